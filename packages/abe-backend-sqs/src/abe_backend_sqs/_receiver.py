"""One consumer of one group."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from abe.backends.message_queue.base import Delivery, Failures, Metadata, Receipt, Settlement, Verb
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.errors import AbeError, LeaseLostError
from abe_backend_sqs import _wire
from abe_backend_sqs._copies import LONGEST_DELAY, Copy, delayed
from abe_backend_sqs._errors import QueueMissingError
from abe_backend_sqs._handles import Handles, beside, insist, not_ours
from abe_backend_sqs._polls import Polls
from abe_backend_sqs._wire import Message

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_log: Final = logging.getLogger("abe.sqs")

LONGEST_HIDING: Final = 43_200
"""Seconds, from its receipt, that SQS lets a message be hidden for."""

_EARLY: Final = LONGEST_DELAY - 300
"""Seconds before it is due that a long delayed message is looked at again: its last stretch is a delay of SQS's own."""

_ON_ITS_WAY: Final = 0.5
"""Seconds for which a message may have been on its way to us while its lease ran."""

_MOST_LOST: Final = 10_000
"""Receipts whose loss is remembered, for verdicts that were under way when it was found out."""


_uncounted: Final[dict[str, int]] = {}
"""Deliveries that were no attempts, by message, as far as this process knows: a FIFO queue counts what is given back."""
_MOST_UNCOUNTED: Final = 100_000


class _Held:
    """A message that SQS counts as ours."""

    __slots__ = ("attempt", "deadline", "expires", "message", "replaced", "uncertain")

    def __init__(self, message: Message, attempt: int, deadline: float) -> None:
        self.message = message
        self.attempt = attempt
        self.deadline = deadline
        """When its lease runs out unless it is renewed, by the monotonic clock."""
        self.expires = time.monotonic() + LONGEST_HIDING
        self.uncertain = False
        """Whether it may have been deleted by a request that was not answered."""
        self.replaced = False
        """Whether its copy is stored, so that only deleting it is left."""


class _Arrival(NamedTuple):
    delivery: Delivery
    held: _Held


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
        self._held: dict[Receipt, _Held] = {}
        self._lost: dict[Receipt, None] = {}
        self._leaving: set[Receipt] = set()
        self._renewing = asyncio.Lock()
        self._arrived: deque[_Arrival] = deque()
        self._stopping = False
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
                self._forget(delivery.receipt)
        return deliveries

    def metadata(self, delivery: Delivery) -> Metadata:
        """Return what was read with the message."""
        assert isinstance(delivery.header, Metadata)
        return delivery.header

    async def ack(self, receipts: Sequence[Receipt], *, verify: bool) -> Failures:
        """Delete. A handle whose lease has run out is left alone: what it deletes, if anything, may be somebody else's by now."""
        ours, failures = self._ours(receipts)
        with self._being_settled(ours):
            failures.update(await self._delete(ours))
        return failures

    async def settle(self, settlements: Sequence[Settlement]) -> Failures:
        """Carry out verdicts: hide, move, or put a copy in its place."""
        verdicts = {settlement.receipt: settlement for settlement in settlements}
        ours, failures = self._ours(verdicts)
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
        with self._being_settled(ours):
            for done in await beside(self._hide(hidden), self._release(released), self._move(moved)):
                failures.update(done)
        return failures

    async def renew(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Hide anew what is still ours, and what arrived and waits to be asked for."""
        waiting = [arrival.delivery.receipt for arrival in self._arrived]
        ours, failures = self._ours([*receipts, *waiting])
        ours = [receipt for receipt in ours if receipt not in self._leaving]
        started = time.monotonic()
        hiding = {receipt: min(self._visibility, self._hideable(self._held[receipt])) for receipt in ours}
        ended = [receipt for receipt, left in hiding.items() if left <= 0]
        if ended:
            _log.warning(
                "%d messages of group %r were held for 12 hours, which is as long as SQS allows",
                len(ended),
                self._group,
            )
        async with self._renewing:
            left_over = {each: left for each, left in hiding.items() if left > 0}
            lost = {*failures, *ended, *await self._prolong(left_over, started)}
        for receipt in lost:
            self._forget(receipt)
        return lost.intersection(receipts)

    async def recover(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Say whose lease has run out meanwhile. What a lost answer brought comes back when its lease runs out."""
        _, lost = self._ours(receipts)
        return list(lost)

    async def stop(self) -> None:
        """Take nothing new. The polls under way end by themselves, in the background."""
        self._leave_polls()

    async def close(self) -> None:
        """Give back what is still ours."""
        self._leave_polls()
        self._arrived.clear()
        await self._give_back(list(self._held))

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
        distinct = {message["MessageId"]: message for message in await self._wanted(messages)}
        early: list[Receipt] = []
        for message in distinct.values():
            parsed = _wire.parse(message)
            delivery = _wire.delivery(message, parsed)
            if self._fifo:
                delivery.attempt -= _uncounted.get(message["MessageId"], 0)
            held = self._held[delivery.receipt] = _Held(message, delivery.attempt, deadline)
            # One that was put off, and that nobody was there for since it is due, has counted what was no attempt.
            if parsed.due and (parsed.due > now + 500 or _wire.received(message) > 1):
                early.append(delivery.receipt)
            else:
                self._arrived.append(_Arrival(delivery, held))
        try:
            if early:
                await self._put_off(early)
            if self._stopping:
                self._arrived.clear()
                await self._give_back([message["ReceiptHandle"] for message in distinct.values()])
        except AbeError as exc:
            _log.debug("messages of group %r could not be given back, their leases will run out: %s", self._group, exc)

    async def _wanted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return what the group wants. A topic sends everything to everybody, and publishers learn late that a group's patterns are new."""
        if self._settings.fanout != "sns" or not messages:
            return messages
        try:
            patterns = (await self._transport.queues.registry()).groups.get(self._group)
            unwanted = [
                message
                for message in messages
                if patterns and _wire.ours(message) and not _wire.wants(patterns, message)
            ]
            await self._handles.delete([message["ReceiptHandle"] for message in unwanted])
        except AbeError as exc:
            _log.debug("what group %r wants cannot be found out now, so it gets everything: %s", self._group, exc)
            return messages
        return [message for message in messages if message not in unwanted]

    async def _put_off(self, receipts: Sequence[Receipt]) -> None:
        """Hide again what is not due, so that it is seen before it is; the last stretch is a delay of SQS's own, which no attempt is."""
        hidden: dict[Receipt, int] = {}
        moved: dict[Receipt, Copy] = {}
        for receipt in receipts:
            message = self._held[receipt].message
            parsed = _wire.parse(message)
            left = max(0.0, parsed.due / 1000 - time.time())
            if left > LONGEST_DELAY:
                hidden[receipt] = int(min(LONGEST_HIDING - 60, left - _EARLY))
            else:
                moved[receipt] = Copy(self._name, delayed(_wire.repack(message, attempts=parsed.attempts), left))
        await beside(self._hide(hidden), self._move(moved))

    async def _give_back(self, receipts: Collection[Receipt]) -> None:
        ours, _ = self._ours(
            [receipt for receipt in receipts if receipt in self._held and receipt not in self._leaving]
        )
        with self._being_settled(ours):
            if self._fifo:
                await self._release(ours)
            else:
                await self._move({each: self._copy(self._held[each], Settlement(each, Verb.RELEASE)) for each in ours})

    @contextmanager
    def _being_settled(self, receipts: Collection[Receipt]) -> Generator[None]:
        """Keep them from being renewed meanwhile, which would hide again what a verdict shows."""
        self._leaving.update(receipts)
        try:
            yield
        finally:
            self._leaving.difference_update(receipts)

    def _stays(self, held: _Held, verdict: Settlement) -> bool:
        """Whether hiding the message does what the verdict says.

        In a FIFO queue a hidden message holds up those behind it, so that only what comes back at once stays; it keeps its place, and a
        release counts as an attempt. In any other, a release cannot be uncounted, and a delay may be longer than a message can be hidden.
        """
        if verdict.verb is Verb.DEAD:
            return False
        if self._fifo:
            return verdict.verb is Verb.RELEASE or not verdict.delay
        return verdict.verb is Verb.RETRY and self._hideable(held) >= -int(-verdict.delay // 1)

    def _copy(self, held: _Held, verdict: Settlement) -> Copy:
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
        failures.update(await self._delete(stored))
        return insist(failures)

    async def _delete(self, receipts: Sequence[Receipt]) -> dict[Receipt, AbeError]:
        failures = await self._handles.delete(receipts)
        for receipt in receipts:
            error, held = failures.get(receipt), self._held.get(receipt)
            if isinstance(error, LeaseLostError) and held is not None and held.uncertain:
                del failures[receipt]
                error = None
            if error is None or isinstance(error, LeaseLostError):
                self._held.pop(receipt, None)
                if held is not None:
                    _uncounted.pop(held.message["MessageId"], None)
            elif held is not None:
                held.uncertain = True
        return insist(failures)

    async def _hide(self, hiding: Mapping[Receipt, int]) -> Failures:
        """Hide for that many seconds what is not ours any more after that."""
        async with self._renewing:
            pass  # a renewal that is on its way could come after this, and hide again what is to be shown
        failures = await self._handles.hide(hiding)
        for receipt in hiding:
            error = failures.get(receipt)
            if error is None or isinstance(error, LeaseLostError):
                self._held.pop(receipt, None)
        return insist(failures)

    async def _release(self, receipts: Sequence[Receipt]) -> Failures:
        """Show at once what is in a FIFO queue, so that it keeps its place, and remember that this delivery was no attempt."""
        ids = {receipt: str(self._held[receipt].message["MessageId"]) for receipt in receipts}
        for id in ids.values():  # before it can be delivered again
            while len(_uncounted) >= _MOST_UNCOUNTED:
                del _uncounted[next(iter(_uncounted))]
            _uncounted[id] = _uncounted.pop(id, 0) + 1
        failures: Failures = {}
        try:
            failures = await self._hide(dict.fromkeys(receipts, 0))
        except AbeError:
            failures = {receipt: not_ours() for receipt in receipts if receipt in self._held}
            raise
        finally:
            for receipt in failures:
                _uncounted[ids[receipt]] = _uncounted.get(ids[receipt], 1) - 1
        return failures

    async def _prolong(self, hiding: Mapping[Receipt, int], started: float) -> Collection[Receipt]:
        """Hide for that many seconds what stays ours, and return what does not."""
        failures = await self._handles.hide(hiding)
        for receipt, left in hiding.items():
            if receipt not in failures and receipt in self._held:
                self._held[receipt].deadline = started + left
        # What was settled while this was on its way is not lost.
        settled = {receipt for receipt in failures if receipt not in self._held or receipt in self._leaving}
        lost = [receipt for receipt, error in failures.items() if not error.retryable and receipt not in settled]
        insist({receipt: error for receipt, error in failures.items() if error.retryable})
        return lost

    def _ours(self, receipts: Iterable[Receipt]) -> tuple[list[Receipt], dict[Receipt, AbeError]]:
        """Return which are still ours, and an error for each of those that are not; neither has what was carried out before."""
        now = time.monotonic()
        ours: list[Receipt] = []
        lost: dict[Receipt, AbeError] = {}
        for receipt in receipts:
            held = self._held.get(receipt)
            if held is not None and held.deadline > now:
                ours.append(receipt)
            elif held is not None or receipt in self._lost:
                self._forget(receipt)
                lost[receipt] = not_ours()
        return ours, lost

    def _forget(self, receipt: Receipt) -> None:
        if self._held.pop(receipt, None) is None:
            return
        while len(self._lost) >= _MOST_LOST:
            del self._lost[next(iter(self._lost))]
        self._lost[receipt] = None

    def _hideable(self, held: _Held) -> int:
        """Return the seconds for which a message may still be hidden."""
        return int(held.expires - time.monotonic())

    async def _reported(self, error: AbeError) -> None:
        """Raise what a poll failed with, unless it can be put right here."""
        if not isinstance(error, QueueMissingError):
            raise error
        _log.warning("group %r was deleted underneath its consumers: it is made again", self._group)
        self._transport.queues.forget(self._name)
        await self._transport.declare(self._group, None)
        self._handles.url = self._polls.url = await self._transport.queues.url(self._name)


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = SqsReceiver
