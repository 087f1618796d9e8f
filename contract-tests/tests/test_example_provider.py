"""A provider that the project did not write proves itself as a third party would."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HANGS = 900
"""Seconds after which it hangs: on a busy machine it takes minutes."""
EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_provider"

pytestmark = [pytest.mark.xdist_group("example-provider"), pytest.mark.thorough]


def test_the_example_provider_passes_the_contract(tmp_path: Path) -> None:
    site, report = tmp_path / "site", tmp_path / "report.json"
    _install(site)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n", "4", "--dist", "worksteal"]
    command += ["-c", os.devnull, f"--rootdir={tmp_path}", "--pyargs", "abe_contract_tests.suite"]
    command += ["--contract", "sqlite", "--contract-strict", f"--contract-report={report}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLE / "src"), str(site)])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert report.exists(), done.stdout + done.stderr
    (verdict,) = json.loads(report.read_text())["providers"]
    failed = {entry["id"]: entry["detail"] for entry in verdict["clauses"] if entry["status"] in ("failed", "not run")}
    assert not failed, done.stdout
    assert (verdict["verdict"], verdict["harness"], verdict["evidence"]) == ("PASS", "sqlite", "real broker")
    assert done.returncode == 0, done.stdout


def _install(site: Path) -> None:
    """Write the metadata that an installation would, so that the entry points are found."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    folder = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in targets.items())])
        for group, targets in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
