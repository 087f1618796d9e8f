"""Write docs/contract.md from the list of clauses: ``python scripts/docs/contract_page.py`` (``--print``: only show it)."""

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from abe_contract_tests.clauses import AREAS, CLAUSES, CONTRACT_VERSION, Clause
from abe_contract_tests.manifest import suite_tests

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"


def lines() -> Iterator[str]:
    """Yield the page."""
    yield from (
        "<!-- Made by scripts/docs/contract_page.py from abe_contract_tests/clauses.py: change it there. -->",
        "",
        "# The contract",
        "",
        f"Version {CONTRACT_VERSION}. What an application may rely on, whichever broker is underneath. Every backend keeps every",
        "**MUST** clause; a **CAP** clause is kept by each backend that declares the capability, and a backend that does not declare it",
        "raises `UnsupportedCapabilityError` where it is used. The published suite, `abe-contract-tests`, proves each clause by the tests",
        "that are named with it.",
        "",
    )
    for area, clauses in groupby(CLAUSES, key=lambda item: item.area):
        yield from (f"## {AREAS[area]}", "", "| Clause | Promise | Level | Tests |", "|---|---|---|---|")
        yield from (row(item) for item in clauses)
        yield ""


def row(item: Clause) -> str:
    """Return a clause's line of the table."""
    tests = [test.name.partition("::")[2].removeprefix("test_") for test in suite_tests() if item.id in test.clauses]
    shown = "a later version of the suite" if item.later else "<br>".join(name.replace("_", " ") for name in tests)
    return f"| {item.id} | {item.text} | {level(item)} | {shown} |"


def level(item: Clause) -> str:
    """Return who keeps the clause."""
    words = [item.level]
    if item.capability is not None:
        words.append(f"where `{item.capability}` is declared")
    if item.unless is not None:
        words.append(f"unless `{item.unless}` is declared")
    if item.networked_only:
        words.append("on brokers outside of the process")
    return ", ".join(words) if len(words) > 2 else " ".join(words)


def main() -> None:
    """Write the page, or show it."""
    text = "\n".join(lines()).rstrip() + "\n"
    if "--print" in sys.argv:
        sys.stdout.write(text)
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
