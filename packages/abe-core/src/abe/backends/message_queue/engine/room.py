"""Bounds unconfirmed messages, and lets publishers wait for room."""

import asyncio
from collections import deque


class Room:
    """Counts unconfirmed messages and bytes.

    Args:
        max_count: Messages from which on there is no room.
        max_bytes: Bytes from which on there is no room.
    """

    def __init__(self, *, max_count: int, max_bytes: int) -> None:
        self.count: int = 0
        """Unconfirmed messages."""
        self.coming: int = 0
        """Waiters that were woken and have not entered yet: their places are reserved."""
        self.closed: bool = False
        """Whether it is closed: `wait` returns at once."""
        self._bytes = 0
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._empty: asyncio.Future[None] | None = None

    def full(self) -> bool:
        """Return whether a publisher has to wait."""
        return self._taken(self.coming)

    def enter(self, size: int) -> None:
        """Count a message of that many bytes."""
        self.count += 1
        self._bytes += size

    def leave(self, count: int, size: int) -> None:
        """Count messages, of that many bytes together, no more."""
        self.count -= count
        self._bytes -= size
        self._wake(count)
        if self._empty is not None and not self.count and not self._empty.done():
            self._empty.set_result(None)

    async def wait(self, deadline: float) -> bool:
        """Wait until there is room, or this is closed; return False if the deadline, by the event loop's clock, comes first."""
        woken = False
        while self._taken(0 if woken else self.coming):
            future: asyncio.Future[None] = self._loop.create_future()
            (self._waiting.appendleft if woken else self._waiting.append)(future)
            try:
                async with asyncio.timeout_at(deadline):
                    await future
            except TimeoutError:
                self._hand_on(future)
                return False
            except asyncio.CancelledError:
                self._hand_on(future)
                raise
            self.coming -= 1
            woken = True
        self._loop.call_soon(self._more)
        return True

    async def empty(self, timeout: float) -> None:
        """Wait until nothing is unconfirmed, for so many seconds at most."""
        if self.count:
            self._empty = self._loop.create_future()
            await asyncio.wait([self._empty], timeout=timeout)

    def release(self) -> None:
        """Wake all waiters."""
        self._wake(len(self._waiting))

    def _taken(self, coming: int) -> bool:
        return (self.count + coming >= self._max_count or self._bytes >= self._max_bytes) and not self.closed

    def _more(self) -> None:
        # One large message makes room for many small ones: each waiter that enters wakes the next.
        if not self.full():
            self._wake(1)

    def _hand_on(self, future: "asyncio.Future[None]") -> None:
        if future.done() and not future.cancelled():
            self.coming -= 1
            self._wake(1)  # woken, and timed out or cancelled at the same moment: the next waiter gets its place

    def _wake(self, places: int) -> None:
        while places and self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                self.coming += 1
                places -= 1
