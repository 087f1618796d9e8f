"""How long a consumer has held its messages, and how many it settles, in ticks of RabbitMQ's `consumer_timeout`. Pure.

RabbitMQ closes the channel of a consumer that holds a message for longer than that, from the delivery on, buffered or not. Tags grow with
time, so that one look at the newest tag in each tick tells the age of all.
"""

from collections import deque
from collections.abc import Iterable
from typing import Final

CONSUMER_TIMEOUT: Final = 1800.0
"""Seconds: RabbitMQ's own default. What a node really has, only its refusals tell."""

TICKS: Final = 24
"""In one `consumer_timeout`."""

WAITED: Final = 6
"""Ticks after which a message that waits for a handler is given back and taken again."""

OVERDUE: Final = 20
"""Ticks after which a message in a handler is about to be taken away."""

LONG: Final = 12
"""Ticks in a handler after which a message that is taken away was its handler's attempt, and no accident of its neighbours."""


class Pace:
    """What was held at each of the last ticks of one channel."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, int]] = deque(maxlen=OVERDUE)
        self._begun: dict[int, int] = {}

    def tick(self, newest: int, settled: int, begun: Iterable[int]) -> None:
        """A tick has passed.

        Args:
            newest: The newest tag that was delivered.
            settled: How many messages of the channel are settled.
            begun: The tags of those in handlers.
        """
        self._begun = {tag: self._begun.get(tag, 0) + 1 for tag in begun}
        self._marks.append((newest, settled))

    def forget(self) -> None:
        """Another channel begins, or nothing is held."""
        self._marks.clear()
        self._begun.clear()

    def held_for(self, tag: int, ticks: int) -> bool:
        """Whether a message was delivered so many ticks ago, or earlier."""
        return len(self._marks) >= ticks and tag <= self._marks[-ticks][0]

    def handled_for(self, tag: int, ticks: int) -> bool:
        """Whether a message has been in its handler for so many ticks."""
        return self._begun.get(tag, 0) >= ticks

    def settled_in(self, ticks: int, settled: int) -> int:
        """Return how many messages were settled in the last ticks, of as many as are known."""
        return settled - self._marks[-min(ticks, len(self._marks))][1] if self._marks else settled
