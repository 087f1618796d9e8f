"""One connection to Redis: redis-py logs in, then the bytes are ours.

redis-py brings TLS, ACL users, Unix sockets and the rest of its URL; its reading and writing would be most of what a message costs.
So after the login its transport gets this protocol: whole replies by hiredis, each to the oldest caller.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias

import hiredis
from redis.asyncio.connection import AbstractConnection

from abe.errors import BackendConnectionError
from abe_backend_redis._errors import ReplyError, code, translated
from abe_backend_redis._login import login
from abe_backend_redis._settings import RedisSettings

_log: Final = logging.getLogger("abe.redis")

PATIENCE: Final = 5.0
"""Seconds without a reply that is due after which a connection counts as dead. Well within the bound that the backend declares."""

IDLE: Final = 3.0
"""Seconds without a word after which Redis is asked for one, so that a connection that went silent is noticed before it is needed."""

Reply: TypeAlias = Any
Argument: TypeAlias = object
"""Bytes, text or a number; what else is there, packing refuses."""

pack: Callable[[Sequence[Argument]], bytes] = hiredis.pack_command  # type: ignore[assignment]
"""Turns a command into the bytes that Redis reads. (hiredis declares it for tuples of one.)"""


_DEPOSED: Final = ("READONLY", "MASTERDOWN")
"""What a server says that is no primary any more: the next connection may find the new one behind the same name."""


class Wire(asyncio.Protocol):
    """Sends commands, and hands each reply to whoever waits for it.

    Args:
        address: For texts.
        patience: Seconds without any reply, while one is due, after which the connection counts as dead.
    """

    def __init__(self, address: str, patience: float) -> None:
        self._address = address
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=ReplyError)
        self._waiting: deque[asyncio.Future[Reply]] = deque()
        self._heard = self._loop.time()
        self._unsent = 0
        self._look_every = min(patience, IDLE) / 4
        self._timer: asyncio.TimerHandle | None = None
        self._login: object = None
        self._transport: asyncio.WriteTransport | None = None

    @classmethod
    async def connect(cls, settings: RedisSettings, name: str, patience: float) -> "Wire":
        """Connect and log in, at the address as it resolves now.

        Raises:
            BackendConnectionError: Redis cannot be reached.
            ConfigurationError: `REDIS_URL` names something else than a Redis that we can use so.
            PermissionDeniedError: It does not let us in.
        """
        wire = cls(settings.address, patience)
        wire._adopt(await login(settings, name))
        return wire

    @property
    def alive(self) -> bool:
        """Whether commands can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def silence(self) -> float:
        """Seconds since the last word of the server, while a reply is due."""
        return self._loop.time() - self._heard if self._waiting else 0.0

    def call(self, *command: Argument) -> asyncio.Future[Reply]:
        """Send a command. The future's result is the reply, its exception a `ReplyError`, or `BackendConnectionError` if none will come."""
        return self.send(pack(command), 1)[0]

    def call_many(self, *commands: Sequence[Argument]) -> list[asyncio.Future[Reply]]:
        """Send commands in one write."""
        return self.send(b"".join(map(pack, commands)), len(commands))

    def send(self, data: bytes, replies: int) -> list[asyncio.Future[Reply]]:
        """Send packed commands that have so many replies."""
        futures: list[asyncio.Future[Reply]] = [self._loop.create_future() for _ in range(replies)]
        if self._transport is None or self._transport.is_closing():
            error = BackendConnectionError(f"the connection to redis at {self._address} is closed")
            for future in futures:
                future.set_exception(error)
            return futures
        if not self._waiting:
            self._heard = self._loop.time()
        self._waiting.extend(futures)
        self._transport.write(data)
        return futures

    def close(self) -> None:
        """Disconnect; whoever waits is told."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Hand out the replies that are complete."""
        self._heard = self._loop.time()
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                future = self._waiting.popleft()
                if not future.done():
                    if isinstance(reply, ReplyError):
                        future.set_exception(reply)
                        if code(reply) in _DEPOSED:
                            self.close()
                    else:
                        future.set_result(reply)
        except (hiredis.ProtocolError, IndexError) as exc:
            _log.error("redis at %s sent what is no reply: %s", self._address, exc)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits."""
        if self._timer is not None:
            self._timer.cancel()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                error = BackendConnectionError(f"the connection to redis at {self._address} was lost")
                error.__cause__ = exc
                future.set_exception(error)

    def _adopt(self, connection: AbstractConnection) -> None:
        """Take over the transport. The two private names are what a newer redis-py could break; a test watches them."""
        writer = connection._writer  # pyright: ignore[reportPrivateUsage]
        assert writer is not None
        connection._reader = connection._writer = None  # pyright: ignore[reportPrivateUsage]
        self._login = writer  # kept: a collected StreamWriter closes its transport
        self._transport = transport = writer.transport
        transport.set_protocol(self)
        self._watch()

    def _watch(self, due: float = math.inf) -> None:
        """Give the connection up when it is silent; ask for a sign of life when nothing else is due.

        Silence is the server's only while this process listens: when the event loop was kept busy, that time does not count. Nor does
        the time in which what we send is still leaving.
        """
        now, unsent = self._loop.time(), self._transport.get_write_buffer_size() if self._transport else 0
        if unsent < self._unsent:
            self._heard = now
        self._unsent = unsent
        self._heard = min(now, self._heard + max(0.0, now - due))
        silence = now - self._heard
        if self._waiting and silence > self._patience:
            _log.warning(
                "redis at %s has not answered for %.1f s: the connection is given up", self._address, self._patience
            )
            self.close()
            return
        if not self._waiting and silence > IDLE:
            self.call(b"PING").add_done_callback(lambda pong: pong.cancelled() or pong.exception())
        self._timer = self._loop.call_at(now + self._look_every, self._watch, now + self._look_every)


class Link:
    """A connection that is made when it is needed, and made anew when it was lost.

    Args:
        settings: Where to, and as whom.
        name: The connection's name in Redis's list of clients.
        patience: See `Wire`.
        prepare: Run on each new connection before it is used.
    """

    def __init__(
        self, settings: RedisSettings, name: str, patience: float, prepare: Callable[[Wire], Awaitable[None]]
    ) -> None:
        self._settings = settings
        self._name = name
        self._patience = patience
        self._prepare = prepare
        self._wire: Wire | None = None
        self._connecting: asyncio.Task[Wire] | None = None
        self._closed = False

    async def get(self) -> Wire:
        """Return a live connection.

        However many ask, one is made; who is cancelled stops waiting, and the connection is made all the same.

        Raises:
            AbeError: There is none to be had; see `Wire.connect`.
        """
        if self._wire is not None and self._wire.alive:
            return self._wire
        if self._closed:
            raise self._was_closed()
        if self._connecting is None or self._connecting.done():
            # In a task of its own also because redis-py waits with wait_for, which on Python 3.11 may swallow a cancellation.
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
            # If everybody who waits is cancelled, nobody looks at the failure: that is no error.
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        connecting = self._connecting
        await asyncio.wait([connecting])
        if connecting.cancelled():
            raise self._was_closed()
        return connecting.result()

    def drop(self, silence: float = 0.0) -> None:
        """Disconnect, if the server has been silent for so many seconds; whoever needs the connection makes it anew."""
        if self._wire is not None and self._wire.silence >= silence:
            self._wire.close()

    async def close(self) -> None:
        """Disconnect for good."""
        self._closed = True
        self.drop()
        while self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
            await asyncio.wait([self._connecting], timeout=0.1)  # wait_for on Python 3.11 may swallow a cancellation

    async def _connect(self) -> Wire:
        wire = await Wire.connect(self._settings, self._name, self._patience)
        try:
            with translated(self._settings.address):
                await self._prepare(wire)
        except BaseException:
            wire.close()
            raise
        self._wire = wire
        if self._closed:
            wire.close()
        return wire

    def _was_closed(self) -> BackendConnectionError:
        return BackendConnectionError(f"the connection to redis at {self._settings.address} was closed")
