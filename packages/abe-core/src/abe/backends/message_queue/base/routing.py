"""Decides which groups get a message, and makes the errors for publishers and consumers where there is none.

While no group exists, messages are parked, and belong to the first group that wants their keys.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeVar

from abe.backends.message_queue.base.names import matches
from abe.backends.message_queue.base.transport import Envelope
from abe.errors import AbeError, BackpressureError, GroupMissingError, LeaseLostError, UnroutableError

_T = TypeVar("_T")

PARKED: Final = ""
"""The group of parked messages. No group has this name."""

_MOST_ROUTES: Final = 10_000


def matches_any(patterns: Iterable[str], key: str) -> bool:
    """Whether a group with these patterns wants the key."""
    return any(matches(pattern, key) for pattern in patterns)


class Routes(dict[str, _T]):
    """The route of each key, ``routes[key]``, computed when a key is first looked up. Bounded.

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


def fan_out(
    envelopes: Iterable[Envelope], groups: Mapping[str, Iterable[str]], room: Mapping[str, int] | None = None
) -> tuple[Sequence[AbeError | None], Sequence[tuple[str, Envelope]]]:
    """Decide which groups get these messages, for a transport that stores a copy for each group.

    Args:
        envelopes: The messages.
        groups: The patterns of each group.
        room: How many messages each group has room for. None: for any number.

    Returns:
        Each message's outcome, in order, as `Transport.send` returns them; and the copies to store, each with its group. Where no group
        exists, that is `PARKED`.
    """
    routes = Routes(groups, lambda wanting: wanting)
    left = None if room is None else dict(room)
    outcomes: list[AbeError | None] = []
    copies: list[tuple[str, Envelope]] = []
    for envelope in envelopes:
        wanting = routes[envelope.key] if envelope.group is None else tuple({envelope.group} & groups.keys())
        if not wanting and (groups or envelope.group is not None):
            outcomes.append(unroutable(envelope))
        elif left is not None and any(left[group] < 1 for group in wanting):
            outcomes.append(group_full())
        else:
            outcomes.append(None)
            copies += [(group, envelope) for group in wanting or (PARKED,)]
            if left is not None:
                left.update({group: left[group] - 1 for group in wanting})
    return outcomes, copies


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
    """Return the error of an operation on a group that does not exist."""
    return GroupMissingError(f"there is no group {group!r}")


def lease_lost() -> LeaseLostError:
    """Return the outcome of a settlement of a message that the consumer has lost."""
    return LeaseLostError("the message is not ours any more: its lease had run out, or it was settled before")
