"""Where a delayed message waits: a queue for each power of two of a delay, declared on first use. See `FanOut` and the README."""

import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from abe_backend_rabbitmq._topology import TICK, Topology, level_of


class Place(NamedTuple):
    """Where a message is to wait."""

    level: int
    """The level's number."""
    key: str
    """The routing key without its first word."""
    headers: tuple[tuple[str, int], tuple[str, int]]
    """When it is due, and when it leaves the level, in milliseconds since the epoch."""


class Delays:
    """Chooses the level of a delayed message, and declares missing levels.

    Args:
        topology: The names.
        build: Declares the levels of a group up to a level, and returns how many it has.
    """

    def __init__(self, topology: Topology, build: Callable[[str, int], Awaitable[int]]) -> None:
        self._names = topology
        self._build = build
        self._levels: dict[str, int] = {}

    async def place(self, group: str, delay: float, due: int = 0) -> Place:
        """Return where a message waits first. The queue exists by then.

        Args:
            group: The group.
            delay: Seconds, above 0.
            due: When the delay is over, in milliseconds since the epoch; 0: `delay` from now.

        Raises:
            GroupMissingError: There is no such group.
        """
        level = level_of(delay)
        if self._levels.get(group, 0) <= level:
            self._levels[group] = await self._build(group, level)
        now = time.time()
        due = due or int((now + delay) * 1000) + 1
        until = min(due, int((now + TICK * 2**level) * 1000) + 1)
        return Place(level, f"{level}.{group}", (("abe-due", due), ("abe-until", until)))

    def forget(self, group: str | None = None) -> None:
        """Declare the levels of a group (None: all groups) again on their next use: one was deleted."""
        if group is None:
            self._levels.clear()
        else:
            self._levels.pop(group, None)
