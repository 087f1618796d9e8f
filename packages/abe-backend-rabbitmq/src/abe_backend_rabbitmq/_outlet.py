"""The connection to publish: the channel that everything goes out by, and another for each look into a queue."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from abe.errors import AbeError, BackendConnectionError, BackpressureError, PublishUnknownError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._browser import Browser
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import PINNED, Connection, Control, Link
from abe_backend_rabbitmq._errors import ChannelNotFound, translated
from abe_backend_rabbitmq._settings import RabbitMQSettings
from abe_backend_rabbitmq._wire import Header

_TRIES, _PAUSE = 200, 0.005
_HALF: Final = 0.5
"""Of the publish timeout: how long a broker that is short of memory or disk is waited for."""


class Outlet:
    """Publishes, and counts and looks at what is in queues.

    Args:
        settings: Where to, and as whom.
        prepare: Makes what every namespace has; run on each new connection, and again when the broker closed the channel.
    """

    def __init__(self, settings: RabbitMQSettings, prepare: Callable[[Connection], Awaitable[None]]) -> None:
        self._settings = settings
        self._prepare = prepare
        self._link = Link(settings, "abe-publish", prepare)
        self.control = Control(self._link)
        self._channel: Channel | None = None
        self._owner: Connection | None = None
        self._opening = asyncio.Lock()

    async def open(self) -> Channel:
        """Return the channel, opened where there is none.

        Raises:
            AbeError: There is none to be had.
        """
        if self._channel is not None and self._channel.closed is None:
            return self._channel
        async with self._opening:
            if self._channel is None or self._channel.closed is not None:
                connection = await self._link.get()
                if connection is self._owner:  # the broker closed the channel alone: what was published to may be gone
                    await self._prepare(connection)
                self._channel = await connection.channel()
                self._owner = connection
            return self._channel

    async def prepare(self) -> None:
        """Make again what was deleted of what every namespace has."""
        await self.open()
        if self._owner is not None:
            await self._prepare(self._owner)

    async def close(self) -> None:
        """Disconnect."""
        await self._link.close()

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[AbeError | None]:
        """Publish, and return each one's outcome; nothing when all were accepted.

        Raises:
            BackendConnectionError: Nothing was published.
        """
        channel = await self.open()
        connection = self._owner
        if connection is not None and connection.blocked:
            try:
                async with asyncio.timeout(self._settings.publish_timeout * _HALF):
                    await connection.unblocked()
            except TimeoutError:
                full = BackpressureError(
                    f"rabbitmq at {connection.address} takes no messages now: it is short of memory or disk"
                )
                return [full] * len(messages)
        return await self._publish(channel, messages, bounded=True)

    async def move(self, messages: Sequence[Outgoing], *, bounded: bool = False) -> Sequence[AbeError | None]:
        """Publish copies of messages that we hold.

        Args:
            messages: The copies.
            bounded: Whether they are new to the group, so that its backlog must not grow beyond its limit.

        Raises:
            BackendConnectionError: Some were not accepted for sure; repeating all of them doubles some at worst.
        """
        outcomes = await self._publish(await self.open(), messages, bounded=bounded)
        unknown = next((error for error in outcomes if isinstance(error, PublishUnknownError)), None)
        if unknown is not None:
            raise BackendConnectionError(str(unknown)) from unknown
        return outcomes

    async def _publish(
        self, channel: Channel, messages: Sequence[Outgoing], *, bounded: bool
    ) -> Sequence[AbeError | None]:
        if not messages:  # no confirm would ever come
            return ()
        if not bounded or self._settings.max_backlog is None:
            return await channel.publish(messages)
        # A queue says that it is full after it took what fills it: only one at a time finds out.
        outcomes: list[AbeError | None] = []
        for message in messages:
            try:
                outcomes += await channel.publish([message]) or (None,)
            except BackendConnectionError as exc:  # those before it are there
                outcomes.append(exc)
        return outcomes if any(outcomes) else ()

    async def count(self, queue: str) -> int | None:
        """Return how many messages a queue has that nobody holds; None: there is no such queue."""
        try:
            declared = await self.control.call(lambda channel: channel.queue_declare(queue, passive=True))
        except BackendConnectionError as exc:
            if isinstance(exc.__cause__, ChannelNotFound):
                return None
            raise
        return declared.message_count or 0

    @asynccontextmanager
    async def browse(
        self,
        queue: str,
        keep: Callable[[Header, bytes], bool] = lambda header, body: True,
        *,
        emptying: bool = False,
    ) -> AsyncGenerator[Browser | None, None]:
        """Look through a queue; None: there is nothing in it. The lock must be held. See `Browser`."""
        count = await self.count(queue)
        if not count:
            yield None
            return
        connection = PINNED.get() or await self._link.get()  # the lock is that connection's
        browser = Browser(await connection.channel(), queue, count, keep, emptying=emptying)
        try:
            with translated(connection.address):
                await browser.open()
            yield browser
        finally:
            with translated(connection.address):
                await browser.close()
            for _ in range(_TRIES):  # they are back before the lock is free
                if (await self.count(queue) or 0) >= count - browser.removed:
                    break
                await asyncio.sleep(_PAUSE)


def moved(exchange: str, key: str, header: Header, body: bytes) -> Outgoing:
    """Return the copy that takes a message elsewhere, as one that was never delivered."""
    properties = _wire.copy(header, body, 0)
    return Outgoing(exchange, key, properties, body, _wire.message_id(properties))
