"""Redis's protocol on one connection: commands out, whole replies in by hiredis, each to the oldest caller.

redis-py's own reading and writing would be most of what a message costs.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, cast

import hiredis

from abe.backends.message_queue.base.tasks import ignore_failure
from abe.errors import BackendConnectionError
from abe_backend_redis._errors import ReplyError, code

_log: Final = logging.getLogger("abe.redis")

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
        timeout: Seconds without any reply, while one is due, after which the connection counts as dead, once it is watched.
        login: Commands that are sent as soon as the connection is there. A server that refuses it says so before it is asked: that is
            then the reply to the first of them.
    """

    def __init__(self, address: str, timeout: float, login: Sequence[Sequence[Argument]] = ()) -> None:
        self._address = address
        self._timeout = timeout
        self.login = login
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=ReplyError)
        self._waiting: deque[asyncio.Future[Reply]] = deque()
        self._heard = self._loop.time()
        self._unsent = 0
        self._look_every = min(timeout, IDLE) / 4
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._fault: Exception | None = None
        self.greeting: Sequence[asyncio.Future[Reply]] = ()
        """The replies to the login."""

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

    def watch(self) -> None:
        """Give the connection up from now on when it is silent."""
        self._heard = self._loop.time()
        self._look()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Log in."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by their type
        self.greeting = self.call_many(*self.login)
        for reply in self.greeting:
            reply.add_done_callback(ignore_failure)  # whoever logs in may be cancelled

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
            if self._timer is not None:  # before that, whoever logs in is told
                _log.error("redis at %s sent what is no reply: %s", self._address, exc)
            self._fault = exc
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits."""
        if self._timer is not None:
            self._timer.cancel()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                error = BackendConnectionError(f"the connection to redis at {self._address} was lost")
                error.__cause__ = self._fault or exc
                future.set_exception(error)

    def _look(self, due: float = math.inf) -> None:
        """Give the connection up when it is silent; ask for a sign of life when nothing else is due.

        Silence is the server's only while this process listens: when the event loop was kept busy, that time does not count. Nor does
        the time in which what we send is still leaving.
        """
        if self._transport is None or self._transport.is_closing():
            return
        now, unsent = self._loop.time(), self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._heard = now
        self._unsent = unsent
        self._heard = min(now, self._heard + max(0.0, now - due))
        silence = now - self._heard
        if self._waiting and silence > self._timeout:
            _log.warning(
                "redis at %s has not answered for %.1f s: the connection is given up", self._address, self._timeout
            )
            self.close()
            return
        if not self._waiting and silence > IDLE:
            self.call(b"PING").add_done_callback(ignore_failure)
        self._timer = self._loop.call_at(now + self._look_every, self._look, now + self._look_every)
