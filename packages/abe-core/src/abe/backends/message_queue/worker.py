"""The workers of a consumer: a fixed set of tasks, each of which takes one message at a time and calls the handler."""

import asyncio
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final

from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.middleware import check_completed
from abe.backends.message_queue.base.subscription import Subscription
from abe.backends.message_queue.failures import Failures
from abe.backends.message_queue.handler import Handle
from abe.backends.message_queue.look_ahead import LookAhead
from abe.backends.message_queue.signals import is_of_signal
from abe.backends.message_queue.threads import Threads
from abe.errors import AbeError, BackendClosedError

_log: Final = Log("abe.consumer")
_STUBBORN: Final = 5.0
"""Seconds to wait for handlers that were cancelled."""

_LAST_SETTLEMENT: Final = 2.0
"""Seconds for settling the message whose handler was interrupted by a signal."""

WORKS_FOR: Final[ContextVar[object]] = ContextVar("abe_works_for", default=None)
"""The consumer run that the current context belongs to: set in workers, so in handlers and in the tasks that they start too."""


class Workers:
    """Handles the messages of a subscription.

    Args:
        subscription: Where messages come from; with a `LookAhead`, messages of one key are handled one after the other.
        call: The handler, with its middleware.
        failures: Settles failed messages.
        threads: For a synchronous handler.
        concurrency: Messages handled at once.
        run: The value for `WORKS_FOR`.
        stop_taking: Set when the workers must take no more messages.
    """

    def __init__(
        self,
        subscription: Subscription | LookAhead,
        call: Handle,
        failures: Failures,
        threads: Threads | None,
        *,
        concurrency: int,
        run: object,
        stop_taking: asyncio.Event,
    ) -> None:
        self._subscription = subscription
        self._call = call
        self._failures = failures
        self._threads = threads
        self._concurrency = concurrency
        self._ahead = subscription if isinstance(subscription, LookAhead) else None
        self._lanes: dict[str, _Lane] = {}
        self._run = run
        self._stop_taking = stop_taking
        self._stopping = False
        self._cancelled = False
        self._host: asyncio.Task[Any] | None = None
        self._cancelled_before = 0

    async def run(self, stopping: "asyncio.Future[Any]", grace: float) -> None:
        """Handle messages until `stopping` is done, the subscription is closed, or every thread is stuck.

        Args:
            stopping: Done when the workers must take no more messages.
            grace: Seconds that the running handlers then get to finish.
        """
        self._host = asyncio.current_task()
        self._cancelled_before = 0 if self._host is None else self._host.cancelling()
        workers = [asyncio.create_task(self._slot()) for _ in range(self._concurrency)]
        giving_back: asyncio.Task[None] | None = None
        try:
            done, _ = await asyncio.wait([*workers, stopping], return_when=asyncio.FIRST_COMPLETED)
            # A worker ends by itself when the subscription is closed, when no thread is left, or by a fatal exception.
            if all(task.exception() is None for task in done):
                self._stop()
                giving_back = asyncio.create_task(self._subscription.stop())
                _, late = await asyncio.wait(workers, timeout=grace)
                if late:
                    template = "%d handlers did not finish within %g s: cancelling them, giving their messages back"
                    _log.warning(template, len(late), grace)
        finally:
            self._stop()
            self._cancelled = True
            # A `stop` that waits for the broker continues inside the subscription, and `aclose` bounds it.
            for task in (*workers, giving_back):
                if task is not None:
                    task.cancel()
            if giving_back is not None:
                await asyncio.gather(giving_back, return_exceptions=True)
            _, stubborn = await asyncio.wait(workers, timeout=_STUBBORN)
            if stubborn:
                _log.error("%d handlers ignored their cancellation and are abandoned", len(stubborn))
        for task in workers:
            if task.done() and not task.cancelled():
                task.result()

    def _stop(self) -> None:
        self._stopping = True
        if self._threads is not None:
            self._threads.wake()

    async def _slot(self) -> None:
        """Run a worker; replace its task, and with it its context, once a handler has set a ContextVar.

        So a variable that a handler sets ends with its message, without the cost of a task or a context for every message.
        """
        context = copy_context()
        context.run(WORKS_FOR.set, self._run)
        lane = _Lane()
        again = True
        while again:
            try:
                again = await asyncio.create_task(self._worker(context, lane), context=context.copy())
            except asyncio.CancelledError:
                if self._ends() or _cancelling():
                    raise
                # A task that a handler left running has cancelled the worker's task between two messages.

    async def _worker(self, clean: Context, lane: "_Lane") -> bool:
        """Handle messages until there are no more (return False), or until a handler has changed the `clean` context (True)."""
        task = asyncio.current_task()
        assert task is not None
        ahead, threads, stopped = self._ahead, self._threads, self._stop_taking.is_set
        handled, call = 0, self._call
        take = _nothing if isinstance(self._subscription, LookAhead) else self._subscription.take
        while not (self._stopping or stopped()) and (threads is None or await self._has_thread(threads, lane)):
            message = take()
            if message is None:
                try:
                    message = await (self._subscription.receive() if ahead is None else self._next(ahead, lane))
                except BackendClosedError:
                    return False
            raised: BaseException | None = None
            try:
                result = await call(message)
                if result is not None:
                    check_completed(result, "the handler")
            except BaseException as exc:  # noqa: BLE001 - a failure, or a cancellation: see `_not_handled`
                raised = exc
            try:
                if raised is None and not task.cancelling():
                    self._subscription.ack_soon(message)
                else:
                    await self._not_handled(message, raised, task)
            finally:
                raised = None  # its traceback would keep the handler's frames alive until the next message
                if ahead is not None:
                    ahead.done(message)
            handled += 1
            if not handled & 63:
                await asyncio.sleep(0)  # handlers that never suspend must not block the event loop
            try:
                changed = copy_context() != clean  # compares two pointers if nothing was set
            except Exception:  # noqa: BLE001 - comparing calls the application's __eq__
                changed = True
            if changed:
                return True
        await self._give_back(lane)
        return False

    async def _next(self, ahead: LookAhead, lane: "_Lane") -> Message:
        """Return the next message of the worker's own key, or else the first one of a key that no worker handles."""
        while lane.key is not None:
            if not lane.waiting:
                del self._lanes[lane.key]
                lane.key = None
            elif not (waiting := lane.waiting.popleft()).lease_lost:
                return waiting
            else:
                ahead.done(waiting)  # another consumer may have it by now
        while True:
            message = await ahead.receive()
            try:
                key = message.key
            except Exception as exc:  # noqa: BLE001 - an unreadable envelope fails its message only
                try:
                    await self._failures.failed(message, exc)
                finally:
                    ahead.done(message)
                continue
            if key not in self._lanes:
                lane.key, self._lanes[key] = key, lane
                return message
            self._lanes[key].waiting.append(message)  # the worker of this key handles it later

    async def _give_back(self, lane: "_Lane") -> None:
        if lane.key is not None:
            del self._lanes[lane.key]
            lane.key = None
        waiting, lane.waiting = lane.waiting, deque()
        # A message that cannot be given back is delivered again when its lease runs out.
        await asyncio.gather(*map(self._subscription.release, waiting), return_exceptions=True)
        for message in waiting:
            if self._ahead is not None:
                self._ahead.done(message)

    async def _has_thread(self, threads: Threads, lane: "_Lane") -> bool:
        if threads.keeps_back:
            await self._give_back(lane)  # another worker may handle this key meanwhile
            await threads.ready()
        return not (threads.exhausted or self._stopping or self._stop_taking.is_set())

    async def _not_handled(self, message: Message, exc: BaseException | None, task: asyncio.Task[Any]) -> None:
        """Settle a message whose handler raised something, or whose worker or handler was cancelled."""
        if isinstance(exc, GeneratorExit) and not _is_running(task):
            raise exc  # not a failure of the handler: the coroutine is closed because its event loop is gone
        if task.cancelling() or isinstance(exc, asyncio.CancelledError):
            exc = await self._cancelled_or(exc, task)
        if exc is None:
            self._subscription.ack_soon(message)
        elif isinstance(exc, KeyboardInterrupt | SystemExit) and is_of_signal(exc):
            await _in_time(self._subscription.release(message))
            raise exc
        elif isinstance(exc, KeyboardInterrupt):
            # The process is to end. This was an attempt: the message must not be the first one of the next process.
            await _in_time(self._failures.failed(message, exc))
            raise exc
        else:
            await self._failures.failed(message, exc)

    async def _cancelled_or(self, exc: BaseException | None, task: asyncio.Task[Any]) -> BaseException | None:
        """Return the message's failure when the handler cancelled its own task; raise when the worker itself is cancelled.

        Raises:
            CancelledError: The worker is cancelled.
        """
        pending = False
        if task.cancelling() and not self._ends():
            try:
                await asyncio.sleep(0)  # raises a cancellation that the handler requested and that is still pending
            except asyncio.CancelledError:
                pending = True
            if not self._ends():
                while task.cancelling():
                    task.uncancel()
                if pending or isinstance(exc, asyncio.CancelledError):
                    return RuntimeError("the handler cancelled its own task")
                return exc
        if self._ends() and (pending or isinstance(exc, asyncio.CancelledError)):
            raise asyncio.CancelledError
        if isinstance(exc, asyncio.CancelledError):
            return RuntimeError("something that the handler awaited was cancelled")
        return exc

    def _ends(self) -> bool:
        return self._cancelled or (self._host is not None and self._host.cancelling() > self._cancelled_before)


class _Lane:
    """The key that a worker handles now, and the next messages of that key."""

    __slots__ = ("key", "waiting")

    def __init__(self) -> None:
        self.key: str | None = None
        self.waiting: deque[Message] = deque()


def _nothing() -> None:
    return None


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _in_time(settling: Coroutine[Any, Any, None]) -> None:
    with suppress(TimeoutError, AbeError):
        async with asyncio.timeout(_LAST_SETTLEMENT):
            await settling


def _is_running(task: asyncio.Task[Any]) -> bool:
    try:
        return asyncio.current_task() is task
    except RuntimeError:
        return False
