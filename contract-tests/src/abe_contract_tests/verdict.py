"""Judges each provider by the results of its tests: PASS, FAIL or INCOMPLETE.

A clause passes when each of its tests ran and passed. A test that was not executed (deselected, skipped, expected to fail) makes its
clauses, and the verdict, incomplete: it never counts as passed.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from abe_contract_tests.clauses import CLAUSES, CONTRACT_VERSION, Clause
from abe_contract_tests.harness import Harness
from abe_contract_tests.manifest import SuiteTest, is_minimal
from abe_contract_tests.waivers import Waiver

NO_BROKER = "no broker: "
"""The prefix of a skip's reason when the harness could not start."""


class Status(StrEnum):
    """The status of a clause."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"
    UNDECLARED = "refused, as undeclared"
    EXCUSED = "excused by a declared capability"
    WAIVED = "waived"
    LATER = "not covered by this version of the suite"
    NOT_APPLICABLE = "not applicable to a broker in this process"
    NOT_OFFERED = "not offered: the provider has the three methods only"


class Verdict(StrEnum):
    """The overall result of a provider."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCOMPLETE = "INCOMPLETE"


@dataclass(slots=True)
class Result:
    """One run of a test, with one set of parameters."""

    test: str
    harness: str
    clauses: tuple[str, ...]
    outcome: str = "passed"
    """passed, failed, skipped, xfailed or xpassed."""
    detail: str = ""
    seconds: float = 0.0
    probed: list[str] = field(default_factory=list[str])
    """Undeclared capabilities, whose negative probes ran in place of the test."""
    excused: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class ClauseResult:
    """The status of one clause, and the reason."""

    clause: Clause
    status: Status
    detail: str = ""
    results: tuple[Result, ...] = ()
    uncollected: bool = False
    """Whether it was not judged because the run did not collect all of its tests."""


@dataclass(frozen=True, slots=True)
class HarnessVerdict:
    """The verdict on one provider, with the results behind it."""

    harness: str
    backend: str
    evidence: str
    broker: str
    verdict: Verdict
    clauses: tuple[ClauseResult, ...]
    complaints: tuple[str, ...]
    """Problems that fail the run besides the clauses: waivers that expired, or whose clause passes."""
    tolerable: bool
    """For INCOMPLETE: whether every missing test was deselected by the user, or had no broker."""

    def count(self, *statuses: Status) -> int:
        """Return the number of clauses with one of these statuses."""
        return sum(item.status in statuses for item in self.clauses)

    def report(self) -> dict[str, Any]:
        """Return the verdict as plain data, for JSON."""
        return {
            "harness": self.harness,
            "backend": self.backend,
            "evidence": self.evidence,
            "broker": self.broker,
            "verdict": self.verdict.value,
            "complaints": list(self.complaints),
            "clauses": [
                {
                    "id": item.clause.id,
                    "level": item.clause.level,
                    "text": item.clause.text,
                    "status": item.status.value,
                    "detail": item.detail,
                    "tests": [asdict(result) for result in item.results],
                }
                for item in self.clauses
            ],
        }


def contract_report(verdicts: Iterable[HarnessVerdict]) -> dict[str, Any]:
    """Return the verdicts of a run as plain data, for JSON."""
    return {"contract": CONTRACT_VERSION, "providers": [verdict.report() for verdict in verdicts]}


def judge(
    name: str,
    harness: type[Harness],
    tests: Sequence[SuiteTest],
    results: Sequence[Result],
    waivers: Sequence[Waiver] = (),
    *,
    broker: str = "",
    selected: bool = False,
) -> HarnessVerdict:
    """Judge one provider.

    Args:
        name: The name by which the provider was selected.
        harness: Its harness.
        tests: All tests of the suite.
        results: The provider's results.
        waivers: The waivers of the run.
        broker: The broker's version.
        selected: Whether the user selected some of the tests only.
    """
    applicable = [test for test in tests if test.applies_to(harness)]
    found: Mapping[str, list[Result]] = defaultdict(list)
    for result in results:
        found[result.test].append(result)
    waived = {waiver.clause: waiver for waiver in waivers if waiver.harness in (None, name)}
    clauses = tuple(
        _judge_clause(item, harness, [test for test in applicable if item.id in test.clauses], found, waived)
        for item in CLAUSES
    )
    complaints = tuple(complaint for item in clauses if (complaint := _complaint(item, waived.get(item.clause.id))))
    if complaints or any(item.status is Status.FAILED for item in clauses):
        verdict = Verdict.FAIL
    elif any(item.status is Status.NOT_RUN for item in clauses):
        verdict = Verdict.INCOMPLETE
    else:
        verdict = Verdict.PASS
    return HarnessVerdict(
        harness=name,
        backend=f"{harness.backend.__module__}:{harness.backend.__qualname__}",
        evidence=harness.evidence,
        broker=broker,
        verdict=verdict,
        clauses=clauses,
        complaints=complaints,
        tolerable=all(_tolerable(item, applicable, selected=selected) for item in clauses),
    )


def _judge_clause(
    item: Clause,
    harness: type[Harness],
    tests: Sequence[SuiteTest],
    found: Mapping[str, list[Result]],
    waived: Mapping[str, Waiver],
) -> ClauseResult:
    if item.later:
        return ClauseResult(item, Status.LATER)
    if item.networked_only and not harness.networked:
        return ClauseResult(item, Status.NOT_APPLICABLE)
    if not tests:
        return (
            ClauseResult(item, Status.NOT_OFFERED)
            if is_minimal(harness)
            else ClauseResult(item, Status.NOT_RUN, "no test")
        )
    results = tuple(result for test in tests for result in found.get(test.name, ()))
    missing = [test.name for test in tests if not found.get(test.name)]
    status, detail = _status(results, missing)
    if item.id in waived and status in (Status.FAILED, Status.NOT_RUN) and not missing:
        return ClauseResult(item, Status.WAIVED, waived[item.id].reason, results)
    return ClauseResult(item, status, detail, results, uncollected=bool(missing) and status is Status.NOT_RUN)


def _status(results: Sequence[Result], missing: Sequence[str]) -> tuple[Status, str]:
    if failed := [result for result in results if result.outcome == "failed"]:
        return Status.FAILED, _some(result.test for result in failed)
    if missing:
        return Status.NOT_RUN, f"not collected: {_some(missing)}"
    if idle := [result for result in results if result.outcome in ("skipped", "xfailed")]:
        return Status.NOT_RUN, "; ".join(
            dict.fromkeys(f"{result.test} {result.outcome}: {result.detail}" for result in idle)
        )
    if all(result.probed for result in results):
        return Status.UNDECLARED, ", ".join(dict.fromkeys(name for result in results for name in result.probed))
    if all(result.excused for result in results):
        return Status.EXCUSED, ", ".join(dict.fromkeys(name for result in results for name in result.excused))
    return Status.PASSED, ""


def _some(names: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:3]) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")


def _complaint(item: ClauseResult, waiver: Waiver | None) -> str:
    if waiver is None:
        return ""
    if waiver.expired:
        return f"the waiver of {waiver.clause} expired on {waiver.expires}"
    if item.status not in (Status.WAIVED, Status.FAILED, Status.NOT_RUN):
        return f"{waiver.clause} is waived, and holds ({item.status.value}): remove the waiver"
    return ""


def _tolerable(item: ClauseResult, tests: Sequence[SuiteTest], *, selected: bool) -> bool:
    if item.status is not Status.NOT_RUN:
        return True
    wanted = {test.name for test in tests if item.clause.id in test.clauses}
    complete = bool(wanted) and wanted == {result.test for result in item.results}
    idle = [result for result in item.results if result.outcome in ("skipped", "xfailed")]
    return (complete or selected) and all(result.detail.startswith(NO_BROKER) for result in idle)
