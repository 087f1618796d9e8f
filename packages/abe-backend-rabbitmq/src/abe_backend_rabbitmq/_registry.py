"""The groups of a namespace, their patterns, and the lock under which both change.

AMQP cannot list queues or bindings, so the registry is a message: the only one in its queue, replaced under a lock. The lock is a
queue that one connection owns; the broker frees it when that connection ends.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec
from aiormq.abc import AbstractChannel
from pamqp import commands

from abe.backends.message_queue.base.names import matches
from abe.errors import AbeError, BackendConnectionError, ConfigurationError
from abe_backend_rabbitmq._connection import PINNED, Connection, Control
from abe_backend_rabbitmq._errors import ChannelLocked
from abe_backend_rabbitmq._topology import Topology

_log: Final = logging.getLogger("abe.rabbitmq")

_PROPERTIES: Final = commands.Basic.Properties(content_type="application/json", delivery_mode=2)
_GOODBYE: Final = 1.0
"""Seconds for which closing waits for work that was cancelled."""

_POLL: Final = 0.005
_LONGEST_POLL: Final = 0.05
_TOO_OFTEN: Final = 1_000
"""Deliveries of the registry's message after which it is written anew: the queue's log ends at its oldest message."""

_T = TypeVar("_T")


class Entry(msgspec.Struct):
    """A group."""

    patterns: list[str]
    bound: list[str]
    """What may be bound: `patterns`, and those before them until the change is through."""
    changing: bool = False


class Registry(msgspec.Struct):
    """The groups of a namespace."""

    serial: int = 0
    """Grows with each writing."""
    version: int = 0
    """Grows with each change; delayed messages name it, and only those are accepted that name the newest."""
    groups: dict[str, Entry] = msgspec.field(default_factory=dict[str, Entry])
    stale: list[int] = msgspec.field(default_factory=list[int])
    """Versions that may still be bound."""

    def wanting(self, key: str) -> tuple[str, ...]:
        """Return the groups that want a key."""
        return tuple(
            group for group, entry in self.groups.items() if any(matches(pattern, key) for pattern in entry.patterns)
        )


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Registry).decode


class RegistryKeeper:
    """Reads and writes the registry.

    Args:
        control: Carries the requests.
        topology: The names.
        patience: Seconds to wait for the lock.
    """

    def __init__(self, control: Control, topology: Topology, patience: float) -> None:
        self._control = control
        self._names = topology
        self._patience = patience
        self._ours = asyncio.Lock()
        self._holders: Counter[Connection] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._begun: asyncio.Task[object] | None = None

    async def close(self) -> None:
        """Give up what is under way. What waits for a silent broker ends with its connection."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_GOODBYE)

    async def exclusively(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do something under the namespace's lock, to its end even if the caller is cancelled.

        Raises:
            BackendConnectionError: It was closed meanwhile; or as `locked`, or the work.
        """

        async def run() -> _T:
            async with self.locked():
                return await work()

        task = self._start(run())
        await asyncio.wait([task])
        if task.cancelled():
            raise BackendConnectionError("the connection to rabbitmq was closed")
        return task.result()

    def begin(self, work: Callable[[], Awaitable[object]]) -> None:
        """Look after something that nobody waits for, unless that is under way: a failure is logged, and left to the next time."""
        if self._begun is not None and not self._begun.done():
            return

        def report(task: asyncio.Task[object]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.warning("held messages could not be handed out, and are kept until the next look: %s", error)

        async def run() -> object:
            return await work()

        self._begun = self._start(run())
        self._begun.add_done_callback(report)

    def _start(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # the caller may have left
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
            before = PINNED.set(connection)  # the lock is this connection's: on another one the work must not go on
            try:
                async with self._locked(connection):
                    yield
            finally:
                PINNED.reset(before)

    @asynccontextmanager
    async def _locked(self, on: Connection) -> AsyncGenerator[None, None]:
        # The lock is the connection's: one that prepares itself again while its own process works under it shares it.
        if not self._holders[on]:
            await self._acquire(on)
        self._holders[on] += 1
        try:
            yield
        finally:
            self._holders[on] -= 1
            if not self._holders[on]:
                del self._holders[on]
                await self._release(on)

    async def _acquire(self, on: Connection) -> None:
        lock = self._names.lock
        deadline = asyncio.get_running_loop().time() + self._patience
        pause = _POLL
        while True:
            try:
                await self._control.call(lambda channel: channel.queue_declare(lock, exclusive=True), on)
            except BackendConnectionError as exc:
                if not isinstance(exc.__cause__, ChannelLocked):
                    raise
                if asyncio.get_running_loop().time() > deadline:
                    raise BackendConnectionError(
                        f"another process has been changing the groups for {self._patience:g} s: it holds the queue {lock!r}"
                    ) from exc
            else:
                return
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(_LONGEST_POLL, pause * 1.5)

    async def _release(self, on: Connection) -> None:
        try:
            await self._control.call(lambda channel: channel.queue_delete(self._names.lock), on)
        except AbeError as exc:
            _log.debug("the lock of the namespace goes with its connection: %s", exc)

    async def seed(self, channel: AbstractChannel) -> None:
        """Put an empty registry where there is none. The lock must be held."""
        declared = await channel.queue_declare(
            self._names.registry, durable=True, arguments=dict(self._names.store_arguments)
        )
        if not declared.message_count:
            await channel.basic_publish(
                _encode(Registry()), routing_key=self._names.registry, properties=_PROPERTIES, mandatory=True
            )

    async def read(self, on: Connection | None = None) -> Registry:
        """Return the registry. The lock must be held.

        Args:
            on: A connection that is being prepared.
        """
        deadline = asyncio.get_running_loop().time() + self._patience / 2
        while True:
            found = await self._control.call(self._read, on)
            if found is not None:
                return found
            if asyncio.get_running_loop().time() > deadline:
                raise BackendConnectionError(
                    f"the queue {self._names.registry!r} is empty: its message is in somebody's hands"
                )
            await asyncio.sleep(_POLL)

    async def write(self, registry: Registry) -> None:
        """Replace the registry. The lock must be held. After a crash in the middle there are two, and the newer one counts."""
        registry.serial += 1
        await self._control.call(lambda channel: self._write(channel, registry))

    async def _read(self, channel: AbstractChannel) -> Registry | None:
        queue = self._names.registry
        newest: Registry | None = None
        tag, used = 0, 0
        while True:
            message = await channel.basic_get(queue)
            method = message.delivery
            if not isinstance(method, commands.Basic.GetOk):
                break
            tag = method.delivery_tag or tag
            used = max(used, _count(message.header.properties.headers))
            try:
                found = _decode(message.body)
            except msgspec.MsgspecError as exc:
                raise ConfigurationError(f"the queue {queue!r} holds a message that is no registry: remove it") from exc
            if newest is None or found.serial >= newest.serial:
                newest = found
            if not method.message_count:
                break
        if newest is None:
            return None
        if used > _TOO_OFTEN:
            await channel.basic_publish(_encode(newest), routing_key=queue, properties=_PROPERTIES, mandatory=True)
            await channel.basic_ack(tag, multiple=True)
            return newest
        await channel.basic_nack(tag, multiple=True, requeue=True)
        for _ in range(100):  # it is back in the queue before anybody else can look
            if (await channel.queue_declare(queue, passive=True)).message_count:
                break
            await asyncio.sleep(_POLL)
        return newest

    async def _write(self, channel: AbstractChannel, registry: Registry) -> None:
        queue, tag = self._names.registry, 0
        while True:
            message = await channel.basic_get(queue)
            method = message.delivery
            if not isinstance(method, commands.Basic.GetOk):
                break
            tag = method.delivery_tag or tag
            if not method.message_count:
                break
        await channel.basic_publish(_encode(registry), routing_key=queue, properties=_PROPERTIES, mandatory=True)
        if tag:
            await channel.basic_ack(tag, multiple=True)


def _count(headers: Mapping[str, object] | None) -> int:
    count = (headers or {}).get("x-delivery-count", 0)
    return count if isinstance(count, int) else 0
