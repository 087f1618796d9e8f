"""A node that the tests here hurt, one after the other."""

from collections.abc import Iterator
from typing import Any

import pytest

from abe_contract_tests.services import RabbitMQShell, rabbitmq_service
from abe_contract_tests.services._process import ProcessService

PROCESSES = {"ABE_TEST_SERVICES": "processes"}


@pytest.fixture(scope="package")
def victim() -> Iterator[ProcessService]:
    """A node that the tests here hurt, one after the other."""
    service = rabbitmq_service(environ=PROCESSES)
    assert isinstance(service, ProcessService)
    with service:
        yield service


@pytest.fixture(scope="package")
def shell(victim: ProcessService) -> Iterator[RabbitMQShell]:
    shell = RabbitMQShell(victim)
    yield shell
    shell.stop()


@pytest.fixture(autouse=True)
def nothing_unretrieved(nothing_left: None) -> None:
    """Have every test of faults looked at for what it leaves behind."""


@pytest.fixture
async def lab(victim: ProcessService, lab_at: Any) -> Any:
    return lab_at(victim.url)
