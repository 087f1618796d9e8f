"""What SQS is told about the messages that one consumer has in flight."""

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping, Sequence

from abe.backends.message_queue.base import Outcomes
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import AbeError, BackendConnectionError, ConfigurationError, LeaseLostError
from abe_backend_sqs._broker import Broker
from abe_backend_sqs._copies import Copy
from abe_backend_sqs._inflight import Failures, InFlight, Receipt
from abe_backend_sqs._queue import Queue


class Settlements:
    """Deletes, shows, moves and extends messages, and lets go of those that are not ours any more.

    Args:
        broker: Stores copies.
        group: Whose messages they are.
        queue: Where they are.
        in_flight: What the consumer has.
    """

    def __init__(self, broker: Broker, group: str, queue: Queue, in_flight: InFlight) -> None:
        self._broker = broker
        self._group = group
        self._in_flight = in_flight
        self._renewing = asyncio.Lock()
        self.queue: Queue = queue

    async def delete(self, receipts: Sequence[Receipt]) -> dict[Receipt, AbeError]:
        """Delete."""
        if not receipts:
            return {}
        with self._in_flight.being_settled(receipts):
            try:
                outcomes = await self.queue.delete([self._in_flight.handle(each) for each in receipts])
            except asyncio.CancelledError:
                for receipt in receipts:
                    if (leased := self._in_flight.get(receipt)) is not None:
                        leased.uncertain = True
                raise
            failures = _failures(receipts, outcomes)
            for receipt in receipts:
                error, leased = failures.get(receipt), self._in_flight.get(receipt)
                if leased is None:
                    continue
                if isinstance(error, LeaseLostError) and leased.uncertain:
                    del failures[receipt]
                    error = None
                if error is None:
                    self._in_flight.forget(receipt)
                    leased.done()
                    self._broker.settled.add(leased, certain=True)
                elif isinstance(error, LeaseLostError):
                    self._in_flight.lose(receipt)
                    self._broker.settled.add(leased, certain=False)
                else:
                    leased.uncertain = True
        return failures

    async def carry_out(
        self, shown: Mapping[Receipt, int], released: Iterable[Receipt], moved: Mapping[Receipt, Copy]
    ) -> Failures:
        """Show, release and move messages, all at once, and return what went wrong with each."""
        failures: dict[Receipt, AbeError] = {}
        for some in await gather_all(self._show(shown), self._release(released), self._move(moved)):
            failures.update(some)
        return failures

    async def _show(self, seconds: Mapping[Receipt, int]) -> Failures:
        """Make messages visible in that many seconds, and ours no more."""
        if not seconds:
            return {}
        async with self._renewing:
            pass  # a renewal that is on its way could come after this, and make invisible again what is to be shown
        failures = await self._change_visibility(seconds)
        for receipt in seconds:
            error = failures.get(receipt)
            if error is None:
                self._in_flight.forget(receipt)
            elif isinstance(error, LeaseLostError):
                self._in_flight.lose(receipt)
        return failures

    async def _release(self, receipts: Iterable[Receipt]) -> Failures:
        """Show at once what is in a FIFO queue, so that it keeps its place, and remember that this delivery was no attempt."""
        released = {receipt: self._in_flight[receipt] for receipt in receipts}
        for leased in released.values():
            leased.uncount()  # before it can be delivered again
        try:
            failures = await self._show(dict.fromkeys(released, 0))
        except BaseException:  # what was cancelled, too, may not have happened
            for leased in released.values():
                leased.recount()
            raise
        for receipt in failures:
            released[receipt].recount()
        return failures

    async def _move(self, copies: Mapping[Receipt, Copy]) -> Failures:
        """Store copies, then delete what they are copies of: a crash in between doubles, and never loses."""
        failures: dict[Receipt, AbeError] = {}
        stored = [receipt for receipt in copies if self._in_flight[receipt].replaced]
        left = {receipt: copy for receipt, copy in copies.items() if receipt not in stored}
        for name in {copy.name for copy in left.values()}:
            some = {receipt: copy.entry for receipt, copy in left.items() if copy.name == name}
            results = await self._broker.publisher.post(name, list(some.values()))
            for receipt, result in zip(some, results, strict=True):
                if result is None:
                    stored.append(receipt)
                    if (leased := self._in_flight.get(receipt)) is not None:
                        leased.replaced = True
                else:
                    failures[receipt] = result
        failures.update(await self.delete(stored))
        return failures

    async def extend(self, receipts: Iterable[Receipt]) -> Collection[Receipt]:
        """Extend the leases of what is ours, let go of what SQS lets nobody have for longer, and return what SQS says is not ours.

        Raises:
            BackendConnectionError: Some could not be extended, and may be next time.
            AbeError: Some may never be.
        """
        started, lease = time.monotonic(), self.queue.clients.settings.visibility
        left = {each: self._in_flight[each].remaining for each in receipts if each not in self._in_flight.settling}
        self._in_flight.warn(left, lease, self._group)
        for receipt, seconds in left.items():
            if seconds <= 0:
                self._in_flight.lose(receipt)
        timeouts = {receipt: min(lease, seconds) for receipt, seconds in left.items() if seconds > 0}
        async with self._renewing:
            failures = await self._change_visibility(timeouts)
        for receipt, seconds in timeouts.items():
            if receipt not in failures and receipt in self._in_flight:
                self._in_flight[receipt].deadline = started + seconds
        # What was settled while this was on its way is not lost.
        known = {each: error for each, error in failures.items() if each in self._in_flight}
        refused = {
            receipt: error
            for receipt, error in known.items()
            if not error.retryable and receipt not in self._in_flight.settling
        }
        for receipt, error in refused.items():
            if not isinstance(error, LeaseLostError):
                raise error
            self._in_flight[receipt].deadline = 0.0
        raise_if_retryable({receipt: error for receipt, error in failures.items() if error.retryable})
        return refused.keys()

    async def _change_visibility(self, timeouts: Mapping[Receipt, int]) -> dict[Receipt, AbeError]:
        by_handle = [(self._in_flight.handle(receipt), seconds) for receipt, seconds in timeouts.items()]
        return _failures(timeouts, await self.queue.change_visibility(by_handle))


def raise_if_retryable(failures: Failures) -> None:
    """Raise if the call is to be repeated, which leaves out what is done.

    Raises:
        BackendConnectionError: Some may succeed later.
    """
    if any(isinstance(error, ConfigurationError) for error in failures.values()):
        return  # that will not pass, and is to be known at once
    for error in failures.values():
        if error.retryable:
            raise BackendConnectionError(str(error)) from error


def _failures(receipts: Iterable[Receipt], outcomes: Outcomes) -> dict[Receipt, AbeError]:
    return {receipt: error for receipt, error in zip(receipts, outcomes, strict=True) if error is not None}
