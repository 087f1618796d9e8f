"""A clock that stands still until a test moves it."""

import asyncio
import heapq
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base.clock import Clock

_TURNS: Final = 50
"""Event-loop iterations after each timer: a settlement, its way through the engine and a new delivery need 20."""


class _Timer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback = callback
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def fire(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self._run)
        except RuntimeError:
            self.cancelled = True  # its event loop was closed: no task waits

    def _run(self) -> None:
        if not self.cancelled:
            self.callback()


class ManualClock:
    """A `Clock` for tests: leases, delays and backoffs run out when the test advances it, without waiting.

    Args:
        start: The initial time in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._serial = count()
        self._timers: list[tuple[float, int, _Timer]] = []

    def time(self) -> float:
        """Return the time in seconds."""
        return self._now

    def call_at(self, when: float, callback: Callable[[], object]) -> _Timer:
        """Call `callback` in the running event loop once the time is `when`; soon, if it is already."""
        timer = _Timer(callback)
        if when <= self._now:
            timer.fire()
        else:
            heapq.heappush(self._timers, (when, next(self._serial), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Advance the time: timers that become due fire in their order, each at its own time.

        After each, the event loop runs some iterations. Work that needs more (a thread, a socket) may still be in
        progress when this returns: wait for its effect.

        Args:
            seconds: How far to advance.

        Raises:
            ValueError: `seconds` is below zero.
        """
        if not seconds >= 0:
            raise ValueError(f"a clock only goes forward: seconds must be at least 0, not {seconds!r}")
        await _settle()
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            if not timer.cancelled:
                timer.fire()
                await _settle()
        self._now = end
        await _settle()


async def _settle() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)


if TYPE_CHECKING:
    _: type[Clock] = ManualClock
