"""Servers for the provider's tests: one of each make that all tests share, and private ones to hurt."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any, cast
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from abe.backends.message_queue.base import Delivery, Envelope
from abe_backend_redis import RedisBackend, RedisSettings
from abe_backend_redis._receiver import RedisReceiver
from abe_backend_redis._topology import Topology
from abe_backend_redis._transport import RedisTransport
from abe_contract_tests import bounds
from abe_contract_tests.services import ServiceUnavailable, TlsFiles, redis_service
from abe_contract_tests.services._process import ProcessService

PROCESSES = {"ABE_TEST_SERVICES": "processes"}


class Lab:
    """A namespace of its own on a server: transports and backends in it, and a look at it with redis-py."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url = url
        self.namespace = f"test-{uuid4().hex[:12]}"
        self.names = Topology(self.namespace)
        self.redis: Any = cast("Any", Redis.from_url(url, single_connection_client=True))
        self._stack = stack
        self._serial = itertools.count()

    def settings(self, **changes: Any) -> RedisSettings:
        defaults: dict[str, Any] = {
            "url": self.url,
            "namespace": self.namespace,
            "lease": 5.0,
            "publish_timeout": 5.0,
        }
        return bounds.stretched(RedisSettings(**defaults | changes))

    async def transport(self, **changes: Any) -> RedisTransport:
        transport = RedisTransport(self.settings(**changes))
        self._stack.push_async_callback(transport.close)  # one that could not be opened is closed too
        await transport.open()
        return transport

    async def receiver(self, transport: RedisTransport, group: str = "g") -> RedisReceiver:
        receiver = await transport.subscribe(group, 1000)
        self._stack.push_async_callback(receiver._link.close)
        return receiver

    async def backend(self, **changes: Any) -> RedisBackend:
        return await self._stack.enter_async_context(RedisBackend(self.settings(**changes)))

    def envelope(
        self, key: str = "k", *, delay: float = 0.0, headers: dict[str, str] | None = None, body: bytes = b"{}"
    ) -> Envelope:
        return Envelope(f"id-{next(self._serial)}", key, body, 1_700_000_000_000, headers, delay)

    def envelopes(self, count: int, key: str = "k", *, delay: float = 0.0) -> list[Envelope]:
        return [self.envelope(key, delay=delay) for _ in range(count)]

    async def pending(self, group: str = "g") -> int:
        return int((await self.redis.xpending(self.names.queue(group), "group"))["pending"])


async def collect(receiver: RedisReceiver, count: int, *, within: float = 5.0) -> list[Delivery]:
    """Receive until there are `count` deliveries, or more."""
    found: list[Delivery] = []
    async with bounds.within(within):
        while len(found) < count:
            found += await receiver.receive(count - len(found))
    return found


async def until(condition: Callable[[], Awaitable[object]], *, within: float = 5.0) -> None:
    """Wait for what only the server can tell."""
    async with bounds.within(within):
        while not await condition():  # noqa: ASYNC110 - another process sets no event of ours
            await asyncio.sleep(0.01)


def started(stack: ExitStack, server: str, **options: Any) -> ProcessService:
    service = redis_service(server=server, environ=PROCESSES, **options)
    assert isinstance(service, ProcessService)
    try:
        return cast("ProcessService", stack.enter_context(service))
    except ServiceUnavailable as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))


@pytest.fixture(
    scope="session",
    params=["system", *(pytest.param(make, marks=pytest.mark.thorough) for make in ("redis8", "valkey"))],
)
def server(request: pytest.FixtureRequest) -> Iterator[ProcessService]:
    """A server that tests share and leave as it was."""
    with ExitStack() as stack:
        yield started(stack, request.param)


@pytest.fixture(scope="session")
def one_server() -> Iterator[ProcessService]:
    """The same, where the make does not matter."""
    with ExitStack() as stack:
        yield started(stack, "system")


@pytest.fixture
def launch() -> Iterator[Callable[..., ProcessService]]:
    """Start servers of the test's own."""
    with ExitStack() as stack:

        def start(
            *arguments: str, server: str = "system", password: str = "", tls: TlsFiles | None = None
        ) -> ProcessService:
            return started(stack, server, arguments=arguments, password=password, tls=tls)

        yield start


@pytest.fixture
async def lab_at() -> AsyncIterator[Callable[[str], Lab]]:
    """Make a namespace on any server."""
    async with AsyncExitStack() as stack:

        def make(url: str) -> Lab:
            lab = Lab(url, stack)
            stack.push_async_callback(lab.redis.aclose)
            return lab

        yield make


@pytest.fixture
async def lab(server: ProcessService, lab_at: Callable[[str], Lab]) -> AsyncIterator[Lab]:
    """A namespace on a shared server; the test runs on each make."""
    lab = lab_at(server.url)
    yield lab
    await _clean(lab)


@pytest.fixture
async def one_lab(one_server: ProcessService, lab_at: Callable[[str], Lab]) -> AsyncIterator[Lab]:
    """The same, where the make does not matter."""
    lab = lab_at(one_server.url)
    yield lab
    await _clean(lab)


async def _clean(lab: Lab) -> None:
    keys: Sequence[bytes] = [key async for key in lab.redis.scan_iter(match=f"{{{lab.namespace}}}:*", count=1000)]
    if keys:
        await lab.redis.unlink(*keys)


@pytest.fixture(name="collect", scope="session")
def collect_fixture() -> Callable[..., Awaitable[list[Delivery]]]:
    return collect


@pytest.fixture(name="until", scope="session")
def until_fixture() -> Callable[..., Awaitable[None]]:
    return until
