"""An open channel, which publishes with confirms, or consumes. Its frames bypass aiormq, by the tap of its connection."""

import asyncio
import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

from aiormq.abc import AbstractChannel
from pamqp import commands
from pamqp import frame as pamqp_frame

from abe.backends.message_queue.base import Delivery
from abe.backends.message_queue.base.log import Log
from abe.errors import AbeError, BackendConnectionError, BackpressureError, UnroutableError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._errors import Refusal
from abe_backend_rabbitmq._tap import Tap
from abe_backend_rabbitmq._wire import Header

_log: Final = Log("abe.rabbitmq")

_U32: Final = struct.Struct(">I").unpack_from
_U64: Final = struct.Struct(">Q").unpack_from
_TAG: Final = struct.Struct(">QB").unpack_from
_CONTENT: Final = struct.Struct(">IIQ").pack
_SETTLE: Final = struct.Struct(">BHIIQBB").pack
_SIZE: Final = struct.Struct(">I").pack

_DELIVER, _RETURN, _ACKED, _NACKED = 0x3C003C, 0x3C0032, 0x3C0050, 0x3C0078
_ACK, _REJECT = 0x3C0050, 0x3C005A
_OPEN_OK, _CLOSE, _CLOSE_OK = 0x14000B, 0x140028, 0x140029
_FRAME_END: Final = 0xCE
_MOST_ROUTES: Final = 10_000
_UNLIMITED: Final = 1 << 31


class Outgoing(NamedTuple):
    """A message to publish: exchange, routing key, properties, body, message id."""

    exchange: str
    key: str
    properties: bytes
    body: bytes
    id: str


Pushed: TypeAlias = Callable[[int, Header, bytes, bool], None]
"""Called for each message that the broker pushes, with its tag, its header, its body and the `redelivered` flag. It puts the message
into `Channel.in_flight`. If it raises, the message goes back to its queue."""


class UnconfirmedBatch:
    """Messages that were published together. The future's result is an outcome for each, or empty when all were accepted."""

    __slots__ = ("_failed", "_future", "_left", "first", "messages")

    def __init__(
        self, first: int, messages: Sequence[Outgoing], future: "asyncio.Future[Sequence[AbeError | None]]"
    ) -> None:
        self.first = first
        self.messages = messages
        self._left = len(messages)
        self._future = future
        self._failed: dict[int, AbeError] = {}

    def settle(self, tag: int, error: AbeError | None) -> None:
        """Record a message's outcome. (The caller may have been cancelled.)"""
        if error is not None:
            self._failed[tag - self.first] = error
        self._left -= 1
        if not self._left and not self._future.done():
            failed = self._failed
            self._future.set_result([failed.get(i) for i in range(len(self.messages))] if failed else ())


class Channel:
    """An open channel that publishes with confirms, or consumes. It ends with its connection and is never opened again.

    If the broker does not read, frames wait in the transport's buffer; the limits on unconfirmed messages limit it too.

    Args:
        tap: The tap of its connection.
        native: aiormq's channel, opened without confirms, so that aiormq keeps no count of them.
        frame_max: Bytes of the longest frame; 0: no limit.
    """

    def __init__(self, tap: Tap, native: AbstractChannel, frame_max: int) -> None:
        assert tap.transport is not None
        self.native = native
        self.closed: str | None = None
        """Why the channel is closed; None while it is open."""
        self.in_flight: dict[int, tuple[Delivery, Header]] = {}
        """Deliveries that are not settled, by tag, the oldest first."""
        self.lost: Sequence[tuple[Delivery, Header]] = ()
        """Deliveries that were in flight when the channel closed."""
        self.ended: Callable[[], object] | None = None
        """Called when the channel has closed. Must not raise."""
        self._deliver: Pushed | None = None
        self._oldest, self._newest = 1, 0
        self._tap = tap
        self._transport = tap.transport
        self._write = tap.transport.write
        self._loop = tap.loop
        self._number = native.number
        self._most = (frame_max or _UNLIMITED) - 8
        self._two = native.number.to_bytes(2, "big")
        self._kind, self._method, self._header, self._left = 0, b"", b"", 0
        self._parts: list[bytes] = []
        self._sent, self._low = 0, 1
        self._pending: dict[int, UnconfirmedBatch] = {}
        self._returned: dict[tuple[str, str, str], int] = {}
        self._routes: dict[tuple[str, str], bytes] = {}
        tap.channels[self._number] = self

    def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[Sequence[AbeError | None]]:
        """Publish messages in this order. The future's result is that of `UnconfirmedBatch`; cancelling it withdraws no message.

        An outcome is `PublishUnknownError` if the channel closed before the message's confirm came.

        Raises:
            BackendConnectionError: The channel is closed; nothing was sent.
        """
        if self.closed is not None or self._transport.is_closing():
            raise BackendConnectionError(self.closed or "the connection was lost")
        future: asyncio.Future[Sequence[AbeError | None]] = self._loop.create_future()
        tag = self._sent
        batch = UnconfirmedBatch(tag + 1, messages, future)
        pending, routes, two, most = self._pending, self._routes, self._two, self._most
        parts: list[bytes] = []
        for exchange, key, properties, body, _ in messages:
            prefix = routes.get((exchange, key)) or self._route(exchange, key)
            size = len(body)
            parts += (prefix, _CONTENT(12 + len(properties), 0x3C0000, size), properties, b"\xce")
            if size <= most:
                if size:
                    parts += (b"\3", two, _SIZE(size), body, b"\xce")
            else:
                for start in range(0, size, most):
                    piece = body[start : start + most]
                    parts += (b"\3", two, _SIZE(len(piece)), piece, b"\xce")
            tag += 1
            pending[tag] = batch
        self._sent = tag
        self._write(b"".join(parts))
        return future

    async def consume(self, queue: str, prefetch: int, deliver: Pushed, tag: str | None = None) -> str:
        """Register a consumer, and return its tag.

        Args:
            queue: The queue's name.
            prefetch: How many unsettled messages the broker may push. (With 0, no limit, a quorum queue pushes 2,000.)
            deliver: Called for each message.
            tag: The consumer's tag; None: one is generated.
        """
        self._deliver = deliver  # first: messages may come in the same chunk as the reply
        await self.native.basic_qos(prefetch_count=prefetch)
        reply = await self.native.basic_consume(queue, _never_called, consumer_tag=tag)
        assert reply.consumer_tag is not None
        return reply.consumer_tag

    async def ack(self, tags: Sequence[int]) -> None:
        """Acknowledge. Tags that are not in flight are left out: the broker closes a channel that settles a tag twice."""
        singly, through = self._settled(tags)
        if self.closed is not None or not (singly or through):
            return
        number = self._number
        parts = [_SETTLE(1, number, 13, _ACK, tag, 0, _FRAME_END) for tag in singly]
        if through:
            parts.append(_SETTLE(1, number, 13, _ACK, through, 1, _FRAME_END))
        self._write(b"".join(parts))

    async def requeue(self, tag: int) -> None:
        """Return a message to its queue, for redelivery at once; the broker counts the delivery."""
        if self.in_flight.pop(tag, None) is not None and self.closed is None:
            self._reject(tag)

    def discard(self, tag: int) -> None:
        """Reject a message: the broker moves it to where its queue dead-letters."""
        if self.in_flight.pop(tag, None) is not None and self.closed is None:
            self._reject(tag, requeue=False)

    async def close(self) -> None:
        """Close the channel. Deliveries in flight go back to their queue; later settlements are ignored.

        (The broker closes the connection when an acknowledgement follows the close.)
        """
        self.lose("the channel was closed")
        await self.native.close()

    def lose(self, reason: str) -> None:
        """Mark the channel as closed: unconfirmed messages get their outcomes, deliveries in flight are lost.

        Whether the broker stored an unconfirmed message is unknown.
        """
        if self.closed is not None:
            return
        self.closed = reason
        pending, self._pending = self._pending, {}
        if pending:
            refusal = Refusal(reason)
            for tag, batch in pending.items():
                message = batch.messages[tag - batch.first]
                batch.settle(tag, refusal.outcome(message.exchange, message.key, len(message.body)))
        self.lost = list(self.in_flight.values())
        self.in_flight.clear()
        for delivery, _ in self.lost:
            delivery.lost = True
        if self.ended is not None:
            self.ended()

    @property
    def delivered(self) -> int:
        """How many messages were delivered: the newest tag."""
        return self._newest

    def take(self, kind: int, data: bytes, position: int, end: int) -> bool:
        """Handle a frame, and return whether it was one of ours."""
        if kind == 1:
            method = _U32(data, position + 7)[0]
            if method in (_DELIVER, _RETURN):
                self._kind, self._method = method, data[position + 11 : end - 1]
            elif method in (_ACKED, _NACKED):
                tag, bits = _TAG(data, position + 11)
                self._confirmed(tag, bits & 1, method == _NACKED)
            else:
                self._kind = 0
                if method == _CLOSE:
                    self.lose(f"the broker closed the channel: {_close_text(data[position:end])}")
                elif method in (_CLOSE_OK, _OPEN_OK):  # the number is free, or in use again
                    self.lose("the channel was closed")
                    del self._tap.channels[self._number]
                return False
            return True
        if not self._kind:
            return False  # the content of a method that is aiormq's
        if kind == 2:
            self._parts.clear()
            self._left = _U64(data, position + 11)[0]
            self._header = data[position + 19 : end - 1]
            if not self._left:
                self._content(b"")
        elif kind == 3 and not self._parts and end - position - 8 == self._left:
            self._content(data[position + 7 : end - 1])
        elif kind == 3:
            self._parts.append(data[position + 7 : end - 1])
            self._left -= end - position - 8
            if self._left <= 0:
                body = b"".join(self._parts)
                self._parts.clear()
                self._content(body)
        return True

    def _content(self, body: bytes) -> None:
        kind, self._kind = self._kind, 0
        if self.closed is not None:
            return
        method = self._method
        if kind == _RETURN:
            at = 3 + method[2]  # after the code and its text
            start, stop = at + 1, at + 1 + method[at]
            exchange, key = str(method[start:stop], "utf-8", "replace"), str(method[stop + 1 :], "utf-8", "replace")
            which = exchange, key, _wire.message_id(self._header)
            self._returned[which] = self._returned.get(which, 0) + 1
            return
        at = 1 + method[0]  # after the consumer's tag
        tag = _U64(method, at)[0]
        start = at + 10
        stop = start + method[at + 9]
        exchange, key = str(method[start:stop], "utf-8", "replace"), str(method[stop + 1 :], "utf-8", "replace")
        if not self._pushed(tag, Header(self._header, exchange, key), body, bool(method[at + 8])):
            self._reject(tag)

    def _confirmed(self, tag: int, multiple: int, nack: bool) -> None:
        low = self._low
        tags = range(low, tag + 1) if multiple else (tag,)  # each is walked over once, however many are outstanding
        if multiple or tag == low:
            self._low = max(low, tag + 1)
        pending, returned = self._pending, self._returned
        for each in tags:
            batch = pending.pop(each, None)
            if batch is None:
                continue
            error: AbeError | None = nacked() if nack else None
            if returned and not nack:  # a return comes before its ack
                exchange, key, _, _, id = batch.messages[each - batch.first]
                times = returned.pop((exchange, key, id), 0)
                if times:
                    error = unroutable(key)
                if times > 1:
                    returned[exchange, key, id] = times - 1
            batch.settle(each, error)
        if returned and not pending:
            returned.clear()

    def _reject(self, tag: int, *, requeue: bool = True) -> None:
        self._write(_SETTLE(1, self._number, 13, _REJECT, tag, requeue, _FRAME_END))

    def _route(self, exchange: str, key: str) -> bytes:
        if len(self._routes) >= _MOST_ROUTES:
            self._routes.clear()
        method = commands.Basic.Publish(exchange=exchange, routing_key=key, mandatory=True)
        prefix = self._routes[exchange, key] = pamqp_frame.marshal(method, self._number) + b"\2" + self._two
        return prefix

    def _pushed(self, tag: int, header: Header, body: bytes, redelivered: bool) -> bool:
        """Pass a delivery to the consumer's callback; return whether that accepted it."""
        self._newest = tag
        try:
            assert self._deliver is not None
            self._deliver(tag, header, body, redelivered)
        except Exception:  # noqa: BLE001 - raised in `data_received` it would end the connection
            _log.exception("unexpected exception while a delivery was accepted: it goes back to its queue")
            self.in_flight.pop(tag, None)
            return False
        return True

    def _settled(self, tags: Sequence[int]) -> tuple[list[int], int]:
        """Remove tags from `in_flight`. Return those to acknowledge singly, and the one to acknowledge with all below it, or 0."""
        held, newest, oldest = self.in_flight, self._newest, self._oldest
        done = [tag for tag in tags if held.pop(tag, None) is not None]
        # Tags come in order, one by one. (Asking the dict for its first would walk over all that were taken from its head.)
        while oldest <= newest and oldest not in held:
            oldest += 1
        self._oldest = oldest
        singly: list[int] = []
        through = 0
        for tag in done:
            if tag > oldest:  # behind one that is still being handled
                singly.append(tag)
            elif tag > through:  # all below it is settled, or among these
                through = tag
        return singly, through


def unroutable(key: str) -> UnroutableError:
    """Return the outcome of a message that the broker returned."""
    return UnroutableError(f"no group wants the key {key!r}")


def nacked() -> BackpressureError:
    """Return the outcome of a message that a queue refused."""
    return BackpressureError(
        "the queue of a group that wants the message refused it: max_backlog messages wait there, or it is short of resources"
    )


async def _never_called(_: object) -> None:
    _log.error("a delivery bypassed the tap: it is not acknowledged, and will be redelivered")


def _close_text(frame: bytes) -> str:
    size = frame[13]
    return str(frame[14 : 14 + size], "utf-8", "replace")
