"""What one consumer holds: messages that SQS counts as ours, until their leases run out."""

import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Final

from abe.backends.message_queue.base import Receipt
from abe.errors import AbeError
from abe_backend_sqs._handles import LONGEST_HIDING, not_ours
from abe_backend_sqs._wire import Message

_MOST_LOST: Final = 10_000
"""Receipts whose loss is remembered, for verdicts that were under way when it was found out."""

_uncounted: Final[dict[str, int]] = {}
"""Deliveries that were no attempts, by message, as far as this process knows: a FIFO queue counts what is given back."""
_MOST_UNCOUNTED: Final = 100_000


class Held:
    """A message that SQS counts as ours."""

    __slots__ = ("attempt", "deadline", "expires", "message", "released", "replaced", "uncertain", "warned")

    def __init__(self, message: Message, attempt: int, deadline: float) -> None:
        self.message = message
        self.attempt = attempt
        self.deadline = deadline
        """When its lease runs out unless it is renewed, by the monotonic clock."""
        self.expires = time.monotonic() + LONGEST_HIDING
        self.released = False
        """Whether this delivery is known to be no attempt."""
        self.replaced = False
        """Whether its copy is stored, so that only deleting it is left."""
        self.uncertain = False
        """Whether it may have been deleted by a request that was not answered."""
        self.warned = False
        """Whether it was said that its lease cannot be renewed for much longer."""

    @property
    def hideable(self) -> int:
        """The seconds for which it may still be hidden."""
        return int(self.expires - time.monotonic())

    def uncount(self) -> None:
        """Remember that this delivery is no attempt, however often that is said."""
        if not self.released:
            self.released = True
            while len(_uncounted) >= _MOST_UNCOUNTED:
                del _uncounted[next(iter(_uncounted))]
            id = str(self.message["MessageId"])
            _uncounted[id] = _uncounted.pop(id, 0) + 1

    def recount(self) -> None:
        """Take that back."""
        if self.released:
            self.released = False
            id = str(self.message["MessageId"])
            if (left := _uncounted.pop(id, 1) - 1) > 0:
                _uncounted[id] = left

    def done(self) -> None:
        """Forget what is known of a message that will not be delivered again."""
        _uncounted.pop(str(self.message["MessageId"]), None)


def uncounted(message: Message) -> int:
    """Return how many of a message's deliveries are known to be no attempts."""
    return _uncounted.get(str(message["MessageId"]), 0)


class Holding(dict[Receipt, Held]):
    """What one consumer holds, by receipt."""

    def __init__(self) -> None:
        super().__init__()
        self.leaving: set[Receipt] = set()
        """Those with a verdict on its way: renewing them would hide again what it shows."""
        self._lost: dict[Receipt, None] = {}

    def ours(self, receipts: Iterable[Receipt]) -> tuple[list[Receipt], dict[Receipt, AbeError]]:
        """Return which are still ours, and an error for each of those that are not; neither has what was carried out before."""
        now = time.monotonic()
        ours: list[Receipt] = []
        lost: dict[Receipt, AbeError] = {}
        for receipt in receipts:
            held = self.get(receipt)
            if held is not None and held.deadline > now:
                ours.append(receipt)
            elif held is not None or receipt in self._lost:
                self.lose(receipt)
                lost[receipt] = not_ours()
        return ours, lost

    def lose(self, receipt: Receipt) -> None:
        """Know that it is not ours any more, and that no verdict has seen to that."""
        if self.pop(receipt, None) is None:
            return
        while len(self._lost) >= _MOST_LOST:
            del self._lost[next(iter(self._lost))]
        self._lost[receipt] = None

    def expire(self) -> None:
        """Let go of those whose leases ran out, and whose verdicts, if there were any, were given up."""
        now = time.monotonic()
        for receipt in [each for each, held in self.items() if held.deadline <= now and each not in self.leaving]:
            self.lose(receipt)

    @contextmanager
    def being_settled(self, receipts: Iterable[Receipt]) -> Generator[None]:
        """Keep them from being renewed, and from being given back, meanwhile."""
        receipts = list(receipts)
        self.leaving.update(receipts)
        try:
            yield
        finally:
            self.leaving.difference_update(receipts)
