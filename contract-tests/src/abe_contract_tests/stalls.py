"""Ends a test whose event loop is blocked: no timeout of asyncio can, as it needs the loop."""

import asyncio
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

from abe_contract_tests.bounds import Deadline


class LoopStalledError(AssertionError):
    """The event loop was blocked; the traceback shows where."""


@contextmanager
def watching(seconds: float | None) -> Generator[None]:
    """Raise `LoopStalledError` in the running code when the event loop has made no iteration for `seconds` (multiplied by `slowness`).

    Does nothing without `seconds`, in other threads than the main one, and on platforms without timer signals.
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
