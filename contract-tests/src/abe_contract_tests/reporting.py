"""Gathers the results of a session, writes the verdicts at its end, and sets its exit status."""

import json
import os
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import pytest

import abe_contract_tests
from abe_contract_tests.clauses import AREAS
from abe_contract_tests.manifest import SUITE, suite_tests
from abe_contract_tests.selection import load_harness, selected_harnesses
from abe_contract_tests.verdict import HarnessVerdict, Result, Status, Verdict, contract_report, judge
from abe_contract_tests.waivers import Waiver

RESULT: Final = "abe_contract"
"""The user property of a test's report with the facts about it."""

_UNREMARKABLE: Final = (Status.PASSED, Status.LATER, Status.NOT_APPLICABLE)
"""Statuses that are listed only in full reports."""
_SELECTING: Final = ("keyword", "markexpr", "deselect", "lf", "stepwise", "maxfail")


class Ledger:
    """The results of the session's tests. It is in the process that receives all of their reports."""

    def __init__(self, config: pytest.Config, waivers: tuple[Waiver, ...]) -> None:
        self._config = config
        self._waivers = waivers
        self._results: dict[str, Result] = {}
        self._brokers: dict[str, str] = {}
        self._verdicts: list[HarnessVerdict] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome of a test's setup, call or teardown."""
        facts: dict[str, Any] | None = next((value for name, value in report.user_properties if name == RESULT), None)  # type: ignore[assignment]
        if facts is None:
            return
        result = self._results.setdefault(
            report.nodeid, Result(test=facts["test"], harness=facts["harness"], clauses=tuple(facts["clauses"]))
        )
        result.seconds += report.duration
        result.probed = facts.get("probed", result.probed)
        result.excused = facts.get("excused", result.excused)
        if "broker" in facts:
            self._brokers[result.harness] = facts["broker"]
        outcome = _outcome(report)
        if outcome != "passed" and result.outcome != "failed":
            result.outcome, result.detail = outcome, _detail(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Judge the providers, and fail the session if a verdict does."""
        if self._config.option.collectonly or not self._results:
            return
        try:
            tests = suite_tests()
        except ImportError:
            return  # pytest has reported it as a collection error; without all tests no clause can be judged
        selected = self._selected()
        for name in selected_harnesses(self._config):
            results = [result for result in self._results.values() if result.harness == name]
            broker = self._brokers.get(name, "none")
            self._verdicts.append(
                judge(name, load_harness(name), tests, results, self._waivers, broker=broker, selected=selected)
            )
        if (path := self._config.getoption("--contract-report")) is not None:
            Path(path).write_text(json.dumps(contract_report(self._verdicts), indent=1) + "\n")
        strict = self._config.getoption("--contract-strict") or bool(os.environ.get("CI"))
        if exitstatus == pytest.ExitCode.OK and any(_fails(verdict, strict=strict) for verdict in self._verdicts):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Write the verdicts above pytest's last line."""
        verbose = self._config.option.verbose > 0
        full = verbose or bool(self._config.getoption("--contract"))
        brief = self._selected() and not verbose
        for verdict in self._verdicts:
            _write(terminalreporter, verdict, full=full, brief=brief)

    def _selected(self) -> bool:
        """Whether the user asked for some of the suite's tests only."""
        config = self._config
        if any(getattr(config.option, name, None) for name in _SELECTING):
            return True
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            return False
        wholes = (SUITE, *SUITE.parents)
        names = (f"{abe_contract_tests.__name__}.suite", abe_contract_tests.__name__)
        return not any(arg in names or (config.invocation_params.dir / arg).resolve() in wholes for arg in config.args)


def _fails(verdict: HarnessVerdict, *, strict: bool) -> bool:
    if verdict.verdict is Verdict.INCOMPLETE:
        return strict or not verdict.tolerable
    return verdict.verdict is Verdict.FAIL


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    return report.outcome


def _detail(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail)
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else str(crash.message)
    return text.partition("\n")[0]


def _write(out: pytest.TerminalReporter, verdict: HarnessVerdict, *, full: bool, brief: bool) -> None:
    colour = {"green": verdict.verdict is Verdict.PASS, "red": verdict.verdict is Verdict.FAIL}
    colour["yellow"] = verdict.verdict is Verdict.INCOMPLETE
    out.write_sep("=", f"contract: {verdict.harness}")
    out.write_line(f"{verdict.backend} on {verdict.broker} ({verdict.evidence})")
    left_out = [item for item in verdict.clauses if brief and item.uncollected]
    shown = [item for item in verdict.clauses if item not in left_out and (full or item.status not in _UNREMARKABLE)]
    for area, items in groupby(shown, lambda item: item.clause.area):
        if full:
            out.write_line(AREAS[area])
        for item in items:
            tests = f"{len(item.results)} tests" if item.results else ""
            detail = f": {item.detail}" if item.detail else ""
            out.write_line(f"  {item.clause.id}  {item.clause.level:<4}  {tests:>9}  {item.status.value}{detail}")
    if left_out:
        out.write_line(f"  {len(left_out)} clauses were not run: some of their tests are not selected (-v lists them)")
    for complaint in verdict.complaints:
        out.write_line(f"  {complaint}", red=True)
    counts = ", ".join(f"{verdict.count(status)} {status.value}" for status in Status if verdict.count(status))
    out.write_line(f"{verdict.harness}: {verdict.verdict.value} ({counts})", bold=True, **colour)
