"""Connections to RabbitMQ: aiormq logs in and speaks the protocol, the supervision is ours.

Nothing is restored by itself when a connection is lost: whoever needs one gets a new one and says again what is wanted of it. So there
is no state that could come back wrong.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Final, TypeVar

import aiormq
from aiormq.abc import AbstractChannel
from yarl import URL

from abe.errors import BackendConnectionError, ConfigurationError
from abe_backend_rabbitmq._channel import Opened, PlainChannel
from abe_backend_rabbitmq._errors import translated
from abe_backend_rabbitmq._settings import RabbitMQSettings, address
from abe_backend_rabbitmq._tap import TapChannel, TapFactory

_log: Final = logging.getLogger("abe.rabbitmq")

_GOODBYE: Final = 1.0
"""Seconds for which closing waits for the broker's answer."""

_FILES: Final = ("cafile", "certfile", "keyfile")

_T = TypeVar("_T")

PINNED: Final[ContextVar["Connection | None"]] = ContextVar("pinned", default=None)
"""The connection that requests must go by, in work that must not survive it."""


class Connection:
    """One connection, until it is lost.

    Args:
        url: Where to.
        tapped: Whether what is many goes past aiormq.
    """

    def __init__(self, url: str, *, tapped: bool) -> None:
        self.address = address(url)
        self._url = url
        self._factory = TapFactory(self._on_blocked) if tapped else None
        self._native: Any = None
        self._unblocked = asyncio.Event()
        self._unblocked.set()

    async def open(self, settings: RabbitMQSettings, name: str) -> None:
        """Connect and log in.

        Raises:
            BackendConnectionError: RabbitMQ cannot be reached.
            PermissionDeniedError: It does not let us in.
        """
        url = URL(self._url).update_query(heartbeat=str(max(1, round(settings.heartbeat))))
        _check_files(url)
        options: dict[str, Any] = {} if self._factory is None else {"transport_factory": self._factory}
        native: Any = aiormq.Connection(url, client_properties={"connection_name": name}, **options)
        with translated(self.address):
            async with asyncio.timeout(settings.connect_timeout):
                await native.connect()
        self._native = native

    @property
    def alive(self) -> bool:
        """Whether it can be used."""
        if self._native is None or self._native.is_closed:
            return False
        tap = None if self._factory is None else self._factory.tap
        return tap is None or (tap.transport is not None and not tap.transport.is_closing())

    @property
    def blocked(self) -> bool:
        """Whether the broker takes no messages now."""
        return not self._unblocked.is_set()

    async def unblocked(self) -> None:
        """Return once the broker takes messages."""
        await self._unblocked.wait()

    async def channel(self) -> Opened:
        """Open a channel that publishes or consumes.

        Raises:
            BackendConnectionError: The connection is lost.
        """
        with translated(self.address):
            if self._factory is None or self._factory.tap is None:
                return PlainChannel(await finished(self._native.channel()))
            return await finished(self._tapped(self._factory))

    async def plain(self) -> AbstractChannel:
        """Open a channel of aiormq's, for what is rare."""
        with translated(self.address):
            channel: AbstractChannel = await finished(self._native.channel())
            return channel

    async def close(self) -> None:
        """Disconnect, whatever the broker does."""
        if self._native is None:
            return
        closing = asyncio.ensure_future(self._native.close())
        await asyncio.wait([closing], timeout=_GOODBYE)
        tap = None if self._factory is None else self._factory.tap
        if tap is not None and tap.transport is not None:
            tap.transport.abort()
        if not closing.done():
            closing.cancel()
            await asyncio.wait([closing])
        if not closing.cancelled() and closing.exception() is not None:
            _log.debug("the connection to rabbitmq at %s ended with %r", self.address, closing.exception())

    async def _tapped(self, factory: TapFactory) -> Opened:
        assert factory.tap is not None
        native = await self._native.channel(publisher_confirms=False)
        channel = TapChannel(factory.tap, native, self._native.connection_tune.frame_max)
        await native.confirm_delivery()
        return channel

    def _on_blocked(self, reason: str | None) -> None:
        if reason is None:
            self._unblocked.set()
            _log.warning("rabbitmq at %s takes messages again", self.address)
        else:
            self._unblocked.clear()
            _log.warning("rabbitmq at %s takes no messages now (%s): publishers wait", self.address, reason)


class Link:
    """A connection that is made when it is needed, and made anew when it was lost; several addresses are tried in turn.

    Args:
        settings: Where to, and as whom.
        name: The connection's name in RabbitMQ's list.
        prepare: Run on each new connection before it is used.
    """

    def __init__(self, settings: RabbitMQSettings, name: str, prepare: Callable[[Connection], Awaitable[None]]) -> None:
        self._settings = settings
        self._name = name
        self._prepare = prepare
        self._next = 0
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        self._closed = False

    @property
    def current(self) -> Connection | None:
        """The connection as it is now."""
        return self._connection

    async def get(self) -> Connection:
        """Return a live connection.

        However many ask, one is made; who is cancelled stops waiting, and the connection is made all the same.

        Raises:
            AbeError: There is none to be had; see `Connection.open`.
        """
        if self._connection is not None and self._connection.alive:
            return self._connection
        if self._closed:
            raise _was_closed()
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
        connecting = self._connecting
        await asyncio.wait([connecting])
        if connecting.cancelled():
            raise _was_closed()
        return connecting.result()

    async def close(self) -> None:
        """Disconnect for good."""
        self._closed = True
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._connection is not None:
            await self._connection.close()

    async def _connect(self) -> Connection:
        if self._connection is not None:
            await self._connection.close()
        urls = self._settings.urls
        for last in range(len(urls) - 1, -1, -1):
            connection = Connection(urls[self._next % len(urls)], tapped=self._settings.tap)
            try:
                await connection.open(self._settings, self._name)
            except BackendConnectionError as exc:
                self._next += 1
                if not last:
                    raise
                _log.info("another address is tried: %s", exc)
            else:
                break
        else:
            raise AssertionError("unreachable: the last address raises")
        try:
            await self._prepare(connection)
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        return connection


class Control:
    """A channel for what is rare, one request at a time; the broker closes it with each error, and it is opened again.

    Args:
        link: Whose connection it is on.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = asyncio.Lock()
        self._channel: AbstractChannel | None = None
        self._owner: Connection | None = None

    async def connection(self) -> Connection:
        """Return the connection."""
        return await self._link.get()

    async def call(self, request: Callable[[AbstractChannel], Awaitable[_T]], on: Connection | None = None) -> _T:
        """Make a request. Who is cancelled stops waiting; the request is finished.

        Args:
            request: Made with the channel.
            on: A connection that is being prepared.

        Raises:
            AbeError: It failed. The native error is the cause.
        """
        return await finished(self._call(request, on))

    async def _call(self, request: Callable[[AbstractChannel], Awaitable[_T]], on: Connection | None) -> _T:
        async with self._lock:
            connection = on or PINNED.get() or await self._link.get()
            if not connection.alive:
                raise BackendConnectionError(f"the connection to rabbitmq at {connection.address} was lost")
            with translated(connection.address):
                if self._channel is None or self._owner is not connection or self._channel.is_closed:
                    self._channel, self._owner = await connection.plain(), connection
                return await request(self._channel)


def _check_files(url: URL) -> None:
    for option in _FILES:
        if option in url.query and not os.path.isfile(url.query[option]):
            raise ConfigurationError(f"{option} in RABBITMQ_URL names no file")


async def finished(work: Coroutine[Any, Any, _T]) -> _T:
    """Await something that goes on to its end even if the caller is cancelled: aiormq closes a channel whose request is cancelled."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(_retrieved)
    return await asyncio.shield(task)


def _retrieved(task: "asyncio.Future[Any]") -> None:
    if not task.cancelled():
        task.exception()


def _was_closed() -> BackendConnectionError:
    return BackendConnectionError("the connection to rabbitmq was closed")
