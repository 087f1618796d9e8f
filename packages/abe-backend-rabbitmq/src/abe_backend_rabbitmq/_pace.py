"""How long messages have been in flight, and how many are settled, in ticks of RabbitMQ's `consumer_timeout`. Pure.

RabbitMQ closes the channel of a consumer that leaves a message unsettled for longer than that, buffered or not. Delivery tags grow with
time, so the newest tag at each tick tells the age of all messages.
"""

from collections import deque
from collections.abc import Iterable
from typing import Final

CONSUMER_TIMEOUT: Final = 1800.0
"""Seconds: RabbitMQ's default. Only the error with which a node closes a channel tells its own value."""

TICKS: Final = 24
"""Ticks of one `consumer_timeout`."""

WAITED: Final = 6
"""Ticks after which a message that waits for a handler is returned to its queue and consumed again."""

OVERDUE: Final = 20
"""Ticks after which a warning tells that `consumer_timeout` is about to end for a message in a handler."""

LONG: Final = 12
"""Ticks in a handler after which a message that is lost with its channel counts as an attempt: its handler may be the cause."""


class Pace:
    """The newest tag, and the number of settled messages, at each of the last ticks of one channel."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, int]] = deque(maxlen=OVERDUE)
        self._begun: dict[int, int] = {}

    def tick(self, newest: int, settled: int, begun: Iterable[int]) -> None:
        """Record a tick.

        Args:
            newest: The newest tag that was delivered.
            settled: How many messages of the channel are settled.
            begun: The tags of those in handlers.
        """
        self._begun = {tag: self._begun.get(tag, 0) + 1 for tag in begun}
        self._marks.append((newest, settled))

    def forget(self) -> None:
        """Forget the ticks: another channel begins, or nothing is in flight."""
        self._marks.clear()
        self._begun.clear()

    def held_for(self, tag: int, ticks: int) -> bool:
        """Return whether a message was delivered at least so many ticks ago."""
        return len(self._marks) >= ticks and tag <= self._marks[-ticks][0]

    def handled_for(self, tag: int, ticks: int) -> bool:
        """Return whether a message has been in its handler for at least so many ticks."""
        return self._begun.get(tag, 0) >= ticks

    def settled_in(self, ticks: int, settled: int) -> int:
        """Return how many messages were settled in the last ticks, of as many as are known."""
        return settled - self._marks[-min(ticks, len(self._marks))][1] if self._marks else settled
