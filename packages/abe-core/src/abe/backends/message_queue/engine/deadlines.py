"""Deadlines that share one timer of the event loop.

`asyncio.timeout` schedules a timer and cancels it again, which costs more than all the rest of publishing into memory. Hardly any of
these deadlines ever passes, so one timer, for the earliest of them, serves all: it ends the blocks whose deadline has passed, and is
scheduled again for the earliest that is left.
"""

import asyncio
import math
from types import TracebackType
from typing import Any


class Deadlines:
    """The deadlines of one event loop's tasks.

    Args:
        loop: The event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop: asyncio.AbstractEventLoop = loop
        self.open: dict[Bound, None] = {}
        """The bounds that are entered."""
        self.due: float = math.inf
        """When the timer is due, by the event loop's clock: at the earliest deadline, or before it."""
        self._timer: asyncio.TimerHandle | None = None

    def until(self, when: float) -> "Bound":
        """Return a bound for a ``with`` block: it ends the block with TimeoutError at that time, by the event loop's clock."""
        return Bound(self, when)

    def expire(self) -> None:
        """End all blocks now."""
        for bound in self.open:
            bound.expire()

    def close(self) -> None:
        """Cancel the timer. Bounds that are still open do not expire any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self.due = None, math.inf

    def arm(self, when: float) -> None:
        """Schedule the timer for that time."""
        self.close()
        self._timer, self.due = self.loop.call_at(when, self._look), when

    def _look(self) -> None:
        self._timer, self.due = None, math.inf
        now = self.loop.time()
        for bound in self.open:
            if bound.when <= now:
                bound.expire()
        if left := [bound.when for bound in self.open if bound.when > now]:
            self.arm(min(left))


class Bound:
    """Ends a ``with`` block of the running task as `asyncio.timeout` does: by cancelling the task, and raising TimeoutError instead of
    that cancellation, unless the task was cancelled by another caller too.

    Args:
        deadlines: Has the timer.
        when: The deadline, by the event loop's clock.
    """

    __slots__ = ("_cancelling", "_deadlines", "_expired", "_task", "when")

    def __init__(self, deadlines: Deadlines, when: float) -> None:
        self._deadlines = deadlines
        self._expired = False
        self.when: float = when

    def __enter__(self) -> None:
        deadlines = self._deadlines
        task: asyncio.Task[Any] | None = asyncio.current_task(deadlines.loop)
        assert task is not None, "only a task can be cancelled"
        self._task = task
        self._cancelling = task.cancelling()
        deadlines.open[self] = None
        if self.when < deadlines.due:
            deadlines.arm(self.when)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self._deadlines.open[self]
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self) -> None:
        """End the block now. Idempotent."""
        if not self._expired:
            self._expired = True
            self._task.cancel()
