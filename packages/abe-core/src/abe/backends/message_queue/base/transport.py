"""The interface between the engine and a broker: what a provider implements.

A transport speaks its broker's primitives in batches, and nothing else: no retries, no timers of its own, no policy. The engine
coalesces, bounds, times out, retries with backoff, renews leases, and decides about dead letters, once for all providers.

Every method raises errors of ``abe.errors`` only. An error of one message of a batch is its outcome, and affects no other: the engine
repeats those whose error is `retryable`, and no others. A raised error is about the whole batch.

`BackendConnectionError` means that the call may be repeated: the transport reconnects whenever it has to. `send` raises it only if
nothing was accepted. Any method may be cancelled: the broker may have carried it out or not, and the transport stays usable.
Times and durations are floats in seconds, times since the epoch, except for `published_at` of `Envelope` and `Metadata`.
"""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec

from abe.backends.message_queue.base.groups import DeadLetter, GroupStats
from abe.errors import AbeError

Outcomes: TypeAlias = Sequence[AbeError | None]
"""The error of each entry of a batch, in its order; None: it was done. An empty sequence: all were done."""


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """A message on its way to the broker.

    Attributes:
        id: The message's id, 1 to 200 bytes of UTF-8, NUL included.
        key: The message's key, with the same limits. Patterns are matched against it (`base.names`, `base.routing`).
        body: The payload, as bytes.
        published_at: When it was published, by the publisher's clock, in *milliseconds* since the epoch, as it is written on the wire.
        headers: Strings sent beside the body; None: none.
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
    """What is sent beside a body. The defaults are for a foreign message.

    Attributes:
        id: The message's id; the broker's own name for it where it has none.
        key: As in `Envelope`.
        published_at: As in `Envelope`, in *milliseconds* since the epoch; 0 if unknown.
        headers: As in `Envelope`.
    """

    id: str
    key: str = ""
    published_at: int = 0
    headers: Mapping[str, str] | None = None


class Delivery(msgspec.Struct, eq=False):
    """A message from its delivery until it is settled. It is compared by identity: a redelivery is another object.

    Attributes:
        body: The payload, as bytes.
        header: The metadata as the broker carried it, parsed by `Receiver.metadata` when it is asked for.
        attempt: 1 for the first delivery.
        native: What the provider needs to settle it, such as the broker's delivery tag. The engine does not read it.
        fault: Why the envelope cannot be read; None: it can.
        uncertain: Earlier attempts that may have been lost connections only, where the broker counts those too. They are no failures.
        alone: How often a handler has begun on it alone, and it came back, since it was given back for that; None: it was not.
        begun: Whether a handler has it. Until then the provider may give it back to the broker, and sets `lost`.
        handled: Whether its handler has ended, and no caller awaits the acknowledgement: if it is lost and redelivered, it may be removed.
        lost: Whether this consumer is known to have lost it.
    """

    body: bytes
    header: object
    attempt: int
    native: Any
    fault: str | None = None
    uncertain: int = 0
    alone: int | None = None
    begun: bool = False
    handled: bool = False
    lost: bool = False


class Disposition(Enum):
    """What becomes of a delivery that is not simply acknowledged.

    Attributes:
        RETRY: Deliver it to the group again, not before `Settlement.delay`. The attempt counts.
        RELEASE: Deliver it again at once, in its old place if the broker can. The attempt does not count, if the broker can uncount it.
        DEAD: Move it to the group's dead letters, in one step, or so that a crash in between duplicates it and never loses it.
        RETURN: Deliver it again, by what needs no answer, as all else has failed for its whole time. Only where there are no leases.
    """

    RETRY = "retry"
    RELEASE = "release"
    DEAD = "dead"
    RETURN = "return"


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a consumer decided about a delivery that it does not simply acknowledge.

    Attributes:
        delivery: The delivery.
        disposition: What becomes of it.
        delay: With `Disposition.RETRY`: seconds before which it must not be delivered again.
        reason: Why, in a word or a line, for the dead letter.
        error: The traceback, for the dead letter.
        alone: With `Disposition.RELEASE`: whether it is to be handled with nothing else in hand next, which `Delivery.alone` counts.
    """

    delivery: Delivery
    disposition: Disposition
    delay: float = 0.0
    reason: str = ""
    error: str = ""
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How much `Transport.send` takes at a time.

    Attributes:
        messages: Messages of one call, at most.
        bytes: Bytes of their bodies together, after which a call gets no further message. The last one may exceed it by its size.
        max_concurrent: Calls in progress at once, at most.
    """

    messages: int
    bytes: int
    max_concurrent: int


@dataclass(frozen=True, kw_only=True)
class Receiving:
    """How `Receiver.receive` is called.

    Attributes:
        messages: Messages of one call, at most, whatever its limit. None: there is no such bound.
        max_concurrent: Calls that may be in progress at once. The engine makes one, and more while each of them returns all that it may.
    """

    messages: int | None = None
    max_concurrent: int = 1


@dataclass(frozen=True, kw_only=True)
class Settling:
    """How much `Receiver.ack` and `Receiver.settle` take at a time.

    Attributes:
        messages: Deliveries of one call, at most: what keeps one request short.
        linger: Seconds that acknowledgements no caller waits for may wait to share a call; 0: those of one turn of the event loop do.
        at_once: Whether `Receiver.ack` never waits for anything. It is then called outside of a task, and must not need one.
    """

    messages: int = 500
    linger: float = 0.0
    at_once: bool = False


class Receiver(Protocol):
    """One consumer of a group. `receive` is called up to `Receiving.max_concurrent` times at once, the other methods concurrently with it.

    What a method does if no answer came, so that the broker may have carried it out or not, and if the group was deleted underneath:

        method        no answer                                      the group was deleted
        receive       raises BackendConnectionError                  raises GroupMissingError
        ack, settle   BackendConnectionError, raised or as outcome   the outcomes are LeaseLostError
        renew         raises BackendConnectionError                  returns all of them
        recover       raises BackendConnectionError                  raises GroupMissingError, or returns all of them
        stop, close   raises nothing, or BackendConnectionError      does nothing
        metadata      asks no broker                                 -

    The engine repeats `ack` and `settle` while the lease lasts, and `renew` and `recover` until they succeed. A settlement that was carried
    out by the call without an answer may have the outcome None or `LeaseLostError` when it is repeated.

    A `receive` that fails or is cancelled may have taken messages that it did not return. After a failure the engine calls `recover`,
    which makes them deliverable again, but not those of other calls. It cancels a `receive` only when it closes the receiver: then `close`
    does that. A request that the broker does not take back outlives its `receive`: a later one returns its messages, or they are released.
    """

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Wait for messages, and return between 0 and `limit` of them, as one request brings them.

        Returns empty from time to time, and soon after `stop`. It also returns messages that became due, and those of dead consumers; but
        never those that this receiver has in flight, even if their lease ran out while the process was paused.

        Raises:
            BackendConnectionError: Nothing is lost: call `recover`, then `receive` again.
            GroupMissingError: The group was deleted underneath: declare it again, then do the same.
        """
        ...

    def metadata(self, delivery: Delivery) -> Metadata:
        """Parse the delivery's header.

        Raises:
            DecodeError: The header cannot be decoded.
        """
        ...

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        """Acknowledge: remove messages. Idempotent.

        Args:
            deliveries: At most `Transport.settling.messages`.
            verify: Their leases may have run out: remove only those that this consumer still has. The others' outcome is `LeaseLostError`.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        """Carry out settlements of messages that this consumer still has; the others' outcome is `LeaseLostError`.

        Args:
            settlements: At most `Transport.settling.messages`.
        """
        ...

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Renew the leases of messages that this consumer still has, and return the lost ones."""
        ...

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Call this after a failed `receive`: reconnect, and make messages deliverable again that were delivered in a lost answer.

        Args:
            deliveries: All that this consumer has in flight.

        Returns:
            Those that are lost.

        Raises:
            GroupMissingError: As `receive`.
        """
        ...

    async def stop(self) -> Sequence[Delivery] | None:
        """Make each waiting `receive` return what it has, within a fraction of a second, and take nothing new from then on.

        Returns:
            Deliveries that `receive` has not returned, in the broker's order, for the engine to hand out or to release; None: no such.
        """
        ...

    async def close(self) -> None:
        """Release everything that the broker counts as in flight here, unsubscribe, and disconnect."""
        ...


class Transport(Protocol):
    """One broker. Its methods may be called by many tasks at once.

    What a method does if no answer came, so that the broker may have carried it out or not, and if there is no such group:

        method               no answer                                     no such group
        send                 PublishUnknownError, raised or as outcome     the outcome is UnroutableError (with `Envelope.group`)
        declare              raises BackendConnectionError                 creates it
        subscribe            the same; a consumer made so far is removed   raises GroupMissingError
        stats, dead_letters  raises BackendConnectionError                 raises GroupMissingError
        replay, purge        the same; some may have been moved            raises GroupMissingError
        delete_group         raises BackendConnectionError                 does nothing
        delete_namespace     raises BackendConnectionError                 -
        open, ping, groups   raises BackendConnectionError                 -
        close                disconnects all the same                      -

    The engine repeats all of them within `publish_timeout`, except for `ping`, the first `open` of ``connect()``, and the later steps of
    the generators, whose error tells the application how many letters were done.

    Attributes:
        batching: How much `send` takes at a time.
        receiving: How much `Receiver.receive` returns at a time, and how many calls there may be at once.
        settling: How much `Receiver.ack` and `Receiver.settle` take at a time.
    """

    batching: Batching
    receiving: Receiving
    settling: Settling

    async def open(self) -> None:
        """Connect; a no-op when connected. Checks what can be checked about the broker.

        It is called before the first `send`, and again after one that failed; `send` itself connects when the connection was lost.

        Raises:
            BackendConnectionError: The broker cannot be reached.
            ConfigurationError: The broker refuses the login, or its configuration cannot fulfil the contract.
        """
        ...

    async def close(self) -> None:
        """Disconnect. May be called repeatedly, and before `open`."""
        ...

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        """Hand messages to the broker, in this order; return each one's outcome.

        The outcome `UnroutableError` means that groups exist and none of them wants the key. While no group exists, messages are parked
        for the first one that wants them.

        A retry passes the same Envelope object; another publish with the same id passes another one.

        Raises:
            BackendConnectionError: None of them was accepted.
            PublishUnknownError: Any of them may have been.
        """
        ...

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Create the group if it does not exist, and return its patterns. It gets the parked messages that it wants, and every message
        that is published later.

        If several callers declare it at once with different patterns, one of them creates it, and the others get its patterns.

        Args:
            group: The group.
            patterns: Those of a new group. None: everything.
            change: Whether an existing group gets these patterns too (not for None); otherwise it keeps its own.
        """
        ...

    async def delete_group(self, group: str) -> None:
        """Delete the group with its messages and dead letters. A no-op if it does not exist."""
        ...

    async def delete_namespace(self) -> None:
        """Delete everything that the namespace has in the broker: groups, messages, dead letters, parked messages. May be repeated."""
        ...

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Return each group's patterns."""
        ...

    async def subscribe(self, group: str, prefetch: int) -> Receiver:
        """Add a consumer, with an identity of its own and at most `prefetch` messages in flight, to an existing group.

        Only an event loop that ends cancels this: if the caller is cancelled, the receiver is completed, and then closed.

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
        """Yield the current dead letters in pages, the oldest first, and leave them in place.

        A page has at least one letter, and is bounded in count and in bytes. The caller may close the generator early. It holds no lock
        that publishers or consumers need.

        Raises:
            GroupMissingError: There is no such group.
        """
        ...

    def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Move the current dead letters back to the group, with attempt 1, and yield after each bounded step how many it moved.

        One that becomes a dead letter again meanwhile is not moved again. If the generator fails or is closed early, each letter is in
        one place, or duplicated where the broker cannot move in one step; none is lost.

        Args:
            group: The group.
            ids: The letters' ids. None: all of them.

        Raises:
            GroupMissingError: There is no such group.
        """
        ...

    def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Delete dead letters, in steps as `replay` moves them."""
        ...

    async def ping(self) -> None:
        """Check that the broker answers.

        Raises:
            BackendConnectionError: It does not.
        """
        ...
