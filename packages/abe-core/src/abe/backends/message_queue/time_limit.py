"""A time limit for handlers, with one timer for all: an ``asyncio.timeout`` for each would cost more than the rest of the loop."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.threads import ThreadCall

_log: Final = Log("abe.consumer")
_T = TypeVar("_T")
_PRECISION: Final = 0.1
"""How late a handler may be cancelled, as a fraction of the limit."""


class TimeLimit:
    """Cancels handlers that take longer than `limit` seconds.

    Args:
        limit: Seconds. A handler is cancelled after that time, at most a tenth of it late.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._deadlines: dict[asyncio.Task[Any], float] = {}
        self._cancelled: dict[asyncio.Task[Any], int] = {}
        """How often the sweep has cancelled each task: a handler that ignores it is cancelled again."""
        self._calls: dict[asyncio.Task[Any], ThreadCall] = {}
        self._timer = self._loop.call_later(limit * _PRECISION, self._sweep)

    async def run(self, call: Callable[[Any], Coroutine[Any, Any, _T]], message: Any, *, in_thread: bool = False) -> _T:
        """Await ``call(message)``.

        Args:
            call: The handler.
            message: Its message.
            in_thread: Whether the time counts only from the call of `began`, when a thread starts the handler.

        Raises:
            TimeoutError: The handler took longer than the limit.
        """
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        self._deadlines[task] = math.inf if in_thread else self._loop.time() + self._limit
        try:
            return await call(message)
        finally:
            if in_thread:
                self._calls.pop(task, None)
            del self._deadlines[task]
            if self._cancelled and self._uncancel(task) and task.cancelling() <= before:
                # Only the sweep has cancelled this task, so the cancellation ends here, whatever the handler did with it.
                raise TimeoutError(f"the handler took longer than {self._limit:g} s")

    def began(self, call: ThreadCall) -> None:
        """Start the time of the current task: its call has a thread."""
        task = asyncio.current_task()
        assert task is not None
        self._calls[task] = call
        self._deadlines[task] = self._loop.time() + self._limit

    def close(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    def _sweep(self) -> None:
        self._timer = self._loop.call_later(self._limit * _PRECISION, self._sweep)
        now = self._loop.time()
        for task, deadline in self._deadlines.items():
            if deadline > now:
                continue
            call = self._calls.get(task)
            left = 0.0 if call is None else self._left(call)
            self._deadlines[task] = now + (left if left > 0 else self._limit)
            if left <= 0:
                self._cancelled[task] = times = self._cancelled.get(task, 0) + 1
                task.cancel()
                if times == 2:
                    _log.warning(
                        "a handler ignores the cancellation at its time limit of %g s: cancelling it again", self._limit
                    )

    def _uncancel(self, task: asyncio.Task[Any]) -> bool:
        times = self._cancelled.pop(task, 0)
        for _ in range(times):
            task.uncancel()
        return times > 0

    def _left(self, call: ThreadCall) -> float:
        """Return the seconds that the call has left. On a busy machine a thread may start its call late."""
        return self._limit if call.began is None else call.began + self._limit - time.monotonic()
