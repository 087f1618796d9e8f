"""Every name the provider uses in RabbitMQ, and the arguments of every queue. Pure.

Namespaces and groups contain no ``:``, so names cannot collide. The README says what each of them is for.
"""

from collections.abc import Mapping
from typing import Any, Final

LEVELS: Final = 26
"""Levels of delay: at level n a message waits for `TICK` times 2**n, and then at lower ones for the rest."""

TICK: Final = 0.1
"""Seconds of the shortest wait."""

AT_ONCE: Final = "now"
"""In the place of a level, for messages without a delay."""

MAX_DELAY: Final = TICK * (2**LEVELS - 1)
"""The longest delay: 77 days."""

DELIVERY_LIMIT: Final = 1000
"""Deliveries after which the broker itself dead-letters: a far backstop, the engine decides much earlier."""

ENDLESS: Final = 2**31 - 1
"""A delivery limit that browsing never reaches. (Without one, a returned message goes to the tail.)"""

Arguments = Mapping[str, Any]

_QUORUM: Final[Arguments] = {"x-queue-type": "quorum", "x-overflow": "reject-publish"}


class Topology:
    """The names in one namespace.

    Args:
        namespace: The namespace.
        exchange: The name of the exchange that is published to; None: the default.
        max_backlog: Waiting messages of a group above which the broker refuses more; None: no limit.
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
        """Queue, exclusive: the lock under which the registry changes."""
        self.parked_lock = f"{prefix}:lock:parked"
        """Queue, exclusive: the lock under which parked messages are moved."""
        self.later = f"{prefix}:later"
        """Topic: copies and delayed messages, accepted if the first word of their key is the registry's newest version."""
        self.delay = f"{prefix}:delay"
        """Topic: to the queues where delayed messages wait. The first word of a key is the version, or anything; then come the level and
        the group; or ``parked``."""
        self.news = f"{prefix}:news"
        """Fanout: announces to consumers that a group's queue or levels were declared."""

    def queue(self, group: str) -> str:
        """Queue: the group's messages, waiting and in flight."""
        return f"{self._prefix}:queue:{group}"

    def dead(self, group: str) -> str:
        """Queue: the group's dead letters."""
        return f"{self._prefix}:dead:{group}"

    def look(self, group: str) -> str:
        """Queue, exclusive: the lock under which the group's dead letters are browsed."""
        return f"{self._prefix}:lock:dead:{group}"

    def tried(self, group: str, name: str) -> str:
        """Queue, always empty: a record that a handler has begun on a message of the group with nothing else in hand."""
        return f"{self._prefix}:tried:{group}:{name}"

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
        # The broker stores the message that exceeds the limit, and refuses those after it.
        return arguments if self._max_backlog is None else {**arguments, "x-max-length": self._max_backlog - 1}

    @property
    def store_arguments(self) -> Arguments:
        """The arguments of the other queues, which are browsed."""
        return {**_QUORUM, "x-delivery-limit": ENDLESS}

    @property
    def level_arguments(self) -> Arguments:
        """The arguments of `waiting`. Two consumers that take messages and return them would change their order."""
        return {**self.store_arguments, "x-single-active-consumer": True}

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
