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
        self.held = tag + b"held"
        """Stream: published before any group existed."""
        self.held_delayed = tag + b"held:delayed"
        """Sorted set: the same, with a delay."""

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
        """Sorted set by the time of their last sign of life in milliseconds: the group's consumers."""
        return self._tag + b"alive:" + group.encode()
