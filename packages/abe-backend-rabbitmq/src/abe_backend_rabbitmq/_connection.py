"""Connections to RabbitMQ: aiormq logs in and speaks the protocol, the supervision is ours.

A lost connection is not restored. The next caller that needs one opens it, and declares again what it uses, so that no stale state
returns.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, Final, TypeVar

import aiormq
from aiormq.abc import AbstractChannel
from pamqp import commands
from pamqp import frame as pamqp_frame
from pamqp.exceptions import PAMQPException
from yarl import URL

from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.tasks import Background, SharedTask, ignore_failure, result_of
from abe.errors import BackendConnectionError, ConfigurationError
from abe_backend_rabbitmq._channel import Channel
from abe_backend_rabbitmq._errors import refused, translated
from abe_backend_rabbitmq._quiet import OURS, install, quietly
from abe_backend_rabbitmq._settings import RabbitMQSettings, address, is_tls, vhost
from abe_backend_rabbitmq._tap import TapFactory
from abe_backend_rabbitmq._tls import tls_context
from abe_backend_rabbitmq._watch import Watch

_log: Final = Log("abe.rabbitmq")

_CLOSE_TIMEOUT: Final = 1.0
"""Seconds that closing waits for the broker's answer."""

_T = TypeVar("_T")


class Connection:
    """One connection, until it is lost.

    Args:
        settings: The provider's settings.
        url: The broker's URL.
        name: The connection's name in RabbitMQ's list.
    """

    def __init__(self, settings: RabbitMQSettings, url: str, name: str) -> None:
        install()
        self.address = address(url)
        self._settings = settings
        self._url = url
        self._name = name
        self._factory = TapFactory(self._said)
        self._native: Any = None
        self._farewell: commands.Connection.Close | None = None
        self._greeted = False
        self._blocked = False
        self._free = asyncio.Event()
        self._free.set()
        self._watch: Watch | None = None
        self.silent = False
        """Whether it was aborted because the broker was silent."""

    async def open(self) -> None:
        """Connect and log in. A connection is opened once.

        Raises:
            BackendConnectionError: RabbitMQ cannot be reached, or does not answer.
            PermissionDeniedError: The user may not log in.
            ConfigurationError: The vhost does not exist, or a certificate is not accepted, the client's or the broker's.
        """
        connecting = asyncio.ensure_future(quietly(self._open))
        connecting.add_done_callback(ignore_failure)
        try:
            await asyncio.wait([connecting], timeout=self._settings.connect_timeout)
        finally:
            if not connecting.done():
                self._abort()  # first: asyncio waits half a minute for a silent peer to shut down TLS
                connecting.cancel()
                await asyncio.wait([connecting])
        if connecting.cancelled():
            limit = f"{self._settings.connect_timeout:g} s"
            raise BackendConnectionError(f"login to rabbitmq at {self.address} timed out after {limit}{self._hint()}")
        if self._farewell is not None:
            raise refused(self._farewell, self.address) from connecting.exception()
        with translated(self.address, self._hint()):
            connecting.result()
        assert self._factory.tap is not None
        self._watch = Watch(
            self._factory.tap, self._settings.heartbeat, self._ask, lambda: not self._blocked, self._give_up
        )

    @property
    def alive(self) -> bool:
        """Whether it can be used."""
        if self._native is None or self._native.is_closed or self._farewell is not None:
            return False
        tap = self._factory.tap
        return tap is not None and tap.transport is not None and not tap.transport.is_closing()

    @property
    def blocked(self) -> bool:
        """Whether the broker has said that it takes no messages now."""
        return self._blocked

    async def unblocked(self) -> None:
        """Return once the broker takes messages, or the connection is lost."""
        await self._free.wait()

    async def channel(self) -> Channel:
        """Open a channel that publishes or consumes.

        Raises:
            BackendConnectionError: The connection is lost.
        """
        return await self._opened(self._tapped(), lambda channel: channel.native)

    async def plain(self) -> AbstractChannel:
        """Open a plain channel of aiormq's, for infrequent requests; raises as `channel`."""
        return await self._opened(self._native.channel(), lambda channel: channel)

    async def close(self) -> None:
        """Close the connection; abort it if the broker does not answer in time."""
        if self._native is None:
            return
        if self._watch is not None:
            self._watch.stop()
        mute = self._watch is not None and self._watch.waited > _CLOSE_TIMEOUT
        if mute:  # first: aiormq would wait for the broker's answer
            self._abort()
        closing = asyncio.ensure_future(quietly(lambda: self._native.close()))
        closing.add_done_callback(ignore_failure)
        try:
            await asyncio.wait([closing], timeout=min(_CLOSE_TIMEOUT, self._settings.close_timeout))
        finally:
            self._abort()
        await asyncio.wait(
            [closing], timeout=_CLOSE_TIMEOUT
        )  # the abort ends it; cancelled it would leave tasks behind

    async def _open(self) -> None:
        context = await asyncio.to_thread(tls_context, self._settings) if is_tls(self._url) else None
        try:
            url = URL(self._url).update_query(heartbeat=str(round(self._settings.heartbeat)))
            native: Any = aiormq.Connection(
                url, context=context, client_properties={"connection_name": self._name}, transport_factory=self._factory
            )
            self._native = native
            native.vhost = vhost(self._url)  # aiormq takes a %2F in a name for a slash
            native.closing.add_done_callback(self._ended)
            await native.connect()
        except ValueError:  # by yarl, or by the codec for names of hosts; the text may show the URL
            raise ConfigurationError(
                "the host in RABBITMQ_URL or MESSAGE_QUEUE_HOST is not a valid host name"
            ) from None

    def _hint(self) -> str:
        """Return a hint about a peer that accepted the connection, and never sent a frame of AMQP."""
        tap = self._factory.tap
        if self._greeted or tap is None or tap.transport is None:
            return ""
        if is_tls(self._url):
            return " (if it asks for a client's certificate, RABBITMQ_CERTIFICATE_FILE must hold one that it trusts)"
        return " (is it RabbitMQ that listens there, and without TLS? With TLS, RABBITMQ_URL begins with amqps://)"

    async def _opened(self, opening: Coroutine[Any, Any, _T], native: Callable[[_T], AbstractChannel]) -> _T:
        """Open a channel; if the caller is cancelled meanwhile, close it again as soon as it is open."""

        def close_again(opened: "asyncio.Future[_T]") -> None:
            if not opened.cancelled() and opened.exception() is None:
                _start(native(opened.result()).close()).add_done_callback(ignore_failure)

        task = _start(opening)
        try:
            with translated(self.address):
                return await result_of(task, _was_closed)
        except asyncio.CancelledError:
            task.add_done_callback(close_again)
            raise

    async def _tapped(self) -> Channel:
        assert self._factory.tap is not None
        native = await self._native.channel(publisher_confirms=False)
        channel = Channel(self._factory.tap, native, self._native.connection_tune.frame_max)
        await native.confirm_delivery()
        return channel

    def _said(self, frame: bytes) -> None:
        """Handle a method of the connection itself: close, blocked, unblocked."""
        self._greeted = True
        try:
            method: object = pamqp_frame.unmarshal(frame)[2]
        except PAMQPException:
            return  # aiormq reports it
        match method:
            case commands.Connection.Close():
                self._farewell = method
                for channel in list(self._factory.tap.channels.values() if self._factory.tap else ()):
                    channel.lose(f"the broker closed the connection: {method.reply_text}")
            case commands.Connection.Blocked():
                if not self._blocked:
                    _log.warning(
                        "rabbitmq at %s takes no messages now (%s): publishers wait", self.address, method.reason
                    )
                self._blocked = True
                self._free.clear()
            case commands.Connection.Unblocked():
                _log.warning("rabbitmq at %s takes messages again", self.address)
                self._blocked = False
                self._free.set()
            case _:
                pass

    async def _ask(self) -> None:
        """Probe the broker by opening a channel, which it answers even while its queues cannot, and closing it."""
        channel = await self.plain()
        await run_to_completion(channel.close())

    def _give_up(self, reason: str) -> None:
        self.silent = True
        _log.warning("the connection to rabbitmq at %s is aborted: %s", self.address, reason)
        if self._factory.tap is not None:
            self._factory.tap.end(f"the connection was aborted: {reason}")
        self._abort()

    def _ended(self, _: object) -> None:
        self._free.set()
        if self._watch is not None:
            self._watch.stop()

    def _abort(self) -> None:
        tap = self._factory.tap
        if tap is not None and tap.transport is not None:
            tap.transport.abort()


class Link:
    """A connection that is opened on demand, and again after a loss; several addresses are tried in turn.

    Args:
        settings: The provider's settings.
        name: The connection's name in RabbitMQ's list.
    """

    def __init__(self, settings: RabbitMQSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._next = 0
        self._connection: Connection | None = None
        self._connecting = SharedTask(self._connect, _was_closed)
        self._closed = False

    async def get(self) -> Connection:
        """Return a live connection.

        Concurrent callers share one attempt; cancelling a caller does not cancel it.

        Raises:
            AbeError: No connection could be opened; see `Connection.open`.
        """
        if self._connection is not None and self._connection.alive and not self._closed:
            return self._connection
        return await self._connecting.join()

    async def close(self) -> None:
        """Close the connection; none is opened any more."""
        self._closed = True
        try:
            await self._connecting.close()
        finally:
            if self._connection is not None:
                await self._connection.close()

    async def _connect(self) -> Connection:
        before, self._connection = self._connection, None
        if before is not None:
            if before.silent:
                self._next += 1
            await before.close()
        connection = await self._reach()
        self._connection = connection
        return connection

    async def _reach(self) -> Connection:
        """Try each address once, beginning with the one that worked last."""
        urls = self._settings.urls
        for left in range(len(urls) - 1, -1, -1):
            connection = Connection(self._settings, urls[self._next % len(urls)], self._name)
            try:
                await connection.open()
            except BackendConnectionError as exc:
                self._next += 1
                if not left:
                    raise
                _log.info("another address is tried: %s", exc)
            else:
                return connection
        raise AssertionError("unreachable: the last address raises")


_requests: Final = Background()


async def run_to_completion(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a request of aiormq to its end even if the caller is cancelled: aiormq closes a channel whose request is cancelled.

    Raises:
        BackendConnectionError: The connection was closed here meanwhile. (aiormq cancels what waits then; the caller was not cancelled.)
    """
    return await result_of(_start(work), _was_closed)


def _start(work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
    context = copy_context()
    context.run(OURS.set, True)
    return context.run(_requests.start, work)


def _was_closed() -> BackendConnectionError:
    return BackendConnectionError("the connection to rabbitmq was closed")
