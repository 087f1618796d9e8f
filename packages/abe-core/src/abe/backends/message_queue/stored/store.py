"""A transport over a store of messages: tables of a database, a file, a directory. A provider writes a `Store`, and no more.

The store is two tables: groups with their patterns, and messages, of which each group has its own copies. A message is in one of
these states:

    waiting    its `due` time has come: its delay passed, or its consumer's lease ran out
    delayed    its `due` time is to come, and no consumer has it
    in flight  a consumer has it, until `due`, when its lease ends
    dead       it has a time of death; nothing delivers it
    parked     its group is `PARKED`: it was published while no group existed

Times are seconds, by one clock for all processes that share the store: its own, where it has one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from abe.backends.message_queue.base.groups import GroupStats

Groups: TypeAlias = Mapping[str, tuple[str, ...]]
"""The patterns of each group."""


class Claim(NamedTuple):
    """Names one delivery of a message to a consumer. It holds no longer once another consumer has taken the message.

    Attributes:
        serial: The message's place in the order of its group. No other message has or had it.
        delivery: The number of the message's delivery: it grows with each, and is never reset.
        consumer: The consumer, as given to `Store.take`.
    """

    serial: int
    delivery: int
    consumer: str


class Copy(NamedTuple):
    """A message to store for a group.

    Attributes:
        group: The group; `PARKED` where there is none.
        key: Its key, for parked messages: it is in the header, too. Like `Change.reason` and `error` it is any text, NUL included, which
            not every database accepts as text.
        header: The encoded metadata.
        body: The payload.
        delay: Seconds until it may be delivered.
    """

    group: str
    key: str
    header: bytes
    body: bytes
    delay: float


class Row(NamedTuple):
    """A message as it is stored.

    Attributes:
        serial: As in `Claim`.
        key: As in `Copy`.
        header: As in `Copy`; empty for a foreign message.
        body: As in `Copy`.
        attempts: How often it was delivered, without the deliveries that were released.
        delivery: As in `Claim`.
        dead_at: When it became a dead letter, in seconds since the epoch; 0 where it is not dead.
        reason: As in `Change`.
        error: As in `Change`.
    """

    serial: int
    key: str
    header: bytes
    body: bytes
    attempts: int
    delivery: int
    dead_at: float = 0.0
    reason: str = ""
    error: str = ""


class Change(NamedTuple):
    """The new state of a message that its consumer has settled; see `Settlement`.

    Attributes:
        serial: With the next two: the claim.
        delivery: As in `Claim`.
        consumer: As in `Claim`.
        delay: Seconds until it is due.
        uncounted: How many attempts are subtracted: 1 if it was released, else 0.
        dead: Whether it is dead from now on.
        reason: Why, in a word or a line; empty where it is not dead.
        error: The traceback of the last failure; empty where there was none.
    """

    serial: int
    delivery: int
    consumer: str
    delay: float
    uncounted: int
    dead: bool
    reason: str
    error: str


class Span(NamedTuple):
    """A range of dead messages.

    Attributes:
        died: Those that became dead after this time, in seconds since the epoch,
        serial: or at this time, with a serial above this one,
        until: and by this time. None: by now.
    """

    died: float = 0.0
    serial: int = 0
    until: float | None = None


Choose: TypeAlias = Callable[[Groups, Mapping[str, int]], Sequence[Copy]]
"""Returns what to store, given the groups, and how many messages each has waiting and delayed (absent: none)."""


class Store(ABC):
    """What a provider writes: each method is one transaction, or equivalent to one.

    Several tasks may call methods at once. A cancelled one is carried out as a whole, or not at all.

    Raises:
        BackendConnectionError: By each method: it could not be carried out, or no answer came. It is called again, which reconnects.
            Only `put` has to tell the two apart.
    """

    @abstractmethod
    async def open(self) -> None:
        """Connect, create what is missing, and check that the store answers.

        Raises:
            ConfigurationError: The store refuses the login, or is none.
        """

    @abstractmethod
    async def close(self) -> None:
        """Disconnect. May be called repeatedly, and before `open`."""

    @abstractmethod
    async def groups(self) -> Groups:
        """Return all groups."""

    @abstractmethod
    async def put(self, choose: Choose, *, counted: bool) -> None:
        """Store what `choose` returns. No group is created or changed between the two: a message that is parked then would stay parked.

        Args:
            choose: Does no I/O, and may be called again where a transaction is repeated.
            counted: Whether the numbers are wanted. If not, they are {}.

        Raises:
            BackendConnectionError: They are certainly not stored.
            PublishUnknownError: They may be stored, or not: no answer came.
        """

    @abstractmethod
    async def declare(self, group: str, patterns: tuple[str, ...], *, change: bool) -> tuple[str, ...]:
        """Create the group unless it exists; return its patterns.

        A group that is created or changed gets those parked messages whose key its patterns want (`matches_any`).

        Args:
            group: The group.
            patterns: Those of a new group.
            change: Whether an existing group gets them too.
        """

    @abstractmethod
    async def delete(self, group: str | None) -> None:
        """Delete a group with all its messages; None: the whole namespace."""

    @abstractmethod
    async def count(self, group: str) -> GroupStats:
        """Count the messages of a group by their states; no group: no messages."""

    @abstractmethod
    async def take(self, group: str, consumer: str, limit: int, lease: float) -> tuple[Sequence[Row], float | None]:
        """Take waiting messages, in the order of their serials: they are in flight then; see `PollingReceiver.take`.

        Returns:
            At most `limit` of them, their attempts and deliveries one higher; if there are none, the seconds until there may be, where that
            is known.

        Raises:
            GroupMissingError: There is no such group.
        """

    @abstractmethod
    async def remove(self, claims: Sequence[Claim]) -> Sequence[bool]:
        """Delete messages; return for each whether the claim holds. The others stay as they are, here and below."""

    @abstractmethod
    async def settle(self, changes: Sequence[Change]) -> Sequence[bool]:
        """Change messages in flight: each is waiting, delayed or dead from now on. Return for each whether the claim holds."""

    @abstractmethod
    async def renew(self, claims: Sequence[Claim], lease: float) -> Sequence[bool]:
        """Renew leases, also those that ran out; return for each whether the claim holds."""

    @abstractmethod
    async def give_back(self, consumer: str, keep: Collection[int]) -> None:
        """Make a consumer's messages in flight waiting, with one attempt less, except for those with these serials."""

    @abstractmethod
    async def dead(self, group: str, span: Span, size: int) -> tuple[Sequence[Row], float]:
        """Read dead messages of a group in the order of their `dead_at`, and of their serials where that is the same.

        Args:
            group: The group.
            span: The range.
            size: Bytes of their bodies together, at most; but the first one in any case. A few hundred messages are enough, too.

        Returns:
            The first ones of the span; and the current time, by the clock of `dead_at`.
        """

    @abstractmethod
    async def revive(self, serials: Collection[int]) -> int:
        """Make those of these messages that are dead waiting, with 0 attempts; return how many."""

    @abstractmethod
    async def purge(self, serials: Collection[int]) -> int:
        """Delete those of these messages that are dead; return how many."""
