"""Looking through a queue: messages are taken, some are removed, the others go back to where they were.

A quorum queue gives back what was taken behind what was given back before, and ahead of what never was. So the order is kept by who takes
all there is, and leaves everything to the broker at once, by closing the channel.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final, TypeAlias

from abe.backends.message_queue.base import Delivery
from abe.errors import BackendConnectionError
from abe_backend_rabbitmq._channel import Channel
from abe_backend_rabbitmq._connection import finished
from abe_backend_rabbitmq._wire import Header

PAGE: Final = 500
_PATIENCE: Final = 5.0
"""Seconds without another message after which there are no more."""

_HELD: Final = Delivery(0, b"", None, 1), Header(b"", "", "")
"""Stands for each message in hand: no more than its tag is needed."""

Found: TypeAlias = tuple[int, Header, bytes]
"""Tag, what came with it, and body of a message."""


class Browser:
    """What a queue had when the look began, the oldest first.

    Args:
        channel: For this alone.
        queue: The queue.
        count: How many messages it has.
        keep: Chooses those to look at, as they come; the others stay in the queue, and no body of theirs in memory.
        emptying: Whether each page is removed before the next one is asked for: then the rest waits in the broker.
    """

    def __init__(
        self, channel: Channel, queue: str, count: int, keep: Callable[[Header, bytes], bool], *, emptying: bool = False
    ) -> None:
        self.removed = 0
        self._channel = channel
        self._queue = queue
        self._left = count
        self._keep = keep
        self._prefetch = PAGE if emptying else 0
        self._found: deque[Found] = deque()
        self._arrived = asyncio.Event()
        self._consumer = ""

    async def open(self) -> None:
        """Begin to take messages."""
        self._channel.ended = self._arrived.set
        self._consumer = await finished(self._channel.consume(self._queue, self._prefetch, self._deliver))

    async def pages(self) -> AsyncGenerator[Sequence[Found], None]:
        """Yield the chosen ones, up to `PAGE` at a time.

        Raises:
            BackendConnectionError: The channel was lost.
        """
        found = self._found
        while True:
            self._arrived.clear()
            if self._channel.closed is not None:
                raise BackendConnectionError(self._channel.closed)
            if len(found) >= PAGE or (found and not self._left):
                yield [found.popleft() for _ in range(min(PAGE, len(found)))]
            elif not self._left:
                return
            else:
                left = self._left
                try:
                    async with asyncio.timeout(_PATIENCE):
                        await self._arrived.wait()
                except TimeoutError:
                    if left == self._left:  # somebody who does not know of the lock took the others
                        self._left = 0

    async def remove(self, tags: Sequence[int]) -> None:
        """Remove messages for good.

        Raises:
            BackendConnectionError: The channel was lost.
        """
        if self._channel.closed is not None:
            raise BackendConnectionError(self._channel.closed)
        await self._channel.ack(tags)
        self.removed += len(tags)

    async def close(self) -> None:
        """Give back what was not removed.

        Acknowledgements can be lost with the channel that they were sent by, until the queue answered it something that came after them:
        cancelling the consumer is such a thing.
        """
        if self._channel.closed is None:
            await finished(self._channel.native.basic_cancel(self._consumer))
        if self._channel.closed is None:
            await finished(self._channel.close())

    def _deliver(self, tag: int, header: Header, body: bytes, redelivered: bool) -> None:
        self._channel.held[tag] = _HELD
        if self._left:
            self._left -= 1
            if self._keep(header, body):
                self._found.append((tag, header, body))
            if not self._left or len(self._found) == PAGE:
                self._arrived.set()
