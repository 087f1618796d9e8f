"""Settles and extends the messages that one consumer has in flight."""

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
    """Deletes, shows, moves and extends messages, and drops those that were lost.

    Args:
        broker: Stores copies.
        group: The group.
        queue: The group's queue.
        in_flight: The consumer's messages.
    """

    def __init__(self, broker: Broker, group: str, queue: Queue, in_flight: InFlight) -> None:
        self._broker = broker
        self._group = group
        self._in_flight = in_flight
        self._renewing = asyncio.Lock()
        self.queue: Queue = queue

    async def delete(self, receipts: Sequence[Receipt]) -> dict[Receipt, AbeError]:
        """Delete messages; return the errors of those that failed."""
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
        """Show, release and move messages, all at once; return the errors of those that failed."""
        failures: dict[Receipt, AbeError] = {}
        for some in await gather_all(self._show(shown), self._release(released), self._move(moved)):
            failures.update(some)
        return failures

    async def _show(self, seconds: Mapping[Receipt, int]) -> Failures:
        """Make messages visible in that many seconds: they are not in flight any more."""
        if not seconds:
            return {}
        async with self._renewing:
            pass  # a renewal in progress could arrive after this, and make the messages invisible again
        failures = await self._change_visibility(seconds)
        for receipt in seconds:
            error = failures.get(receipt)
            if error is None:
                self._in_flight.forget(receipt)
            elif isinstance(error, LeaseLostError):
                self._in_flight.lose(receipt)
        return failures

    async def _release(self, receipts: Iterable[Receipt]) -> Failures:
        """Show messages of a FIFO queue at once, so that they keep their places; remember that these deliveries were no attempts."""
        released = {receipt: self._in_flight[receipt] for receipt in receipts}
        for leased in released.values():
            leased.uncount()  # before it can be delivered again
        try:
            failures = await self._show(dict.fromkeys(released, 0))
        except BaseException:  # a cancelled request, too, may not have been carried out
            for leased in released.values():
                leased.recount()
            raise
        for receipt in failures:
            released[receipt].recount()
        return failures

    async def _move(self, copies: Mapping[Receipt, Copy]) -> Failures:
        """Store copies, then delete the originals: a crash in between duplicates, and never loses."""
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
        """Extend leases, drop messages that were in flight for as long as SQS allows, and return those that SQS says are lost.

        Raises:
            BackendConnectionError: Some could not be extended; a retry may succeed.
            AbeError: Some could not be extended, and a retry does not help.
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
        # A message that was settled meanwhile is not lost.
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
    """Raise if the call is to be repeated; messages that are done are left out then.

    Raises:
        BackendConnectionError: A retry may succeed for some.
    """
    if any(isinstance(error, ConfigurationError) for error in failures.values()):
        return  # it is permanent, and is to be reported at once
    for error in failures.values():
        if error.retryable:
            raise BackendConnectionError(str(error)) from error


def _failures(receipts: Iterable[Receipt], outcomes: Outcomes) -> dict[Receipt, AbeError]:
    return {receipt: error for receipt, error in zip(receipts, outcomes, strict=True) if error is not None}
