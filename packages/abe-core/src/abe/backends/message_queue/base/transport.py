"""The interface between the engine and a broker: what a provider implements.

A transport speaks its broker's primitives in batches, and nothing else: no retries, no timers of its own, no policy. The engine
coalesces, bounds, times out, retries with backoff, renews leases, and decides about dead letters, once for all providers.

Every method raises errors of ``abe.errors`` only. What goes wrong with one message of a batch is its outcome, and concerns no other:
the engine repeats those whose error is `retryable`, and them alone. Raising concerns the whole batch.

`BackendConnectionError` means: call it again, which reconnects; the transport connects whenever it has to. Only `send` does harm where
it is repeated, so that there it means besides that nothing was accepted. Any of the methods may be cancelled: the broker may then have
done it, or not, and the transport stays usable.

Times and durations are seconds, moments since the epoch, all of them floats; with one exception, which says so: `published_at` of
`Envelope` and `Metadata`.
"""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec

from abe.backends.message_queue.base.groups import DeadLetter, GroupStats
from abe.errors import AbeError

Outcomes: TypeAlias = Sequence[AbeError | None]
"""What went wrong with each of a batch, in its order; None: it was done. An empty sequence: all were."""


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """A message on its way to the broker.

    Attributes:
        id: The message's id, 1 to 200 bytes of UTF-8, NUL included.
        key: What it is about, the same. Patterns are matched against it (`base.names`, `base.routing`).
        body: The payload, as bytes.
        published_at: When it was published, by the publisher's clock, in *milliseconds* since the epoch, as it is written on the wire.
        headers: Strings that travel beside the body; None: none.
        delay: Seconds before which it must not be delivered.
        group: The one group that gets it, whatever its patterns; None: every group that wants the key.
    """

    id: str
    key: str
    body: bytes
    published_at: int
    headers: Mapping[str, str] | None = None
    delay: float = 0.0
    group: str | None = None


class Metadata(NamedTuple):
    """What travels beside a body. The defaults are for a foreign message.

    Attributes:
        id: The message's id; the broker's own name for it where it has none.
        key: As in `Envelope`.
        published_at: As in `Envelope`, in *milliseconds* since the epoch; 0 where that is not known.
        headers: As in `Envelope`.
    """

    id: str
    key: str = ""
    published_at: int = 0
    headers: Mapping[str, str] | None = None


class Delivery(msgspec.Struct, eq=False):
    """A message that the broker gave us, until it is settled. It is compared by identity: the next delivery of a message is another.

    Attributes:
        body: The payload, as bytes.
        header: The metadata as the broker carried it, parsed by `Receiver.metadata` when it is asked for.
        attempt: 1 for the first delivery.
        native: What the provider needs to settle it: the name that the broker knows it by, for one. The engine does not look at it.
        fault: Why the envelope cannot be read, if so.
        uncertain: Attempts before this one that may have been no more than a lost connection, where the broker counts those too.
        begun: A handler has got it. What is not begun, the provider may take back, and say so by `lost`.
        handled: Its handler was done with it, and nobody waits to hear whether it was acknowledged: where it was lost by then and comes
            again, the provider may remove it.
        lost: It is known not to be ours any more.
    """

    body: bytes
    header: object
    attempt: int
    native: Any
    fault: str | None = None
    uncertain: int = 0
    begun: bool = False
    handled: bool = False
    lost: bool = False


class Disposition(Enum):
    """What becomes of a delivery that is not simply acknowledged.

    Attributes:
        RETRY: Deliver it to the group again, not before `Settlement.delay`. The attempt counts.
        RELEASE: Deliver it again at once, in its old place where the broker can. The attempt does not count where the broker can tell.
        DEAD: Move it to the group's dead letters, in one step or so that a crash in the middle doubles it and never loses it.
    """

    RETRY = "retry"
    RELEASE = "release"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a delivery's consumer decided, where it did not simply acknowledge.

    Attributes:
        delivery: Which.
        disposition: What becomes of it.
        delay: With `Disposition.RETRY`: seconds before which it must not be delivered again.
        reason: Why, in a word or a line, for the dead letter.
        error: The traceback, for the dead letter.
        attempts: With `Disposition.RELEASE`, of a delivery that has uncertain attempts: how many count from now on. None: those that did.
    """

    delivery: Delivery
    disposition: Disposition
    delay: float = 0.0
    reason: str = ""
    error: str = ""
    attempts: int | None = None


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How much `Transport.send` takes at a time.

    Attributes:
        messages: Messages of one call, at most.
        bytes: Bytes of their bodies together, after which a call gets no further message. Its last one may exceed it, by up to what a
            message may have at all (`Capabilities.max_payload_bytes`).
        max_concurrent: Calls that may be under way at once.
    """

    messages: int
    bytes: int
    max_concurrent: int


@dataclass(frozen=True, kw_only=True)
class Settling:
    """How much `Receiver.ack` and `Receiver.settle` take at a time.

    Attributes:
        messages: Deliveries of one call, at most: what keeps one request short.
        linger: Seconds for which acknowledgements that nobody waits for may wait until `messages` of them share a call, where a broker's
            requests are expensive. 0: those of one turn of the event loop leave together.
        at_once: Whether `Receiver.ack` never waits for anything. It is called outside of a task then, which it must not need.
    """

    messages: int = 500
    linger: float = 0.0
    at_once: bool = False


class Receiver(Protocol):
    """One consumer's side of a group. One task calls `receive`; the other methods may be called beside it.

    What a method does where no answer came, so that the broker may have done it or not, and where the group was deleted underneath:

        method        no answer                                      the group is gone
        receive       raises BackendConnectionError                  raises GroupMissingError
        ack, settle   BackendConnectionError, raised or as outcome   the outcomes are LeaseLostError
        renew         raises BackendConnectionError                  returns all of them
        recover       raises BackendConnectionError                  raises GroupMissingError, or returns all of them
        stop, close   raises nothing, or BackendConnectionError      does nothing
        metadata      asks no broker                                 -

    The engine repeats `ack` and `settle` for as long as the lease lasts, and `renew` and `recover` until they succeed. What was settled by
    the call that had no answer may have the outcome None or `LeaseLostError` when it is repeated.

    A `receive` that fails or is cancelled may have taken messages that nobody saw. After a failure the engine calls `recover`, which makes
    them deliverable again. It cancels a `receive` only when it closes the receiver: there `close` does so.
    """

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Wait for messages, and return between 0 and `limit` of them.

        Returns empty from time to time, and soon after `stop`. What became due, and what dead consumers held, comes this way too; never
        what this receiver holds itself, though its lease ran out while the program stood still.

        Raises:
            BackendConnectionError: Nothing is lost: call `recover`, then `receive` again.
            GroupMissingError: The group was deleted underneath. It is declared again by whoever called, then as above.
        """
        ...

    def metadata(self, delivery: Delivery) -> Metadata:
        """Parse the delivery's header.

        Raises:
            DecodeError: The header is not what our codec writes.
        """
        ...

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        """Remove messages that are done. Repeating it is harmless.

        Args:
            deliveries: Which; at most `Transport.settling.messages`.
            verify: Their leases may have run out: remove only what is still ours. The others' outcome is `LeaseLostError`.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        """Carry out settlements, each only if the delivery is still ours; the others' outcome is `LeaseLostError`.

        Args:
            settlements: Which; at most `Transport.settling.messages`.
        """
        ...

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Start the leases anew of those that are still ours, and return those that are not."""
        ...

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """After a failed `receive`: reconnect, make deliverable again what the broker gave us and we never saw, and return which of
        these, all that we hold, are lost.

        Raises:
            GroupMissingError: As `receive`.
        """
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
    """One broker. Its methods may be called by many tasks at once.

    What a method does where no answer came, so that the broker may have done it or not, and where there is no such group:

        method               no answer                                     no such group
        send                 PublishUnknownError, raised or as outcome     the outcome is UnroutableError (with `Envelope.group`)
        declare              raises BackendConnectionError                 makes it
        subscribe            the same; what had joined leaves              raises GroupMissingError
        stats, dead_letters  raises BackendConnectionError                 raises GroupMissingError
        replay, purge        the same; some may have been moved            raises GroupMissingError
        delete_group         raises BackendConnectionError                 does nothing
        delete_namespace     raises BackendConnectionError                 -
        open, ping, groups   raises BackendConnectionError                 -
        close                disconnects all the same                      -

    The engine repeats all of them within `publish_timeout`, but for `ping`, the first `open` of ``connect()``, and the later steps of the
    generators: there, whoever called is told how far they came.

    Attributes:
        batching: How much `send` takes at a time.
        settling: How much `Receiver.ack` and `Receiver.settle` take at a time.
    """

    batching: Batching
    settling: Settling

    async def open(self) -> None:
        """Connect; a no-op when connected. Checks what can be checked about the broker.

        It is called before the first `send`, and again after one that failed; `send` itself connects when the connection was lost.

        Raises:
            BackendConnectionError: It cannot be reached now.
            ConfigurationError: It refuses us, or is configured so that the contract cannot hold.
        """
        ...

    async def close(self) -> None:
        """Disconnect. May be called repeatedly, and before `open`."""
        ...

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        """Hand messages to the broker, in this order; return each one's outcome.

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
