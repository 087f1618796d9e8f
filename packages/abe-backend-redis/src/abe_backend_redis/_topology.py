"""Every key that the provider uses in Redis. The namespace is the hash tag, so that all are in one slot and a script may use them.

A namespace contains no ``{``, ``}`` or ``:``, and a group no ``:``, so that no two keys collide.
"""

from typing import Final

GROUP: Final = b"group"
"""The consumer group of every stream. A stream belongs to one group of the application, so one is enough."""

RELEASED: Final = b"released"
"""The consumer that owns released entries until another consumer claims them."""


class Topology:
    """The keys of one namespace."""

    def __init__(self, namespace: str) -> None:
        tag = f"{{{namespace}}}:".encode()
        self._tag = tag
        self.groups = tag + b"groups"
        """Hash: group to its key patterns, as JSON."""
        self.version = tag + b"version"
        """String: changes whenever the groups do."""
        self.parked = tag + b"parked"
        """Stream: parked messages, published before any group existed."""
        self.parked_delayed = tag + b"parked:delayed"
        """Sorted set: parked messages with a delay."""
        self.parked_passed = tag + b"parked:delayed:passed"
        """Sorted set: delayed parked messages that no group so far wants."""
        self.joining = tag + b"joining"
        """Hash: the group that is joining, and its position in the parked messages."""

    def queue(self, group: str) -> bytes:
        """Stream: the group's messages, waiting and in flight."""
        return self._tag + b"queue:" + group.encode()

    def delayed(self, group: str) -> bytes:
        """Sorted set by due time in milliseconds: the group's delayed messages."""
        return self._tag + b"delayed:" + group.encode()

    def dead(self, group: str) -> bytes:
        """Stream: the group's dead letters."""
        return self._tag + b"dead:" + group.encode()

    def alive(self, group: str) -> bytes:
        """Sorted set by the end of their leases in milliseconds: the group's consumers."""
        return self._tag + b"alive:" + group.encode()

    def all_of(self, group: str) -> list[bytes]:
        """All keys of the group."""
        return [self.queue(group), self.delayed(group), self.dead(group), self.alive(group)]

    @property
    def pattern(self) -> bytes:
        """The glob pattern of every key."""
        return self._tag + b"*"
