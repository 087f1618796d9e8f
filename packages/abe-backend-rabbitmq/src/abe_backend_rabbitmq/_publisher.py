"""The connection to publish: the channel that everything goes out by."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from abe.errors import AbeError, BackendConnectionError, PublishUnknownError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import Connection, Link
from abe_backend_rabbitmq._errors import BlockedError
from abe_backend_rabbitmq._settings import RabbitMQSettings
from abe_backend_rabbitmq._wire import Header

_MOMENT: Final = 1.0
"""Seconds for which copies of messages that we hold wait for a broker that is short of memory or disk."""

_HALF: Final = 0.5
"""Of the publish timeout: how long a broker that is short of memory or disk is waited for."""


class Publisher:
    """Publishes.

    Args:
        settings: Where to, and as whom.
        prepare: Makes what every namespace has; run for each new channel.
    """

    def __init__(self, settings: RabbitMQSettings, prepare: Callable[[], Awaitable[None]]) -> None:
        self._settings = settings
        self._prepare = prepare
        self._link = Link(settings, "abe-publish")
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
                await self._prepare()  # what was published to may be gone
                self._channel = await connection.channel()
                self._owner = connection
            return self._channel

    async def close(self) -> None:
        """Disconnect."""
        await self._link.close()

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[AbeError | None]:
        """Publish, and return each one's outcome; nothing when all were accepted.

        Raises:
            BackendConnectionError: Nothing was published.
            BackpressureError: Nothing was published: the broker is short of memory or disk.
        """
        channel = await self.open()
        await self._unblocked(self._settings.publish_timeout * _HALF)
        return await self._publish(channel, messages, bounded=True)

    async def move(self, messages: Sequence[Outgoing], *, bounded: bool = False) -> Sequence[AbeError | None]:
        """Publish copies of messages that we hold.

        Args:
            messages: The copies.
            bounded: Whether they are new to the group, so that its backlog must not grow beyond its limit.

        Raises:
            BackendConnectionError: Some were not accepted for sure; repeating all of them doubles some at worst.
            BlockedError: Likewise, and the broker is short of memory or disk.
        """
        channel = await self.open()
        await self._unblocked(_MOMENT)
        publishing = asyncio.ensure_future(self._publish(channel, messages, bounded=bounded))
        while True:
            await asyncio.wait([publishing], timeout=_MOMENT)
            if publishing.done():
                break
            if self.blocked:
                publishing.cancel()  # whoever is cancelled leaves alone: the copies may still be taken
                raise self._out_of_resources()
        outcomes = publishing.result()
        unknown = next((error for error in outcomes if isinstance(error, PublishUnknownError)), None)
        if unknown is not None:
            raise BackendConnectionError(str(unknown)) from unknown
        return outcomes

    @property
    def blocked(self) -> bool:
        """Whether the broker is known to take nothing now."""
        return self._owner is not None and self._owner.alive and self._owner.blocked

    async def unblocked(self) -> None:
        """Return once the broker takes messages again, or the connection is lost."""
        if self._owner is not None:
            await self._owner.unblocked()

    async def _unblocked(self, timeout: float) -> None:
        if self.blocked:
            try:
                async with asyncio.timeout(timeout):
                    await self.unblocked()
            except TimeoutError:
                raise self._out_of_resources() from None

    def _out_of_resources(self) -> BlockedError:
        address = "" if self._owner is None else f" at {self._owner.address}"
        return BlockedError(f"rabbitmq{address} takes no messages now: it is short of memory or disk")

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


def moved(
    exchange: str, key: str, header: Header, body: bytes, extra: Sequence[tuple[str, str | int]] = ()
) -> Outgoing:
    """Return the copy that takes a message elsewhere, as one that was never delivered."""
    properties = _wire.copy(header, body, 0, *extra)
    return Outgoing(exchange, key, properties, body, _wire.message_id(properties))
