"""The READMEs' Python is code: it type-checks, and it runs. Links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOUND = 120
"""Seconds; each takes a few."""


def blocks() -> dict[str, str]:
    """Return every Python block of the READMEs, by a name that is also a module's."""
    found = {}
    for path in [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]:
        where = "root" if path.parent == ROOT else path.parent.name.replace("-", "_")
        for number, block in enumerate(
            re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
        ):
            found[f"{where}_{number}"] = block
    return found


BLOCKS = blocks()


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Each runs on memory, whatever broker it is written for: application code is the same on all of them.
    environment = os.environ | {"QUEUE_BACKEND": "memory"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=BOUND, check=False
    )


def test_every_readme_begins_with_code() -> None:
    packages = {path.parent.name.replace("-", "_") for path in ROOT.glob("packages/*/README.md")}
    assert {f"{name}_0" for name in ["root", *packages]} <= set(BLOCKS)


def test_the_blocks_type_check_strictly(tmp_path: Path) -> None:
    for name, block in BLOCKS.items():
        (tmp_path / f"{name}.py").write_text(block)
    files = [f"{name}.py" for name in BLOCKS]
    done = run("-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", *files, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs_as_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "example.py"
    path.write_text(BLOCKS[name])
    done = run("-W", "error", path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    if name.startswith("abe_backend_"):
        assert done.stdout == "shipped 1\n"
    if name == "root_0":
        assert done.stdout == "billing Order(order_id=17, cents=1099)\n"


PAGES = sorted(
    path
    for folder in (".", "docs", "benchmarks", "contract-tests", "examples/*", "packages/*")
    for path in ROOT.glob(f"{folder}/*.md")
)
SHIPPED = [path for path in PAGES if path.parent.parent.name == "packages" or path.parent.name == "contract-tests"]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(page: Path) -> set[str]:
    """Return what a page's headings are called in links, as code hosts call them."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} is not there"
        assert not anchor or anchor in anchors(target), f"{path} has no heading #{anchor}"


@pytest.mark.parametrize("page", SHIPPED, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_package_index_shows_has_no_link_into_the_repository(page: Path) -> None:
    assert [path for path, _ in LINK.findall(page.read_text()) if path] == []


def test_the_index_of_the_documentation_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / path).resolve() for path, _ in LINK.findall(index.read_text())}
    assert {path for path in PAGES if path.parent == index.parent} - linked == {index}
