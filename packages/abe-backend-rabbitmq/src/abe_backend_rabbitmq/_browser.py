"""Looking into a queue: messages are taken, some are removed, the rest goes back to where it was."""

import asyncio
from collections.abc import Sequence
from typing import Final, Self

from abe.backends.message_queue.base import Delivery
from abe.errors import BackendConnectionError
from abe_backend_rabbitmq._channel import Opened
from abe_backend_rabbitmq._wire import Header

_PATIENCE: Final = 5.0
_MOST_PREFETCHED: Final = 65_535


class Browser:
    """Messages that were taken from a queue. Closing their channel puts back those that were not removed.

    Args:
        channel: Theirs; None: there are none.
        found: Tag, what came with it, and body of each, the oldest first.
    """

    def __init__(self, channel: Opened | None, found: Sequence[tuple[int, Header, bytes]]) -> None:
        self._channel = channel
        self.found = found
        self.removed = 0

    @classmethod
    async def open(cls, channel: Opened, queue: str, wanted: int) -> Self:
        """Take that many messages, or fewer if there are fewer after all.

        Raises:
            BackendConnectionError: The connection was lost.
        """
        found: list[tuple[int, Header, bytes]] = []
        complete = asyncio.Event()

        def deliver(tag: int, header: Header, body: bytes, redelivered: bool) -> None:
            channel.held[tag] = Delivery(tag, b"", None, 1), header
            if len(found) < wanted:
                found.append((tag, header, body))
            if len(found) == wanted:
                complete.set()

        channel.ended = complete.set
        await channel.consume(queue, wanted if wanted <= _MOST_PREFETCHED else 0, deliver)
        try:
            async with asyncio.timeout(_PATIENCE):
                await complete.wait()
        except TimeoutError:
            pass  # somebody without the lock took the others
        if channel.closed is not None:
            raise BackendConnectionError(channel.closed)
        return cls(channel, found)

    async def remove(self, tags: Sequence[int]) -> None:
        """Remove messages for good."""
        if self._channel is None or not tags:
            return
        if self._channel.closed is not None:
            raise BackendConnectionError(self._channel.closed)
        await self._channel.ack(tags)
        self.removed += len(tags)
