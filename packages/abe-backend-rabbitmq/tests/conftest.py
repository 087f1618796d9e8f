"""A RabbitMQ node that the provider's tests share, and namespaces on it."""

import asyncio
import gc
import io
import itertools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import aio_pika
import pytest
from rabbitmq_access import SECRET

from abe.backends.message_queue.base import Delivery, Envelope
from abe_backend_rabbitmq import RabbitMQBackend, RabbitMQSettings
from abe_backend_rabbitmq._receiver import RabbitMQReceiver
from abe_backend_rabbitmq._topology import Topology
from abe_backend_rabbitmq._transport import RabbitMQTransport
from abe_contract_tests import bounds
from abe_contract_tests.services import RabbitMQShell, Service, ServiceUnavailable, rabbitmq_service
from abe_contract_tests.services._process import ProcessService

PROCESSES = {"ABE_TEST_SERVICES": "processes"}


class Lab:
    """A namespace of its own on a node: transports and backends in it, and a look at it with aio-pika."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url = url
        self.namespace = f"test-{uuid4().hex[:12]}"
        self.names = Topology(self.namespace)
        self.groups: set[str] = set()
        self._stack = stack
        self._serial = itertools.count()
        self._pika: Any = None

    def settings(self, **changes: Any) -> RabbitMQSettings:
        defaults: dict[str, Any] = {"url": self.url, "namespace": self.namespace, "publish_timeout": 5.0}
        return bounds.stretched(RabbitMQSettings(**defaults | changes))

    async def transport(self, **changes: Any) -> RabbitMQTransport:
        transport = RabbitMQTransport(self.settings(**changes))
        self._stack.push_async_callback(transport.close)  # one that could not be opened is closed too
        await transport.open()
        return transport

    async def receiver(self, transport: RabbitMQTransport, group: str = "g", prefetch: int = 1000) -> RabbitMQReceiver:
        receiver = await transport.subscribe(group, prefetch)
        self._stack.push_async_callback(receiver.close)
        return receiver

    async def backend(self, **changes: Any) -> RabbitMQBackend:
        return await self._stack.enter_async_context(RabbitMQBackend(self.settings(**changes)))

    def at_the_end(self, act: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        """Do that when what is opened from now on is closed."""
        self._stack.push_async_callback(act, *arguments)

    def envelope(
        self, key: str = "k", *, delay: float = 0.0, headers: dict[str, str] | None = None, body: bytes = b"{}"
    ) -> Envelope:
        return Envelope(f"id-{next(self._serial)}", key, body, 1_700_000_000_000, headers, delay)

    def envelopes(self, count: int, key: str = "k", *, delay: float = 0.0) -> list[Envelope]:
        return [self.envelope(key, delay=delay) for _ in range(count)]

    async def pika(self) -> Any:
        """Return a channel of a plain client."""
        if self._pika is None:
            connection = await aio_pika.connect(self.url)
            self._stack.push_async_callback(connection.close)
            self._pika = await connection.channel()
        return self._pika

    async def waiting(self, queue: str) -> int:
        """Count what a queue has that nobody holds."""
        declared = await (await self.pika()).declare_queue(queue, passive=True)
        return int(declared.declaration_result.message_count)

    async def put(self, queue: str, body: bytes, **properties: Any) -> None:
        """Put a stranger's message into a queue."""
        await (await self.pika()).default_exchange.publish(aio_pika.Message(body, **properties), queue)

    async def clean(self) -> None:
        self._pika = None  # that one is closed
        transport = await self.transport()
        await transport.delete_namespace()


async def collect(receiver: RabbitMQReceiver, count: int, *, within: float = 10.0) -> list[Delivery]:
    """Receive until there are `count` deliveries, or more."""
    found: list[Delivery] = []
    async with bounds.within(within):
        while len(found) < count:
            found += await receiver.receive(count - len(found))
    return found


async def until(condition: Callable[[], object], *, within: float = 20.0) -> None:
    """Wait for what sets no event of ours."""
    async with bounds.within(within):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture(scope="session")
def node() -> Iterator[ProcessService]:
    """A node that tests share, each with queues of its own. (One xdist group has it: a node takes seconds to start.)"""
    service = rabbitmq_service(environ=PROCESSES)
    assert isinstance(service, ProcessService)
    try:
        service.start()
    except ServiceUnavailable as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))
    yield service
    service.stop()


@pytest.fixture
async def lab_at() -> AsyncIterator[Callable[..., Lab]]:
    """Make a namespace on any node. Nobody cleans it up."""
    async with AsyncExitStack() as stack:
        yield lambda url: Lab(url, stack)


@pytest.fixture
async def lab(node: ProcessService) -> AsyncIterator[Lab]:
    """A namespace on the shared node."""
    async with AsyncExitStack() as stack:
        lab = Lab(node.url, stack)
        stack.push_async_callback(lab.clean)
        yield lab


@pytest.fixture(name="collect", scope="session")
def collect_fixture() -> Callable[..., Awaitable[list[Delivery]]]:
    return collect


@pytest.fixture(name="until", scope="session")
def until_fixture() -> Callable[..., Awaitable[None]]:
    return until


@pytest.fixture
async def nothing_left() -> AsyncIterator[None]:
    """Fail on tasks that are left behind, and on what only the event loop would complain of."""
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
def log() -> Iterator[io.StringIO]:
    """Everything that is logged, with its tracebacks, as a file would have it."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="module")
def shell(node: Service) -> Iterator[RabbitMQShell]:
    shell = RabbitMQShell(node)
    yield shell
    shell.stop()


@pytest.fixture
async def user(shell: RabbitMQShell, lab: Any) -> Callable[..., Awaitable[str]]:
    """Give the test's user rights, and return its address. ``NS`` stands for what the namespace's names begin with."""
    name = f"app-{lab.namespace}"

    async def grant(configure: str = ".*", write: str = ".*", read: str = ".*") -> str:
        rights = [right.replace("NS", f"abe:{lab.namespace}") for right in (configure, write, read)]
        await shell.add_user(name, SECRET, configure=rights[0], write=rights[1], read=rights[2])
        return f"amqp://{name}:{SECRET}@{lab.url.rpartition('@')[2]}"

    # After what was opened since is closed: the node ends the connections of a user that it deletes.
    lab.at_the_end(shell.delete_user, name)
    return grant
