"""One consumer of one group."""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from abe.backends.message_queue.base import Delivery, Disposition, Metadata, Outcomes, Settlement
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import AbeError, GroupMissingError
from abe_backend_sqs import _wire
from abe_backend_sqs._broker import Broker, Poll
from abe_backend_sqs._copies import LONGEST_DELAY, Copy, delayed
from abe_backend_sqs._errors import QueueMissingError
from abe_backend_sqs._inflight import Failures, InFlight, Leased, Receipt, uncount, uncounted
from abe_backend_sqs._queue import LONGEST_VISIBILITY, Queue
from abe_backend_sqs._revival import Revival
from abe_backend_sqs._settlements import Settlements, raise_if_retryable
from abe_backend_sqs._topics import wanted
from abe_backend_sqs._wire import BATCH, Message

_log: Final = Log("abe.sqs")

_EARLY: Final = LONGEST_DELAY - 300
"""Seconds before it is due that a long delayed message is looked at again: its last stretch is a delay of SQS's own."""

_ON_ITS_WAY: Final = 0.5
"""Seconds for which a message may have been on its way to us while its lease ran."""

_AGAIN: Final = 2
"""Seconds for which a poll waits for what may come again."""

_RELEASE: Final = Settlement(Delivery(b"", None, 1, ""), Disposition.RELEASE)
"""Stands for that of any message."""


class SqsReceiver:
    """Asks for messages, and tells SQS what became of them.

    A poll is never cancelled: messages that SQS had put into its answer would be lost until their leases run out, and an attempt with
    them. One whose `receive` was cancelled or stopped is detached: the group's next `receive` in this process takes it over. What it
    brings before that is given back.

    Args:
        broker: What the receivers share.
        group: The group.
        queue: Its queue.
    """

    def __init__(self, broker: Broker, group: str, queue: Queue) -> None:
        self._broker = broker
        self._group = group
        self._settings = broker.settings
        self._in_flight = InFlight()
        self._settlements = Settlements(broker, group, queue, self._in_flight)
        self._revival = Revival(self._in_flight, self._again, broker.background.start)
        self._detached = broker.detached
        self._stopped: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._missing = False
        if self._settings.fifo:
            broker.delays(group).register()

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Wait for what one poll brings: a new one, or one that is detached."""
        if self._stopped.done():
            return ()
        queue = self._settlements.queue
        # One that was made again under the same name is another queue.
        suitable = (each for each, (its, count) in self._detached.items() if its is queue and count <= limit)
        poll = next(suitable, None)
        if poll is None:
            count = min(limit, BATCH)
            poll = self._broker.background.start(self._poll(count))
        else:
            _, count = self._detached.pop(poll)
        claimed = False
        try:
            done, _ = await asyncio.wait([poll, self._stopped], return_when=asyncio.FIRST_COMPLETED)
            claimed = poll in done
        finally:
            if not claimed:
                self._detached[poll] = queue, count
                poll.add_done_callback(self._unclaimed)
        if not claimed:
            return ()
        try:
            return self._take(*poll.result())
        except QueueMissingError as exc:
            raise self._deleted() from exc

    def metadata(self, delivery: Delivery) -> Metadata:
        """Return what was read with the message."""
        assert isinstance(delivery.header, Metadata)
        return delivery.header

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        """Delete. What may not be ours any more is received again first: by an old handle, SQS may delete what another consumer has."""
        ours, expired, failures = self._in_flight.ours([delivery.native for delivery in deliveries])
        with self._in_flight.being_settled([*ours, *expired]):
            for some in await gather_all(self._settlements.delete(ours), self._ack_again(expired)):
                failures.update(some)
        return [failures.get(delivery.native) for delivery in deliveries]

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        """Carry out settlements: change its visibility, or put a copy in its place."""
        by_receipt: dict[Receipt, Settlement] = {settlement.delivery.native: settlement for settlement in settlements}
        ours, expired, failures = self._in_flight.ours(by_receipt)
        with self._in_flight.being_settled([*ours, *expired]):
            # What is given back is given back by its lease, too.
            again = await self._revived(
                [each for each in expired if by_receipt[each].disposition is not Disposition.RELEASE]
            )
            failures.update(self._lost(expired, again))
            failures.update(await self._settle({each: by_receipt[each] for each in (*ours, *again)}))
        return [failures.get(receipt) for receipt in by_receipt]

    async def _settle(self, settlements: Mapping[Receipt, Settlement]) -> Failures:
        shown: dict[Receipt, int] = {}
        released: list[Receipt] = []
        moved: dict[Receipt, Copy] = {}
        for receipt, settlement in settlements.items():
            leased = self._in_flight[receipt]
            if not leased.stays(settlement, fifo=self._settings.fifo):
                moved[receipt] = self._copy(leased, settlement)
            elif settlement.disposition is Disposition.RELEASE:
                released.append(receipt)
            else:
                shown[receipt] = -int(-settlement.delay // 1)
        return await self._settlements.carry_out(shown, released, moved)

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Extend what is still ours; receive again what may be."""
        ours, expired, failures = self._in_flight.ours([delivery.native for delivery in deliveries])
        for leased in self._in_flight.expire({*ours, *expired}):
            self._give_up(leased)
        refused = await self._settlements.extend(ours)
        expired = [
            each for each in {*expired, *refused} if each in self._in_flight and each not in self._in_flight.settling
        ]
        again = asyncio.ensure_future(self._revived(expired))
        try:
            while not (await asyncio.wait([again], timeout=self._settings.lease / 3))[0]:
                await self._settlements.extend(
                    [each for each in ours if each in self._in_flight]
                )  # they are not to wait for those
        finally:
            again.cancel()
        lost = {
            *failures,
            *self._lost(expired, again.result()),
            *(each for each in ours if self._in_flight.is_lost(each)),
        }
        return [delivery for delivery in deliveries if delivery.native in lost]

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Say which are lost. What a lost answer brought comes back when its lease runs out."""
        try:
            if self._missing:
                self._settlements.queue = await self._broker.groups.find(self._settlements.queue.name)
                self._missing = False
            _, expired, lost = self._in_flight.ours([delivery.native for delivery in deliveries])
            expired = [each for each in expired if each not in self._in_flight.settling]
            lost.update(self._lost(expired, await self._revival.of(expired)))
        except QueueMissingError as exc:
            raise self._deleted() from exc
        return [delivery for delivery in deliveries if delivery.native in lost]

    async def stop(self) -> None:
        """Take nothing new. The polls under way end by themselves, in the background."""
        if not self._stopped.done():
            self._stopped.set_result(None)
            if self._settings.fifo:
                self._broker.delays(self._group).unregister()

    async def close(self) -> None:
        """Give back what is still ours. What may be deleted comes back when its lease runs out, or never."""
        await self.stop()
        self._revival.end()
        await self._give_back(
            [each for each, leased in self._in_flight.items() if leased.replaced or not leased.uncertain]
        )

    async def _ack_again(self, receipts: Sequence[Receipt]) -> Failures:
        if not receipts:
            return {}
        done = {each: leased for each in receipts if (leased := self._in_flight.get(each)) is not None}
        again = await self._revived(receipts)
        failures = dict(self._lost(receipts, again))
        for receipt in failures:
            if (leased := done.get(receipt)) is not None:  # should it come to us next, it was handled
                self._broker.settled.add(leased, certain=False)
        failures.update(await self._settlements.delete(again))
        return failures

    async def _revived(self, expired: Sequence[Receipt]) -> Sequence[Receipt]:
        """Return those that are ours again: none of those that were deleted with their queue."""
        try:
            return await self._revival.of(expired)
        except QueueMissingError:
            return ()

    def _lost(self, expired: Sequence[Receipt], again: Collection[Receipt]) -> Mapping[Receipt, AbeError]:
        """Let go of what was not received again; what was carried out meanwhile is not lost."""
        lost = [each for each in expired if each not in again]
        for receipt in lost:
            self._in_flight.lose(receipt)
        return self._in_flight.ours(lost)[2]

    async def _poll(self, count: int, wait: int | None = None) -> tuple[Sequence[Message], float]:
        """Return what a poll brings, and until when it is ours."""
        queue = self._settlements.queue
        messages = await queue.poll(count, wait)
        deadline = time.monotonic() + self._settings.visibility - _ON_ITS_WAY
        if self._settings.fanout == "sns" and messages:
            messages = await wanted(self._broker.groups.keeper, queue, self._group, messages)
        return messages, deadline

    def _unclaimed(self, poll: Poll) -> None:
        """Give back what a poll brought that is still detached."""
        if self._detached.pop(poll, None) is None or poll.cancelled():
            return
        if (error := poll.exception()) is None:
            self._broker.background.start(self._return(self._take(*poll.result())))
        else:
            level = logging.DEBUG if isinstance(error, AbeError) else logging.ERROR
            _log.log(level, "a poll of group %r whose consumer has stopped failed: %r", self._group, error)

    async def _again(self, count: int) -> int:
        """Ask once more for what is in flight, give back what is not, and return how many messages came.

        Raises:
            AbeError: By the tables of errors.
        """
        messages, deadline = await self._poll(count, _AGAIN)
        await self._return(self._take(messages, deadline))
        return len(messages)

    def _take(self, messages: Sequence[Message], deadline: float) -> Sequence[Delivery]:
        """Return what is to be handed out of what a poll brought. The rest is in flight already, or not due, or done."""
        now, late = time.time() * 1000, time.monotonic() >= deadline
        deliveries: list[Delivery] = []
        early: list[Receipt] = []
        repeated: list[str] = []
        # One answer may hold a message twice; the later handle is the one that counts.
        for message in {message["MessageId"]: message for message in messages}.values():
            if self._is_done(message):
                repeated.append(message["ReceiptHandle"])
                continue
            if self._in_flight.receive_again(message, deadline):
                continue
            if late:  # its lease ran out before it could be taken, which is no attempt
                uncount(message)
                continue
            parsed = _wire.parse(message)
            if parsed.due > now + _wire.LONGEST_WAIT:
                parsed = parsed._replace(due=0, fault="the time that it waits for comes when SQS has it no more")
            delivery = _wire.delivery(message, parsed)
            delivery.attempt = max(1, delivery.attempt - uncounted(message))
            received_again = uncounted(message) > 0
            self._in_flight[delivery.native] = Leased(message, delivery, deadline, received_again=received_again)
            # One that waited is handed out as a copy: SQS has counted what was no attempt, and would not tell it from the first one.
            if parsed.due:
                early.append(delivery.native)
            else:
                deliveries.append(delivery)
        if early or repeated:
            self._in_flight.settling.update(early)  # from now on: closing must not show them
            self._broker.background.start(self._set_aside(early, repeated))
        return deliveries

    def _is_done(self, message: Message) -> bool:
        """Whether a message that is delivered is only to be deleted: SQS was told that it is done, or would have been."""
        if (leased := self._in_flight.given_up(message)) is not None:
            self._give_up(leased)
        return self._broker.settled.has(message)

    def _give_up(self, leased: Leased) -> None:
        """See to it that a message that the engine does not have is handed out when it comes next, unless it was done with."""
        leased.give_up()
        if leased.replaced or leased.delivery.handled:
            self._broker.settled.add(leased, certain=leased.replaced)

    async def _set_aside(self, early: Sequence[Receipt], repeated: Sequence[str]) -> None:
        try:
            with self._in_flight.being_settled(early):
                await gather_all(self._put_off(early), self._settlements.queue.delete(repeated))
        except AbeError as exc:
            _log.debug(
                "early or repeated messages of group %r come back when their leases run out: %s", self._group, exc
            )
        finally:
            self._in_flight.give_up(early)

    async def _put_off(self, receipts: Sequence[Receipt]) -> None:
        """Make invisible again what is not due, so that it is seen before it is. Its last stretch is a delay of SQS's own, no attempt."""
        shown: dict[Receipt, int] = {}
        moved: dict[Receipt, Copy] = {}
        for receipt in receipts:
            message = self._in_flight[receipt].message
            parsed = _wire.parse(message)
            left = max(0.0, parsed.due / 1000 - time.time())
            if left > LONGEST_DELAY:
                shown[receipt] = int(min(LONGEST_VISIBILITY, left - _EARLY))
            else:
                moved[receipt] = Copy(
                    self._settlements.queue.name, delayed(_wire.repack(message, attempts=parsed.attempts), left)
                )
        raise_if_retryable(await self._settlements.carry_out(shown, (), moved))

    async def _return(self, deliveries: Sequence[Delivery]) -> None:
        try:
            await self._give_back([delivery.native for delivery in deliveries])
        except AbeError as exc:
            _log.debug("messages of group %r could not be given back, their leases will run out: %s", self._group, exc)
        finally:
            self._in_flight.give_up(delivery.native for delivery in deliveries)

    async def _give_back(self, receipts: Collection[Receipt]) -> None:
        ours, *_ = self._in_flight.ours(each for each in receipts if each not in self._in_flight.settling)
        with self._in_flight.being_settled(ours):
            raise_if_retryable(await self._settle(dict.fromkeys(ours, _RELEASE)))

    def _copy(self, leased: Leased, settlement: Settlement) -> Copy:
        return self._broker.copies.settled(self._group, leased.message, leased.delivery.attempt, settlement)

    def _deleted(self) -> GroupMissingError:
        self._missing = True
        self._broker.groups.forget(self._settlements.queue.name)
        return GroupMissingError(f"group {self._group!r} was deleted underneath its consumers")


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = SqsReceiver
