"""Every name the provider uses in RabbitMQ, and the arguments of every queue. Pure.

A namespace and a group hold no ``:``, so that no two names fall together. What they are for is told in the README.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

LEVELS: Final = 26
"""Queues of a delay ladder: level n holds a message for `TICK` times 2**n."""

TICK: Final = 0.1
"""Seconds that delays are rounded up to."""

AT_ONCE: Final = ".".join("0" * LEVELS)
"""The binary digits of no delay at all: straight to the end of the ladder."""

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
        any it goes on to `holding`."""
        self.nowhere = f"{prefix}:nowhere"
        """Fanout: bound to nothing."""
        self.holding = f"{prefix}:holding"
        """Fanout: to the queue `held`."""
        self.held = f"{prefix}:held"
        """Queue: published while no group existed."""
        self.registry = f"{prefix}:groups"
        """Queue: one message, the groups and their patterns."""
        self.lock = f"{prefix}:lock"
        """Queue, exclusive: whoever has it may change the registry."""
        self.moving = f"{prefix}:lock:held"
        """Queue, exclusive: whoever has it may move held messages."""
        self.later = f"{prefix}:later"
        """Topic: delayed messages, accepted if their first word is the registry's version."""
        self.delay = f"{prefix}:delay"
        """Topic: where the ladder begins. The first word of a key is the version, or anything; then come `LEVELS` binary digits and the
        group; or ``held``."""
        self.due = f"{prefix}:due"
        """Topic: where the ladder ends; to the group's queue."""

    def queue(self, group: str) -> str:
        """Queue: the group's messages, waiting and in flight."""
        return f"{self._prefix}:queue:{group}"

    def dead(self, group: str) -> str:
        """Queue: the group's dead letters."""
        return f"{self._prefix}:dead:{group}"

    def look(self, group: str) -> str:
        """Queue, exclusive: whoever has it may look through the group's dead letters."""
        return f"{self._prefix}:lock:dead:{group}"

    def rung(self, level: int) -> str:
        """Topic: the ladder's exchange for that digit; -1: its end."""
        return self.due if level < 0 else f"{self._prefix}:delay:{level}"

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

    def waiting_arguments(self, level: int) -> Arguments:
        """The arguments of `waiting`."""
        return {
            **_QUORUM,
            "x-delivery-limit": ENDLESS,
            "x-message-ttl": int(TICK * 1000) << level,
            "x-dead-letter-exchange": self.rung(level - 1),
            "x-dead-letter-strategy": "at-least-once",
        }

    @property
    def store_arguments(self) -> Arguments:
        """The arguments of `held`, `registry` and `dead`, where messages are looked at and put back."""
        return {**_QUORUM, "x-delivery-limit": ENDLESS}

    @property
    def pass_by(self) -> str:
        """The pattern of those that wait at no level."""
        return f"*.{AT_ONCE}.*"

    def leap(self, level: int) -> str:
        """Return the pattern of those whose ladder begins at the level."""
        return f"*.{'0.' * (LEVELS - 1 - level)}1.#"

    def climb(self, level: int) -> str:
        """Return the pattern of those that skip the level."""
        return f"*.{'*.' * (LEVELS - 1 - level)}0.#"

    def wait(self, group: str, level: int) -> str:
        """Return the pattern of a group's messages that wait at the level."""
        return f"*.{'*.' * (LEVELS - 1 - level)}1.{'*.' * level}{group}"

    def arrive(self, group: str) -> str:
        """Return the pattern of a group's messages at the end of the ladder."""
        return f"*.{'*.' * LEVELS}{group}"


def ladder(delay: float) -> tuple[int, str]:
    """Return the level at which a delay above 0 begins, and its binary digits as words."""
    # The tiny number keeps 0.3 from becoming four ticks.
    ticks = max(1, min(math.ceil(delay / TICK - 1e-9), 2**LEVELS - 1))
    return ticks.bit_length() - 1, ".".join(f"{ticks:0{LEVELS}b}")
