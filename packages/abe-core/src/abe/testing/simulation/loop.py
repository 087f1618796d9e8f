"""The event loop of one simulated host: asyncio's own, without a selector, on a time that the world gives it."""

import asyncio
import heapq
import sys
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import Context
from itertools import count
from typing import Any, Final, TypeVar

_T = TypeVar("_T")
_PRECISION: Final = 1e-7
"""Seconds by which a timer may be early: what is lost when a host's time is converted to the world's and back."""


class _Future(asyncio.Future[Any]):
    """A future whose hash is the same in each run: `asyncio.wait` goes through a set."""

    serial: int

    def __hash__(self) -> int:
        return self.serial


class Task(asyncio.Task[Any]):
    """A task whose hash is the same in each run."""

    serial: int

    def __new__(cls, *_: object, serial: int, **__: object) -> "Task":
        task = super().__new__(cls)  # not in __init__: asyncio puts the task into a set there
        task.serial = serial
        return task

    def __init__(self, *arguments: Any, serial: int, **options: Any) -> None:
        super().__init__(*arguments, **options)

    def __hash__(self) -> int:
        return self.serial


class HostLoop(asyncio.BaseEventLoop):
    """An event loop that runs when its world says so. It has no sockets, no files and no signals.

    Args:
        name: The host's name, for the names of tasks.
        now: Returns the host's time in seconds.
        troubled: Gets what asyncio reports: an exception that nobody retrieved, a task that was destroyed.
    """

    # Of asyncio.BaseEventLoop, for the type checker.
    _ready: Any
    _scheduled: Any
    _asyncgen_firstiter_hook: Any
    _asyncgen_finalizer_hook: Any

    def __init__(self, name: str, now: Callable[[], float], troubled: Callable[[str], object]) -> None:
        super().__init__()
        self.name = name
        self.tasks: dict[asyncio.Task[Any], None] = {}
        """Those that have not ended."""
        self._buried = False
        self._now = now
        self._serial = count(1).__next__
        self._clock_resolution = _PRECISION
        self.set_exception_handler(lambda _, context: troubled(_text_of(context)))

    def time(self) -> float:
        """Return the host's time in seconds."""
        return self._now()

    def create_future(self) -> "asyncio.Future[Any]":
        """Return a future of this loop."""
        future = _Future(loop=self)
        future.serial = self._serial()
        return future

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, _T] | Generator[Any, None, _T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> "asyncio.Task[_T]":
        """Return a task that runs the coroutine."""
        if self._buried:
            coro.close()
            return self.create_future()  # type: ignore[return-value]
        serial = self._serial()
        task: asyncio.Task[_T] = Task(
            coro, loop=self, name=name or f"{self.name}-{serial}", context=context, serial=serial
        )
        self.tasks[task] = None
        task.add_done_callback(self.tasks.pop)
        return task

    def run_in_executor(self, executor: object, func: object, *args: object) -> Any:
        """Refuse: a thread has no part in virtual time.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("a simulated process has no executor and no asyncio.to_thread: its time is virtual")

    def due(self, now: float) -> bool:
        """Whether something is ready, or a timer is due.

        Args:
            now: The host's time.
        """
        if self._ready:
            return True
        timers = self._scheduled
        return bool(timers) and timers[0]._when <= now + _PRECISION

    def mature(self) -> None:
        """Make ready what is due."""
        timers = self._scheduled
        if timers:
            now = self._now() + _PRECISION
            while timers and (timers[0]._cancelled or timers[0]._when <= now):
                self._take_timer()

    def next_timer(self) -> float | None:
        """When the next timer is due, by the host's time; None: there is none."""
        while self._scheduled and self._scheduled[0]._cancelled:
            self._take_timer()
        return self._scheduled[0]._when if self._scheduled else None

    def width(self) -> int:
        """How many callbacks are ready."""
        return len(self._ready)

    @contextmanager
    def entered(self) -> Generator[None]:
        """Be the running event loop, for `step`."""
        hooks = sys.get_asyncgen_hooks()
        asyncio._set_running_loop(self)
        sys.set_asyncgen_hooks(self._asyncgen_firstiter_hook, self._asyncgen_finalizer_hook)
        try:
            yield
        finally:
            sys.set_asyncgen_hooks(*hooks)
            asyncio._set_running_loop(None)

    def step(self, place: int = 0) -> None:
        """Run the ready callback at that place in the queue."""
        handle = self._ready[place]
        del self._ready[place]
        if not handle._cancelled:
            handle._run()

    def kill(self) -> object:
        """End it as SIGKILL does: nothing runs any more, no ``finally`` either.

        Returns:
            What has to be kept alive until `bury`, so that no ``finally`` runs because of the garbage collector.
        """
        rest = list(self._ready), list(self._scheduled)
        self._ready.clear()
        self._scheduled.clear()
        self._closed = True
        return rest

    def bury(self) -> None:
        """Close what is left of it, silently; the world is over by now."""
        self._closed = self._buried = True  # what is closed below may call it, and is not heard
        self.set_exception_handler(_unheard)
        for task in list(self.tasks):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            coroutine = task.get_coro()
            for _ in range(20):  # each ``finally`` that awaits refuses once
                try:
                    if coroutine is not None:  # pyright: ignore[reportUnnecessaryComparison]
                        coroutine.close()
                except BaseException:  # noqa: BLE001 - of a host that is dead
                    continue
                break
        self.tasks.clear()
        self._ready.clear()
        self._scheduled.clear()

    def _check_closed(self) -> None:
        if not self._buried:
            super()._check_closed()  # type: ignore[misc]

    def _take_timer(self) -> None:
        """Take the first timer: what is cancelled is gone, the rest is ready."""
        timer = heapq.heappop(self._scheduled)
        timer._scheduled = False
        if timer._cancelled:
            self._timer_cancelled_count: int = max(0, self._timer_cancelled_count - 1)
        else:
            self._ready.append(timer)

    def _write_to_self(self) -> None:
        """Nothing sleeps that would have to be woken."""

    def _process_events(self, event_list: object) -> None:
        """There are no sockets."""


def _unheard(_: object, __: object) -> None:
    """Drop what asyncio reports of a host that is dead."""


def _text_of(context: dict[str, Any]) -> str:
    exception = context.get("exception")
    return f"{context.get('message')}: {exception!r}" if exception is not None else str(context.get("message"))
