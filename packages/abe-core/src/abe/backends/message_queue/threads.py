"""The threads of synchronous handlers. A handler that hangs keeps its thread; no message is taken for a thread that is not available."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, Final

from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.report import reason_of

_log: Final = Log("abe.consumer")


class ThreadCall:
    """A call of a handler in a thread.

    Args:
        function: The handler.
        message: Its argument.
        future: Done when the call has ended, with a pair: the returned value, and the raised exception or None.
    """

    def __init__(
        self,
        function: Callable[[Any], object],
        message: Any,
        future: "asyncio.Future[tuple[object, BaseException | None]]",
    ) -> None:
        self._function = function
        self._message = message
        self._context = copy_context()
        self.future = future
        self.began: float | None = None
        """When the thread started it, by ``time.monotonic``."""
        self.abandoned = False
        """Whether its caller was cancelled and no longer waits."""

    def run(self) -> tuple[object, BaseException | None]:
        """Call the handler. Runs in the thread."""
        self.began = time.monotonic()
        try:
            return self._context.run(self._function, self._message), None
        except BaseException as exc:  # noqa: BLE001 - raised by the awaiting task: a future takes no StopIteration
            return None, exc


class Threads:
    """A bounded pool of daemon threads.

    A cancelled call continues in its thread, which is then *stuck*. `ready` blocks one caller for each stuck thread.

    Args:
        most: The maximum number of threads.
        group: The group's name, for the log.
    """

    def __init__(self, most: int, group: str) -> None:
        self._most = most
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[ThreadCall | None] = SimpleQueue()
        self._started = 0
        self._busy: set[ThreadCall] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._kept_back: deque[asyncio.Future[None]] = deque()
        self._closed = False

    @property
    def exhausted(self) -> bool:
        """Whether every thread is stuck in an abandoned call."""
        return len(self._busy) >= self._most and all(call.abandoned for call in self._busy)

    async def run(
        self, function: Callable[[Any], object], message: Any, begun: Callable[[ThreadCall], object]
    ) -> object:
        """Call ``function(message)`` in a thread, in a copy of the context, as soon as one is free.

        Args:
            function: The handler.
            message: Its argument.
            begun: Called with the call once it has a thread.
        """
        while len(self._busy) >= self._most:
            await self._turn(self._waiting)
        call = ThreadCall(function, message, self._loop.create_future())
        self._busy.add(call)
        try:
            if self._started < len(self._busy):
                threading.Thread(target=self._work, name=f"abe-handler_{self._started}", daemon=True).start()
                self._started += 1
        except RuntimeError:
            self._busy.discard(call)  # the process may have no more threads
            raise
        self._calls.put(call)
        begun(call)
        try:
            result, exc = await call.future
        except asyncio.CancelledError:
            if not call.future.done() or call.future.cancelled():
                if call in self._busy:
                    call.abandoned = True
                    self._report_stuck()
                raise
            result, exc = call.future.result()  # it ended in the turn of the cancellation: the outcome counts
        if isinstance(exc, StopIteration | KeyboardInterrupt):
            # A coroutine cannot raise StopIteration; KeyboardInterrupt is no signal here, as only the main thread gets signals.
            raise RuntimeError(f"the handler raised {type(exc).__name__}") from exc  # noqa: TRY004
        if exc is not None:
            raise exc
        return result

    @property
    def keeps_back(self) -> bool:
        """Whether `ready` would wait."""
        return not self.exhausted and sum(call.abandoned for call in self._busy) > len(self._kept_back)

    async def ready(self) -> None:
        """Wait while a thread is stuck, one caller for each. Returns when one became free, or when all are stuck."""
        if self.keeps_back:
            await self._turn(self._kept_back)

    async def available(self) -> None:
        """Wait until at least one thread is not stuck."""
        while self.exhausted:
            await self._turn(self._kept_back)

    def wake(self) -> None:
        """Wake all callers that wait in `ready`."""
        while self._kept_back:
            _wake(self._kept_back)

    def close(self) -> None:
        """End the threads, each after its current call."""
        self._closed = True
        for _ in range(self._started):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            outcome = call.run()
            try:
                self._loop.call_soon_threadsafe(self._ended, call, outcome)
            except RuntimeError:
                return  # the event loop is closed
            del call, outcome

    def _ended(self, call: ThreadCall, outcome: tuple[object, BaseException | None]) -> None:
        was_exhausted = self.exhausted
        self._busy.discard(call)
        if not call.future.done():
            call.future.set_result(outcome)
        _wake(self._waiting)
        if call.abandoned and not self._closed:
            _wake(self._kept_back)
            how = "returned" if outcome[1] is None else f"raised {reason_of(outcome[1])}"
            then = ": consuming resumes" if was_exhausted else ""
            seconds = time.monotonic() - (call.began or 0.0)
            _log.warning("an abandoned handler of group %r has %s after %.1f s%s", self._group, how, seconds, then)

    def _report_stuck(self) -> None:
        stuck = [call for call in self._busy if call.abandoned]
        since = min((call.began for call in stuck if call.began is not None), default=time.monotonic())
        seconds = time.monotonic() - since
        level, then = logging.WARNING, "the other threads go on"
        if self.exhausted:
            level, then = logging.ERROR, "consuming pauses until one returns"
            self.wake()
        if not self._closed:
            _log.log(
                level,
                "%d of %d threads of group %r are stuck in abandoned handlers, since %s (%.1f s): %s",
                len(stuck),
                self._most,
                self._group,
                time.strftime("%H:%M:%S", time.localtime(time.time() - seconds)),
                seconds,
                then,
            )

    async def _turn(self, queue: "deque[asyncio.Future[None]]") -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        queue.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                _wake(queue)  # woken and cancelled at once: it is another one's turn
            raise
        finally:
            if future in queue:
                queue.remove(future)


def _wake(queue: "deque[asyncio.Future[None]]") -> None:
    while queue:
        future = queue.popleft()
        if not future.done():
            future.set_result(None)
            return
