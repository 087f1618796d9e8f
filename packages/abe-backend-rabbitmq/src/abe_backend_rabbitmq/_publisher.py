"""The connection that publishes, and its channel."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from abe.backends.message_queue.base.tasks import SharedTask
from abe.errors import AbeError, BackendConnectionError, PublishUnknownError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import Connection, Link
from abe_backend_rabbitmq._errors import BlockedError
from abe_backend_rabbitmq._settings import RabbitMQSettings
from abe_backend_rabbitmq._wire import Header

_MOMENT: Final = 1.0
"""Seconds that `move` waits for a broker that is short of memory or disk."""

_HALF: Final = 0.5
"""The share of the publish timeout that `publish` waits for a broker that is short of memory or disk."""


class Publisher:
    """Publishes on one channel, which is opened again after a loss.

    Args:
        settings: The provider's settings.
        prepare: Declares what every namespace has; called before each new channel.
    """

    def __init__(self, settings: RabbitMQSettings, prepare: Callable[[], Awaitable[None]]) -> None:
        self._settings = settings
        self._prepare = prepare
        self._link = Link(settings, "abe-publish")
        self._channel: Channel | None = None
        self._owner: Connection | None = None
        self._opening = SharedTask(self._open)  # who has little time does not begin it anew each time

    async def open(self) -> Channel:
        """Return the channel; open one if there is none.

        Raises:
            AbeError: No channel could be opened.
        """
        if self._channel is not None and self._channel.closed is None:
            return self._channel
        return await self._opening.join()

    async def _open(self) -> Channel:
        connection = await self._link.get()
        await self._prepare()  # the exchanges may have been deleted
        self._channel, self._owner = await connection.channel(), connection
        return self._channel

    async def close(self) -> None:
        """Close the connection."""
        await self._opening.close()
        await self._link.close()

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[AbeError | None]:
        """Publish, and return an outcome for each message; empty when all were accepted.

        Raises:
            BackendConnectionError: Nothing was published.
            BackpressureError: Nothing was published: the broker is short of memory or disk.
        """
        channel = await self.open()
        await self._unblocked(self._settings.publish_timeout * _HALF)
        return await self._publish(channel, messages, bounded=True)

    async def move(self, messages: Sequence[Outgoing], *, bounded: bool = False) -> Sequence[AbeError | None]:
        """Publish copies of messages that are in flight here.

        Args:
            messages: The copies.
            bounded: Whether they add to the group's backlog, so that its limit applies.

        Raises:
            BackendConnectionError: Some may not be stored; repeating all of them may duplicate some.
            BlockedError: The same; the broker is short of memory or disk.
        """
        channel = await self.open()
        await self._unblocked(_MOMENT)
        publishing = asyncio.ensure_future(self._publish(channel, messages, bounded=bounded))
        while True:
            await asyncio.wait([publishing], timeout=_MOMENT)
            if publishing.done():
                break
            if self.blocked:
                publishing.cancel()  # this ends the wait only: the broker may still store the copies
                raise self._out_of_resources()
        outcomes = publishing.result()
        unknown = next((error for error in outcomes if isinstance(error, PublishUnknownError)), None)
        if unknown is not None:
            raise BackendConnectionError(str(unknown)) from unknown
        return outcomes

    @property
    def blocked(self) -> bool:
        """Whether the broker has said that it takes no messages now."""
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
        # A queue refuses messages only after it stored the one that fills it: a batch would exceed the limit.
        outcomes: list[AbeError | None] = []
        for message in messages:
            try:
                outcomes += await channel.publish([message]) or (None,)
            except BackendConnectionError as exc:  # those before it were accepted
                outcomes.append(exc)
        return outcomes if any(outcomes) else ()


def moved(
    exchange: str, key: str, header: Header, body: bytes, extra: Sequence[tuple[str, str | int]] = ()
) -> Outgoing:
    """Return the copy that moves a message to another queue, with its attempts at 0."""
    properties = _wire.copy(header, body, 0, *extra)
    return Outgoing(exchange, key, properties, body, _wire.message_id(properties))
