"""Runs of pytest in a process of their own, as a third party starts them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """What a run of pytest came to."""

    status: int
    output: str
    errors: str
    providers: dict[str, dict[str, Any]]

    def clause(self, harness: str, id: str) -> dict[str, Any]:
        """Return one clause's result."""
        return next(entry for entry in self.providers[harness]["clauses"] if entry["id"] == id)


class Runner:
    """Runs pytest in a folder of its own, as a third party would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str) -> str:
        """Write a file, and return its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def __call__(self, *arguments: str, target: str = "--pyargs abe_contract_tests.suite", **environment: str) -> Run:
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--rootdir={self.folder}"]
        command += ["-c", os.devnull, *target.split(), f"--contract-report={report}", *arguments]
        path = os.pathsep.join([str(self.folder), str(Path(__file__).parent)])
        values = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_XDIST_WORKER")}
        values |= {"PYTHONPATH": path, **environment}
        done = subprocess.run(
            command, cwd=self.folder, env=values, capture_output=True, text=True, timeout=600, check=False
        )
        providers = json.loads(report.read_text())["providers"] if report.exists() else []
        return Run(done.returncode, done.stdout, done.stderr, {entry["harness"]: entry for entry in providers})
