"""Every name the provider uses in Redis. The namespace is the hash tag, so that all of them are in one slot and one script may use them.

A namespace holds no ``{``, ``}`` or ``:``, and a group no ``:``, so that no two names fall together.
"""

from typing import Final

GROUP: Final = b"group"
"""The consumer group of every stream: a stream belongs to one group of ours, so that one is enough."""

RELEASED: Final = b"released"
"""The consumer that holds what a leaving consumer gave back, until somebody claims it."""


class Topology:
    """The names in one namespace."""

    def __init__(self, namespace: str) -> None:
        tag = f"{{{namespace}}}:".encode()
        self._tag = tag
        self.groups = tag + b"groups"
        """Hash: group to its patterns as JSON."""
        self.version = tag + b"version"
        """String: changes whenever the groups do."""
        self.parked = tag + b"parked"
        """Stream: parked, as it was published before any group existed."""
        self.parked_delayed = tag + b"parked:delayed"
        """Sorted set: the same, with a delay."""
        self.parked_passed = tag + b"parked:delayed:passed"
        """Sorted set: those of them that every group so far has looked at, and does not want."""
        self.joining = tag + b"joining"
        """Hash: the group that is being made, and how far it has got among the parked messages."""

    def queue(self, group: str) -> bytes:
        """Stream: the group's messages, waiting and in flight."""
        return self._tag + b"queue:" + group.encode()

    def delayed(self, group: str) -> bytes:
        """Sorted set by due time in milliseconds: the group's messages that wait for it."""
        return self._tag + b"delayed:" + group.encode()

    def dead(self, group: str) -> bytes:
        """Stream: the group's dead letters."""
        return self._tag + b"dead:" + group.encode()

    def alive(self, group: str) -> bytes:
        """Sorted set by the time until which their leases hold, in milliseconds: the group's consumers."""
        return self._tag + b"alive:" + group.encode()

    def all_of(self, group: str) -> list[bytes]:
        """Everything that belongs to the group."""
        return [self.queue(group), self.delayed(group), self.dead(group), self.alive(group)]

    @property
    def pattern(self) -> bytes:
        """The glob pattern of every key."""
        return self._tag + b"*"
