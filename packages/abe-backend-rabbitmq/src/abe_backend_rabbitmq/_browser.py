"""Looking through a queue: messages are taken a page at a time, some are removed, the others go back to where they were.

A quorum queue gives back what was taken behind what was given back before, and ahead of what never was. So whoever looks takes all that
was ever given back, keeps it until it is through, and then leaves it to the broker by closing its channels, in their order. The broker
gives back what a channel held consumer by consumer, sorted by their tags as long as they are few: hence a consumer for each page, and
another channel after some of them.
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
"""Bytes of bodies in memory, about: nobody knows how large messages are before they come."""

_FIRST, _GROWTH = 8, 4
"""Messages of the first page, and how much longer the next one may be: nobody knows how large they are."""

_CONSUMERS: Final = 24
"""Consumers of one channel. (An Erlang map is sorted up to 32 keys.)"""

_QUIET: Final = 0.5
"""Seconds without another message after which the queue is asked whether it has any."""

_REST: Final = 2_000
"""Messages at a time when none of them is kept."""

_MARK: Final = b"x-delivery-count"
"""In the properties of a message that was given back before."""

_TRIES, _PAUSE = 400, 0.005

_PLACEHOLDER: Final = Delivery(b"", None, 1, 0), Header(b"", "", "")
"""Stands for each message in hand: no more than its tag is needed."""

Found: TypeAlias = tuple[int, Header, bytes]
"""Tag, what came with it, and body of a message."""


class Browser:
    """What a queue had when the look began, the oldest first.

    Args:
        control: Counts.
        connection: Whose channels are used; the lock under which one looks must be this connection's.
        queue: The queue.
        count: How many messages it has.
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
        """Return the next messages, the oldest first; none: that was all.

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
        """Remove messages of the last page for good. It is certain when the next page is there, or the browser is closed.

        Raises:
            BackendConnectionError: The channel was lost.
        """
        await self._channel().ack(tags)
        self._unsure = self._unsure or bool(tags)
        self._passed -= len(tags)

    async def rest(self, timeout: float) -> None:
        """Take the rest into hand unseen, for the sake of its order, as far as it was ever given back.

        Args:
            timeout: Seconds after which order counts for less.
        """
        with translated(self._connection.address):
            try:
                async with asyncio.timeout(timeout):
                    await self._pass(lambda: self._left if self._given_back else 0)
            except TimeoutError:
                return

    async def close(self) -> None:
        """Give back what was not removed."""
        with translated(self._connection.address):
            if self._unsure and self._channels[-1].closed is None:
                # What it acknowledged can be lost with a channel, until the queue answered it something that came after.
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
        """Forget what came, which was too much, and take it in smaller steps: each in its old place."""
        passed = self._passed
        self._ready.clear()
        self._bytes, self._too_much = 0, False
        await self._pass(lambda: self._left)
        left = sum(len(channel.in_flight) for channel in self._channels)
        await self.close()
        self._left, self._size = left, max(1, min(_FIRST, _MOST // self._largest))
        await self._pass(lambda: passed - (left - self._left))

    async def _pass(self, left: Callable[[], int]) -> None:
        """Take messages into hand without keeping them, as long as there are any left to take."""
        self._keeping = False
        while (count := min(left(), self._left)) > 0:
            await self._take(min(count, _REST))
        self._keeping = True

    async def _take(self, count: int) -> None:
        """Have `count` messages pushed, and wait for them.

        The consumer is cancelled when it can be given no more: what reaches it later is given back at once, out of order.
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
                    self._left = 0  # somebody who does not know of the lock took the others
                    break
            self._channel()
        await run_to_completion(self._channel().native.basic_cancel(consumer))

    async def _consume(self, count: int, *, cancel: bool = True) -> str:
        """Make a consumer. The queue has carried out by then what it was told before."""
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
        """Wait, for a moment, until the queue has that many again."""
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
