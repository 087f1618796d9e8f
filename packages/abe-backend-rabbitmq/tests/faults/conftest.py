"""A node that the tests here hurt, one after the other."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from abe_contract_tests import bounds
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
async def nothing_unretrieved() -> AsyncIterator[None]:
    """Fail on what only the event loop would complain of: exceptions that nobody looked at, tasks left pending."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
    yield
    gc.collect()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=5 * bounds.slowness())
    assert [task for task in left if not task.done()] == []
    assert complaints == []


@pytest.fixture
async def lab(victim: ProcessService, lab_at: Any) -> Any:
    return lab_at(victim.url)
