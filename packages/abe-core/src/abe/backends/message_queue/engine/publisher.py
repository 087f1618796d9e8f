"""Publishes in batches: messages that are published in one turn of the event loop are sent together.

A lone publish is sent at once, in its caller's own task. Concurrent ones collect into a batch that is sent on the next turn of the loop;
while as many batches as the transport allows are in progress, the next one collects until one returns. There is no timer and no task per
message. Cancelling a publish does not cancel its batch.

A lone publish that the transport answers without waiting is not counted and has no deadline: nothing else has run meanwhile.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.transport import Envelope, Outcomes, Transport
from abe.backends.message_queue.engine.batch import AGAIN, Batch
from abe.backends.message_queue.engine.deadlines import Deadlines
from abe.backends.message_queue.engine.room import Room
from abe.backends.message_queue.engine.stepping import Begun, begin
from abe.errors import (
    AbeError,
    BackendClosedError,
    PublishRejectedError,
    PublishUnknownError,
    UnroutableError,
)

_log: Final = Log("abe.engine")
_BACKOFF: Final = ExponentialBackoff(initial=0.05, maximum=2.0)
_ACCEPTED: Final = [None]

_SLACK: Final = 0.1
"""The fraction of its time that a message may lose by joining an earlier batch, and by which the outcome of one without a timeout of its
own may be late: a timer for each would be expensive."""


class Publisher:
    """Coalesces messages into batches, bounds what is unconfirmed, and retries within the deadline with the same ids.

    Args:
        transport: Sends the batches.
        opened: Returns once the transport is connected.
        timeout: Seconds from `publish` to an outcome.
        max_count: Unconfirmed messages above which `publish` waits.
        max_bytes: Unconfirmed bytes above which `publish` waits.
    """

    def __init__(
        self,
        transport: Transport,
        opened: Callable[[], Awaitable[None]],
        *,
        timeout: float,
        max_count: int,
        max_bytes: int,
    ) -> None:
        self._transport = transport
        self._opened = opened
        self._timeout = timeout
        self._limits = transport.batching
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines(self._loop)
        self._current: Batch | None = None
        self._ready: deque[Batch] = deque()
        self._under_way = 0
        self._latest = -math.inf  # the latest deadline of a batch that may be in progress, or waits
        self._tasks: set[asyncio.Task[None]] = set()
        self._scheduled = False
        self._alone = True
        self._at_once = 0
        self._room = Room(max_count=max_count, max_bytes=max_bytes)
        self._connected = False
        self._abandoned = asyncio.Event()
        self._troubled = False

    async def publish(self, envelope: Envelope, timeout: float | None = None) -> AbeError | None:
        """Publish a message, and return its outcome: None when the broker has it.

        Args:
            envelope: The message.
            timeout: Seconds until there is an outcome, the wait for room included; None: the publisher's.
        """
        begun: Begun[Outcomes] | Outcomes | None = None
        room = self._room
        if self._alone and self._connected and not (room.count or room.coming or room.closed):
            begun = begin(self._transport.send([envelope]))
            if not begun or begun == _ACCEPTED:
                self._at_once += 1
                if not self._at_once & 63:
                    await asyncio.sleep(0)  # a loop of publishes that never wait must not block the event loop
                return None  # nothing else has run meanwhile
        seconds = self._timeout if timeout is None else timeout
        deadline = self._loop.time() + seconds
        if self._room.full() and not await self._room.wait(deadline):
            return PublishRejectedError(
                f"there was no room for {seconds:g} s: too many messages or bytes are unconfirmed"
            )
        if self._room.closed:
            raise BackendClosedError("the backend was closed")
        size = len(envelope.body)
        self._room.enter(size)
        if begun is not None or (self._alone and not self._under_way and self._current is None):
            return await self._publish_alone(envelope, size, deadline, seconds, begun)
        batch, future = self._enqueue(envelope, size, deadline, seconds)
        if timeout is not None or batch.deadline - deadline > _SLACK * seconds:
            await asyncio.wait([future], timeout=max(0.0, deadline - self._loop.time()))
            if not future.done():
                self._leave(batch, future, seconds)
        return await future

    async def publish_many(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Publish messages, and return their outcomes, all in this order."""
        futures: list[asyncio.Future[AbeError | None]] = []
        refusal: AbeError | None = None
        timeout = self._timeout
        deadline = self._loop.time() + timeout
        for envelope in envelopes:
            if refusal is None and self._room.full():
                if not await self._room.wait(self._loop.time() + timeout):
                    refusal = PublishRejectedError(
                        f"there was no room for {timeout:g} s: too many messages or bytes are unconfirmed"
                    )
                deadline = self._loop.time() + timeout
            if self._room.closed:
                refusal = BackendClosedError("the backend was closed before the message could be sent")
            if refusal is not None:
                refused: asyncio.Future[AbeError | None] = self._loop.create_future()
                refused.set_result(refusal)
                futures.append(refused)
                continue
            size = len(envelope.body)
            self._room.enter(size)
            futures.append(self._enqueue(envelope, size, deadline, timeout, deadline + _SLACK * timeout)[1])
        try:
            return [await future for future in futures]
        except asyncio.CancelledError:
            for future in futures:
                future.cancel()  # none of them is retried
            raise

    async def close(self, timeout: float) -> None:
        """Refuse new messages, wait up to `timeout` seconds for unconfirmed ones, and give up those that are left."""
        self._room.closed = True
        await self._room.empty(timeout)
        self._abandoned.set()
        for batch in (*self._ready, *([self._current] if self._current else [])):
            error = BackendClosedError("the backend was closed before the message could be sent")
            self._finish(batch, [error] * len(batch.futures))
        self._ready.clear()
        self._current = None
        self._deadlines.expire()
        self._deadlines.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_SLACK * timeout)  # a transport may be slow to react
        self._room.release()

    def _enqueue(
        self, envelope: Envelope, size: int, deadline: float, timeout: float, latest: float = math.inf
    ) -> tuple[Batch, asyncio.Future[AbeError | None]]:
        """Put a message into the collecting batch, or into a new one if the deadline of that batch is too early, or after `latest`."""
        batch = self._current
        if batch is None or not deadline - _SLACK * timeout <= batch.deadline <= latest:
            if batch is not None:
                self._ready.append(batch)
            usual = self._loop.time() + self._timeout  # not a shorter one: others are to join the batch
            batch = self._current = Batch([], max(deadline, usual), max(timeout, self._timeout))
            if self._latest > batch.deadline:  # an earlier batch may be in progress for longer than that
                batch.timer = self._loop.call_at(batch.deadline, self._expire, batch)
            self._latest = max(self._latest, batch.deadline)
            self._schedule()
        future: asyncio.Future[AbeError | None] = self._loop.create_future()
        batch.envelopes.append(envelope)
        batch.futures.append(future)
        batch.size += size
        if len(batch.futures) >= self._limits.messages or batch.size >= self._limits.bytes:
            self._ready.append(batch)
            self._current = None
        return batch, future

    def _schedule(self) -> None:
        if self._under_way < self._limits.max_concurrent and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._start_batches)

    def _expire(self, batch: Batch) -> None:
        """Give up a batch whose time is over before its turn has come."""
        if batch is self._current:
            self._current = None
        elif batch in self._ready:
            self._ready.remove(batch)
        else:
            return
        self._finish(batch, [self._gave_up(False, None, batch.timeout)] * len(batch.futures))

    def _leave(self, batch: Batch, future: "asyncio.Future[AbeError | None]", timeout: float) -> None:
        """Remove a message whose time is over from its batch; if that was sent already, it is not retried."""
        place = batch.futures.index(future)
        future.set_result(self._gave_up(batch.sending or place in batch.doubtful, batch.error, timeout))
        if not batch.sent:
            size = len(batch.envelopes[place].body)
            del batch.envelopes[place], batch.futures[place]
            batch.size -= size
            self._room.leave(1, size)

    async def _publish_alone(
        self, envelope: Envelope, size: int, deadline: float, timeout: float, begun: Begun[Outcomes] | Outcomes | None
    ) -> AbeError | None:
        outcomes: list[AbeError | None] = [None]
        self._latest = max(self._latest, deadline)
        self._under_way += 1
        try:
            await self._deliver(Batch([envelope], deadline, timeout), outcomes, begun)
            return outcomes[0]
        finally:
            self._room.leave(1, size)
            self._batch_done()

    def _start_batches(self) -> None:
        self._scheduled = False
        while self._under_way < self._limits.max_concurrent and (self._ready or self._current is not None):
            if self._ready:
                batch = self._ready.popleft()
            else:
                assert self._current is not None
                batch, self._current = self._current, None
            batch.end_timer()
            if not batch.futures:
                continue  # all its messages have timed out
            self._alone = len(batch.futures) == 1
            self._under_way += 1
            task = self._loop.create_task(self._run(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: Batch) -> None:
        unknown = PublishUnknownError("the backend was closed before the confirm came")
        outcomes: list[AbeError | None] = [unknown] * len(batch.futures)
        try:
            await self._deliver(batch, outcomes)
        finally:
            self._finish(batch, outcomes)
            self._batch_done()

    def _batch_done(self) -> None:
        self._under_way -= 1
        if (self._ready or self._current is not None) and not self._abandoned.is_set():
            self._start_batches()
        elif not self._under_way:
            self._latest = -math.inf  # nothing is left that could keep another waiting

    async def _deliver(
        self, batch: Batch, outcomes: list[AbeError | None], begun: Begun[Outcomes] | Outcomes | None = None
    ) -> None:
        """Send until every message has an outcome, or the deadline passes.

        1. Each try sends the pending messages. A final outcome stays, whatever becomes of the others; a retryable one (`AGAIN`) leaves
           its message pending.
        2. A message that a try may have published is *doubtful*, also one whose try the deadline interrupted.
        3. After a backoff the pending messages are sent again, except for those whose callers have timed out.
        4. At the deadline, or when the publisher closes, pending messages become unknown if they are doubtful, otherwise rejected.
        5. A doubtful message that a later try refused is unknown too, unless it is unroutable.

        Args:
            batch: The messages.
            outcomes: Gets each one's outcome.
            begun: The first try, if it has begun, or its outcomes.
        """
        batch.sent = True  # not before: a message that is removed until then is certainly not published
        pending: Sequence[int] = range(len(batch.envelopes))
        try:
            with self._deadlines.until(batch.deadline):
                tries = 0
                while pending and (begun or (self._loop.time() < batch.deadline and not self._abandoned.is_set())):
                    pending = await self._try(batch, pending, outcomes, begun)
                    begun = None
                    if not pending:
                        break
                    batch.error = outcomes[pending[0]]
                    tries += 1
                    await pause(self._abandoned, _BACKOFF(tries))
                    pending = [i for i in pending if not (batch.futures and batch.futures[i].done())]
        except TimeoutError:
            if batch.sending:
                batch.doubtful = batch.doubtful.union(pending)
        for index in pending:
            outcomes[index] = self._gave_up(index in batch.doubtful, batch.error, batch.timeout)
        for index in batch.doubtful.difference(pending):
            outcome = outcomes[index]
            if outcome is not None and not isinstance(outcome, UnroutableError):
                outcomes[index] = self._gave_up(True, outcome, batch.timeout)

    async def _try(
        self,
        batch: Batch,
        pending: Sequence[int],
        outcomes: list[AbeError | None],
        begun: Begun[Outcomes] | Outcomes | None,
    ) -> Sequence[int]:
        """Send the pending messages once, unless `begun` does; return those without a final outcome."""
        try:
            if begun is None:
                pending = await self._connect(batch, pending)
                if not pending:
                    return ()
                whole = len(pending) == len(batch.envelopes)
                begun = begin(self._transport.send(batch.envelopes if whole else [batch.envelopes[i] for i in pending]))
            batch.sending = True
            results = _one_each((await begun) if isinstance(begun, Begun) else begun, len(pending))
        except AbeError as exc:
            results = [exc] * len(pending)
        except Exception as exc:  # noqa: BLE001 - a fault of a transport is an outcome too: no caller may wait for ever
            _log.exception("unexpected exception from the transport (a bug of the provider)")
            for index in pending:
                outcomes[index] = _unexpected(exc)
            batch.sending = False
            return ()
        batch.sending = False
        for index, result in zip(pending, results or [None] * len(pending), strict=True):
            outcomes[index] = result
        again: Sequence[int] = ()
        if any(results):
            again = [i for i in pending if isinstance(outcomes[i], AGAIN)]
            batch.doubtful = batch.doubtful.union(i for i in again if _maybe_accepted(outcomes[i]))
            self._connected = not again  # the next try connects first
            if again:
                batch.tell(pending, results)
        self._trouble(outcomes[again[0]] if again else None)
        return again

    async def _connect(self, batch: Batch, pending: Sequence[int]) -> Sequence[int]:
        """Connect if necessary; return the messages whose callers still wait. The others have been rejected meanwhile."""
        if self._connected:
            return pending
        await self._opened()
        self._connected = True
        return [i for i in pending if not (batch.futures and batch.futures[i].done())]

    def _trouble(self, error: AbeError | None) -> None:
        """Log when publishing begins to fail, and when it works again; not each try in between."""
        if (error is None) != self._troubled:
            return
        self._troubled = error is not None
        if error is None:
            _log.info("publishing works again")
        else:
            _log.warning("publishing fails, trying again: %s", error)

    def _gave_up(self, unknown: bool, cause: AbeError | None, timeout: float) -> AbeError:
        why = f": {cause}" if cause else ""
        when = "before the backend was closed" if self._abandoned.is_set() else f"within {timeout:g} s"
        failure: AbeError
        if unknown:
            failure = PublishUnknownError(
                f"no confirm {when}{why}. The broker may have the message or not: publish it again with the same id"
            )
        else:
            failure = PublishRejectedError(f"the message could not be sent {when}{why}")
        failure.__cause__ = cause
        return failure

    def _finish(self, batch: Batch, outcomes: Sequence[AbeError | None]) -> None:
        batch.end_timer()
        for future, outcome in zip(batch.futures, outcomes, strict=True):
            if not future.done():
                future.set_result(outcome)
        self._room.leave(len(batch.futures), batch.size)


def _one_each(results: Outcomes, count: int) -> Outcomes:
    if results and len(results) != count:
        raise RuntimeError(f"{len(results)} outcomes of {count} messages")
    return results


def _unexpected(exc: Exception) -> PublishUnknownError:
    error = PublishUnknownError(f"the transport failed: {exc!r}. The broker may have the message or not")
    error.__cause__ = exc
    return error


def _maybe_accepted(outcome: AbeError | None) -> bool:
    return outcome is not None and outcome.maybe_accepted
