"""Browses a queue: messages are taken a page at a time, some are removed, the others return to their places.

1. A quorum queue puts a returned message behind those that were returned before, and ahead of those that never were. So a browser takes
   every message that was ever returned, and keeps all of them until it is done.
2. Then it closes its channels in their order. The broker returns a channel's messages consumer by consumer, sorted by consumer tag as long
   as the consumers are few. So each page has a consumer of its own, and after some consumers another channel is opened.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from abe.backends.message_queue.base import Delivery
from abe.errors import BackendConnectionError
from abe_backend_rabbitmq._channel import Channel
from abe_backend_rabbitmq._connection import Connection, run_to_completion
from abe_backend_rabbitmq._control import Control
from abe_backend_rabbitmq._errors import translated
from abe_backend_rabbitmq._wire import Header

PAGE: Final = 500
"""Messages in a page at most."""

PAGE_BYTES: Final = 4 * 1024 * 1024
"""Bytes of bodies after which a page ends."""

_MOST: Final = 8 * PAGE_BYTES
"""Bytes of bodies in memory, approximately: the size of a message is known only when it arrives."""

_FIRST, _GROWTH = 8, 4
"""Messages of the first page, and the factor by which the next one may grow: the sizes are not known in advance."""

_CONSUMERS: Final = 24
"""Consumers of one channel. (An Erlang map is sorted up to 32 keys.)"""

_QUIET: Final = 0.5
"""Seconds without another message after which the queue is asked whether it has any."""

_REST: Final = 2_000
"""Messages taken at a time when their bodies are not kept."""

_MARK: Final = b"x-delivery-count"
"""In the properties of a message that was returned before."""

_TRIES, _PAUSE = 400, 0.005

_PLACEHOLDER: Final = Delivery(b"", None, 1, 0), Header(b"", "", "")
"""Stands for each message taken: only its tag is needed."""

Found: TypeAlias = tuple[int, Header, bytes]
"""Delivery tag, header and body of a message."""


class Browser:
    """The messages that a queue held when browsing began, the oldest first.

    Args:
        control: Counts messages.
        connection: Its channels are used; it must own the lock that permits browsing.
        queue: The queue's name.
        count: How many messages the queue holds.
    """

    def __init__(self, control: Control, connection: Connection, queue: str, count: int) -> None:
        self._control = control
        self._connection = connection
        self._queue = queue
        self._left = count
        self._size = _FIRST
        self._channels: list[Channel] = []
        self._consumers = 0
        self._fresh_from = 0
        self._unsure = False
        self._keeping = True
        self._given_back = True
        self._due = 0
        self._ready: deque[Found] = deque()
        self._bytes = 0
        self._largest = 1
        self._passed = 0
        self._too_much = False
        self._arrived = asyncio.Event()

    async def page(self) -> Sequence[Found]:
        """Return the next messages, the oldest first; none at the end.

        Raises:
            BackendConnectionError: The channel was lost.
        """
        with translated(self._connection.address):
            while not self._ready and self._left:
                await self._take(min(self._left, self._size))
                if self._too_much:
                    await self._begin_again()
                elif self._ready:
                    fitting = PAGE_BYTES * len(self._ready) // max(self._bytes, 1)
                    self._size = max(1, min(PAGE, self._size * _GROWTH, fitting, _MOST // self._largest))
        page: list[Found] = []
        size = 0
        while self._ready and len(page) < PAGE and (not page or size + len(self._ready[0][2]) <= PAGE_BYTES):
            page.append(self._ready.popleft())
            size += len(page[-1][2])
        self._bytes -= size
        self._passed += len(page)
        return page

    async def remove(self, tags: Sequence[int]) -> None:
        """Acknowledge messages of the last page. Their removal is certain once the next page has been returned, or `close` has.

        Raises:
            BackendConnectionError: The channel was lost.
        """
        await self._channel().ack(tags)
        self._unsure = self._unsure or bool(tags)
        self._passed -= len(tags)

    async def rest(self, timeout: float) -> None:
        """Take the remaining messages that were ever returned, without keeping their bodies, so that `close` returns all in order.

        Args:
            timeout: Seconds after which the order is given up.
        """
        with translated(self._connection.address):
            try:
                async with asyncio.timeout(timeout):
                    await self._pass(lambda: self._left if self._given_back else 0)
            except TimeoutError:
                return

    async def close(self) -> None:
        """Return the messages that were not removed."""
        with translated(self._connection.address):
            if self._unsure and self._channels[-1].closed is None:
                # Acknowledgements can be lost with a channel, until the queue has answered a later request on it.
                await self._consume(1)
            for channel in self._channels:
                before = await self._control.count(self._queue, self._connection) or 0
                kept = len(channel.in_flight)
                if channel.closed is None:
                    channel.ended = None
                    await run_to_completion(channel.close())
                    await self._until(before + kept)  # they are back before the next channel's
        self._channels.clear()

    async def _begin_again(self) -> None:
        """Return the messages of a page that was too large, in order, and take them again in smaller pages."""
        passed = self._passed
        self._ready.clear()
        self._bytes, self._too_much = 0, False
        await self._pass(lambda: self._left)
        left = sum(len(channel.in_flight) for channel in self._channels)
        await self.close()
        self._left, self._size = left, max(1, min(_FIRST, _MOST // self._largest))
        await self._pass(lambda: passed - (left - self._left))

    async def _pass(self, left: Callable[[], int]) -> None:
        """Take messages without keeping their bodies, as long as `left` says that some are to be taken."""
        self._keeping = False
        while (count := min(left(), self._left)) > 0:
            await self._take(min(count, _REST))
        self._keeping = True

    async def _take(self, count: int) -> None:
        """Consume `count` messages.

        The consumer is cancelled when its prefetch is used up: what reaches a cancelled consumer is returned at once, out of order.
        """
        self._due = count
        consumer = await self._consume(count, cancel=False)
        while self._due > 0:
            self._arrived.clear()
            due = self._due
            try:
                async with asyncio.timeout(_QUIET):
                    await self._arrived.wait()
            except TimeoutError:
                if due == self._due and not await self._control.count(self._queue, self._connection):
                    self._left = 0  # a client that does not know of the lock took the others
                    break
            self._channel()
        await run_to_completion(self._channel().native.basic_cancel(consumer))

    async def _consume(self, count: int, *, cancel: bool = True) -> str:
        """Register a consumer, and return its tag. The queue has processed all earlier requests by then."""
        if not self._channels or self._consumers - self._fresh_from >= _CONSUMERS:
            if not self._channels or self._channels[-1].in_flight:
                channel = await self._connection.channel()
                channel.ended = self._arrived.set
                self._channels.append(channel)
            self._fresh_from = self._consumers
        self._consumers += 1
        channel = self._channel()
        tag = f"page-{self._consumers:06}"
        await run_to_completion(channel.consume(self._queue, count, self._deliver, tag))
        self._unsure = False
        if cancel:
            await run_to_completion(channel.native.basic_cancel(tag))
        return tag

    def _channel(self) -> Channel:
        channel = self._channels[-1]
        if channel.closed is not None:
            raise BackendConnectionError(channel.closed)
        return channel

    async def _until(self, count: int) -> None:
        """Wait until the queue holds that many messages again, but a few seconds at most."""
        for _ in range(_TRIES):
            if (await self._control.count(self._queue, self._connection) or 0) >= count:
                return
            await asyncio.sleep(_PAUSE)

    def _deliver(self, tag: int, header: Header, body: bytes, redelivered: bool) -> None:
        self._channels[-1].in_flight[tag] = _PLACEHOLDER
        self._due -= 1
        if self._due <= 0:
            self._arrived.set()
        if not self._left:
            return
        self._left -= 1
        self._given_back = _MARK in header.properties
        if not self._keeping or self._too_much:
            return
        self._ready.append((tag, header, body))
        self._bytes += len(body)
        self._largest = max(self._largest, len(body))
        self._too_much = self._bytes > _MOST and len(self._ready) > 1
