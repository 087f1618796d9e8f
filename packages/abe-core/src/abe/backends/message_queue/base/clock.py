"""The clock of leases, delays and backoffs: real time, or a manual clock in tests."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A scheduled call."""

    def cancel(self) -> None:
        """Cancel the call."""
        ...


class Clock(Protocol):
    """A monotonic clock with an arbitrary start."""

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
    """Wait for a number of seconds of the clock."""
    done = asyncio.Event()
    timer = clock.call_at(clock.time() + seconds, done.set)
    try:
        await done.wait()
    finally:
        timer.cancel()


async def pause(ended: asyncio.Event, seconds: float) -> bool:
    """Wait for a number of seconds in real time, or until the event is set; return whether it is set."""
    try:
        async with asyncio.timeout(seconds):
            return await ended.wait()
    except TimeoutError:
        return False
