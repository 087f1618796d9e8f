"""One consumer of one group."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import Delivery, Disposition, Metadata, Outcomes, Settlement
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import AbeError, GroupMissingError
from abe_backend_sqs import _wire
from abe_backend_sqs._broker import Broker
from abe_backend_sqs._copies import LONGEST_DELAY, Copy, delayed
from abe_backend_sqs._errors import QueueMissingError
from abe_backend_sqs._inflight import Failures, InFlight, Leased, Receipt, uncounted
from abe_backend_sqs._polls import Polls
from abe_backend_sqs._queue import LONGEST_VISIBILITY, Queue
from abe_backend_sqs._revival import Revival
from abe_backend_sqs._settlements import Settlements, raise_if_retryable
from abe_backend_sqs._topics import wanted
from abe_backend_sqs._wire import Message

_log: Final = logging.getLogger("abe.sqs")

_EARLY: Final = LONGEST_DELAY - 300
"""Seconds before it is due that a long delayed message is looked at again: its last stretch is a delay of SQS's own."""

_ON_ITS_WAY: Final = 0.5
"""Seconds for which a message may have been on its way to us while its lease ran."""

_RELEASE: Final = Settlement(Delivery(b"", None, 1, ""), Disposition.RELEASE)
"""Stands for that of any message."""


class SqsReceiver:
    """Hands out what polls bring in the background, and tells SQS what became of it.

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
        self._polls = Polls(queue, broker.detached[queue.name], broker.background.start, self._take)
        self._revival = Revival(self._in_flight, self._polls, broker.background.start)
        self._arrived: deque[tuple[Delivery, Leased]] = deque()
        self._stopping = False
        self._missing = False
        if self._settings.fifo:
            broker.delays(group).register()

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Wait for what the polls bring, and have as many of them under way as the limit allows."""
        polls = self._polls
        while not self._stopping and not self._arrived:
            if (error := polls.error) is not None:
                polls.error = None
                if isinstance(error, QueueMissingError):
                    raise self._deleted() from error
                raise error
            polls.ask_for(limit - polls.asked_for)
            polls.news.clear()
            await polls.news.wait()
        taken = [self._arrived.popleft() for _ in range(min(limit, len(self._arrived)))]
        if not self._stopping:
            polls.ask_for(limit - len(taken) - polls.asked_for - len(self._arrived))
        now = time.monotonic()
        deliveries: list[Delivery] = []
        for delivery, leased in taken:
            if leased.deadline > now:
                deliveries.append(delivery)
            else:  # nobody had the time to take it before its lease ran out, which is no attempt
                leased.uncount()
                self._in_flight.lose(delivery.native)
        return deliveries

    def metadata(self, delivery: Delivery) -> Metadata:
        """Return what was read with the message."""
        assert isinstance(delivery.header, Metadata)
        return delivery.header

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        """Delete. What may not be ours any more is received again first: by an old handle, SQS may delete what somebody else has by now."""
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
            again = await self._revival.of(
                each for each in expired if by_receipt[each].disposition is not Disposition.RELEASE
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
        """Extend what is still ours, and what arrived and waits to be asked for; receive again what may be."""
        lost = await self._renew([delivery.native for delivery in deliveries])
        return [delivery for delivery in deliveries if delivery.native in lost]

    async def _renew(self, receipts: Sequence[Receipt]) -> Collection[Receipt]:
        waiting: list[Receipt] = [delivery.native for delivery, _ in self._arrived]
        ours, expired, failures = self._in_flight.ours([*receipts, *waiting])
        self._in_flight.expire({*receipts, *waiting})
        refused = await self._settlements.extend(ours)
        expired = [
            each for each in {*expired, *refused} if each in self._in_flight and each not in self._in_flight.settling
        ]
        again = asyncio.ensure_future(self._revival.of(expired))
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
        return lost.intersection(receipts)

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Say which are lost. What a lost answer brought comes back when its lease runs out."""
        if self._missing:
            try:
                queue = await self._broker.groups.find(self._polls.queue.name)
            except QueueMissingError as exc:
                raise self._deleted() from exc
            self._polls.queue = self._settlements.queue = queue
            self._missing = False
        _, expired, lost = self._in_flight.ours([delivery.native for delivery in deliveries])
        expired = [each for each in expired if each not in self._in_flight.settling]
        lost.update(self._lost(expired, await self._revival.of(expired)))
        return [delivery for delivery in deliveries if delivery.native in lost]

    async def stop(self) -> None:
        """Take nothing new, and give back what nobody was handed. The polls under way end by themselves, in the background."""
        self._unsubscribe()
        await self._give_back_arrived()

    async def close(self) -> None:
        """Give back what is still ours. What may be deleted comes back when its lease runs out, or never."""
        self._unsubscribe()
        self._revival.end()
        self._arrived.clear()
        await self._give_back(
            [each for each, leased in self._in_flight.items() if leased.replaced or not leased.uncertain]
        )

    async def _ack_again(self, receipts: Sequence[Receipt]) -> Failures:
        if not receipts:
            return {}
        done = {each: leased for each in receipts if (leased := self._in_flight.get(each)) is not None}
        again = await self._revival.of(receipts)
        failures = dict(self._lost(receipts, again))
        for receipt in failures:
            if (leased := done.get(receipt)) is not None:  # should it come to us next, it was handled
                self._broker.settled.add(leased, certain=False)
        failures.update(await self._settlements.delete(again))
        return failures

    def _lost(self, expired: Sequence[Receipt], again: Collection[Receipt]) -> Mapping[Receipt, AbeError]:
        """Let go of what was not received again; what was carried out meanwhile is not lost."""
        lost = [each for each in expired if each not in again]
        for receipt in lost:
            self._in_flight.lose(receipt)
        return self._in_flight.ours(lost)[2]

    def _unsubscribe(self) -> None:
        if self._settings.fifo and not self._stopping:
            self._broker.delays(self._group).unregister()
        self._stopping = True
        self._polls.detach()

    async def _take(self, messages: Sequence[Message]) -> None:
        """Have what a poll brought: to be handed out, made invisible again, or given back."""
        deadline = time.monotonic() + self._settings.visibility - _ON_ITS_WAY
        now = time.time() * 1000
        # One answer may hold a message twice; the later handle is the one that counts.
        if self._settings.fanout == "sns" and messages:
            messages = await wanted(self._broker.groups.keeper, self._polls.queue, self._group, messages)
        distinct = {message["MessageId"]: message for message in messages}
        early: list[Receipt] = []
        repeated = [message for message in distinct.values() if self._broker.settled.has(message)]
        for message in distinct.values():
            if message in repeated or self._in_flight.receive_again(message, deadline):
                continue
            parsed = _wire.parse(message)
            if parsed.due > now + _wire.LONGEST_WAIT:
                parsed = parsed._replace(due=0, fault="the time that it waits for comes when SQS has it no more")
            delivery = _wire.delivery(message, parsed)
            delivery.attempt = max(1, delivery.attempt - uncounted(message))
            leased = self._in_flight[delivery.native] = Leased(message, delivery.attempt, deadline)
            # One that was put off, and that nobody was there for since it is due, has counted what was no attempt.
            if parsed.due and (parsed.due > now + 500 or _wire.received(message) > 1):
                early.append(delivery.native)
            else:
                self._arrived.append((delivery, leased))
        if repeated:  # SQS was told that they are done, or would have been
            await self._settlements.queue.delete([message["ReceiptHandle"] for message in repeated])
        if early:
            self._polls.news.set()  # for those that are ready
            try:
                await self._put_off(early)
            except AbeError as exc:
                _log.debug("early messages of group %r come back when their leases run out: %s", self._group, exc)
        if self._stopping:
            await self._give_back_arrived()

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
                    self._polls.queue.name, delayed(_wire.repack(message, attempts=parsed.attempts), left)
                )
        with self._in_flight.being_settled(receipts):
            raise_if_retryable(await self._settlements.carry_out(shown, (), moved))

    async def _give_back_arrived(self) -> None:
        receipts: list[Receipt] = [delivery.native for delivery, _ in self._arrived]
        self._arrived.clear()
        try:
            await self._give_back(receipts)
        except AbeError as exc:
            _log.debug("messages of group %r could not be given back, their leases will run out: %s", self._group, exc)

    async def _give_back(self, receipts: Collection[Receipt]) -> None:
        ours, *_ = self._in_flight.ours(each for each in receipts if each not in self._in_flight.settling)
        with self._in_flight.being_settled(ours):
            raise_if_retryable(await self._settle(dict.fromkeys(ours, _RELEASE)))

    def _copy(self, leased: Leased, settlement: Settlement) -> Copy:
        return self._broker.copies.settled(self._group, leased.message, leased.attempt, settlement)

    def _deleted(self) -> GroupMissingError:
        self._missing = True
        self._broker.groups.forget(self._polls.queue.name)
        return GroupMissingError(f"group {self._group!r} was deleted underneath its consumers")


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = SqsReceiver
