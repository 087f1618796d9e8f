"""What one consumer has in flight: messages that SQS counts as ours, until their leases run out."""

import time
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from abe.backends.message_queue.base import Delivery, Disposition, Settlement
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.routing import lease_lost
from abe.errors import AbeError
from abe_backend_sqs._queue import LONGEST_VISIBILITY
from abe_backend_sqs._wire import Message, received

_log: Final = Log("abe.sqs")

Receipt: TypeAlias = str
"""The handle by which a delivery was known first."""

Failures: TypeAlias = Mapping[Receipt, AbeError]
"""What went wrong with which delivery."""

_MOST_LOST: Final = 10_000
"""Receipts whose loss is remembered, for settlements that were under way when it was found out."""

_EVER: Final = 2**53

_uncounted: Final[dict[str, int]] = {}
"""Deliveries that were no attempts, by message, as far as this process knows: what was given back to a FIFO queue, what was received again
while we had it, and what was not taken in time."""
_MOST_UNCOUNTED: Final = 100_000


@dataclass(slots=True, eq=False)
class Leased:
    """A message that SQS counts as ours."""

    message: Message
    delivery: Delivery
    deadline: float
    """When its lease runs out unless it is renewed, by the monotonic clock."""
    handle: str = ""
    """The newest one. The first is what the engine knows it by."""
    count: int = 1
    """Which delivery of SQS's the newest handle is of."""
    expires: float = field(default_factory=lambda: time.monotonic() + LONGEST_VISIBILITY)
    """When SQS lets no consumer have it for longer, by the monotonic clock."""
    received_again: bool = False
    """Whether SQS has delivered it to us more often than we have handed it out."""
    released: bool = False
    """Whether this delivery is known to be no attempt."""
    replaced: bool = False
    """Whether its copy is stored, so that only deleting it is left."""
    uncertain: bool = False
    """Whether it may have been deleted by a request that was not answered."""
    warned: bool = False
    """Whether it was said that its lease cannot be renewed for much longer."""

    def __post_init__(self) -> None:
        self.handle, self.count = str(self.message.get("ReceiptHandle", "")), received(self.message)

    @property
    def remaining(self) -> int:
        """The seconds for which it may still stay invisible."""
        return int(self.expires - time.monotonic())

    def stays(self, settlement: Settlement, *, fifo: bool) -> bool:
        """Whether changing the message's visibility does what a settlement says.

        In a FIFO queue an invisible message holds up those behind it, so that only what comes back at once stays; it keeps its place, and
        a release counts as an attempt. In any other, a release cannot be uncounted, and a message can be invisible for 12 hours at most.
        """
        if settlement.disposition is Disposition.DEAD:
            return False
        if fifo:
            return settlement.disposition is Disposition.RELEASE or not settlement.delay
        shown_in_time = self.remaining >= -int(-settlement.delay // 1)
        return settlement.disposition is Disposition.RETRY and shown_in_time and not self.received_again

    def uncount(self) -> None:
        """Remember that this delivery is no attempt, however often that is said."""
        if not self.released:
            self.released = True
            uncount(self.message)

    def recount(self) -> None:
        """Take that back."""
        if self.released:
            self.released = False
            id = str(self.message["MessageId"])
            if (left := _uncounted.pop(id, 1) - 1) > 0:
                _uncounted[id] = left

    def give_up(self) -> None:
        """Know that the engine does not have it, or not any more. Unless a handler has begun, this delivery is no attempt."""
        self.delivery.lost = True
        if not self.delivery.begun:
            self.uncount()

    def done(self) -> None:
        """Forget what is known of a message that will not be delivered again."""
        _uncounted.pop(str(self.message["MessageId"]), None)


def uncount(message: Message) -> None:
    """Remember that a delivery of a message was no attempt."""
    while len(_uncounted) >= _MOST_UNCOUNTED:
        del _uncounted[next(iter(_uncounted))]
    id = str(message["MessageId"])
    _uncounted[id] = _uncounted.pop(id, 0) + 1


def uncounted(message: Message) -> int:
    """Return how many of a message's deliveries are known to be no attempts."""
    return _uncounted.get(str(message["MessageId"]), 0)


class InFlight(dict[Receipt, Leased]):
    """What one consumer has in flight, by the receipt that it was handed out with."""

    def __init__(self) -> None:
        super().__init__()
        self.settling: set[Receipt] = set()
        """Those with a settlement on its way: renewing them would make invisible again what it makes visible."""
        self._lost: dict[Receipt, None] = {}
        self._receipts: dict[str, Receipt] = {}

    def __setitem__(self, receipt: Receipt, leased: Leased) -> None:
        super().__setitem__(receipt, leased)
        self._receipts[str(leased.message["MessageId"])] = receipt

    def handle(self, receipt: Receipt) -> str:
        """Return the handle by which SQS knows a delivery."""
        leased = self.get(receipt)
        return str(receipt) if leased is None else leased.handle

    def ours(self, receipts: Iterable[Receipt]) -> tuple[list[Receipt], list[Receipt], dict[Receipt, AbeError]]:
        """Return which are ours, which may be, as their leases ran out and no other is known to have them, and an error for each of those
        that are not; none of them has what was carried out before."""
        now = time.monotonic()
        ours: list[Receipt] = []
        expired: list[Receipt] = []
        lost: dict[Receipt, AbeError] = {}
        for receipt in receipts:
            leased = self.get(receipt)
            if leased is not None:
                (ours if leased.deadline > now else expired).append(receipt)
            elif receipt in self._lost:
                lost[receipt] = lease_lost()
        return ours, expired, lost

    def give_up(self, receipts: Iterable[Receipt]) -> None:
        """Know of those that are in flight still that the engine never had them, and does not get them."""
        for receipt in receipts:
            if (leased := self.get(receipt)) is not None:
                leased.give_up()

    def given_up(self, message: Message) -> Leased | None:
        """Let go of a message that is delivered again, if the engine does not have it; return what is known of it then."""
        receipt = self._receipts.get(str(message["MessageId"]))
        leased = None if receipt is None else self.get(receipt)
        if receipt is None or leased is None or not leased.delivery.lost or receipt in self.settling:
            return None
        self.lose(receipt)
        return leased

    def receive_again(self, message: Message, deadline: float) -> bool:
        """Take a delivery of a message in flight for the one that we have, if no other consumer had it in between."""
        receipt = self._receipts.get(str(message["MessageId"]))
        leased = None if receipt is None else self.get(receipt)
        if receipt is None or leased is None:
            return False
        count = received(message)
        # What has a copy in its place is only to be deleted, whichever consumer had it.
        if count > leased.count + 1 and not leased.replaced:
            self.lose(receipt)
            return False
        if count > leased.count:
            leased.handle, leased.count, leased.deadline = str(message["ReceiptHandle"]), count, deadline
            leased.expires = time.monotonic() + LONGEST_VISIBILITY
            leased.received_again = True
            uncount(message)
        return True

    def lose(self, receipt: Receipt) -> None:
        """Know that it is not ours any more, and that no settlement has seen to that."""
        if self.forget(receipt):
            while len(self._lost) >= _MOST_LOST:
                del self._lost[next(iter(self._lost))]
            self._lost[receipt] = None

    def is_lost(self, receipt: Receipt) -> bool:
        """Whether it is known that it is not ours any more, and that it was not settled."""
        return receipt in self._lost

    def forget(self, receipt: Receipt) -> bool:
        """Let go of what was carried out; return whether it was in flight."""
        if (leased := self.pop(receipt, None)) is None:
            return False
        self._receipts.pop(str(leased.message["MessageId"]), None)
        return True

    def expire(self, known: Collection[Receipt]) -> Collection[Leased]:
        """Let go of those whose leases ran out, and whose settlements, if there were any, were given up: the engine asks for them no more.
        Return what is known of them."""
        now = time.monotonic()
        expired = {
            receipt: leased
            for receipt, leased in self.items()
            if leased.deadline <= now and receipt not in self.settling and receipt not in known
        }
        for receipt in expired:
            self.lose(receipt)
        return expired.values()

    def warn(self, left: Mapping[Receipt, int], lease: int, group: str) -> None:
        """Say once of each message that it can be kept for no longer than a lease.

        Args:
            left: The seconds for which each may still stay invisible.
            lease: The seconds of a lease.
            group: Whose they are.
        """
        late = [receipt for receipt, seconds in left.items() if seconds < lease and not self[receipt].warned]
        for receipt in late:
            self[receipt].warned = True
        if late:
            _log.warning(
                "%d messages of group %r have been in flight for 12 hours, which is as long as SQS allows: "
                "unless they are settled within %d seconds, they are delivered again",
                len(late),
                group,
                max(0, min(left[receipt] for receipt in late)),
            )

    @contextmanager
    def being_settled(self, receipts: Iterable[Receipt]) -> Generator[None]:
        """Keep them from being renewed, and from being given back, meanwhile."""
        receipts = list(receipts)
        self.settling.update(receipts)
        try:
            yield
        finally:
            self.settling.difference_update(receipts)


class Settled:
    """Messages that were done with here, and that SQS may deliver all the same."""

    def __init__(self) -> None:
        self._most: dict[str, int] = {}

    def add(self, leased: Leased, *, certain: bool) -> None:
        """Remember that a message was acknowledged, or that a copy has taken its place.

        Args:
            leased: The message.
            certain: SQS was told, and said yes. Otherwise another consumer may have it next, and decide; until then it is done.
        """
        while len(self._most) >= _MOST_LOST:
            del self._most[next(iter(self._most))]
        id = str(leased.message["MessageId"])
        self._most[id] = _EVER if certain else max(leased.count + 1, self._most.get(id, 0))

    def has(self, message: Message) -> bool:
        """Whether a message that is delivered is only to be deleted."""
        return received(message) <= self._most.get(str(message["MessageId"]), 0)
