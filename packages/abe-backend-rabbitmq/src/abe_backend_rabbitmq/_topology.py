"""Every name the provider uses in RabbitMQ, and the arguments of every queue. Pure.

A namespace and a group hold no ``:``, so that no two names fall together. What they are for is told in the README.
"""

from collections.abc import Mapping
from typing import Any, Final

LEVELS: Final = 26
"""Levels of delay: at level n a message waits for `TICK` times 2**n, and then at a lower one, if need be."""

TICK: Final = 0.1
"""Seconds of the shortest wait."""

AT_ONCE: Final = "now"
"""Stands for the level of those that wait at none."""

MAX_DELAY: Final = TICK * (2**LEVELS - 1)
"""The longest delay: 77 days."""

DELIVERY_LIMIT: Final = 1000
"""Deliveries after which the broker itself dead-letters: a far backstop, the engine decides much earlier."""

ENDLESS: Final = 2**31 - 1
"""A delivery limit that looking at dead letters never reaches. (Without one, a message that is looked at goes to the tail.)"""

Arguments = Mapping[str, Any]

_QUORUM: Final[Arguments] = {"x-queue-type": "quorum", "x-overflow": "reject-publish"}


class Topology:
    """The names in one namespace.

    Args:
        namespace: The namespace.
        exchange: What the exchange is called that is published to; None: its default name.
        max_backlog: Waiting messages of a group above which the broker refuses more.
    """

    def __init__(self, namespace: str, exchange: str | None = None, max_backlog: int | None = None) -> None:
        self._prefix = prefix = f"abe:{namespace}"
        self._max_backlog = max_backlog
        self.exchange = exchange or prefix
        """Topic: published to. What no group wants goes on to `unwanted`."""
        self.unwanted = f"{prefix}:unwanted"
        """Fanout: bound to `nowhere` once for each group. So with groups a message ends there, and the broker returns it; without
        any it goes on to `parking`."""
        self.nowhere = f"{prefix}:nowhere"
        """Fanout: bound to nothing."""
        self.parking = f"{prefix}:parking"
        """Fanout: to the queue `parked`."""
        self.parked = f"{prefix}:parked"
        """Queue: published while no group existed."""
        self.registry = f"{prefix}:groups"
        """Queue: one message, the groups and their patterns."""
        self.lock = f"{prefix}:lock"
        """Queue, exclusive: whoever has it may change the registry."""
        self.parked_lock = f"{prefix}:lock:parked"
        """Queue, exclusive: whoever has it may move parked messages."""
        self.later = f"{prefix}:later"
        """Topic: delayed messages, accepted if their first word is the registry's version."""
        self.delay = f"{prefix}:delay"
        """Topic: to the queues where delayed messages wait. The first word of a key is the version, or anything; then come the level and
        the group; or ``parked``."""
        self.news = f"{prefix}:news"
        """Fanout: tells everybody who consumes that a group has another level."""

    def queue(self, group: str) -> str:
        """Queue: the group's messages, waiting and in flight."""
        return f"{self._prefix}:queue:{group}"

    def dead(self, group: str) -> str:
        """Queue: the group's dead letters."""
        return f"{self._prefix}:dead:{group}"

    def look(self, group: str) -> str:
        """Queue, exclusive: whoever has it may look through the group's dead letters."""
        return f"{self._prefix}:lock:dead:{group}"

    def waiting(self, group: str, level: int) -> str:
        """Queue: the group's messages that wait for ``TICK * 2 ** level``."""
        return f"{self._prefix}:delay:{level}:{group}"

    def queue_arguments(self, group: str) -> Arguments:
        """The arguments of `queue`."""
        arguments = {
            **_QUORUM,
            "x-delivery-limit": DELIVERY_LIMIT,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": self.dead(group),
            "x-dead-letter-strategy": "at-least-once",
        }
        # The broker refuses what comes after the message that goes over the limit.
        return arguments if self._max_backlog is None else {**arguments, "x-max-length": self._max_backlog - 1}

    @property
    def store_arguments(self) -> Arguments:
        """The arguments of the other queues, where messages are looked at and put back."""
        return {**_QUORUM, "x-delivery-limit": ENDLESS}

    def straight(self, group: str) -> str:
        """Return the pattern of a group's messages that wait at no level."""
        return f"*.{AT_ONCE}.{group}"

    def wait(self, group: str, level: int) -> str:
        """Return the pattern of a group's messages that wait at the level."""
        return f"*.{level}.{group}"


def level_of(delay: float) -> int:
    """Return the level at which a delay above 0 begins: the longest wait that is not longer."""
    # The tiny number keeps 0.8 from being less than eight ticks.
    return min(max(1, int(delay / TICK + 1e-9)).bit_length(), LEVELS) - 1
