"""Keeps the timeline and the brokers' logs of each failing test.

The report of a failing test ends with a section for each. With ``--contract-keep`` they are kept in full in the run's folder, together
with ``timeline-WORKER.jsonl``, which has a line for every test: its start, duration, processor time, and the machine's `slowness`.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO, cast

import pytest

from abe_contract_tests import timeline
from abe_contract_tests.bounds import slowness
from abe_contract_tests.services import Service, running_services

_RUNS: Final = 10
"""The number of runs whose folders are kept, the newest."""
_RUN: Final = re.compile(r"\d{8}-\d{6}-\d+")
_SHOWN: Final = 80
"""The number of lines in a section of the report, the last ones."""
_LONGEST_NAME: Final = 150
_FOLDER: Final = "contract_keep"
_FORMAT: Final = logging.Formatter("%(name)s %(levelname)s %(message)s")


class Keeper:
    """One process's part. Under pytest-xdist the controller makes the folder, and its workers write into it."""

    def __init__(self, config: pytest.Config) -> None:
        self._folder = _folder(config)
        self._worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        self._lines: TextIO | None = None
        self._logs: dict[Service, int] = {}
        self._began = 0.0

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Send the folder to a worker of pytest-xdist."""
        if self._folder is not None:
            node.workerinput[_FOLDER] = str(self._folder)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Record a test's timeline, and write its line."""
        timeline.begin()
        self._logs = {service: service.log_size() for service in running_services()}
        self._began, began, used = time.time(), time.monotonic(), time.process_time()
        with _noting_logs():
            try:
                return (yield)
            finally:
                line = {
                    "test": item.nodeid,
                    "began": round(self._began, 3),
                    "seconds": round(time.monotonic() - began, 3),
                    "processor": round(time.process_time() - used, 3),
                    "slowness": round(slowness(began), 2),
                }
                self._write(line)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add the sections, and keep them."""
        report = yield
        if report.failed:
            sections = self._sections()
            for name, text in sections.items():
                lines = text.splitlines()
                left = [f"({len(lines) - _SHOWN} lines before)"] if len(lines) > _SHOWN else []
                report.sections.append((name, "\n".join([*left, *lines[-_SHOWN:]])))
            if self._folder is not None:
                kept = self._keep(item, report, sections)
                report.sections.append(("kept", str(kept)))
        return report

    def pytest_unconfigure(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _sections(self) -> Mapping[str, str]:
        found = {"timeline": "\n".join(f"{at - self._began:9.3f}  {text}" for at, text in timeline.entries())}
        for service in running_services():
            log = service.log_since(self._logs.get(service, 0))
            name = f"log of {service.version}"
            while name in found:
                name += ", another"
            found[name] = log or "(nothing)"
        return found

    def _keep(self, item: pytest.Item, report: pytest.TestReport, sections: Mapping[str, str]) -> Path:
        assert self._folder is not None
        folder = self._folder / _file_name(f"{item.path.name}_{item.nodeid.partition('::')[2]}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{report.when}.txt").write_text(f"{item.nodeid}\n{report.longreprtext}\n")
        for name, text in sections.items():
            (folder / f"{_file_name(name)}.txt").write_text(text)
        return folder

    def _write(self, line: Mapping[str, object]) -> None:
        if self._folder is None:
            return
        if self._lines is None:
            self._lines = (self._folder / f"timeline-{self._worker}.jsonl").open("a", buffering=1)
        self._lines.write(json.dumps(line) + "\n")


def _folder(config: pytest.Config) -> Path | None:
    """Create and return this run's folder; None if nothing is kept in files."""
    if (inputs := cast("dict[str, Any] | None", getattr(config, "workerinput", None))) is not None:
        return Path(inputs[_FOLDER]) if _FOLDER in inputs else None
    chosen = config.getoption("--contract-keep") or config.getini(_FOLDER)
    if not chosen or config.option.collectonly:
        return None
    runs = config.invocation_params.dir / chosen if config.getoption("--contract-keep") else config.rootpath / chosen
    folder: Path = runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    folder.mkdir(parents=True)
    for old in sorted(path for path in runs.iterdir() if _RUN.fullmatch(path.name))[:-_RUNS]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)[:_LONGEST_NAME]


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("abe"):
            timeline.note(_FORMAT.format(record))


@contextmanager
def _noting_logs() -> Generator[None]:
    """Add the library's log records to the timeline, at the levels that the test sets."""
    handler = _Notes()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
