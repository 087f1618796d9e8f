"""Bounds that a slow or busy machine does not break: each is stretched by one measured factor, which `slowness` returns.

A bound is written for a quiet machine of the usual speed. The factor is the product of

- how long a fixed computation takes here, measured once, against what it takes on the machine that the bounds were written on;
- how many threads want a processor, for each that there is, on average over the time that the bound is about;
- ``ABE_CONTRACT_TIME_FACTOR``, for what this process cannot see: a slow disk, or a broker on another machine.

What is measured is never below 1, as a fast machine is no reason to fail a test sooner. A wait that is at its end looks at the factor of
the time that it has waited, and goes on where the machine was busy: nothing has to be known beforehand.
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Settings = TypeVar("_Settings", bound="DataclassInstance")

FACTOR_VARIABLE: Final = "ABE_CONTRACT_TIME_FACTOR"

_REFERENCE: Final = 0.0082
"""Seconds of processor time for `_computation` on the machine that the bounds were written on."""
_SAMPLE: Final = 0.1
"""Seconds between two looks at the machine."""
_REMEMBERED: Final = 600.0
"""Seconds for which looks are kept; a longer wait goes by these."""
_SHORTEST: Final = 2.0
"""Seconds that the average is taken over at least: less would be chance."""
_MOST: Final = 20.0
"""No machine is slower, or a test that hangs would hang for ever."""
_NOTICE: Final = 0.9
"""The part of a bound after which it is looked whether it must be stretched."""


def slowness(since: float | None = None) -> float:
    """Return how many times as long things take as on a quiet machine of the usual speed.

    Args:
        since: The moment, by ``time.monotonic()``, from which on the machine was looked at; the last seconds by default.
    """
    return min(_speed() * _METER.crowding(since) * _asked_for(), _MOST)


def within(seconds: float | None) -> asyncio.Timeout:
    """Bound a wait by that many seconds, as ``asyncio.timeout`` does, stretched while it lasts. None bounds nothing."""
    timeout = asyncio.timeout(seconds)
    if seconds is None:
        return timeout
    loop = asyncio.get_running_loop()
    began, began_by_loop = time.monotonic(), loop.time()
    bound = seconds

    def stretch() -> None:
        due = began_by_loop + bound * slowness(began)
        try:
            if due > (timeout.when() or 0.0):
                timeout.reschedule(due)
        except RuntimeError:
            return  # it is over, or was never entered
        if (remaining := due - loop.time()) > _SAMPLE:
            loop.call_later(remaining * _NOTICE, stretch)

    loop.call_later(bound * _NOTICE, stretch)
    return timeout


def stretched(settings: _Settings) -> _Settings:
    """Return settings, a dataclass's, whose time-outs are as long as the machine needs now."""
    factor = slowness()
    timeouts = [field.name for field in fields(settings) if field.name.endswith("_timeout")]
    return replace(settings, **{name: factor * getattr(settings, name) for name in timeouts})


class Deadline:
    """The end of a wait in which nothing can be cancelled: ``while not deadline.passed: ...``."""

    def __init__(self, seconds: float) -> None:
        """Begin to wait.

        Args:
            seconds: On a quiet machine of the usual speed.
        """
        self._seconds = seconds
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """The seconds since it began."""
        return time.monotonic() - self._began

    @property
    def bound(self) -> float:
        """The seconds that it may take, as things have been since it began."""
        return self._seconds * slowness(self._began)

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self.elapsed > self._seconds and self.elapsed > self.bound


class _Meter:
    """Looks ten times a second how many threads want a processor. Its own thread starts with the first question."""

    def __init__(self, runnable: Callable[[], float], processors: int) -> None:
        self._runnable = runnable
        self._processors = processors
        self._lock = threading.RLock()  # a signal's handler may ask while its thread does
        self._thread: threading.Thread | None = None
        self._wanted = deque[tuple[float, float]](maxlen=int(_REMEMBERED / _SAMPLE))
        """The end of each period, and the sum over all periods of their length times how crowded the machine was."""

    def start(self) -> None:
        """Begin to look, if nobody has."""
        if self._thread is not None and self._thread.is_alive():  # a forked process inherits no threads
            return
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, name="machine-load", daemon=True)
                self._wanted.append((time.monotonic(), self._sum))
                self._thread.start()

    @property
    def _sum(self) -> float:
        return self._wanted[-1][1] if self._wanted else 0.0

    def crowding(self, since: float | None) -> float:
        """Return how many threads there were for each processor since then, on average; at least 1."""
        self.start()
        now = time.monotonic()
        begin = min(now - _SHORTEST if since is None else since, now - _SHORTEST)
        samples = list(self._wanted)
        first = next((sample for sample in samples if sample[0] >= begin), samples[-1])
        last = samples[-1]
        if last[0] <= first[0]:
            return max(1.0, self._runnable() / self._processors)
        return (last[1] - first[1]) / (last[0] - first[0])

    def _look(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(_SAMPLE)
            now = time.monotonic()
            crowded = max(1.0, self._runnable() / self._processors)
            self._wanted.append((now, self._sum + crowded * (now - before)))
            before = now


def _runnable_threads() -> float:
    """Return how many threads of this machine run or wait for a processor, this one left out."""
    try:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].partition("/")[0]) - 1
    except (OSError, IndexError, ValueError):
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _speed() -> float:
    took = min(_timed_computation() for _ in range(5))
    return max(1.0, took / _REFERENCE)


def _timed_computation() -> float:
    began = time.thread_time()
    value = 0
    for step in range(200_000):
        value = (value * 31 + step) & 0xFFFF
    return time.thread_time() - began


def _asked_for() -> float:
    return float(os.environ.get(FACTOR_VARIABLE, "1"))


_METER: Final = _Meter(_runnable_threads, _processors())
