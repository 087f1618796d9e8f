"""Time bounds that allow for slow or busy machines: each is multiplied by one measured factor, which `slowness` returns.

A bound is written for an idle machine of reference speed. The factor is the product of

- the time of a fixed computation on this machine, measured once, relative to the reference machine;
- the number of runnable threads per processor, on average over the time that the bound covers;
- ``ABE_CONTRACT_TIME_FACTOR``, for anything that this process cannot measure: a slow disk, or a broker on another machine.

Each measured factor is at least 1, as a fast machine must not fail a test sooner. A wait whose time is over computes the factor for the
time that it has waited, and goes on if the machine was busy: nothing has to be known in advance.

The code under test may be given a longer time-out on a busy machine, by `allowance` or `stretched`. The bounds of the same test are
stretched by at least that factor, whatever the machine does later: the code may take that time.
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
"""Seconds of processor time for `_timed_computation` on the reference machine."""
_SAMPLE: Final = 0.1
"""Seconds between two samples of the machine's load."""
_REMEMBERED: Final = 600.0
"""Seconds for which samples are kept; a longer wait uses these."""
_SHORTEST: Final = 2.0
"""The shortest period for the average, in seconds: over a shorter one it would be random."""
_MOST: Final = 20.0
"""The limit of the factor, so that a test that hangs ends."""
_NOTICE: Final = 0.9
"""The fraction of a bound after which it is checked whether to extend it."""


def slowness(since: float | None = None) -> float:
    """Return the factor of a bound: how much slower this machine is than an idle one of reference speed, and no less than `allowance` was.

    Args:
        since: The start of the period, by ``time.monotonic()``; by default the last seconds.
    """
    return max(_given[0], min(_speed() * _METER.crowding(since) * _asked_for(), _MOST))


def allowance() -> float:
    """Return the factor of a time-out that the code under test is given, and remember it for the test's bounds."""
    _given[0] = slowness()
    return _given[0]


def forget() -> None:
    """Start a test: what was given to the code under test before does not stretch its bounds."""
    _given[0] = 1.0


def within(seconds: float | None) -> asyncio.Timeout:
    """Bound a wait like ``asyncio.timeout``, extended by `slowness` while it lasts. None: no bound."""
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
    """Return settings (a dataclass) with each timeout multiplied by `slowness`."""
    factor = allowance()
    timeouts = [field.name for field in fields(settings) if field.name.endswith("_timeout")]
    return replace(settings, **{name: factor * getattr(settings, name) for name in timeouts})


class Deadline:
    """The end of a polling wait: ``while not deadline.passed: ...``."""

    def __init__(self, seconds: float) -> None:
        """Start the time.

        Args:
            seconds: The bound on an idle machine of reference speed.
        """
        self._seconds = seconds
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    @property
    def bound(self) -> float:
        """The bound in seconds, multiplied by `slowness` since it began."""
        return self._seconds * slowness(self._began)

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self.elapsed > self._seconds and self.elapsed > self.bound


class _Meter:
    """Samples the number of runnable threads ten times a second, in a thread that the first call starts."""

    def __init__(self, runnable: Callable[[], float], processors: int) -> None:
        self._runnable = runnable
        self._processors = processors
        self._lock = threading.RLock()  # a signal handler may interrupt a caller
        self._thread: threading.Thread | None = None
        self._wanted = deque[tuple[float, float]](maxlen=int(_REMEMBERED / _SAMPLE))
        """The end of each period, and the integral of the load up to it."""

    def start(self) -> None:
        """Start sampling, if it has not started."""
        if self._thread is not None and self._thread.is_alive():  # a forked process inherits no threads
            return
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._sample_load, name="machine-load", daemon=True)
                self._wanted.append((time.monotonic(), self._sum))
                self._thread.start()

    @property
    def _sum(self) -> float:
        return self._wanted[-1][1] if self._wanted else 0.0

    def crowding(self, since: float | None) -> float:
        """Return the average number of runnable threads per processor since then; at least 1."""
        self.start()
        now = time.monotonic()
        begin = min(now - _SHORTEST if since is None else since, now - _SHORTEST)
        samples = list(self._wanted)
        first = next((sample for sample in samples if sample[0] >= begin), samples[-1])
        last = samples[-1]
        if last[0] <= first[0]:
            return max(1.0, self._runnable() / self._processors)
        return (last[1] - first[1]) / (last[0] - first[0])

    def _sample_load(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(_SAMPLE)
            now = time.monotonic()
            crowded = max(1.0, self._runnable() / self._processors)
            self._wanted.append((now, self._sum + crowded * (now - before)))
            before = now


def _runnable_threads() -> float:
    """Return the number of runnable threads of this machine, without the calling one."""
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


_given: Final = [1.0]
"""The largest factor by which a time-out of the code under test was stretched since the test began."""

_METER: Final = _Meter(_runnable_threads, _processors())
