"""The message that a handler receives."""

from collections.abc import Mapping
from typing import Any, Final, Protocol

from abe.backends.message_queue.base.transport import Delivery, Metadata
from abe.errors import DecodeError, UnsupportedCapabilityError


class MessageSource(Protocol):
    """Where a message was received, and where it is settled."""

    group: str

    def metadata(self, message: "Message") -> Metadata: ...
    def lease_lost(self, message: "Message") -> bool: ...
    def dropped(self, message: "Message") -> None: ...
    def ack_soon(self, message: "Message") -> None: ...
    async def release(self, message: "Message") -> None: ...
    async def ack(self, message: "Message") -> None: ...
    async def nack(self, message: "Message", delay: float | None, reason: str, error: str) -> None: ...
    async def reject(self, message: "Message", reason: str, error: str) -> None: ...
    async def extend(self, message: "Message", seconds: float) -> None: ...


class Message(dict[str, Any]):
    """A payload, as a dict, with the attributes of its delivery.

    `ack`, `nack` and `reject` settle it. The first settlement wins, repeating it does nothing, and the opposite one raises
    `AlreadySettledError`. Each returns when the broker has carried it out, and raises `LeaseLostError` when the lease was lost (another
    consumer has the message, or will get it). Cancelling the caller does not cancel the settlement.

    A copy (``copy.copy``, ``copy.deepcopy``, ``pickle``) has the same attributes but cannot be settled; nor can a message that an
    application creates to test its handlers, ``Message(payload)``. ``dict(message)`` is the payload alone. The ``repr`` identifies the
    message, and shows nothing of its payload.
    """

    # The engine calls `Message(payload)` and assigns these three: an __init__ would be half of the cost.
    __slots__ = ("_delivery", "_settled", "_source")

    _delivery: Delivery
    _source: MessageSource
    _settled: str | None

    def __del__(self) -> None:
        # A message that is dropped unsettled would count against the prefetch for ever.
        try:
            if self._settled is None:
                self._source.dropped(self)
        except AttributeError:
            return  # not delivered by a broker

    @property
    def id(self) -> str:
        """The id given at publish; for a foreign message, the broker's own."""
        return self._source.metadata(self).id

    @property
    def key(self) -> str:
        """The key given at publish."""
        return self._source.metadata(self).key

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers given at publish."""
        return self._source.metadata(self).headers or {}

    @property
    def published_at(self) -> float:
        """When it was published, in seconds since the epoch, by the publisher's clock; 0 if unknown."""
        return self._source.metadata(self).published_at / 1000

    @property
    def attempt(self) -> int:
        """The number of this delivery to the group: 1 for the first."""
        return self._delivery.attempt

    @property
    def group(self) -> str:
        """The group it was delivered to."""
        return self._source.group

    @property
    def settled(self) -> bool:
        """Whether it was acknowledged, failed or rejected already."""
        return self._settled is not None

    @property
    def lease_lost(self) -> bool:
        """Whether this consumer is known to have lost the message. The handler should stop: the message is delivered again."""
        return self._source.lease_lost(self)

    async def ack(self) -> None:
        """Acknowledge the message: it is removed."""
        await self._source.ack(self)

    async def nack(self, delay: float | None = None, *, reason: str = "", error: str = "") -> None:
        """Fail the message: it is delivered again, or moved to the dead letters if this was its last attempt.

        Args:
            delay: Seconds before the next delivery; None: the default backoff for this attempt.
            reason: The reason, for the dead letter.
            error: A traceback, for the dead letter.

        Raises:
            UnsupportedCapabilityError: The delay is longer than the backend's `max_delay`.
        """
        await self._source.nack(self, delay, reason, error)

    async def reject(self, reason: str = "rejected", *, error: str = "") -> None:
        """Move the message to the dead letters: it will never succeed."""
        await self._source.reject(self, reason, error)

    async def extend(self, seconds: float) -> None:
        """Renew the lease now, before a handler blocks the event loop. Otherwise it is renewed automatically.

        Args:
            seconds: How long the lease must last: at most the backend's lease, after which a silent consumer counts as dead.

        Raises:
            UnsupportedCapabilityError: `seconds` is more than the lease.
            LeaseLostError: The lease was lost.
        """
        await self._source.extend(self, seconds)

    def __repr__(self) -> str:
        try:
            known = f"id={self.id!r}, key={self.key!r}"
        except DecodeError:
            known = "id and key cannot be read"
        return f"<Message {known}, group={self.group!r}, attempt={self.attempt}>"

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            metadata = self._source.metadata(self)
        except DecodeError:
            metadata = Metadata("")
        headers = None if metadata.headers is None else dict(metadata.headers)
        return _copied, (dict(self), tuple(metadata._replace(headers=headers)), self.group, self.attempt)

    def __getattr__(self, name: str) -> Any:
        # Called only for missing attributes: the three slots of a message that no broker delivered.
        if name == "_source":
            return _UNDELIVERED
        if name == "_delivery":
            return Delivery(b"", None, 1, None)
        if name == "_settled":
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class _Detached:
    """The source of a message that no broker delivered."""

    def __init__(self, group: str, metadata: Metadata) -> None:
        self.group = group
        self._metadata = metadata

    def metadata(self, message: Message) -> Metadata:
        return self._metadata

    def lease_lost(self, message: Message) -> bool:
        return False

    def dropped(self, message: Message) -> None:
        """Do nothing: it is not in flight."""

    def ack_soon(self, message: Message) -> None:
        raise _unsettled()

    async def release(self, message: Message) -> None:
        raise _unsettled()

    async def ack(self, message: Message) -> None:
        raise _unsettled()

    async def nack(self, message: Message, delay: float | None, reason: str, error: str) -> None:
        raise _unsettled()

    async def reject(self, message: Message, reason: str, error: str) -> None:
        raise _unsettled()

    async def extend(self, message: Message, seconds: float) -> None:
        raise _unsettled()


_UNDELIVERED: Final = _Detached("", Metadata(""))


def _copied(payload: dict[str, Any], metadata: tuple[Any, ...], group: str, attempt: int) -> Message:
    message = Message(payload)
    message._delivery = Delivery(b"", None, attempt, None)  # pyright: ignore[reportPrivateUsage]
    message._source = _Detached(group, Metadata(*metadata))  # pyright: ignore[reportPrivateUsage]
    message._settled = None  # pyright: ignore[reportPrivateUsage]
    return message


def _unsettled() -> UnsupportedCapabilityError:
    return UnsupportedCapabilityError(
        "this is a copy of a message, or one that no broker delivered: settle the message itself"
    )
