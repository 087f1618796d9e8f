"""A tap on aiormq's connection: what is many goes past it, the rest is its own.

``aiormq.connect(transport_factory=...)`` lets its caller supply the stream pair. Ours is the usual one, but its protocol looks at whole
frames before the stream does: deliveries, returns and confirms of the channels here are handled at once, everything else (login,
heartbeats, replies, closing, other channels) goes on to aiormq unchanged. Frames of ours go to the same transport. Only public names
are used.
"""

import asyncio
import logging
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import aiormq
from aiormq.abc import AbstractChannel
from pamqp import commands
from pamqp import frame as pamqp_frame
from yarl import URL

from abe.errors import AbeError, BackendConnectionError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Flight, Opened, Outgoing, Pushed, nacked, unroutable
from abe_backend_rabbitmq._errors import ConnectError, unconfirmed
from abe_backend_rabbitmq._wire import Header

_log: Final = logging.getLogger("abe.rabbitmq")

_FRAME: Final = struct.Struct(">BHI").unpack_from
_TAG: Final = struct.Struct(">QB").unpack_from
_U32: Final = struct.Struct(">I").unpack_from
_U64: Final = struct.Struct(">Q").unpack_from
_CONTENT: Final = struct.Struct(">IIQ").pack
_SETTLE: Final = struct.Struct(">BHIIQBB").pack
_SIZE: Final = struct.Struct(">I").pack

_DELIVER, _RETURN, _ACKED, _NACKED = 0x3C003C, 0x3C0032, 0x3C0050, 0x3C0078
_ACK, _REJECT = 0x3C0050, 0x3C005A
_OPEN_OK, _CLOSE, _CLOSE_OK = 0x14000B, 0x140028, 0x140029
_OUT_CLOSE, _OUT_CLOSE_OK = b"\0\x14\0\x28", b"\0\x14\0\x29"
_OUT_END: Final = (b"\0\x0a\0\x32", b"\0\x0a\0\x33")
_HEARTBEAT: Final = b"\x08\0\0\0\0\0\0\xce"
_FRAME_END: Final = 0xCE
_LAST_KIND: Final = 8
_SHORTEST: Final = 8
_MOST_ROUTES: Final = 10_000
_UNLIMITED: Final = 1 << 31


class Tap(asyncio.StreamReaderProtocol):
    """The protocol of a connection.

    Args:
        reader: What aiormq reads from.
        loop: The event loop.
        said: Called with each method of the connection itself, as a whole frame. Must not raise.
    """

    def __init__(
        self, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop, said: Callable[[bytes], object]
    ) -> None:
        super().__init__(reader, loop=loop)
        self.loop = loop
        self.transport: asyncio.WriteTransport | None = None
        self.channels: dict[int, TapChannel] = {}
        self._said = said
        self._pieces: list[bytes] = []
        self._missing = 0
        self._raw: bool = False
        self._fed: float = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Take the frames that are ours out of what arrived, and pass the rest on in order."""
        if self._raw:
            super().data_received(data)
            return
        if self._pieces:
            self._pieces.append(data)
            self._missing -= len(data)
            if self._missing > 0:  # a long frame comes in many pieces: they are joined once
                return
            data = b"".join(self._pieces)
            self._pieces.clear()
        position, keep, size, channels = 0, 0, len(data), self.channels
        rest: list[bytes] = []
        while position < size:
            if size - position < _SHORTEST:
                self._missing = position + _SHORTEST - size
                break
            kind, number, length = _FRAME(data, position)
            end = position + length + 8
            if kind > _LAST_KIND or (end <= size and data[end - 1] != _FRAME_END):
                self._raw, position = True, size  # aiormq says better what is wrong while we log in
                break
            if end > size:
                self._missing = end - size
                break
            channel = channels.get(number)
            if channel is None:
                if number == 0 and kind == 1:
                    self._said(data[position:end])
            elif channel.take(kind, data, position, end):
                if keep < position:
                    rest.append(data[keep:position])
                keep = end
            position = end
        if keep < position:
            rest.append(data[keep:position])
        if position < size:
            self._pieces.append(data[position:])
        now = self.loop.time()
        if rest or (keep and now - self._fed > 1):
            # aiormq counts silence by the frames it sees; those that we take prove life too.
            super().data_received(b"".join(rest) or _HEARTBEAT)
            self._fed = now
        if self._raw and channels and self.transport is not None:
            self.end("the broker sent something that is not AMQP")
            self.transport.abort()

    def eof_received(self) -> bool | None:
        """Tell the channels."""
        self.end("the broker ended the connection")
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the channels."""
        self.end("the connection was lost" if exc is None else f"the connection was lost: {exc}")
        super().connection_lost(exc)

    def end(self, reason: str) -> None:
        """Tell the channels that nothing more comes or goes."""
        for channel in list(self.channels.values()):
            channel.lose(reason)


class _Writer(asyncio.StreamWriter):
    """Watches what aiormq sends: nothing of ours goes out after it closed a channel or the connection."""

    tap: Tap

    def write(self, data: Any) -> None:
        method = data[7:11]
        if method in (_OUT_CLOSE, _OUT_CLOSE_OK):
            number = int.from_bytes(data[1:3], "big")
            channel = self.tap.channels.get(number)
            if channel is not None:
                channel.lose("the channel was closed")
                if method == _OUT_CLOSE_OK:
                    del self.tap.channels[number]
        elif method in _OUT_END and data[:3] == b"\1\0\0":
            self.tap.end("the connection was closed")
        super().write(data)

    def close(self) -> None:
        self.tap.end("the connection was closed")
        super().close()


class TapFactory(aiormq.TransportFactory):
    """Makes the stream pair of one connection.

    Args:
        said: See `Tap`.
    """

    def __init__(self, said: Callable[[bytes], object]) -> None:
        self._said = said
        self.tap: Tap | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect."""
        provider = kwargs.pop("ssl_context_provider")
        loop = asyncio.get_running_loop()
        context = await provider.get_context() if url.scheme == "amqps" else None
        reader = asyncio.StreamReader(loop=loop)
        tap = self.tap = Tap(reader, loop, self._said)
        try:
            transport, _ = await loop.create_connection(
                lambda: tap, url.host or "localhost", url.port or 0, ssl=context, **kwargs
            )
        except OSError as exc:
            raise ConnectError(*exc.args) from exc
        writer = _Writer(transport, tap, reader, loop)
        writer.tap = tap
        return reader, writer


class TapChannel(Opened):
    """One channel whose publishing, deliveries and settlements go by the tap.

    What is written waits in the transport's buffer if the broker does not read; the bounds on what is unconfirmed bound that too.

    Args:
        tap: Of its connection.
        native: aiormq's, opened without confirms: it keeps no count then.
        frame_max: The longest frame; 0: any.
    """

    def __init__(self, tap: Tap, native: AbstractChannel, frame_max: int) -> None:
        super().__init__(native)
        assert tap.transport is not None
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
        self._pending: dict[int, Flight] = {}
        self._returned: dict[tuple[str, str, str], int] = {}
        self._routes: dict[tuple[str, str], bytes] = {}
        tap.channels[self._number] = self

    def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[Sequence[AbeError | None]]:
        """See `Opened.publish`."""
        if self.closed is not None or self._transport.is_closing():
            raise BackendConnectionError(self.closed or "the connection was lost")
        future: asyncio.Future[Sequence[AbeError | None]] = self._loop.create_future()
        tag = self._sent
        flight = Flight(tag + 1, messages, future)
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
            pending[tag] = flight
        self._sent = tag
        self._write(b"".join(parts))
        return future

    async def consume(self, queue: str, prefetch: int, deliver: Pushed) -> str:
        """See `Opened.consume`."""
        self._deliver = deliver  # first: messages may come in the same chunk as the reply
        await self.native.basic_qos(prefetch_count=prefetch)
        reply = await self.native.basic_consume(queue, _not_ours)
        assert reply.consumer_tag is not None
        return reply.consumer_tag

    async def ack(self, tags: Sequence[int]) -> None:
        """See `Opened.ack`."""
        singly, through = self._settled(tags)
        if self.closed is not None or not (singly or through):
            return
        number = self._number
        parts = [_SETTLE(1, number, 13, _ACK, tag, 0, _FRAME_END) for tag in singly]
        if through:
            parts.append(_SETTLE(1, number, 13, _ACK, through, 1, _FRAME_END))
        self._write(b"".join(parts))

    async def requeue(self, tag: int) -> None:
        """See `Opened.requeue`."""
        if self.held.pop(tag, None) is not None and self.closed is None:
            self._reject(tag)

    def lose(self, reason: str) -> None:
        """Tell everybody that the channel is gone. All that was published is on its way: nobody knows how far it came."""
        if self.closed is None:
            pending, self._pending = self._pending, {}
            unknown = unconfirmed(reason) if pending else None
            for tag, flight in pending.items():
                flight.settle(tag, unknown)
            super().lose(reason)

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
                elif method in (_CLOSE_OK, _OPEN_OK):  # the number is free for another channel, or is another's already
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
            flight = pending.pop(each, None)
            if flight is None:
                continue
            error: AbeError | None = nacked() if nack else None
            if returned and not nack:  # a return comes before its ack
                exchange, key, _, _, id = flight.messages[each - flight.first]
                times = returned.pop((exchange, key, id), 0)
                if times:
                    error = unroutable(key)
                if times > 1:
                    returned[exchange, key, id] = times - 1
            flight.settle(each, error)
        if returned and not pending:
            returned.clear()

    def _reject(self, tag: int) -> None:
        self._write(_SETTLE(1, self._number, 13, _REJECT, tag, 1, _FRAME_END))

    def _route(self, exchange: str, key: str) -> bytes:
        if len(self._routes) >= _MOST_ROUTES:
            self._routes.clear()
        method = commands.Basic.Publish(exchange=exchange, routing_key=key, mandatory=True)
        prefix = self._routes[exchange, key] = pamqp_frame.marshal(method, self._number) + b"\2" + self._two
        return prefix


async def _not_ours(_: object) -> None:
    _log.error("a delivery went past the tap: it is not acknowledged, and comes again")


def _close_text(frame: bytes) -> str:
    size = frame[13]
    return str(frame[14 : 14 + size], "utf-8", "replace")
