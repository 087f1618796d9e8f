"""Makes the copies that replace messages which leave their queue. Pure except for the clock."""

import time
from typing import Final, NamedTuple

from abe.backends.message_queue.base import Disposition, Settlement
from abe_backend_sqs import _wire
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._topology import Topology
from abe_backend_sqs._wire import Entry, Message

LONGEST_DELAY: Final = 900
"""Seconds that SQS delays a message at most."""


class Copy(NamedTuple):
    """An entry, and the name of the queue for it."""

    name: str
    entry: Entry


def delayed(entry: Entry, delay: float) -> Entry:
    """Return the entry with a delay: whole seconds, rounded up, and `LONGEST_DELAY` at most."""
    return entry._replace(delay=min(LONGEST_DELAY, -int(-delay // 1)))


class Copies:
    """Makes copies.

    Args:
        settings: Whether queues are FIFO queues, and of which message group.
        names: The queues' names.
    """

    def __init__(self, settings: SqsSettings, names: Topology) -> None:
        self._fifo = settings.fifo
        self._message_group = settings.message_group
        self._names = names

    def settled(self, group: str, message: Message, attempt: int, settlement: Settlement) -> Copy:
        """Return the copy that carries out a settlement of a group's message in its `attempt`-th delivery."""
        names = self._names
        if settlement.disposition is Disposition.DEAD:
            at = int(time.time() * 1000)
            entry = _wire.bury(message, attempts=attempt, reason=settlement.reason, error=settlement.error, at=at)
            if self._fifo:
                # Each dead letter is a message group of its own, so that none blocks another when they are browsed; and one that is
                # dead again after a replay is no duplicate.
                id = str(message["MessageId"])
                entry = _wire.in_order(_wire.leaving(message, entry), id, f"{id}-{_wire.received(message)}")
            return Copy(names.dead(group), entry)
        if settlement.disposition is Disposition.RELEASE:
            return Copy(names.queue(group), _wire.repack(message, attempts=attempt - 1))
        due = int((time.time() + settlement.delay) * 1000) if settlement.delay > LONGEST_DELAY else 0
        entry = delayed(_wire.repack(message, attempts=attempt, due=due), settlement.delay)
        if self._fifo:
            return Copy(names.delayed(group), _wire.leaving(message, entry))
        return Copy(names.queue(group), entry)

    def due(self, group: str, message: Message) -> Copy:
        """Return the copy of a due message for its group's FIFO queue.

        A message that was never in it is deduplicated by its id, like any published one. One that returns would be dropped by that: it
        has a deduplication id of its own, the same if moving it is repeated.
        """
        parsed = _wire.parse(message)
        entry = _wire.repack(message, attempts=parsed.attempts)
        back = parsed.fault is not None or parsed.attempts > 0 or _wire.left(message)
        dedup = message["MessageId"] if back else parsed.metadata.id
        return Copy(self._names.queue(group), self._in_order(message, entry, dedup))

    def replayed(self, group: str, message: Message) -> Copy:
        """Return the copy with which a dead letter is replayed."""
        entry = _wire.repack(message, attempts=0, only=True)
        if self._fifo:
            # Not the message's own id, with which it was published perhaps a moment ago; and the same if the replay is repeated.
            entry = self._in_order(message, entry, message["MessageId"])
        return Copy(self._names.queue(group), entry)

    def unparked(self, group: str, message: Message) -> Copy:
        """Return the copy of a parked message for a group, with the rest of its delay."""
        parsed = _wire.parse(message)
        left = max(0.0, parsed.due / 1000 - time.time())
        entry = _wire.repack(message, attempts=0, due=parsed.due if left > LONGEST_DELAY else 0)
        if left:
            name = self._names.delayed(group) if self._fifo else self._names.queue(group)
            return Copy(name, delayed(entry, left))
        if self._fifo:
            # The message's own id: one that was moved, and not deleted here before a crash, is not moved twice.
            entry = self._in_order(message, entry, parsed.metadata.id)
        return Copy(self._names.queue(group), entry)

    def _in_order(self, message: Message, entry: Entry, dedup: str) -> Entry:
        return _wire.in_order(entry, self._message_group or _wire.order(message), dedup)
