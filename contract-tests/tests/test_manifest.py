"""Clauses, tests, saboteurs and the documentation's page say the same."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from abe_contract_tests.clauses import AREAS, BY_ID, CLAUSES
from abe_contract_tests.harness import Harness
from abe_contract_tests.manifest import suite_tests
from abe_contract_tests.marks import clause
from abe_contract_tests.probes import PROBES
from abe_contract_tests.services import Broker

sys.path.insert(0, str(Path(__file__).parent))
from saboteurs import SABOTEURS

from abe.backends.message_queue.base import Capabilities

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("item", [item for item in CLAUSES if not item.later], ids=lambda item: item.id)
def test_every_clause_has_a_test(item: object) -> None:
    assert [test.name for test in suite_tests() if item.id in test.clauses]  # type: ignore[attr-defined]


def test_clauses_of_a_later_version_have_no_test_yet() -> None:
    assert not [test.name for test in suite_tests() if any(BY_ID[id].later for id in test.clauses)]


def test_every_test_of_the_suite_names_its_clauses() -> None:
    from importlib import import_module

    for module in {test.name.partition("::")[0] for test in suite_tests()}:
        functions = vars(import_module(f"abe_contract_tests.suite.{module}"))
        names = {name for name in functions if name.startswith("test_")}
        assert names == {test.name.partition("::")[2] for test in suite_tests() if test.name.startswith(f"{module}::")}


def test_tests_have_names_of_their_own() -> None:
    names = [test.name for test in suite_tests()]
    assert len(names) == len(set(names))


def test_ids_are_unique_and_their_areas_known() -> None:
    assert len(BY_ID) == len(CLAUSES)
    assert {item.area for item in CLAUSES} == set(AREAS)


def test_every_capability_has_a_probe() -> None:
    assert set(PROBES) == set(Capabilities.__dataclass_fields__)


def test_every_cap_clause_names_a_capability() -> None:
    assert all(item.capability in Capabilities.__dataclass_fields__ for item in CLAUSES if item.level == "CAP")


def test_every_saboteur_names_a_clause_that_has_tests() -> None:
    assert all(not BY_ID[saboteur.clause].later for saboteur in SABOTEURS.values())


def test_a_mark_for_an_unknown_clause_or_capability_is_refused() -> None:
    with pytest.raises(ValueError, match="C-XXX-01"):
        clause("C-XXX-01")
    with pytest.raises(ValueError, match="telepathy"):
        clause("C-PUB-01", capability="telepathy")
    with pytest.raises(ValueError, match="name its clauses"):
        clause()


def test_the_documented_contract_is_up_to_date() -> None:
    script = ROOT / "scripts" / "docs" / "contract_page.py"
    page = subprocess.run([sys.executable, str(script), "--print"], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "contract.md").read_text() == page, f"run {script.relative_to(ROOT)}"


def test_help_and_readme_tell_every_attribute_of_a_harness() -> None:
    told = Harness.__doc__ or ""
    readme = (ROOT / "contract-tests" / "README.md").read_text()
    names = [name for name in Harness.__annotations__ if not name.startswith("_")]
    assert [name for name in names if f"\n        {name}: " not in told] == []
    assert [name for name in names if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("kind", [Harness, Broker])
def test_the_readme_tells_every_member_of_what_an_author_writes(kind: type) -> None:
    readme = (ROOT / "contract-tests" / "README.md").read_text()
    names = {name for name in {**vars(kind), **kind.__annotations__} if not name.startswith("_")}
    assert [name for name in sorted(names) if not re.search(rf"^\| .*`{name}[(`].*\|", readme, re.MULTILINE)] == []
