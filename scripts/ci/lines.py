"""Fails where a module is longer than 400 lines: ``python scripts/ci/lines.py [folder]``. The exceptions are in pyproject.toml."""

import sys
import tomllib
from pathlib import Path

LONGEST = 400
PARTS = ("packages", "contract-tests", "examples", "benchmarks", "scripts", "simulation")


def main(root: Path) -> int:
    """Print what is too long, and return whether anything is."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    allowed = set(project.get("tool", {}).get("abstract-backend", {}).get("long-modules", []))
    modules = [path for part in PARTS for path in sorted((root / part).rglob("*.py"))]
    lines = {path.relative_to(root).as_posix(): len(path.read_text().splitlines()) for path in modules}
    too_long = {name for name, count in lines.items() if count > LONGEST}
    for name in sorted(too_long - allowed):
        print(f"{name}: {lines[name]} lines, {LONGEST} are the most", file=sys.stderr)
    for name in sorted(allowed - too_long):
        print(f"lines: {name} needs its exception no more")
    if too_long <= allowed:
        print("lines: no findings")
    return int(not too_long <= allowed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[2]))
