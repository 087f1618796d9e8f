"""One consumer of one group."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from abe.backends.message_queue.base import Delivery, Failures, Metadata, Receipt, Settlement, Verb
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.errors import AbeError, LeaseLostError
from abe_backend_sqs import _wire
from abe_backend_sqs._copies import LONGEST_DELAY, Copy, delayed
from abe_backend_sqs._errors import QueueMissingError
from abe_backend_sqs._handles import LONGEST_HIDING, Deletions, Handles, beside, insist
from abe_backend_sqs._held import Held, Holding, uncounted
from abe_backend_sqs._polls import Polls
from abe_backend_sqs._registry import Registry
from abe_backend_sqs._wire import BATCH, Message

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_log: Final = logging.getLogger("abe.sqs")

_EARLY: Final = LONGEST_DELAY - 300
"""Seconds before it is due that a long delayed message is looked at again: its last stretch is a delay of SQS's own."""

_LONGEST_WAIT: Final = 15 * 86_400_000
"""Milliseconds from now for which a message may be made to wait: SQS keeps it for 14 days."""

_ON_ITS_WAY: Final = 0.5
"""Seconds for which a message may have been on its way to us while its lease ran."""


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
        self._handles = Handles(transport, url)
        self._polls = Polls(transport, name, url, self._take)
        self._held = Holding()
        self._deletions = Deletions(transport, self._delete, self._more_to_delete)
        self._renewing = asyncio.Lock()
        self._arrived: deque[_Arrival] = deque()
        self._stopping = False
        self._restoring: asyncio.Future[None] | None = None
        if self._fifo:
            transport.later(group).join()

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Wait for what the polls bring, and have as many of them under way as the limit allows."""
        polls = self._polls
        while not self._stopping and not self._arrived:
            if (error := polls.error) is not None:
                polls.error = None
                await self._reported(error)
                return ()
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
            else:  # nobody had the time to take it before its lease ran out
                self._held.lose(delivery.receipt)
        return deliveries

    def metadata(self, delivery: Delivery) -> Metadata:
        """Return what was read with the message."""
        assert isinstance(delivery.header, Metadata)
        return delivery.header

    async def ack(self, receipts: Sequence[Receipt], *, verify: bool) -> Failures:
        """Delete. A handle whose lease has run out is left alone: what it deletes, if anything, may be somebody else's by now."""
        ours, failures = self._held.ours(receipts)
        self._held.leaving.update(ours)
        failures.update(await self._deletions.delete(ours, awaited=verify))
        return insist(failures)

    async def settle(self, settlements: Sequence[Settlement]) -> Failures:
        """Carry out verdicts: hide, move, or put a copy in its place."""
        verdicts = {settlement.receipt: settlement for settlement in settlements}
        ours, failures = self._held.ours(verdicts)
        hidden: dict[Receipt, int] = {}
        released: list[Receipt] = []
        moved: dict[Receipt, Copy] = {}
        for receipt in ours:
            held, verdict = self._held[receipt], verdicts[receipt]
            if not self._stays(held, verdict):
                moved[receipt] = self._copy(held, verdict)
            elif verdict.verb is Verb.RELEASE:
                released.append(receipt)
            else:
                hidden[receipt] = -int(-verdict.delay // 1)
        parts: list[Awaitable[Failures]] = []
        if hidden:
            parts.append(self._hide(hidden))
        if released:
            parts.append(self._release(released))
        if moved:
            parts.append(self._move(moved))
        with self._held.being_settled(ours):
            for done in await beside(*parts):
                failures.update(done)
        return insist(failures)

    async def renew(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Hide anew what is still ours, and what arrived and waits to be asked for."""
        waiting = [arrival.delivery.receipt for arrival in self._arrived]
        ours, failures = self._held.ours([*receipts, *waiting])
        self._held.expire()
        started = time.monotonic()
        left = {each: self._held[each].hideable for each in ours if each not in self._held.leaving}
        self._warn(left)
        ended = [receipt for receipt, seconds in left.items() if seconds <= 0]
        hiding = {receipt: min(self._visibility, seconds) for receipt, seconds in left.items() if seconds > 0}
        async with self._renewing:
            lost = {*failures, *ended, *await self._prolong(hiding, started)}
        for receipt in lost:
            self._held.lose(receipt)
        return lost.intersection(receipts)

    async def recover(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Say whose lease has run out meanwhile. What a lost answer brought comes back when its lease runs out."""
        _, lost = self._held.ours(receipts)
        return list(lost)

    async def stop(self) -> None:
        """Take nothing new, and give back what nobody was handed. The polls under way end by themselves, in the background."""
        self._leave_polls()
        await self._give_back_arrived()

    async def close(self) -> None:
        """Give back what is still ours, when what was acknowledged is deleted."""
        self._leave_polls()
        self._arrived.clear()
        await beside(self._deletions.drain(), self._give_back(list(self._held)))

    def _leave_polls(self) -> None:
        if self._fifo and not self._stopping:
            self._transport.later(self._group).leave()
        self._stopping = True
        if self._restoring is not None:
            self._restoring.cancel()
        self._deletions.leave()
        self._polls.leave()

    async def _take(self, messages: Sequence[Message]) -> None:
        """Have what a poll brought: to be handed out, hidden again, or given back."""
        deadline = time.monotonic() + self._visibility - _ON_ITS_WAY
        now = time.time() * 1000
        # One answer may hold a message twice; the later handle is the one that counts.
        distinct = {message["MessageId"]: message for message in await self._wanted(messages)}
        early: list[Receipt] = []
        for message in distinct.values():
            parsed = _wire.parse(message)
            if parsed.due > now + _LONGEST_WAIT:
                parsed = parsed._replace(due=0, fault="the time that it waits for comes when SQS has it no more")
            delivery = _wire.delivery(message, parsed)
            if self._fifo:
                delivery.attempt = max(1, delivery.attempt - uncounted(message))
            held = self._held[delivery.receipt] = Held(message, delivery.attempt, deadline)
            # One that was put off, and that nobody was there for since it is due, has counted what was no attempt.
            if parsed.due and (parsed.due > now + 500 or _wire.received(message) > 1):
                early.append(delivery.receipt)
            else:
                self._arrived.append(_Arrival(delivery, held))
        if early:
            self._polls.news.set()  # for those that are ready
            try:
                await self._put_off(early)
            except AbeError as exc:
                _log.debug("early messages of group %r come back when their leases run out: %s", self._group, exc)
        if self._stopping:
            await self._give_back_arrived()

    async def _wanted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return what the group wants. A topic sends everything to everybody, and publishers learn late that a group's patterns are new."""
        if self._settings.fanout != "sns" or not messages:
            return messages
        queues, came = self._transport.queues, time.monotonic()
        try:
            unwanted = self._unwanted(await queues.registry(), messages)
            if unwanted:  # perhaps they were not, until a moment ago
                unwanted = self._unwanted(await queues.registry(since=came), messages)
                await self._handles.delete([message["ReceiptHandle"] for message in unwanted])
        except AbeError as exc:
            _log.debug("what group %r wants cannot be found out now, so it gets everything: %s", self._group, exc)
            return messages
        return [message for message in messages if message not in unwanted]

    def _unwanted(self, registry: Registry, messages: Sequence[Message]) -> Sequence[Message]:
        """Return what was published to all groups and that this one does not want, by that registry."""
        if not (patterns := registry.groups.get(self._group)):
            return []
        return [each for each in messages if _wire.published(each) and not _wire.wants(patterns, each)]

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
            for failures in await beside(self._hide(hidden), self._move(moved)):
                insist(failures)

    async def _give_back_arrived(self) -> None:
        receipts = [arrival.delivery.receipt for arrival in self._arrived]
        self._arrived.clear()
        try:
            await self._give_back(receipts)
        except AbeError as exc:
            _log.debug("messages of group %r could not be given back, their leases will run out: %s", self._group, exc)

    async def _give_back(self, receipts: Collection[Receipt]) -> None:
        ours, _ = self._held.ours([each for each in receipts if each in self._held and each not in self._held.leaving])
        if not ours:
            return
        with self._held.being_settled(ours):
            if self._fifo:
                insist(await self._release(ours))
            else:
                copies = {each: self._copy(self._held[each], Settlement(each, Verb.RELEASE)) for each in ours}
                insist(await self._move(copies))

    def _stays(self, held: Held, verdict: Settlement) -> bool:
        """Whether hiding the message does what the verdict says.

        In a FIFO queue a hidden message holds up those behind it, so that only what comes back at once stays; it keeps its place, and a
        release counts as an attempt. In any other, a release cannot be uncounted, and a delay may be longer than a message can be hidden.
        """
        if verdict.verb is Verb.DEAD:
            return False
        if self._fifo:
            return verdict.verb is Verb.RELEASE or not verdict.delay
        return verdict.verb is Verb.RETRY and held.hideable >= -int(-verdict.delay // 1)

    def _copy(self, held: Held, verdict: Settlement) -> Copy:
        return self._transport.copies.settled(self._group, held.message, held.attempt, verdict)

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

    def _more_to_delete(self) -> bool:
        """Whether a full batch may come together soon: where as many are held. In a FIFO queue, others wait for each deletion."""
        return not self._fifo and not self._stopping and len(self._held) >= BATCH

    async def _delete(self, receipts: Sequence[Receipt]) -> dict[Receipt, AbeError]:
        with self._held.being_settled(receipts):
            failures = await self._handles.delete(receipts)
            for receipt in receipts:
                error, held = failures.get(receipt), self._held.get(receipt)
                if held is None:
                    continue
                if isinstance(error, LeaseLostError) and held.uncertain:
                    del failures[receipt]
                    error = None
                if error is None:
                    del self._held[receipt]
                    held.done()
                elif isinstance(error, LeaseLostError):
                    self._held.lose(receipt)
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
                self._held.pop(receipt, None)
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

    async def _prolong(self, hiding: Mapping[Receipt, int], started: float) -> Collection[Receipt]:
        """Hide for that many seconds what stays ours, and return what does not."""
        failures = await self._handles.hide(hiding)
        for receipt, left in hiding.items():
            if receipt not in failures and receipt in self._held:
                self._held[receipt].deadline = started + left
        # What was settled while this was on its way is not lost.
        settled = {receipt for receipt in failures if receipt not in self._held or receipt in self._held.leaving}
        lost = [receipt for receipt, error in failures.items() if not error.retryable and receipt not in settled]
        insist({receipt: error for receipt, error in failures.items() if error.retryable})
        return lost

    def _warn(self, left: Mapping[Receipt, int]) -> None:
        """Say once of each message that it can be kept hidden for no longer than a lease."""
        late = [receipt for receipt, seconds in left.items() if seconds < self._visibility]
        late = [receipt for receipt in late if not self._held[receipt].warned]
        for receipt in late:
            self._held[receipt].warned = True
        if late:
            _log.warning(
                "%d messages of group %r have been held for 12 hours, which is as long as SQS allows: "
                "unless they are settled within %d seconds, they are delivered again",
                len(late),
                self._group,
                max(0, min(left[receipt] for receipt in late)),
            )

    async def _reported(self, error: AbeError) -> None:
        """Raise what a poll failed with, unless it can be put right here."""
        if not isinstance(error, QueueMissingError):
            raise error
        _log.warning("group %r was deleted underneath its consumers: it is made again", self._group)
        self._transport.queues.forget(self._name)
        self._restoring = asyncio.ensure_future(self._transport.restore(self._group))
        try:
            await asyncio.wait([self._restoring])
        finally:
            self._restoring.cancel()
        if self._restoring.cancelled():  # stopped meanwhile
            return
        self._restoring.result()
        self._handles.url = self._polls.url = await self._transport.queues.url(self._name)


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = SqsReceiver
