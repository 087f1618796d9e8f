"""The READMEs' Python is code: it type-checks, and it runs."""

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
