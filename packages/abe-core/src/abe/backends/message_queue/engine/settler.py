"""Settles messages in batches: settlements of one turn of the event loop share a call.

A settlement that fails with a retryable error, such as a lost connection, is retried until the lease must have run out.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.clock import Clock, sleep
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.transport import Delivery, Disposition, Outcomes, Receiver, Settlement, Settling
from abe.backends.message_queue.engine.stepping import Begun, begin
from abe.errors import AbeError, ConfigurationError, LeaseLostError

_log: Final = Log("abe.engine")
_BACKOFF: Final = ExponentialBackoff(initial=0.05, maximum=2.0)

Waiter: TypeAlias = asyncio.Future[AbeError | None]
_Item = TypeVar("_Item")


class Settler:
    """Batches acknowledgements and other settlements.

    Args:
        receiver: Carries them out.
        settling: How many a call takes, and whether acknowledgements wait for others.
        count: Returns how many messages are in flight: waiting for others pays only if these can fill a call.
        sure: Returns whether no lease can have run out.
        settled: Called when a batch was carried out, so that more messages can be taken.
        refused: Called with a permanent error: the broker will carry out no settlement.
        timeout: Seconds for which a settlement is retried.
        stranded: Called when the broker may still count as ours what could not be settled.
        leased: Whether unsettled messages are redelivered when their lease runs out. If not, they are given back after `timeout`.
        clock: Measures `timeout`.
    """

    def __init__(
        self,
        receiver: Receiver,
        settling: Settling,
        *,
        count: Callable[[], int],
        sure: Callable[[], bool],
        settled: Callable[[], None],
        refused: Callable[[AbeError], None],
        timeout: float,
        stranded: Callable[[], object],
        leased: bool,
        clock: Clock,
    ) -> None:
        self._receiver = receiver
        self._most = settling.messages
        self._linger = settling.linger
        self._at_once = settling.at_once
        self._count = count
        self._sure = sure
        self._settled = settled
        self._refused = refused
        self._timeout = timeout
        self._stranded = stranded
        self._leased = leased
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._acks: list[Delivery] = []
        self._asked: list[tuple[Delivery, Waiter]] = []
        self._settlements: list[tuple[Settlement, Waiter]] = []
        self._pending: list[tuple[Delivery, Waiter | None]] = []  # acknowledgements that wait for others
        self._pending_until: asyncio.TimerHandle | None = None
        self._acking = 0
        self._scheduled = False
        self._abandoned = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: dict[Delivery, None] = {}
        self.outstanding: int = 0
        """Messages whose settlement is not confirmed: the broker still counts them as in flight."""

    def ack(self, delivery: Delivery) -> None:
        """Acknowledge with the next batch. A failure is logged."""
        self._acks.append(delivery)
        self.outstanding += 1
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def submit(self, delivery: Delivery, settlement: Settlement | None) -> Waiter:
        """Settle (None: acknowledge) with the next batch; the future's result is what went wrong, or None."""
        waiter: Waiter = self._loop.create_future()
        self.outstanding += 1
        if settlement is None:
            self._asked.append((delivery, waiter))
        else:
            self._settlements.append((settlement, waiter))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)
        return waiter

    def deliveries(self) -> list[Delivery]:
        """Return the messages whose settlement is not confirmed."""
        return [
            *self._leaving,
            *self._acks,
            *(delivery for delivery, _ in self._pending),
            *(delivery for delivery, _ in self._asked),
            *(settlement.delivery for settlement, _ in self._settlements),
        ]

    async def carried_out(self, delivery: Delivery) -> None:
        """Return when the settlement of this delivery is confirmed, or given up; at once if there is none."""
        if delivery in self.deliveries():
            self._flush_all()
        while delivery in self._leaving:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def drain(self) -> None:
        """Return when everything submitted so far has been carried out, or given up."""
        self._flush_all()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def abandon(self) -> None:
        """Cancel the settlements in progress, and retry none from now on."""
        self._abandoned = True
        for task in self._tasks:
            task.cancel()

    def _flush(self) -> None:
        self._scheduled = False
        settlements, self._settlements = self._settlements, []
        for start in range(0, len(settlements), self._most):
            part = settlements[start : start + self._most]
            items = [settlement for settlement, _ in part]
            deliveries = [settlement.delivery for settlement in items]
            waiters = [waiter for _, waiter in part]
            self._start(self._run(self._receiver.settle, items, deliveries, waiters), deliveries, waiters)
        acks, self._acks = self._acks, []
        asked, self._asked = self._asked, []
        if self._linger:
            self._pending += asked
            self._pending += [(delivery, None) for delivery in acks]
            # Those with a waiting caller linger only while another call is in progress.
            self._flush_pending(linger=self._acking > 0 if asked else self._count() >= self._most)
            return
        for start in range(0, len(acks), self._most):
            self._start_acks(acks[start : start + self._most], None)
        for start in range(0, len(asked), self._most):
            some = asked[start : start + self._most]
            self._start_acks([delivery for delivery, _ in some], [waiter for _, waiter in some])

    def _flush_all(self) -> None:
        self._flush()
        self._flush_pending(linger=False)

    def _flush_pending(self, *, linger: bool) -> None:
        """Send pending acknowledgements: full batches, and the rest unless it is to linger."""
        pending = self._pending
        leaving = len(pending) - (len(pending) % self._most if linger else 0)
        self._pending = pending[leaving:]
        for start in range(0, leaving, self._most):
            some = pending[start : min(start + self._most, leaving)]
            self._start_acks([delivery for delivery, _ in some], [waiter for _, waiter in some])
        if self._pending_until is not None and (leaving or not self._pending):
            self._pending_until.cancel()
            self._pending_until = None
        if self._pending and self._pending_until is None:
            self._pending_until = self._loop.call_later(self._linger, partial(self._flush_pending, linger=False))

    def _start_acks(self, deliveries: list[Delivery], waiters: Sequence[Waiter | None] | None) -> None:
        # If a caller waits for the outcome, each one is verified: a plain acknowledgement may not tell which of them was lost.
        verify = (waiters is not None and any(waiters)) or not self._sure()
        begun: Begun[Outcomes] | Outcomes | None = None
        if self._at_once and not self._abandoned:
            begun = begin(self._receiver.ack(deliveries, verify=verify))
            if waiters is None and _are_done(begun, len(deliveries)):
                self.outstanding -= len(deliveries)
                self._settled()
                return

        async def ack(some: Sequence[Delivery]) -> Outcomes:
            nonlocal verify, begun
            first, begun = begun, None
            now, verify = verify, True  # a retry may come when the leases are long over
            if first is None:
                return await self._receiver.ack(some, verify=now)
            return (await first) if isinstance(first, Begun) else first

        def acked(_: object) -> None:
            self._acking -= 1
            if self._pending and not self._acking:
                self._flush_pending(linger=all(waiter is None for _, waiter in self._pending))

        self._acking += 1
        self._start(self._run(ack, deliveries, deliveries, waiters), deliveries, waiters).add_done_callback(acked)

    def _start(
        self,
        coroutine: Coroutine[Any, Any, None],
        deliveries: Sequence[Delivery],
        waiters: Sequence[Waiter | None] | None,
    ) -> asyncio.Task[None]:
        def done(task: asyncio.Task[None]) -> None:
            if task.cancelled():  # before its first step: no waiter was told
                _tell(deliveries, waiters or (), [_closed()] * len(deliveries))
            self._tasks.discard(task)
            self.outstanding -= len(deliveries)
            for delivery in deliveries:
                self._leaving.pop(delivery, None)
            self._settled()

        self._leaving.update(dict.fromkeys(deliveries))
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(done)
        return task

    async def _run(
        self,
        call: Callable[[Sequence[_Item]], Awaitable[Outcomes]],
        items: Sequence[_Item],
        deliveries: Sequence[Delivery],
        waiters: Sequence[Waiter | None] | None,
    ) -> None:
        """Carry out a batch, and set the waiters' results; failures without a waiter are logged."""
        outcomes: list[AbeError | None] = [_closed()] * len(items)
        try:
            await self._carry_out(call, items, outcomes, partial(_tell, deliveries, waiters or ()))
            late = [each for each, error in zip(deliveries, outcomes, strict=True) if error and error.retryable]
            await self._give_back(late)
        finally:  # also when `abandon` cancels it
            failures: list[AbeError] = []
            for delivery, waiter, error in zip(deliveries, waiters or [None] * len(items), outcomes, strict=True):
                delivery.lost = delivery.lost or error is not None
                if waiter is None:
                    if error is not None:
                        failures.append(error)
                elif not waiter.done():
                    waiter.set_result(error)
            if failures:
                _log.warning(
                    "%d of %d acknowledgements were not carried out, so these messages will be delivered again: %s",
                    len(failures),
                    len(items),
                    failures[0],
                )

    async def _carry_out(
        self,
        call: Callable[[Sequence[_Item]], Awaitable[Outcomes]],
        items: Sequence[_Item],
        outcomes: list[AbeError | None],
        tell: Callable[[Sequence[AbeError | None]], None],
    ) -> None:
        """Make the call, and repeat it for items with a retryable error; put each one's outcome in its place.

        Final outcomes are passed to `tell` before each pause: they do not wait for the retries of others.
        """
        deadline = self._clock.time() + self._timeout
        outcomes[:] = await self._attempt(call, items)
        places: Sequence[int] = range(len(items))
        tries = 0
        while places := [place for place in places if (error := outcomes[place]) is not None and error.retryable]:
            tries += 1
            pause = _BACKOFF(tries)
            if self._abandoned or self._clock.time() + pause > deadline:
                break
            _log.debug("%d settlements failed, trying again: %s", len(places), outcomes[places[0]])
            tell(outcomes)
            await sleep(self._clock, pause)
            again = await self._attempt(call, [items[place] for place in places])
            for place, error in zip(places, again, strict=True):
                outcomes[place] = error

    async def _give_back(self, deliveries: Sequence[Delivery]) -> None:
        """Give back what could not be settled. Where a lease makes the broker redeliver it, that may not be to us: it is recovered."""
        if deliveries and self._leased:
            self._stranded()
        elif deliveries:
            await self._attempt(self._receiver.settle, [Settlement(each, Disposition.RETURN) for each in deliveries])

    async def _attempt(
        self, call: Callable[[Sequence[_Item]], Awaitable[Outcomes]], items: Sequence[_Item]
    ) -> Outcomes:
        """Make the call once.

        A batch that fails permanently as a whole is halved until the failing ones are alone. An error that all settlements will have is
        passed to `refused`.
        """
        error: AbeError
        if self._abandoned:
            return [_closed()] * len(items)
        try:
            outcomes = _one_each(await call(items), items)
        except AbeError as exc:
            error = exc
        except Exception as exc:  # noqa: BLE001 - a fault of a transport must leave no caller waiting for ever
            _log.exception("unexpected exception from the transport (a bug of the provider)")
            error = LeaseLostError(f"the transport failed, so that the broker may not know the settlement: {exc!r}")
            error.__cause__ = exc
        else:
            if refusal := next((each for each in outcomes if isinstance(each, ConfigurationError)), None):
                self._refused(refusal)
            return outcomes
        if isinstance(error, ConfigurationError):
            self._refused(error)
        elif not error.retryable and len(items) > 1:
            half = len(items) // 2
            parts = items[:half], items[half:]
            return [each for part in parts for each in await self._attempt(call, part)]
        return [error] * len(items)


def _tell(
    deliveries: Sequence[Delivery], waiters: Sequence[Waiter | None], outcomes: Sequence[AbeError | None]
) -> None:
    """Set the results of waiters whose outcome is final."""
    for delivery, waiter, error in zip(deliveries, waiters, outcomes, strict=False):
        if waiter is not None and not waiter.done() and (error is None or not error.retryable):
            delivery.lost = delivery.lost or error is not None
            waiter.set_result(error)


def _one_each(outcomes: Outcomes, items: Sequence[object]) -> Outcomes:
    if outcomes and len(outcomes) != len(items):
        raise RuntimeError(f"{len(outcomes)} outcomes of {len(items)} settlements")
    return outcomes or [None] * len(items)


def _are_done(begun: Begun[Outcomes] | Outcomes, count: int) -> bool:
    return not isinstance(begun, Begun) and len(begun) in (0, count) and not any(begun)


def _closed() -> LeaseLostError:
    return LeaseLostError("the subscription was closed before the broker could be told")
