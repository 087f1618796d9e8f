"""A RabbitMQ node that the provider's tests share."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator

import pytest

from abe_contract_tests.services import ServiceUnavailable, rabbitmq_service
from abe_contract_tests.services._process import ProcessService

PROCESSES = {"ABE_TEST_SERVICES": "processes"}


async def until(condition: Callable[[], object], *, within: float = 20.0) -> None:
    """Wait for what sets no event of ours."""
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture(scope="session")
def node() -> Iterator[ProcessService]:
    """A node that tests share, each with queues of its own. (One xdist group has it: a node takes seconds to start.)"""
    service, _ = rabbitmq_service(environ=PROCESSES)
    assert isinstance(service, ProcessService)
    try:
        service.start()
    except ServiceUnavailable as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))
    yield service
    service.stop()


@pytest.fixture(name="until", scope="session")
def until_fixture() -> Callable[..., Awaitable[None]]:
    return until
