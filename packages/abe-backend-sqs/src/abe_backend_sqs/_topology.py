"""Every name the provider uses in SQS. Pure.

A queue's name is the namespace, what it is for, and the group, with a hyphen before and after the middle one. In the
outer two a hyphen is doubled and a dot becomes ``-_``, so that names cannot collide; a part that is too long
ends in a hash.
"""

import hashlib
import re
from functools import lru_cache
from secrets import token_hex
from typing import Final

FIFO: Final = ".fifo"
_ROOM: Final = 34
"""Characters of a namespace or group in a queue's name, which has 80 at most."""
_HASH: Final = 24
_MARK: Final = 16


class Topology:
    """The names in one namespace."""

    def __init__(self, namespace: str, *, fifo: bool = False) -> None:
        self._namespace = _part(namespace)
        self._suffix = suffix = FIFO if fifo else ""
        self.all = f"{self._namespace}-"
        """What the names of all queues of the namespace begin with, and perhaps others."""
        self.topic = f"{self._namespace}-topic"
        """Topic: what every group wants, with SQS_FANOUT=sns."""
        self.listed = f"{self._namespace}-group"
        """What the names of all groups' queues and revisions begin with."""
        self.prefix = f"{self.listed}-"
        """What the names of all groups' queues begin with."""
        self.parked = f"{self._namespace}-parked{suffix}"
        """Queue: published before any group existed."""

    def queue(self, group: str) -> str:
        """Queue: the group's messages."""
        return f"{self.prefix}{_part(group)}{self._suffix}"

    def revision(self, queue: str) -> str:
        """Queue, always empty: its name, which is new each time, tells that a group has changed."""
        return f"{self.listed}s-{mark(queue)}{token_hex(8)}{self._suffix}"

    def revised(self, name: str) -> str | None:
        """Return the mark of the group of which it is a revision; None for the name of any other queue."""
        found = re.fullmatch(
            rf"{re.escape(self.listed)}s-([0-9a-f]{{16}})[0-9a-f]{{16}}{re.escape(self._suffix)}", name
        )
        return found[1] if found else None

    def owns(self, name: str) -> bool:
        """Whether a queue is one of this namespace, and of this kind: another namespace's name may begin like it."""
        if name.startswith(f"{self._namespace}-delayed-"):
            return bool(self._suffix)
        begins = name.startswith((self.prefix, f"{self.listed}s-", f"{self._namespace}-dead-"))
        return name == self.parked or (begins and name.endswith(FIFO) is bool(self._suffix))

    def dead(self, group: str) -> str:
        """Queue: the group's dead letters."""
        return f"{self._namespace}-dead-{_part(group)}{self._suffix}"

    def delayed(self, group: str) -> str:
        """Queue, standard: delayed messages of a FIFO group, whose own queue can delay no single message."""
        return f"{self._namespace}-delayed-{_part(group)}"


@lru_cache(maxsize=10_000)
def mark(queue: str) -> str:
    """Return what the names of the revisions of a group's queue have in common."""
    return hashlib.sha256(queue.encode()).hexdigest()[:_MARK]


@lru_cache(maxsize=10_000)
def _part(name: str) -> str:
    text = name.replace("-", "--").replace(".", "-_")
    if len(text) <= _ROOM:
        return text
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH]
    # What is kept is for people only. No escape ends in "-x", so that no shorter name is taken for this one.
    return f"{text[: _ROOM - _HASH - 2].rstrip('-')}-x{digest}"
