"""Redis's protocol on one connection: sends commands, parses replies with hiredis, resolves the oldest waiting call with each.

redis-py's own reading and writing would be most of a message's cost.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, cast

import hiredis

from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.tasks import ignore_failure
from abe.errors import BackendConnectionError
from abe_backend_redis._errors import ReplyError, code

_log: Final = Log("abe.redis")

IDLE: Final = 3.0
"""Seconds without received data after which a PING is sent, so that a lost connection is noticed before it is needed."""

Reply: TypeAlias = Any
Argument: TypeAlias = object
"""Bytes, text or a number; `pack` refuses anything else."""

pack: Callable[[Sequence[Argument]], bytes] = hiredis.pack_command  # type: ignore[assignment]
"""Encodes a command. (hiredis declares it for tuples of one.)"""

_DEMOTED: Final = ("READONLY", "MASTERDOWN")
"""The error codes of a server that is no longer primary: the next connection may reach the new one by the same name."""


class Wire(asyncio.Protocol):
    """Sends commands, and resolves each call with its reply.

    Args:
        address: The server's, for error texts.
        timeout: Seconds without received data, while a reply is due, after which the connection counts as lost (from `watch` on).
        login: Commands that are sent as soon as the connection is open. A server that refuses the connection sends an error
            unasked, which is then the reply to the first of them.
    """

    def __init__(self, address: str, timeout: float, login: Sequence[Sequence[Argument]] = ()) -> None:
        self._address = address
        self._timeout = timeout
        self.login = login
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=ReplyError)
        self._waiting: deque[asyncio.Future[Reply]] = deque()
        self._received_at = self._loop.time()
        self._unsent = 0
        self._check_interval = min(timeout, IDLE) / 4
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
        """Seconds since data was received, while a reply is due."""
        return self._loop.time() - self._received_at if self._waiting else 0.0

    def call(self, *command: Argument) -> asyncio.Future[Reply]:
        """Send a command. The future has the reply, a `ReplyError`, or `BackendConnectionError` if the connection was lost."""
        return self.send(pack(command), 1)[0]

    def call_many(self, *commands: Sequence[Argument]) -> list[asyncio.Future[Reply]]:
        """Send commands in one write."""
        return self.send(b"".join(map(pack, commands)), len(commands))

    def send(self, data: bytes, replies: int) -> list[asyncio.Future[Reply]]:
        """Send packed commands, which have `replies` replies."""
        futures: list[asyncio.Future[Reply]] = [self._loop.create_future() for _ in range(replies)]
        if self._transport is None or self._transport.is_closing():
            error = BackendConnectionError(f"the connection to redis at {self._address} is closed")
            for future in futures:
                future.set_exception(error)
            return futures
        if not self._waiting:
            self._received_at = self._loop.time()
        self._waiting.extend(futures)
        self._transport.write(data)
        return futures

    def close(self) -> None:
        """Disconnect. Pending calls fail with `BackendConnectionError`."""
        if self._transport is not None:
            self._transport.abort()

    def watch(self) -> None:
        """Begin to check for silence: from now on a silent connection is closed."""
        self._received_at = self._loop.time()
        self._check()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Log in."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not subclass it
        self.greeting = self.call_many(*self.login)
        for reply in self.greeting:
            reply.add_done_callback(ignore_failure)  # the task that logs in may be cancelled

    def data_received(self, data: bytes) -> None:
        """Resolve calls with the complete replies."""
        self._received_at = self._loop.time()
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                future = self._waiting.popleft()
                if not future.done():
                    if isinstance(reply, ReplyError):
                        future.set_exception(reply)
                        if code(reply) in _DEMOTED:
                            self.close()
                    else:
                        future.set_result(reply)
        except (hiredis.ProtocolError, IndexError) as exc:
            if self._timer is not None:  # before `watch`, the task that logs in gets the error
                _log.error("redis at %s sent an invalid reply: %s", self._address, exc)
            self._fault = exc
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the pending calls."""
        if self._timer is not None:
            self._timer.cancel()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                error = BackendConnectionError(f"the connection to redis at {self._address} was lost")
                error.__cause__ = self._fault or exc
                future.set_exception(error)

    def _check(self, due: float = math.inf) -> None:
        """Close the connection when it is silent too long; send a PING when no reply is due.

        Time in which the event loop was blocked, and so read nothing, does not count as silence. Nor does time in which data is
        still being sent.
        """
        if self._transport is None or self._transport.is_closing():
            return
        now, unsent = self._loop.time(), self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._received_at = now
        self._unsent = unsent
        self._received_at = min(now, self._received_at + max(0.0, now - due))
        silence = now - self._received_at
        if self._waiting and silence > self._timeout:
            _log.warning(
                "redis at %s has not answered for %.1f s: closing the connection", self._address, self._timeout
            )
            self.close()
            return
        if not self._waiting and silence > IDLE:
            self.call(b"PING").add_done_callback(ignore_failure)
        self._timer = self._loop.call_at(now + self._check_interval, self._check, now + self._check_interval)
