"""The interface between the engine and a broker: what a provider implements.

A transport speaks its broker's primitives in batches, and nothing else: no retries, no timers of its own, no policy. The engine
coalesces, bounds, times out, retries with backoff, renews leases, and decides about dead letters, once for all providers.

Every method raises errors of ``abe.errors`` only. `BackendConnectionError` means that the operation certainly did not happen and may be
tried again, which reconnects; the transport connects whenever it has to. Any of them may be cancelled: the broker may then have
done it, or not, and the transport stays usable.
"""

from collections.abc import AsyncGenerator, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, TypeAlias

from abe.errors import AbeError

Receipt: TypeAlias = Hashable
"""What names one delivery to the broker; unique among those that a receiver holds."""


class Envelope(NamedTuple):
    """A message on its way to the broker."""

    id: str
    key: str
    body: bytes
    published_at: int
    """Milliseconds since the epoch, by the publisher's clock."""
    headers: Mapping[str, str] | None = None
    delay: float = 0.0
    """Seconds before which it must not be delivered."""
    group: str | None = None
    """The one group that gets it, whatever its patterns; None: every group that wants the key."""


class Metadata(NamedTuple):
    """What travels beside a body. The defaults are for a message that a stranger wrote."""

    id: str
    key: str = ""
    published_at: int = 0
    headers: Mapping[str, str] | None = None


class Delivery:
    """A message that the broker gave us, until it is settled.

    `header` is the metadata as the broker carried it, parsed by `Receiver.metadata` when somebody asks; `fault` says why the
    envelope cannot be read, if so; `lost` becomes true when it turns out that the delivery is not ours any more. `attempt` is 1 for the
    first delivery; `uncertain` of the attempts before this one may have been no more than a connection that was lost, where the broker
    counts those too. `begun` becomes true when a handler gets it: what is not begun, the transport may take back, and say so by `lost`.
    `handled` becomes true when its handler was done with it, and nobody waits to hear whether it was acknowledged: when it was lost by
    then and comes again, the transport may remove it.
    """

    __slots__ = ("attempt", "begun", "body", "fault", "handled", "header", "lost", "receipt", "uncertain")

    def __init__(
        self,
        receipt: Receipt,
        body: bytes,
        header: object,
        attempt: int,
        fault: str | None = None,
        *,
        uncertain: int = 0,
    ) -> None:
        self.receipt: Receipt = receipt
        self.body: bytes = body
        self.header: object = header
        self.attempt: int = attempt
        self.fault: str | None = fault
        self.uncertain: int = uncertain
        self.begun: bool = False
        self.handled: bool = False
        self.lost: bool = False


class Verb(Enum):
    """What becomes of a delivery that is not simply acknowledged."""

    RETRY = "retry"
    """Deliver it to the group again, not before `delay`. The attempt counts."""
    RELEASE = "release"
    """Deliver it again at once, in its old place where the broker can. The attempt does not count where the broker can tell."""
    DEAD = "dead"
    """Move it to the group's dead letters, in one step or so that a crash in the middle doubles it and never loses it."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """A verdict on a delivery."""

    receipt: Receipt
    verb: Verb
    delay: float = 0.0
    reason: str = ""
    error: str = ""
    attempts: int | None = None
    """With `Verb.RELEASE`, of a delivery that has uncertain attempts: how many attempts count from now on. None: those that did."""


Failures: TypeAlias = Mapping[Receipt, AbeError]
"""What went wrong with which delivery. Empty: nothing did."""


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A message that was given up."""

    id: str
    """The message's id; the broker's own where the message had none."""
    key: str
    body: bytes
    headers: Mapping[str, str]
    attempts: int
    reason: str
    error: str
    """The traceback of the last failure, if there was an exception."""
    published_at: float
    """Seconds since the epoch; 0 where nobody wrote it down."""
    dead_at: float
    """Seconds since the epoch, by the broker's clock where it has one."""


@dataclass(frozen=True, kw_only=True)
class GroupStats:
    """How a group stands. Exact or approximate, as the broker counts."""

    waiting: int
    """Messages that could be delivered now."""
    in_flight: int
    """Messages that a consumer holds."""
    delayed: int
    """Messages that wait for their time."""
    dead: int
    """Dead letters."""
    oldest: float | None
    """Seconds that the oldest waiting message has waited; None where none waits, or the broker cannot tell."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How much `Transport.send` takes at a time."""

    messages: int
    bytes: int
    flights: int
    """Calls of `send` that may be under way at once."""


class Receiver(Protocol):
    """One consumer's side of a group. One task calls `receive`; the other methods may be called beside it."""

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Wait for messages, and return between 0 and `limit` of them.

        Returns empty from time to time, and soon after `stop`. What became due, and what dead consumers held, comes this way too; never
        what this receiver holds itself, though its lease ran out while the program stood still.

        Raises:
            BackendConnectionError: Nothing is lost: call `recover`, then `receive` again.
        """
        ...

    def metadata(self, delivery: Delivery) -> Metadata:
        """Parse the delivery's header.

        Raises:
            DecodeError: The header is not what our codec writes.
        """
        ...

    async def ack(self, receipts: Sequence[Receipt], *, verify: bool) -> Failures:
        """Remove messages that are done. Repeating it is harmless.

        Args:
            receipts: Which; the batch is bounded by what the receiver handed out.
            verify: The leases may have run out: remove only what is still ours, and report the rest as `LeaseLostError`.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> Failures:
        """Carry out verdicts, each only if the delivery is still ours; the others are reported as `LeaseLostError`."""
        ...

    async def renew(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Start the leases anew of those that are still ours, and return those that are not."""
        ...

    async def recover(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """After a failed `receive`: reconnect, make deliverable again what the broker gave us and we never saw, and return which of
        the deliveries that we hold are lost."""
        ...

    async def stop(self) -> Sequence[Delivery] | None:
        """Let a waiting `receive` return, with what it has, within a fraction of a second. Nothing new is taken from then on.

        Returns:
            What was taken from the broker and not returned by `receive`, in the broker's order, for the engine to hand out or to give
            back; None where there is no such thing.
        """
        ...

    async def close(self) -> None:
        """Give back whatever the broker still counts as ours, leave the group's list of consumers, and disconnect."""
        ...


class Transport(Protocol):
    """One broker. Its methods may be called by many tasks at once."""

    batching: Batching

    async def open(self) -> None:
        """Connect; a no-op when connected. Checks what can be checked about the broker.

        Raises:
            BackendConnectionError: It cannot be reached now.
            ConfigurationError: It refuses us, or is configured so that the contract cannot hold.
        """
        ...

    async def close(self) -> None:
        """Disconnect. May be called repeatedly, and before `open`."""
        ...

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Hand messages to the broker, in this order; return each one's outcome, in this order too. An empty result: all were accepted.

        The outcome `UnroutableError` means that groups exist and none of them wants the key. While no group exists, messages are held
        for the first one that wants them.

        What is sent again, as its outcome was not final, is the same object; another publish with the same id is another.

        Raises:
            BackendConnectionError: None of them was accepted.
            PublishUnknownError: Any of them may have been.
        """
        ...

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Make the group exist, and return the patterns that it has now. Parked messages that it wants become its own. Any publish that
        starts later reaches it.

        Of several who declare at once with different patterns, one makes the group, and the others get its patterns.

        Args:
            group: The group.
            patterns: Those of a new group. None: everything.
            change: Whether an existing group gets these patterns too (not for None); otherwise it keeps its own.
        """
        ...

    async def delete_group(self, group: str) -> None:
        """End the group: its messages, dead letters included. A no-op when there is none."""
        ...

    async def delete_namespace(self) -> None:
        """Remove everything that the namespace has in the broker: groups, messages, dead letters, parked messages. A no-op when there
        is nothing."""
        ...

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Return each group's patterns."""
        ...

    async def subscribe(self, group: str, prefetch: int) -> Receiver:
        """Join an existing group, as a consumer with an identity of its own that holds at most `prefetch` messages.

        It is not cancelled but by an event loop that ends: a receiver that nobody waits for any more is closed when it is there.

        Raises:
            GroupMissingError: There is no such group.
        """
        ...

    async def stats(self, group: str) -> GroupStats:
        """Count the group's messages.

        Raises:
            GroupMissingError: There is no such group.
        """
        ...

    def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        """Go through the dead letters that are there now, the oldest first, and leave them where they are.

        A page has at least one letter, and is bounded in count and in bytes. The caller may close the generator early. Nothing is locked
        meanwhile that others need to work.

        Raises:
            GroupMissingError: There is no such group.
        """
        ...

    def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Move dead letters back to the group, their attempts forgotten, and yield after each bounded step how many it moved.

        Those that are there when it starts: one that is buried again meanwhile is not met again. A generator that is closed early, or
        fails, leaves each letter in one place, or doubles it where the broker cannot move in one step; it never loses one.

        Args:
            group: The group.
            ids: The letters' ids. None: all of them.

        Raises:
            GroupMissingError: There is no such group.
        """
        ...

    def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Remove dead letters for good, in the same way as `replay` moves them."""
        ...

    async def ping(self) -> None:
        """Ask the broker for a sign of life.

        Raises:
            BackendConnectionError: There is none.
        """
        ...
