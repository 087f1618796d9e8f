"""The connection for infrequent requests: declaring, counting, browsing. It is apart from those that publish and consume.

A broker that is short of memory stops reading from a connection that publishes; requests on this one are answered all the same.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

from aiormq.abc import AbstractChannel

from abe.backends.message_queue.base.log import Log
from abe.errors import AbeError, BackendConnectionError
from abe_backend_rabbitmq._connection import Connection, Link, run_to_completion
from abe_backend_rabbitmq._errors import ChannelLocked, ChannelNotFound, translated

_log: Final = Log("abe.rabbitmq")

_POLL: Final = 0.005
_LONGEST_POLL: Final = 0.05

_T = TypeVar("_T")

PINNED: Final[ContextVar["Connection | None"]] = ContextVar("pinned", default=None)
"""The connection that requests of the current work must use: it owns the work's lock."""


class Control:
    """A channel for infrequent requests, one at a time; the broker closes it with each error, and it is opened again.

    Args:
        link: Opens the connection.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = asyncio.Lock()
        self._channel: AbstractChannel | None = None
        self._owner: Connection | None = None

    async def connection(self) -> Connection:
        """Return a live connection."""
        return await self._link.get()

    async def close(self) -> None:
        """Disconnect."""
        await self._link.close()

    async def call(self, request: Callable[[AbstractChannel], Awaitable[_T]], on: Connection | None = None) -> _T:
        """Make a request. A cancelled caller stops waiting; the request runs to completion.

        Args:
            request: Made with the channel.
            on: The connection to use: one that is being prepared, or that owns a lock.

        Raises:
            AbeError: The request failed. The native error is the cause.
        """
        return await run_to_completion(self._call(request, on))

    async def count(self, queue: str, on: Connection | None = None) -> int | None:
        """Return how many messages of a queue are not in flight; None: the queue does not exist."""
        try:
            declared = await self.call(lambda channel: channel.queue_declare(queue, passive=True), on)
        except BackendConnectionError as exc:
            if isinstance(exc.__cause__, ChannelNotFound):
                return None
            raise
        return declared.message_count or 0

    async def _call(self, request: Callable[[AbstractChannel], Awaitable[_T]], on: Connection | None) -> _T:
        # Before the lock: a connection that is being prepared makes requests itself.
        connection = on or PINNED.get() or await self._link.get()
        async with self._lock:
            if not connection.alive:
                raise BackendConnectionError(f"the connection to rabbitmq at {connection.address} was lost")
            with translated(connection.address):
                if self._channel is None or self._owner is not connection or self._channel.is_closed:
                    self._channel, self._owner = await connection.plain(), connection
                channel = self._channel
                try:
                    return await request(channel)
                except BaseException:
                    self._channel = None  # messages that the request took are returned with its channel
                    if not channel.is_closed:
                        await channel.close()
                    raise


class Lock:
    """A lock between processes: an exclusive queue. The broker deletes it when the connection that declared it ends.

    Args:
        control: Carries the requests.
        name: The queue's name.
        timeout: Seconds to wait for the lock.
    """

    def __init__(self, control: Control, name: str, timeout: float) -> None:
        self._control = control
        self._name = name
        self._timeout = timeout
        self._ours = asyncio.Lock()

    @asynccontextmanager
    async def held(self) -> AsyncGenerator[Connection, None]:
        """Hold the lock; yield the connection that owns it: requests under the lock must use this connection.

        Raises:
            BackendConnectionError: Another process holds it for too long, or the connection was lost.
        """
        async with self._ours:
            connection = await self._control.connection()
            await self.acquire(connection)
            try:
                yield connection
            finally:
                await self.release(connection)

    async def acquire(self, on: Connection) -> None:
        """Acquire the lock for a connection; raises as `held` does."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        pause = _POLL
        while True:
            try:
                await self._control.call(lambda channel: channel.queue_declare(self._name, exclusive=True), on)
            except asyncio.CancelledError:
                await self.release(on)  # the request is carried out all the same
                raise
            except BackendConnectionError as exc:
                if not isinstance(exc.__cause__, ChannelLocked):
                    raise
                if asyncio.get_running_loop().time() > deadline:
                    text = f"another process has held the lock, the queue {self._name!r}, for {self._timeout:g} s"
                    raise BackendConnectionError(text) from exc
            else:
                return
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(_LONGEST_POLL, pause * 1.5)

    async def release(self, on: Connection) -> None:
        """Release the lock."""
        try:
            await self._control.call(lambda channel: channel.queue_delete(self._name), on)
        except AbeError as exc:
            _log.debug("a lock could not be released, and ends with its connection: %s", exc)
