"""One consumer of one group."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from abe.backends.message_queue.base import Delivery, Disposition, Metadata, Outcomes, Settlement
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import AbeError, GroupMissingError, LeaseLostError
from abe_backend_sqs import _wire
from abe_backend_sqs._copies import LONGEST_DELAY, Copy, delayed
from abe_backend_sqs._errors import QueueMissingError
from abe_backend_sqs._handles import LONGEST_HIDING, Failures, Handles, Receipt, insist
from abe_backend_sqs._held import Held, Holding, uncounted
from abe_backend_sqs._polls import Polls
from abe_backend_sqs._revival import Revival
from abe_backend_sqs._topics import wanted
from abe_backend_sqs._wire import Message

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_log: Final = logging.getLogger("abe.sqs")

_EARLY: Final = LONGEST_DELAY - 300
"""Seconds before it is due that a long delayed message is looked at again: its last stretch is a delay of SQS's own."""

_ON_ITS_WAY: Final = 0.5
"""Seconds for which a message may have been on its way to us while its lease ran."""

_RELEASE: Final = Settlement(Delivery(b"", None, 1, ""), Disposition.RELEASE)
"""Stands for that of any message."""


class _Arrival(NamedTuple):
    delivery: Delivery
    held: Held


class SqsReceiver:
    """Hands out what polls bring in the background, and tells SQS what became of it.

    Args:
        transport: Asks SQS.
        group: The group.
        name: The name of its queue.
        url: Its address.
    """

    def __init__(self, transport: "SqsTransport", group: str, name: str, url: str) -> None:
        self._transport = transport
        self._group = group
        self._name = name
        self._settings = transport.settings
        self._fifo = self._settings.fifo
        self._visibility = self._settings.visibility
        self._held = Holding()
        self._handles = Handles(transport, url, self._held.handle)
        self._polls = Polls(transport, name, url, self._take)
        self._revival = Revival(self._held, self._polls, transport.in_background)
        self._renewing = asyncio.Lock()
        self._arrived: deque[_Arrival] = deque()
        self._stopping = False
        self._missing = False
        if self._fifo:
            transport.later(group).join()

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
        for delivery, held in taken:
            if held.deadline > now:
                deliveries.append(delivery)
            else:  # nobody had the time to take it before its lease ran out, which is no attempt
                held.uncount()
                self._held.lose(delivery.native)
        return deliveries

    def metadata(self, delivery: Delivery) -> Metadata:
        """Return what was read with the message."""
        assert isinstance(delivery.header, Metadata)
        return delivery.header

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        """Delete. What may not be ours any more is received again first: by an old handle, SQS may delete what somebody else has by now."""
        ours, doubtful, failures = self._held.ours([delivery.native for delivery in deliveries])
        with self._held.being_settled([*ours, *doubtful]):
            for some in await gather_all(self._delete(ours), self._ack_again(doubtful)):
                failures.update(some)
        return [failures.get(delivery.native) for delivery in deliveries]

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        """Carry out settlements: hide, move, or put a copy in its place."""
        by_receipt: dict[Receipt, Settlement] = {settlement.delivery.native: settlement for settlement in settlements}
        ours, doubtful, failures = self._held.ours(by_receipt)
        with self._held.being_settled([*ours, *doubtful]):
            # What is given back is given back by its lease, too.
            again = await self._revival.of(
                each for each in doubtful if by_receipt[each].disposition is not Disposition.RELEASE
            )
            failures.update(self._lost(doubtful, again))
            for done in await gather_all(*self._settle([*ours, *again], by_receipt)):
                failures.update(done)
        return [failures.get(receipt) for receipt in by_receipt]

    def _settle(
        self, receipts: Sequence[Receipt], by_receipt: Mapping[Receipt, Settlement]
    ) -> Sequence[Awaitable[Failures]]:
        hidden: dict[Receipt, int] = {}
        released: list[Receipt] = []
        moved: dict[Receipt, Copy] = {}
        for receipt in receipts:
            held, settlement = self._held[receipt], by_receipt[receipt]
            if not held.stays(settlement, fifo=self._fifo):
                moved[receipt] = self._copy(held, settlement)
            elif settlement.disposition is Disposition.RELEASE:
                released.append(receipt)
            else:
                hidden[receipt] = -int(-settlement.delay // 1)
        parts: list[Awaitable[Failures]] = []
        if hidden:
            parts.append(self._hide(hidden))
        if released:
            parts.append(self._release(released))
        if moved:
            parts.append(self._move(moved))
        return parts

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Hide anew what is still ours, and what arrived and waits to be asked for; receive again what may be."""
        lost = await self._renew([delivery.native for delivery in deliveries])
        return [delivery for delivery in deliveries if delivery.native in lost]

    async def _renew(self, receipts: Sequence[Receipt]) -> Collection[Receipt]:
        waiting: list[Receipt] = [arrival.delivery.native for arrival in self._arrived]
        ours, doubtful, failures = self._held.ours([*receipts, *waiting])
        self._held.expire({*receipts, *waiting})
        refused = await self._prolong(ours)
        doubtful = [each for each in {*doubtful, *refused} if each in self._held and each not in self._held.leaving]
        again = asyncio.ensure_future(self._revival.of(doubtful))
        try:
            while not (await asyncio.wait([again], timeout=self._settings.lease / 3))[0]:
                await self._prolong([each for each in ours if each in self._held])  # they are not to wait for those
        finally:
            again.cancel()
        lost = {*failures, *self._lost(doubtful, again.result()), *(each for each in ours if self._held.is_lost(each))}
        return lost.intersection(receipts)

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Say which are lost. What a lost answer brought comes back when its lease runs out."""
        if self._missing:
            try:
                self._handles.url = self._polls.url = await self._transport.queues.url(self._name)
            except QueueMissingError as exc:
                raise self._deleted() from exc
            self._missing = False
        _, doubtful, lost = self._held.ours([delivery.native for delivery in deliveries])
        doubtful = [each for each in doubtful if each not in self._held.leaving]
        lost.update(self._lost(doubtful, await self._revival.of(doubtful)))
        return [delivery for delivery in deliveries if delivery.native in lost]

    async def stop(self) -> None:
        """Take nothing new, and give back what nobody was handed. The polls under way end by themselves, in the background."""
        self._leave_polls()
        await self._give_back_arrived()

    async def close(self) -> None:
        """Give back what is still ours. What may be deleted comes back when its lease runs out, or never."""
        self._leave_polls()
        self._revival.end()
        self._arrived.clear()
        await self._give_back([each for each, held in self._held.items() if held.replaced or not held.uncertain])

    async def _ack_again(self, receipts: Sequence[Receipt]) -> Failures:
        if not receipts:
            return {}
        done = {each: held for each in receipts if (held := self._held.get(each)) is not None}
        again = await self._revival.of(receipts)
        failures = dict(self._lost(receipts, again))
        for receipt in failures:
            if (held := done.get(receipt)) is not None:  # should it come to us next, it was handled
                self._transport.settled.add(held, certain=False)
        failures.update(await self._delete(again))
        return failures

    def _lost(self, doubtful: Sequence[Receipt], again: Collection[Receipt]) -> Mapping[Receipt, AbeError]:
        """Let go of what was not received again; what was carried out meanwhile is not lost."""
        lost = [each for each in doubtful if each not in again]
        known = [each for each in lost if each in self._held]
        for receipt in known:
            self._held.lose(receipt)
        return self._held.ours(lost)[2]

    def _leave_polls(self) -> None:
        if self._fifo and not self._stopping:
            self._transport.later(self._group).leave()
        self._stopping = True
        self._polls.leave()

    async def _take(self, messages: Sequence[Message]) -> None:
        """Have what a poll brought: to be handed out, hidden again, or given back."""
        deadline = time.monotonic() + self._visibility - _ON_ITS_WAY
        now = time.time() * 1000
        # One answer may hold a message twice; the later handle is the one that counts.
        if self._settings.fanout == "sns" and messages:
            messages = await wanted(self._transport.queues, self._handles, self._group, messages)
        distinct = {message["MessageId"]: message for message in messages}
        early: list[Receipt] = []
        repeated = [message for message in distinct.values() if self._transport.settled.has(message)]
        for message in distinct.values():
            if message in repeated or self._held.receive_again(message, deadline):
                continue
            parsed = _wire.parse(message)
            if parsed.due > now + _wire.LONGEST_WAIT:
                parsed = parsed._replace(due=0, fault="the time that it waits for comes when SQS has it no more")
            delivery = _wire.delivery(message, parsed)
            delivery.attempt = max(1, delivery.attempt - uncounted(message))
            held = self._held[delivery.native] = Held(message, delivery.attempt, deadline)
            # One that was put off, and that nobody was there for since it is due, has counted what was no attempt.
            if parsed.due and (parsed.due > now + 500 or _wire.received(message) > 1):
                early.append(delivery.native)
            else:
                self._arrived.append(_Arrival(delivery, held))
        if repeated:  # SQS was told that they are done, or would have been
            await self._handles.delete([message["ReceiptHandle"] for message in repeated])
        if early:
            self._polls.news.set()  # for those that are ready
            try:
                await self._put_off(early)
            except AbeError as exc:
                _log.debug("early messages of group %r come back when their leases run out: %s", self._group, exc)
        if self._stopping:
            await self._give_back_arrived()

    async def _put_off(self, receipts: Sequence[Receipt]) -> None:
        """Hide again what is not due, so that it is seen before it is; the last stretch is a delay of SQS's own, which no attempt is."""
        hidden: dict[Receipt, int] = {}
        moved: dict[Receipt, Copy] = {}
        for receipt in receipts:
            message = self._held[receipt].message
            parsed = _wire.parse(message)
            left = max(0.0, parsed.due / 1000 - time.time())
            if left > LONGEST_DELAY:
                hidden[receipt] = int(min(LONGEST_HIDING, left - _EARLY))
            else:
                moved[receipt] = Copy(self._name, delayed(_wire.repack(message, attempts=parsed.attempts), left))
        with self._held.being_settled(receipts):
            for failures in await gather_all(self._hide(hidden), self._move(moved)):
                insist(failures)

    async def _give_back_arrived(self) -> None:
        receipts: list[Receipt] = [arrival.delivery.native for arrival in self._arrived]
        self._arrived.clear()
        try:
            await self._give_back(receipts)
        except AbeError as exc:
            _log.debug("messages of group %r could not be given back, their leases will run out: %s", self._group, exc)

    async def _give_back(self, receipts: Collection[Receipt]) -> None:
        ours, *_ = self._held.ours([each for each in receipts if each in self._held and each not in self._held.leaving])
        if not ours:
            return
        with self._held.being_settled(ours):
            if self._fifo:
                insist(await self._release(ours))
            else:
                copies = {each: self._copy(self._held[each], _RELEASE) for each in ours}
                insist(await self._move(copies))

    def _copy(self, held: Held, settlement: Settlement) -> Copy:
        return self._transport.copies.settled(self._group, held.message, held.attempt, settlement)

    async def _move(self, moves: Mapping[Receipt, Copy]) -> Failures:
        """Store copies, then delete what they are copies of: a crash in between doubles, and never loses."""
        failures: dict[Receipt, AbeError] = {}
        stored = [receipt for receipt in moves if self._held[receipt].replaced]
        left = {receipt: move for receipt, move in moves.items() if receipt not in stored}
        for name in {name for name, _ in left.values()}:
            some = {receipt: entry for receipt, (where, entry) in left.items() if where == name}
            results = await self._transport.sender.post(name, list(some.values()))
            for receipt, result in zip(some, results, strict=True):
                if result is None:
                    stored.append(receipt)
                    if (held := self._held.get(receipt)) is not None:
                        held.replaced = True
                else:
                    failures[receipt] = result
        if stored:
            failures.update(await self._delete(stored))
        return failures

    async def _delete(self, receipts: Sequence[Receipt]) -> dict[Receipt, AbeError]:
        if not receipts:
            return {}
        with self._held.being_settled(receipts):
            try:
                failures = await self._handles.delete(receipts)
            except asyncio.CancelledError:
                for receipt in receipts:
                    if (held := self._held.get(receipt)) is not None:
                        held.uncertain = True
                raise
            for receipt in receipts:
                error, held = failures.get(receipt), self._held.get(receipt)
                if held is None:
                    continue
                if isinstance(error, LeaseLostError) and held.uncertain:
                    del failures[receipt]
                    error = None
                if error is None:
                    self._held.forget(receipt)
                    held.done()
                    self._transport.settled.add(held, certain=True)
                elif isinstance(error, LeaseLostError):
                    self._held.lose(receipt)
                    self._transport.settled.add(held, certain=False)
                else:
                    held.uncertain = True
        return failures

    async def _hide(self, hiding: Mapping[Receipt, int]) -> Failures:
        """Hide for that many seconds what is not ours any more after that."""
        async with self._renewing:
            pass  # a renewal that is on its way could come after this, and hide again what is to be shown
        failures = await self._handles.hide(hiding)
        for receipt in hiding:
            error = failures.get(receipt)
            if error is None:
                self._held.forget(receipt)
            elif isinstance(error, LeaseLostError):
                self._held.lose(receipt)
        return failures

    async def _release(self, receipts: Sequence[Receipt]) -> Failures:
        """Show at once what is in a FIFO queue, so that it keeps its place, and remember that this delivery was no attempt."""
        released = {receipt: self._held[receipt] for receipt in receipts}
        for held in released.values():
            held.uncount()  # before it can be delivered again
        try:
            failures = await self._hide(dict.fromkeys(receipts, 0))
        except BaseException:  # what was cancelled, too, may not have happened
            for held in released.values():
                held.recount()
            raise
        for receipt in failures:
            released[receipt].recount()
        return failures

    async def _prolong(self, receipts: Sequence[Receipt]) -> Collection[Receipt]:
        """Hide anew what is ours, let go of what SQS lets nobody have for longer, and return what SQS says is not ours."""
        started = time.monotonic()
        left = {each: self._held[each].hideable for each in receipts if each not in self._held.leaving}
        self._held.warn(left, self._visibility, self._group)
        for receipt, seconds in left.items():
            if seconds <= 0:
                self._held.lose(receipt)
        hiding = {receipt: min(self._visibility, seconds) for receipt, seconds in left.items() if seconds > 0}
        async with self._renewing:
            failures = await self._handles.hide(hiding)
        for receipt, seconds in hiding.items():
            if receipt not in failures and receipt in self._held:
                self._held[receipt].deadline = started + seconds
        # What was settled while this was on its way is not lost.
        settled = {receipt for receipt in failures if receipt not in self._held or receipt in self._held.leaving}
        refused = [receipt for receipt, error in failures.items() if not error.retryable and receipt not in settled]
        for receipt in refused:
            if isinstance(failures[receipt], LeaseLostError):
                self._held[receipt].deadline = 0.0
            else:
                raise failures[receipt]
        insist({receipt: error for receipt, error in failures.items() if error.retryable})
        return refused

    def _deleted(self) -> GroupMissingError:
        self._missing = True
        self._transport.queues.forget(self._name)
        return GroupMissingError(f"group {self._group!r} was deleted underneath its consumers")


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = SqsReceiver
