"""The suite tests itself: each saboteur is caught by the clause named for it, and the unbroken backend passes the same tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from saboteurs import SABOTEURS, UnbrokenHarness

# One process runs the whole zoo, so one worker of pytest-xdist must have all of it.
pytestmark = [pytest.mark.thorough, pytest.mark.xdist_group("saboteurs")]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each saboteur's report, by its name."""
    folder = tmp_path_factory.mktemp("zoo")
    report = folder / "report.json"
    harnesses = [f"saboteurs:{name}Harness" for name in [*SABOTEURS, UnbrokenHarness.name]]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "saboteurs",
        "-p",
        "no:cacheprovider",
        "-q",
        "-n",
        "4",
        "--dist",
        "worksteal",
    ]
    command += [
        "-c",
        os.devnull,
        f"--rootdir={folder}",
        "--pyargs",
        "abe_contract_tests.suite",
        f"--contract-report={report}",
    ]
    command += [f"--contract={harness}" for harness in harnesses]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert report.exists(), done.stdout + done.stderr
    return {
        entry["harness"].partition(":")[2].removesuffix("Harness"): entry
        for entry in json.loads(report.read_text())["providers"]
    }


@pytest.mark.parametrize("name", SABOTEURS)
def test_the_saboteur_is_caught_by_its_clause(name: str, verdicts: dict[str, dict[str, Any]]) -> None:
    clause = SABOTEURS[name].clause
    statuses = {entry["id"]: entry for entry in verdicts[name]["clauses"]}
    assert statuses[clause]["status"] == "failed", statuses[clause]
    assert verdicts[name]["verdict"] == "FAIL"


def test_the_unbroken_backend_passes_what_catches_the_saboteurs(verdicts: dict[str, dict[str, Any]]) -> None:
    statuses = {entry["id"]: entry for entry in verdicts[UnbrokenHarness.name]["clauses"]}
    for saboteur in SABOTEURS.values():
        assert statuses[saboteur.clause]["status"] == "passed", statuses[saboteur.clause]
