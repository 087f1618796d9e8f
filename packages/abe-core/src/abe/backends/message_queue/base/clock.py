"""What leases, delays and backoffs are measured by: real time, or a clock that a test moves."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """Something that was scheduled."""

    def cancel(self) -> None:
        """Do not call it after all."""
        ...


class Clock(Protocol):
    """A clock that only goes forward. Its seconds count from anywhere."""

    def time(self) -> float:
        """Return the time in seconds."""
        ...

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Call `callback` in the running event loop once the time is `when`."""
        ...


class MonotonicClock:
    """Real time, the same in every event loop, thread and process of the machine."""

    def time(self) -> float:
        """Return ``time.monotonic()``."""
        return time.monotonic()

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Call `callback` in the running event loop once the time is `when`."""
        return asyncio.get_running_loop().call_later(when - time.monotonic(), callback)


async def sleep(clock: Clock, seconds: float) -> None:
    """Wait that long by that clock."""
    done = asyncio.Event()
    timer = clock.call_at(clock.time() + seconds, done.set)
    try:
        await done.wait()
    finally:
        timer.cancel()


async def pause(ended: asyncio.Event, seconds: float) -> bool:
    """Wait that long in real time, or until the event is set; return whether it is."""
    try:
        async with asyncio.timeout(seconds):
            return await ended.wait()
    except TimeoutError:
        return False
