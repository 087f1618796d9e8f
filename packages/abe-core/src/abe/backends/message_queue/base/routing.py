"""Which groups get a message, and what its publisher or consumer is told where there is none.

While no group exists, messages are parked, and belong to the first group that wants their keys.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeVar

from abe.backends.message_queue.base.names import matches
from abe.backends.message_queue.base.transport import Envelope
from abe.errors import BackpressureError, GroupMissingError, LeaseLostError, UnroutableError

_T = TypeVar("_T")

_MOST_ROUTES: Final = 10_000


def matches_any(patterns: Iterable[str], key: str) -> bool:
    """Whether a group with these patterns wants the key."""
    return any(matches(pattern, key) for pattern in patterns)


class Routes(dict[str, _T]):
    """What each key leads to: ``routes[key]``, worked out when a key is first looked up. Bounded.

    Args:
        groups: The patterns of each group.
        make: Turns the names of the groups that want a key, in the order of `groups`, into what is kept for it.
    """

    def __init__(self, groups: Mapping[str, Iterable[str]], make: Callable[[tuple[str, ...]], _T]) -> None:
        super().__init__()
        self._groups = groups
        self._make = make

    def __missing__(self, key: str) -> _T:
        if len(self) >= _MOST_ROUTES:
            self.clear()
        wanting = tuple(group for group, patterns in self._groups.items() if matches_any(patterns, key))
        route = self[key] = self._make(wanting)
        return route


def unroutable(envelope: Envelope) -> UnroutableError:
    """Return the outcome of a message that no group gets, though there are groups, or it is for one that is not there."""
    return UnroutableError(
        f"no group wants the key {envelope.key!r}"
        if envelope.group is None
        else f"there is no group {envelope.group!r}"
    )


def group_full() -> BackpressureError:
    """Return the outcome of a message that is stored nowhere, as a group has `max_backlog` messages."""
    return BackpressureError("a group that wants the message has max_backlog messages waiting")


def group_missing(group: str) -> GroupMissingError:
    """Return the error of what is asked of a group that does not exist."""
    return GroupMissingError(f"there is no group {group!r}")


def lease_lost() -> LeaseLostError:
    """Return the outcome of a settlement that comes too late."""
    return LeaseLostError("the message is not ours any more: its lease had run out, or it was settled before")
