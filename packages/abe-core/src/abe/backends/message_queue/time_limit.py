"""A time limit for handlers, kept by one timer for all of them: ``asyncio.timeout`` for each would cost more than the rest of the loop."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

_PRECISION: Final = 0.1
"""A handler is cancelled at most that part of the limit late."""


class TimeLimit:
    """Cancels handlers that take longer than `limit` seconds.

    Args:
        limit: Seconds. A handler is cancelled between that and a tenth more.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._deadlines: dict[asyncio.Task[Any], float | None] = {}
        self._timer = self._loop.call_later(limit * _PRECISION, self._sweep)

    async def run(self, call: Callable[[Any], Awaitable[object]], message: Any) -> object:
        """Await ``call(message)``.

        Raises:
            TimeoutError: It took longer than the limit.
        """
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        self._deadlines[task] = self._loop.time() + self._limit
        try:
            return await call(message)
        finally:
            # None: the sweep has cancelled the task. If nobody else has, that ends here, whatever the handler made of it.
            if self._deadlines.pop(task) is None and task.uncancel() <= before:
                raise TimeoutError(f"the handler took longer than {self._limit:g} s")

    def close(self) -> None:
        """Watch no longer."""
        self._timer.cancel()

    def _sweep(self) -> None:
        now = self._loop.time()
        for task, deadline in self._deadlines.items():
            if deadline is not None and deadline <= now:
                self._deadlines[task] = None
                task.cancel()
        self._timer = self._loop.call_later(self._limit * _PRECISION, self._sweep)
