"""The pytest plugin: chooses what is tested, gives each test its `Contract`, and ends with the verdict."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import pytest_asyncio

from abe_contract_tests.contract import Contract
from abe_contract_tests.harness import Harness
from abe_contract_tests.selection import load_harness, selected_harnesses

pytest.register_assert_rewrite("abe_contract_tests.suite", "abe_contract_tests.accounting", "abe_contract_tests.probes")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("abe-contract", "the contract of Abstract Backend")
    group.addoption(
        "--contract",
        action="append",
        metavar="NAME",
        help="Test this provider: a registered harness's name, or module:Class. May be given repeatedly.",
    )
    parser.addini("contract_harnesses", "What --contract is when it is not given.", type="args", default=[])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contract_clause(*ids): the clauses of the contract that the test proves.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contract_harness" in metafunc.fixturenames:
        names = selected_harnesses(metafunc.config)
        if not names:
            raise pytest.Collector.CollectError("say what to test: --contract NAME, or the ini option contract_harnesses")
        metafunc.parametrize("contract_harness", names, ids=[name.rpartition(":")[2] for name in names], indirect=True, scope="session")


@pytest.fixture(scope="session")
def contract_harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """The provider's harness, its broker started."""
    harness = load_harness(request.param)()
    harness.start()
    try:
        yield harness
    finally:
        harness.stop()


@pytest_asyncio.fixture
async def contract(contract_harness: Harness, request: pytest.FixtureRequest) -> AsyncIterator[Contract]:
    """The provider under test, in a namespace of this test's own."""
    held = Contract(contract_harness)
    with held.capturing():
        try:
            yield held
        finally:
            await held.aclose()
