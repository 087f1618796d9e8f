"""The pytest plugin: selects the providers, gives each test its `Contract`, and reports the verdict."""

import os
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final, cast

import pytest
import pytest_asyncio

# Before they are imported, and those below import some of them.
pytest.register_assert_rewrite("abe_contract_tests.suite", "abe_contract_tests.accounting", "abe_contract_tests.probes")

from abe_contract_tests.blocking import explain, policed
from abe_contract_tests.bounds import forget, slowness
from abe_contract_tests.contract import Contract
from abe_contract_tests.harness import Harness
from abe_contract_tests.keeping import Keeper
from abe_contract_tests.loops import LOOP_VARIABLE, LOOPS, LoopFactory, chosen_loop, new_event_loop
from abe_contract_tests.manifest import is_of_the_suite, suite_test
from abe_contract_tests.marks import MARK
from abe_contract_tests.reporting import RESULT, Ledger
from abe_contract_tests.selection import harness_label, load_harness, selected_harnesses
from abe_contract_tests.services import ServiceUnavailable
from abe_contract_tests.stalls import watching
from abe_contract_tests.verdict import NO_BROKER, Result
from abe_contract_tests.waivers import Waiver, read_waivers

_STALL: Final = 20.0
"""Seconds for which an event loop may be blocked before its test is ended."""

_waivers: Final = pytest.StashKey[tuple[Waiver, ...]]()
_result: Final = pytest.StashKey[Result]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("abe-contract", "the contract of Abstract Backend")
    group.addoption(
        "--contract",
        action="append",
        metavar="NAME",
        help="Test this provider: the name of a registered harness, or module:Class. May be given repeatedly.",
    )
    group.addoption(
        "--contract-strict",
        action="store_true",
        help="Fail the run on any INCOMPLETE verdict, as it does where the variable CI is set.",
    )
    group.addoption(
        "--contract-waivers",
        metavar="FILE",
        help="Clauses that may fail until a date: a TOML file of [[waiver]] tables.",
    )
    group.addoption(
        "--contract-loop",
        choices=LOOPS,
        help=f"Run the tests, their workers and their programs on this event loop; by default that of {LOOP_VARIABLE}, else asyncio's.",
    )
    group.addoption("--contract-report", metavar="FILE", help="Write the results as JSON.")
    group.addoption(
        "--contract-keep",
        metavar="DIR",
        help="Keep the timeline, the brokers' logs and the concurrent tests of each failing test in this folder.",
    )
    parser.addini(
        "contract_keep",
        "The default of --contract-keep; a relative path is relative to the root.",
        default="",
    )
    parser.addini("contract_harnesses", "The default of --contract.", type="args", default=[])


@pytest.hookimpl(tryfirst=True)  # before pytest-asyncio's
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--contract"):
        # Every fixture of the suite has an explicit scope, so the default scope does not matter.
        warnings.filterwarnings("ignore", message=".*asyncio_default_fixture_loop_scope", category=DeprecationWarning)
    config.addinivalue_line("markers", f"{MARK}(*ids): the clauses of the contract that the test proves.")
    config.stash[_waivers] = read_waivers(config.getoption("--contract-waivers"))
    for name in config.getoption("--contract") or ():
        load_harness(name)
    _choose_loop(config)
    config.pluginmanager.register(Keeper(config), "abe-contract-keeper")
    slowness()  # starts to sample the machine's load
    if not hasattr(config, "workerinput"):
        # Under pytest-xdist the workers run the tests, and only the controller sees all of their results.
        config.pluginmanager.register(Ledger(config, config.stash[_waivers]), "abe-contract-ledger")


def _choose_loop(config: pytest.Config) -> None:
    if (name := config.getoption("--contract-loop")) is not None:
        os.environ[LOOP_VARIABLE] = name
    try:
        if chosen_loop() == LOOPS[0]:
            return
        new_event_loop().close()
    except (ValueError, ImportError) as exc:
        raise pytest.UsageError(str(exc)) from exc
    # A plugin with this hook must answer for every test, so it is registered only if another loop was chosen.
    config.pluginmanager.register(_Loops(), "abe-contract-loops")


class _Loops:
    def pytest_asyncio_loop_factories(self) -> Mapping[str, LoopFactory]:
        return {chosen_loop(): new_event_loop}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contract_harness" not in metafunc.fixturenames:
        return
    names = selected_harnesses(metafunc.config)
    if not names:
        raise pytest.Collector.CollectError("say what to test: --contract NAME, or the ini option contract_harnesses")
    labels = [harness_label(name) for name in names]
    metafunc.parametrize("contract_harness", names, ids=labels, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept: list[pytest.Item] = []
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and item.get_closest_marker(MARK) is not None
            and hasattr(item, "callspec")
        ):
            name = cast("str", item.callspec.params["contract_harness"])
            if not _prepare(item, name, config.stash[_waivers]):
                continue
        kept.append(item)
    items[:] = kept


def _prepare(item: pytest.Function, name: str, waivers: tuple[Waiver, ...]) -> bool:
    """Attach the item's result and waivers; return whether it applies to that provider."""
    test = suite_test(cast("Any", item).function, item.path.stem)
    assert test is not None
    if not test.applies_to(load_harness(name)):
        return False
    item.stash[_result] = Result(test=test.name, harness=name, clauses=test.clauses)
    for waiver in waivers:
        if waiver.clause in test.clauses and waiver.harness in (None, name) and not waiver.expired:
            item.add_marker(pytest.mark.xfail(reason=f"waived: {waiver.reason}", strict=False))
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    forget()
    if isinstance(item, pytest.Function) and item.get_closest_marker(MARK) is not None and (reason := _tampered(item)):
        pytest.fail(reason, pytrace=False)


def _tampered(item: pytest.Function) -> str:
    if not is_of_the_suite(cast("Any", item).function):
        return "a clause test was redefined: only the suite's own tests prove clauses"
    for name in ("contract", "contract_harness"):
        fixtures = item._fixtureinfo.name2fixturedefs.get(name, ())  # pyright: ignore[reportPrivateUsage]
        if any(fixture.func.__module__ != __name__ for fixture in fixtures):
            return f"the fixture {name!r} was overridden: clauses are proved with the suite's own"
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    contract = cast("Contract | None", getattr(item, "funcargs", {}).get("contract"))
    if contract is not None and call.excinfo is not None:
        explain(call.excinfo.value, contract.harness)
    report = cast("pytest.TestReport", (yield))
    if (result := item.stash.get(_result, None)) is not None:
        # pytest-xdist sends the user properties, plain data, from a worker to the controller.
        facts = {"test": result.test, "harness": result.harness, "clauses": list(result.clauses)}
        if contract is not None:
            facts |= {"probed": contract.probed, "excused": contract.excused, "broker": contract.broker}
        report.user_properties.append((RESULT, facts))
    return report  # type: ignore[return-value]  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="session")
def contract_harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """The provider's harness, with its broker started. Without a broker its tests are skipped; where the variable CI is set, they fail."""
    harness = load_harness(request.param)()
    try:
        harness.start()
    except ServiceUnavailable as exc:
        if os.environ.get("CI"):
            pytest.fail(f"{NO_BROKER}{exc}", pytrace=False)
        pytest.skip(f"{NO_BROKER}{exc}")
    try:
        yield harness
    finally:
        harness.stop()


@pytest_asyncio.fixture(loop_scope="function")
async def contract(contract_harness: Harness, request: pytest.FixtureRequest) -> AsyncIterator[Contract]:
    """The provider under test, in a namespace for this test."""
    made = Contract(contract_harness)
    # A debugger blocks the loop on purpose.
    stall = None if request.config.option.usepdb else _STALL
    with made.capturing(), watching(stall), policed(contract_harness):
        try:
            yield made
        finally:
            await made.aclose()
