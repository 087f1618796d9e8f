"""One consumer of one group."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from abe.backends.message_queue.base import Delivery, Failures, Metadata, Receipt, Settlement, Verb
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.errors import AbeError, BackendConnectionError, LeaseLostError
from abe_backend_sqs import _wire
from abe_backend_sqs._errors import CLIENT_ERRORS, QueueMissingError, translate, translate_entry
from abe_backend_sqs._sender import LONGEST_DELAY, delayed
from abe_backend_sqs._wire import BATCH, Entry, Message

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_log: Final = logging.getLogger("abe.sqs")

LONGEST_HIDING: Final = 43_200
"""Seconds, from its receipt, that SQS lets a message be hidden for."""

_EARLY: Final = LONGEST_DELAY - 300
"""Seconds before it is due that a long delayed message is looked at again: its last stretch is a delay of SQS's own."""

_POLLED: Final = ("ApproximateReceiveCount", "SentTimestamp")

_T = TypeVar("_T")


class _Held:
    """A message that SQS counts as ours."""

    __slots__ = ("attempt", "deadline", "expires", "message", "uncertain")

    def __init__(self, message: Message, attempt: int, deadline: float) -> None:
        self.message = message
        self.attempt = attempt
        self.deadline = deadline
        """When its lease runs out unless it is renewed, by the monotonic clock."""
        self.expires = time.monotonic() + LONGEST_HIDING
        self.uncertain = False
        """Whether it may have been deleted by a request that was not answered."""


class Poll:
    """A request for messages that is under way, and who gets what it brings."""

    __slots__ = ("count", "owner")

    def __init__(self, count: int, owner: "SqsReceiver") -> None:
        self.count = count
        self.owner = owner


class _Arrival(NamedTuple):
    delivery: Delivery
    held: _Held


class SqsReceiver:
    """Polls a group's queue in the background, as many times at once as messages flow, and never for more than it was asked for.

    A poll is never cancelled: what SQS had put into its answer would be lost until its lease runs out, and an attempt with
    it. A poll that ends after the receiver was stopped gives back what it brings.

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
        self._url = url
        self._settings = transport.settings
        self._visibility = self._settings.visibility
        self._held: dict[Receipt, _Held] = {}
        self._lost: set[Receipt] = set()
        self._leaving: set[Receipt] = set()
        self._arrived: deque[_Arrival] = deque()
        self._asked_for = 0
        self._polls: set[Poll] = set()
        self._most_polls = 1
        self._error: AbeError | None = None
        self._news = asyncio.Event()
        self._stopping = False

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Wait for what the polls bring, and have as many of them under way as the limit allows."""
        while not self._stopping and not self._arrived:
            if (error := self._error) is not None:
                self._error = None
                await self._reported(error)
                return ()
            self._poll_for(limit - self._asked_for)
            self._news.clear()
            await self._news.wait()
        taken = [self._arrived.popleft() for _ in range(min(limit, len(self._arrived)))]
        if not self._stopping:
            self._poll_for(limit - len(taken) - self._asked_for - len(self._arrived))
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
        failures.update(await self._delete(ours))
        return failures

    async def settle(self, settlements: Sequence[Settlement]) -> Failures:
        """Carry out verdicts: hide, move, or put a copy in its place."""
        verdicts = {settlement.receipt: settlement for settlement in settlements}
        ours, failures = self._ours(verdicts)
        hidden: dict[Receipt, int] = {}
        moved: dict[Receipt, tuple[str, Entry]] = {}
        for receipt in ours:
            held, verdict = self._held[receipt], verdicts[receipt]
            if verdict.verb is Verb.RETRY and (left := self._hideable(held)) >= verdict.delay:
                hidden[receipt] = min(left, -int(-verdict.delay // 1))
            else:
                moved[receipt] = self._copy(held, verdict)
        for done in await _all(self._hide(hidden), self._move(moved)):
            failures.update(done)
        return failures

    async def renew(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Hide anew what is still ours, and what arrived and waits to be asked for."""
        waiting = [arrival.delivery.receipt for arrival in self._arrived]
        ours, failures = self._ours([*receipts, *waiting])
        started = time.monotonic()
        hiding = {receipt: min(self._visibility, self._hideable(self._held[receipt])) for receipt in ours}
        ended = [receipt for receipt, left in hiding.items() if left <= 0]
        if ended:
            _log.warning(
                "%d messages of group %r were held for 12 hours, which is as long as SQS allows",
                len(ended),
                self._group,
            )
        lost = {
            *failures,
            *ended,
            *await self._prolong({each: left for each, left in hiding.items() if left > 0}, started),
        }
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

    def _poll_for(self, count: int) -> None:
        """Have polls under way for that many messages more: those that a consumer of this process left behind, then new ones."""
        left_behind = self._transport.left_behind[self._name]
        while left_behind and left_behind[-1].count <= count:
            poll = left_behind.pop()
            poll.owner = self
            count -= self._began(poll)
        while count > 0 and len(self._polls) < self._most_polls:
            poll = Poll(min(BATCH, count), self)
            count -= self._began(poll)
            self._transport.in_background(_carry_out(poll))

    def _began(self, poll: Poll) -> int:
        self._polls.add(poll)
        self._asked_for += poll.count
        return poll.count

    async def brought(self, poll: Poll, messages: Sequence[Message]) -> None:
        """Have what a poll brought."""
        self._most_polls = min(self._settings.pollers, len(self._polls) + 1) if len(messages) == poll.count else 1
        await self._take(messages)

    def failed(self, error: AbeError) -> None:
        """Know that a poll failed."""
        self._error = error

    def ended(self, poll: Poll) -> None:
        """Forget a poll."""
        if poll in self._polls:
            self._polls.discard(poll)
            self._asked_for -= poll.count
        elif poll in self._transport.left_behind[self._name]:
            self._transport.left_behind[self._name].remove(poll)
        self._news.set()

    def _leave_polls(self) -> None:
        """Leave the polls under way to the group's next consumer in this process."""
        self._stopping = True
        self._transport.left_behind[self._name] += self._polls
        self._polls.clear()
        self._asked_for = 0
        self._news.set()

    async def ask(self, count: int) -> Sequence[Message]:
        """Ask SQS, and wait until there is something, or the time is up."""
        client = await self._transport.clients.polls()
        try:
            reply: Mapping[str, Any] = await client.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=count,
                WaitTimeSeconds=self._settings.wait,
                VisibilityTimeout=self._visibility,
                MessageSystemAttributeNames=_POLLED,
                MessageAttributeNames=("All",),
            )
        except CLIENT_ERRORS as exc:
            raise translate(exc, self._settings.address) from exc
        messages: Sequence[Message] = reply.get("Messages") or ()
        return messages

    async def _take(self, messages: Iterable[Message]) -> None:
        """Have what a poll brought: to be handed out, hidden again, or given back."""
        deadline = time.monotonic() + self._visibility
        now = time.time() * 1000
        # One answer may hold a message twice; the later handle is the one that counts.
        distinct = {message["MessageId"]: message for message in messages}
        early: list[Receipt] = []
        for message in distinct.values():
            parsed = _wire.parse(message)
            delivery = _wire.delivery(message, parsed)
            held = self._held[delivery.receipt] = _Held(message, delivery.attempt, deadline)
            if parsed.due > now + 500:
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

    async def _put_off(self, receipts: Sequence[Receipt]) -> None:
        """Hide again what is not due, so that it is seen before it is; the last stretch is a delay of SQS's own, which no attempt is."""
        hidden: dict[Receipt, int] = {}
        moved: dict[Receipt, tuple[str, Entry]] = {}
        for receipt in receipts:
            message = self._held[receipt].message
            due = _wire.parse(message).due / 1000
            left = due - time.time()
            if left > LONGEST_DELAY:
                hidden[receipt] = int(min(LONGEST_HIDING - 60, left - _EARLY))
            else:
                moved[receipt] = (self._name, delayed(_wire.repack(message, attempts=0), left))
        await _all(self._hide(hidden), self._move(moved))

    async def _give_back(self, receipts: Collection[Receipt]) -> None:
        ours, _ = self._ours(
            [receipt for receipt in receipts if receipt in self._held and receipt not in self._leaving]
        )
        self._leaving.update(ours)
        try:
            await self._move({each: self._copy(self._held[each], Settlement(each, Verb.RELEASE)) for each in ours})
        finally:
            self._leaving.difference_update(ours)

    def _copy(self, held: _Held, verdict: Settlement) -> tuple[str, Entry]:
        """Return what takes the message's place, and where.

        A release is a copy because SQS cannot uncount a delivery; a retry is one where the delay is longer than a message can be hidden.
        """
        if verdict.verb is Verb.DEAD:
            entry = _wire.bury(
                held.message,
                attempts=held.attempt,
                reason=verdict.reason,
                error=verdict.error,
                at=int(time.time() * 1000),
            )
            return self._transport.queues.names.dead(self._group), entry
        if verdict.verb is Verb.RELEASE:
            return self._name, _wire.repack(held.message, attempts=held.attempt - 1)
        due = int((time.time() + verdict.delay) * 1000) if verdict.delay > LONGEST_DELAY else 0
        return self._name, delayed(_wire.repack(held.message, attempts=held.attempt, due=due), verdict.delay)

    async def _move(self, moves: Mapping[Receipt, tuple[str, Entry]]) -> Failures:
        """Store copies, then delete what they are copies of: a crash in between doubles, and never loses."""
        failures: dict[Receipt, AbeError] = {}
        stored: list[Receipt] = []
        for name in {name for name, _ in moves.values()}:
            some = {receipt: entry for receipt, (where, entry) in moves.items() if where == name}
            results = await self._transport.sender.post(name, list(some.values()))
            for receipt, result in zip(some, results, strict=True):
                if result is None:
                    stored.append(receipt)
                else:
                    failures[receipt] = result
        failures.update(await self._delete(stored))
        return _insist(failures)

    async def _delete(self, receipts: Sequence[Receipt]) -> dict[Receipt, AbeError]:
        def entry(receipt: Receipt) -> dict[str, Any]:
            return {"ReceiptHandle": receipt}

        client = await self._transport.clients.calls()
        failures = await self._in_batches(receipts, entry, client.delete_message_batch)
        for receipt in receipts:
            error, held = failures.get(receipt), self._held.get(receipt)
            if isinstance(error, LeaseLostError) and held is not None and held.uncertain:
                del failures[receipt]
                error = None
            if error is None or isinstance(error, LeaseLostError):
                self._held.pop(receipt, None)
            elif held is not None:
                held.uncertain = True
        return dict(_insist(failures))

    async def _hide(self, hiding: Mapping[Receipt, int]) -> Failures:
        """Hide for that many seconds what is not ours any more after that."""
        failures = await self._change(hiding)
        for receipt in hiding:
            error = failures.get(receipt)
            if error is None or isinstance(error, LeaseLostError):
                self._held.pop(receipt, None)
        return _insist(failures)

    async def _prolong(self, hiding: Mapping[Receipt, int], started: float) -> Collection[Receipt]:
        """Hide for that many seconds what stays ours, and return what does not."""
        failures = await self._change(hiding)
        for receipt, left in hiding.items():
            if receipt not in failures and receipt in self._held:
                self._held[receipt].deadline = started + left
        lost = [receipt for receipt, error in failures.items() if not error.retryable]
        _insist({receipt: error for receipt, error in failures.items() if error.retryable})
        return lost

    async def _change(self, hiding: Mapping[Receipt, int]) -> dict[Receipt, AbeError]:
        def entry(receipt: Receipt) -> dict[str, Any]:
            return {"ReceiptHandle": receipt, "VisibilityTimeout": hiding[receipt]}

        client = await self._transport.clients.calls()
        return await self._in_batches(list(hiding), entry, client.change_message_visibility_batch)

    async def _in_batches(
        self,
        receipts: Sequence[Receipt],
        entry: Callable[[Receipt], dict[str, Any]],
        call: Callable[..., Awaitable[Any]],
    ) -> dict[Receipt, AbeError]:
        failures: dict[Receipt, AbeError] = {}

        async def batch(some: Sequence[Receipt]) -> None:
            try:
                reply = await call(
                    QueueUrl=self._url,
                    Entries=[{"Id": str(index), **entry(receipt)} for index, receipt in enumerate(some)],
                )
            except CLIENT_ERRORS as exc:
                error = translate(exc, self._settings.address)
                error.__cause__ = exc
                if isinstance(error, QueueMissingError):
                    error = _not_ours()
                failures.update(dict.fromkeys(some, error))
                return
            for failed in reply.get("Failed", ()):
                failures[some[int(failed["Id"])]] = translate_entry(failed, self._settings.address)

        await _all(*(batch(receipts[start : start + BATCH]) for start in range(0, len(receipts), BATCH)))
        return failures

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
                lost[receipt] = _not_ours()
                self._lost.discard(receipt)
        return ours, lost

    def _forget(self, receipt: Receipt) -> None:
        if self._held.pop(receipt, None) is not None:
            self._lost.add(receipt)

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
        self._url = await self._transport.queues.url(self._name)


async def _carry_out(poll: Poll) -> None:
    """Poll. Whoever owns it in the end gets what it brings."""
    try:
        messages = await poll.owner.ask(poll.count)
    except AbeError as exc:
        poll.owner.failed(exc)
    else:
        await poll.owner.brought(poll, messages)
    finally:
        poll.owner.ended(poll)


async def _all(*calls: Awaitable[_T]) -> Sequence[_T]:
    """Run them beside each other, or just run the only one."""
    return [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)


def _insist(failures: dict[Receipt, AbeError]) -> dict[Receipt, AbeError]:
    """Return the failures if they are for good.

    Raises:
        BackendConnectionError: Some may succeed later: the call is to be repeated, and leaves out what is done.
    """
    for error in failures.values():
        if error.retryable:
            raise BackendConnectionError(str(error)) from error
    return failures


def _not_ours() -> LeaseLostError:
    return LeaseLostError("the message is not ours any more: its lease had run out, or it was settled before")


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = SqsReceiver
