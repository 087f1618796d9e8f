"""Ends a test whose event loop stands still: no time-out of asyncio's can, as it needs the loop that stands."""

import asyncio
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

from abe_contract_tests.bounds import Deadline


class LoopStalledError(AssertionError):
    """Something kept the event loop busy, or blocked it; the traceback shows where it was."""


@contextmanager
def watching(seconds: float | None) -> Generator[None]:
    """Raise `LoopStalledError` inside of whatever runs when the running event loop has not turned for that long on a quiet machine.

    Does nothing without `seconds`, in other threads than the main one, and where there are no timer signals.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    loop = asyncio.get_running_loop()

    timers: list[asyncio.Handle] = []
    turned = Deadline(seconds)

    def stalled(*_: object) -> None:
        if (left := turned.bound - turned.elapsed) <= 0:
            raise LoopStalledError(f"the event loop did not turn for {turned.elapsed:g} s")
        signal.setitimer(signal.ITIMER_REAL, left)

    def beat() -> None:
        nonlocal turned
        turned = Deadline(seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        timers[:] = [loop.call_later(seconds / 4, beat)]

    before = signal.signal(signal.SIGALRM, stalled)
    beat()
    try:
        yield
    finally:
        timers[0].cancel()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
