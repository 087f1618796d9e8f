"""The message that an application handles."""

from collections.abc import Mapping
from typing import Any, Final, Protocol

from abe.backends.message_queue.base.transport import Delivery, Metadata
from abe.errors import DecodeError, UnsupportedCapabilityError


class MessageSource(Protocol):
    """Where a message came from, and where its settlement goes."""

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
    """The payload, which it is equal to, with what is known about its delivery.

    `ack`, `nack` and `reject` settle it. The first settlement wins, the same again does nothing, and the opposite raises
    `AlreadySettledError`. Each returns when the broker has carried it out, and raises `LeaseLostError` when the message was not ours
    any more (somebody else has it, or will get it). A settlement that was cancelled goes on by itself.

    A copy (``copy.copy``, ``copy.deepcopy``, ``pickle``) is a message that tells the same and cannot be settled, as is one that an
    application makes itself, ``Message(payload)``, to test its handlers. ``dict(message)`` is the payload alone. The ``repr`` tells which
    message it is, and nothing of its payload.
    """

    # Made by the engine with `Message(payload)` and these three assignments: an __init__ would be half of the cost.
    __slots__ = ("_delivery", "_settled", "_source")

    _delivery: Delivery
    _source: MessageSource
    _settled: str | None

    def __del__(self) -> None:
        # Taken and dropped, it would keep its place in the bound for ever.
        try:
            if self._settled is None:
                self._source.dropped(self)
        except AttributeError:
            return  # it never came from a broker

    @property
    def id(self) -> str:
        """The id given at publish, or the broker's own for a message that a stranger wrote."""
        return self._source.metadata(self).id

    @property
    def key(self) -> str:
        """What the message is about."""
        return self._source.metadata(self).key

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers given at publish."""
        return self._source.metadata(self).headers or {}

    @property
    def published_at(self) -> float:
        """When it was published, in seconds since the epoch, by the publisher's clock; 0 where nobody wrote it down."""
        return self._source.metadata(self).published_at / 1000

    @property
    def attempt(self) -> int:
        """Which delivery to the group this is: 1 for the first."""
        return self._delivery.attempt

    @property
    def group(self) -> str:
        """The group it was delivered to."""
        return self._source.group

    @property
    def settled(self) -> bool:
        """Whether it was acknowledged, failed or rejected already, by whomever."""
        return self._settled is not None

    @property
    def lease_lost(self) -> bool:
        """Whether the broker is known to have taken the message from us: stop, the work will be done again."""
        return self._source.lease_lost(self)

    async def ack(self) -> None:
        """The message is done: remove it."""
        await self._source.ack(self)

    async def nack(self, delay: float | None = None, *, reason: str = "", error: str = "") -> None:
        """The message failed: deliver it again, or move it to the dead letters if this was its last attempt.

        Args:
            delay: Seconds before which it must not come back; None: the default backoff for this attempt.
            reason: Why, for the dead letter.
            error: A traceback, for the dead letter.

        Raises:
            UnsupportedCapabilityError: The delay is longer than the backend's `max_delay`.
        """
        await self._source.nack(self, delay, reason, error)

    async def reject(self, reason: str = "rejected", *, error: str = "") -> None:
        """The message will never succeed: move it to the dead letters."""
        await self._source.reject(self, reason, error)

    async def extend(self, seconds: float) -> None:
        """Start the lease anew, for a handler that is about to keep the event loop busy. It is renewed by itself otherwise.

        Args:
            seconds: How long it must hold. More than the backend's lease cannot be had, as a lease that long could not be told from a
                dead consumer's.

        Raises:
            UnsupportedCapabilityError: `seconds` is more than the lease.
            LeaseLostError: The message is not ours any more.
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
        # Asked only for what is not there, so for the three slots of a message that no broker delivered.
        if name == "_source":
            return _UNDELIVERED
        if name == "_delivery":
            return Delivery(b"", None, 1, None)
        if name == "_settled":
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class _Detached:
    """The source of a message that no broker waits for."""

    def __init__(self, group: str, metadata: Metadata) -> None:
        self.group = group
        self._metadata = metadata

    def metadata(self, message: Message) -> Metadata:
        return self._metadata

    def lease_lost(self, message: Message) -> bool:
        return False

    def dropped(self, message: Message) -> None:
        """Nobody waits for it."""

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
