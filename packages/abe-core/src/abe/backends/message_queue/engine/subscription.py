"""The subscription that `consume` returns."""

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, Self

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.tasks import gather_all, result_of
from abe.backends.message_queue.engine.inbox import Inbox
from abe.backends.message_queue.report import shown
from abe.errors import AbeError, AlreadySettledError, BackendClosedError

_log: Final = Log("abe.engine")
_ENDS: Final = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt)
_RESUBSCRIBE: Final = ExponentialBackoff(initial=0.1, maximum=5.0)


class GroupSubscription:
    """The messages of a group; the contract is on ``base.Subscription``.

    An inbox does the work and never refers back to this object: when a loop over it ended by ``break`` and no reference is left, it is
    garbage-collected, and the inbox is closed. One inbox may be replaced by another (see `Inbox`); each message keeps its own.

    Args:
        start: Subscribes, and returns the inbox; with True, one with a single message in flight.
    """

    def __init__(self, start: Callable[[bool], Awaitable[Inbox]]) -> None:
        self._start = start
        self._starting: asyncio.Task[Inbox] | None = None
        self._inbox: Inbox | None = None
        self._before: Inbox | None = None
        self._inboxes: list[Inbox] = []  # those that are not closed yet, the newest last
        weakref.finalize(self, _close_soon, self._inboxes).atexit = False
        self._current: Message | None = None
        self._waiting = False
        self._stopped = False
        self._closed = False

    async def __aenter__(self) -> Self:
        await self._started()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        current, self._current = self._current, None
        try:
            # What ends the task or the process is no failure of the message; sys.exit() is one: its next delivery would do it again.
            if current is not None and exc is not None and not isinstance(exc, _ENDS):
                await _fail(current, exc)
        finally:
            await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        if self._waiting:
            raise RuntimeError(
                "this subscription is being asked for its next message already; let one task iterate, or use receive()"
            )
        self._waiting = True
        try:
            inbox = self._inbox or await self._started()
            current, self._current = self._current, None
            if current is not None and not self._closed:
                self.ack_soon(current)
            message = inbox.take()
            if message is None:
                message = await self._receive()
        except BackendClosedError:
            raise StopAsyncIteration from None
        finally:
            self._waiting = False
        self._current = message
        return message

    def take(self) -> Message | None:
        """Return the next buffered message, or None."""
        return None if self._inbox is None else self._inbox.take()

    async def receive(self) -> Message:
        """Wait for the next message, which the caller settles."""
        if self._closed:
            raise BackendClosedError("the subscription was closed")
        return await self._receive()

    def ack_soon(self, message: Message) -> None:
        """Acknowledge a message with the next batch, without waiting; a failure is logged."""
        message._source.ack_soon(message)  # pyright: ignore[reportPrivateUsage]

    async def release(self, message: Message) -> None:
        """Give a message back as if it had never been taken; a no-op if it is settled already."""
        await message._source.release(message)  # pyright: ignore[reportPrivateUsage]

    async def halt(self) -> None:
        """Stop receiving from the broker; `take` still returns the buffered messages."""
        if self._inbox is not None:
            await self._inbox.halt()
        else:
            await self.stop()

    async def stop(self) -> None:
        """Stop receiving from the broker, and release the buffered messages."""
        self._stopped = True
        if self._inbox is not None:
            await self._inbox.stop()
        elif self._before is not None:
            if self._starting is not None:
                self._starting.cancel()  # no other inbox is needed
            await self._before.stop()

    async def aclose(self) -> None:
        """Release everything that is not settled, and unsubscribe."""
        self._closed = self._stopped = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await gather_all(*(inbox.close() for inbox in self._inboxes))

    async def _receive(self) -> Message:
        while True:
            inbox = self._inbox or await self._started()
            try:
                return await inbox.receive()
            except BackendClosedError:
                if not inbox.changing or self._stopped:
                    raise
                if self._inbox is inbox:
                    self._before, self._inbox, self._starting = inbox, None, None

    async def _started(self) -> Inbox:
        """Return the inbox. Concurrent callers share one attempt to get it; cancelling a caller does not cancel it."""
        if self._closed or (self._stopped and self._before is not None):
            raise BackendClosedError("the subscription was closed")
        failed = self._starting is not None and self._starting.done() and self._inbox is None
        if self._starting is None or failed:
            starting = _subscribe(self._start, self._before, weakref.ref(self))
            self._starting = asyncio.get_running_loop().create_task(starting)
        return await result_of(self._starting, lambda: BackendClosedError("the subscription was closed"))


async def _subscribe(
    start: Callable[[bool], Awaitable[Inbox]], before: Inbox | None, wanted: "weakref.ref[GroupSubscription]"
) -> Inbox:
    if before is None:
        inbox = await start(False)
    else:
        await before.hand_over()
        inbox = await _follow(start, alone=not before.alone, wanted=wanted)
    subscription = wanted()
    if subscription is None:
        await inbox.close()
    else:
        subscription._inbox = inbox  # pyright: ignore[reportPrivateUsage]
        inboxes = subscription._inboxes  # pyright: ignore[reportPrivateUsage]
        inboxes[:] = [*(other for other in inboxes if not other.closed), inbox]
        if subscription._stopped:  # pyright: ignore[reportPrivateUsage]
            await inbox.stop()
    return inbox


def _close_soon(inboxes: Sequence[Inbox]) -> None:
    for inbox in inboxes:
        inbox.close_soon()


async def _follow(
    start: Callable[[bool], Awaitable[Inbox]], *, alone: bool, wanted: "weakref.ref[GroupSubscription]"
) -> Inbox:
    """Subscribe again, retrying without a limit: a subscription that has begun does not end because the broker is unreachable."""
    tries = 0
    while True:
        try:
            return await start(alone)
        except AbeError as exc:
            if not exc.retryable or wanted() is None:
                raise
            tries += 1
            _log.warning("the group cannot be subscribed to, trying again: %s", exc)
            await asyncio.sleep(_RESUBSCRIBE(tries))


async def _fail(message: Message, exc: BaseException) -> None:
    try:
        await message.nack(reason=f"{type(exc).__name__} in the consuming block", error=shown(exc)[1])
    except AlreadySettledError:
        return
    except AbeError as failure:
        _log.warning("a failed message of group %r could not be given back: %s", message.group, failure)
