"""The registry: the groups of a namespace and their patterns, and the lock under which they change.

AMQP cannot list queues or bindings, so the registry is a message: the only one in its queue, replaced under a lock. Reading needs no lock:
a reader takes the message and returns it at once, and one that finds the queue empty retries.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from aiormq.abc import AbstractChannel
from pamqp import commands

from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.routing import matches_any
from abe.backends.message_queue.base.tasks import Background, ignore_failure, result_of
from abe.errors import BackendConnectionError, ConfigurationError
from abe_backend_rabbitmq._connection import Connection
from abe_backend_rabbitmq._control import PINNED, Control, Lock
from abe_backend_rabbitmq._topology import Topology

_log: Final = Log("abe.rabbitmq")

_PROPERTIES: Final = commands.Basic.Properties(content_type="application/json", delivery_mode=2)
_CLOSE_TIMEOUT: Final = 1.0
"""Seconds that closing waits for cancelled tasks."""

_POLL: Final = 0.005
_LONGEST_POLL: Final = 0.05
"""Seconds, at most, after which a reader retries while another one has the message."""
_READERS: Final = 100
"""Times that an existing queue must look empty before it counts as empty."""
_TOO_OFTEN: Final = 1_000
"""Deliveries of the registry's message after which it is replaced: a quorum queue keeps its log from its oldest message on."""

_T = TypeVar("_T")


class Entry(msgspec.Struct):
    """A group's entry."""

    patterns: list[str]
    bound: list[str]
    """Patterns that may be bound: `patterns`, and the former ones until the change is complete."""
    changing: bool = False
    levels: int = 0
    """How many levels of delay have a queue."""
    made: int = 0
    """The version in which its queue was declared."""


class Registry(msgspec.Struct):
    """The groups of a namespace."""

    serial: int = 0
    """Grows with each writing."""
    version: int = 0
    """Grows with each change. Delayed messages name it; the broker accepts those of the newest only."""
    groups: dict[str, Entry] = msgspec.field(default_factory=dict[str, Entry])
    stale: list[int] = msgspec.field(default_factory=list[int])
    """Versions that may still be bound."""

    def wanting(self, key: str) -> tuple[str, ...]:
        """Return the groups that want a key."""
        return tuple(group for group, entry in self.groups.items() if matches_any(entry.patterns, key))


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Registry).decode


class _Taken(NamedTuple):
    """The registry's messages, taken from their queue. After a crash during `write` there are two; the newer one counts."""

    newest: Registry | None
    tag: int
    """The last message's delivery tag; 0: there was none."""
    deliveries: int
    messages: int


class RegistryKeeper:
    """Reads and writes the registry.

    Args:
        control: Carries the requests.
        topology: The names.
        timeout: Seconds to wait for the lock, and for the message.
        writable: Raises an error if the broker takes no messages: a write would keep the registry from all readers while it waits.
    """

    def __init__(
        self, control: Control, topology: Topology, timeout: float, writable: Callable[[], Awaitable[object]]
    ) -> None:
        self._control = control
        self._names = topology
        self._timeout = timeout
        self._writable = writable
        self._lock = Lock(control, topology.lock, timeout)
        self._ours = asyncio.Lock()
        self._holders: Counter[Connection] = Counter()
        self._tasks = Background()

    async def close(self) -> None:
        """Cancel the tasks in progress. A request to a silent broker ends with its connection."""
        await self._tasks.cancel(_CLOSE_TIMEOUT)

    async def exclusively(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do something under the namespace's lock, to completion even if the caller is cancelled.

        Raises:
            BackendConnectionError: The keeper was closed meanwhile; or see `locked`.
        """

        async def run() -> _T:
            async with self.locked():
                return await work()

        return await result_of(self.start(run()))

    def start(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Start a task that runs to completion, or until `close`."""
        task = self._tasks.start(work)
        task.add_done_callback(ignore_failure)  # the caller may have been cancelled
        return task

    @asynccontextmanager
    async def locked(self, on: Connection | None = None) -> AsyncGenerator[None, None]:
        """Hold the namespace's lock.

        Args:
            on: A connection that is being prepared.

        Raises:
            BackendConnectionError: Another process holds it for too long, or the connection was lost.
        """
        if on is not None:
            async with self._locked(on):
                yield
            return
        async with self._ours:
            connection = await self._control.connection()
            before = PINNED.set(connection)  # the lock is this connection's: the work must not continue on another
            try:
                async with self._locked(connection):
                    yield
            finally:
                PINNED.reset(before)

    @asynccontextmanager
    async def _locked(self, on: Connection) -> AsyncGenerator[None, None]:
        # The lock is the connection's: preparing it again, while this process works under the lock, shares the lock.
        if not self._holders[on]:
            await self._lock.acquire(on)
        self._holders[on] += 1
        try:
            yield
        finally:
            self._holders[on] -= 1
            if not self._holders[on]:
                del self._holders[on]
                await self._lock.release(on)

    async def seed(self, on: Connection) -> None:
        """Write an empty registry if there is none. The lock must be held.

        Args:
            on: A connection that is being prepared.
        """
        names = self._names
        made = await self._control.count(names.registry, on) is None

        async def seed(channel: AbstractChannel) -> None:
            await channel.queue_declare(names.registry, durable=True, arguments=dict(names.store_arguments))
            taken = await self._take(channel)
            if taken.newest is None:
                await self._put(channel, Registry())
            else:
                await channel.basic_nack(taken.tag, multiple=True, requeue=True)

        for _ in range(0 if made else _READERS):  # a reader may have the message
            if await self._control.count(names.registry, on):
                return
            await asyncio.sleep(_POLL)
        await self._control.call(seed, on)

    async def peek(self) -> Registry:
        """Read the registry without the lock. It may show a change in progress."""

        async def peek(channel: AbstractChannel) -> _Taken:
            taken = await self._take(channel)
            if taken.newest is not None:
                await channel.basic_nack(taken.tag, multiple=True, requeue=True)
            return taken

        taken = await self._until_taken(peek, None)
        if taken.deliveries > _TOO_OFTEN:
            return await self.exclusively(self.read)
        assert taken.newest is not None
        return taken.newest

    async def read(self, on: Connection | None = None) -> Registry:
        """Read the registry, and reduce its messages to one. The lock must be held.

        Args:
            on: A connection that is being prepared.
        """

        async def read(channel: AbstractChannel) -> _Taken:
            taken = await self._take(channel)
            if taken.newest is not None and (taken.deliveries > _TOO_OFTEN or taken.messages > 1):
                await self._put(channel, taken.newest)
                await channel.basic_ack(taken.tag, multiple=True)
            elif taken.newest is not None:
                await channel.basic_nack(taken.tag, multiple=True, requeue=True)
            return taken

        newest = (await self._until_taken(read, on)).newest
        assert newest is not None
        return newest

    async def write(self, registry: Registry) -> None:
        """Replace the registry that was read last. The lock must be held. A crash in the middle leaves two messages."""
        await self._writable()
        before = registry.serial
        registry.serial += 1

        async def write(channel: AbstractChannel) -> _Taken:
            taken = await self._take(channel)
            if (
                taken.newest is None or taken.newest.serial < before
            ):  # a reader has the message that is to be replaced, and would return it
                if taken.newest is not None:
                    await channel.basic_nack(taken.tag, multiple=True, requeue=True)
                return taken._replace(newest=None)
            await self._put(channel, registry)
            await channel.basic_ack(taken.tag, multiple=True)
            return taken

        await self._until_taken(write, None)

    async def _until_taken(
        self, request: Callable[[AbstractChannel], Awaitable[_Taken]], on: Connection | None
    ) -> _Taken:
        """Repeat a request until no other reader has the message."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self._timeout, _POLL
        while True:
            taken = await self._control.call(request, on)
            if taken.newest is not None:
                return taken
            if loop.time() > deadline:
                raise BackendConnectionError(
                    f"the queue {self._names.registry!r} is empty: another consumer has its message"
                )
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(_LONGEST_POLL, pause * 1.5)

    async def _take(self, channel: AbstractChannel) -> _Taken:
        """Take all messages. Those that are not settled are returned when the channel closes."""
        queue = self._names.registry
        newest: Registry | None = None
        tag, deliveries, count = 0, 0, 0
        while True:
            message = await channel.basic_get(queue)
            method = message.delivery
            if not isinstance(method, commands.Basic.GetOk):
                break
            tag, count = method.delivery_tag or tag, count + 1
            deliveries = max(deliveries, _count(message.header.properties.headers))
            try:
                found = _decode(message.body)
            except (msgspec.MsgspecError, RecursionError) as exc:
                raise ConfigurationError(f"the queue {queue!r} holds a message that is no registry: remove it") from exc
            if newest is None or found.serial >= newest.serial:
                newest = found
            if not method.message_count:
                break
        return _Taken(newest, tag, deliveries, count)

    async def _put(self, channel: AbstractChannel, registry: Registry) -> None:
        await channel.basic_publish(
            _encode(registry), routing_key=self._names.registry, properties=_PROPERTIES, mandatory=True
        )


def _count(headers: Mapping[str, object] | None) -> int:
    count = (headers or {}).get("x-delivery-count", 0)
    return count if isinstance(count, int) else 0
