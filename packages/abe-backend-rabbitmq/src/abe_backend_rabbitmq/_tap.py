"""A tap on aiormq's connection: deliver, ack, confirm and return frames of our channels bypass aiormq.

``aiormq.connect(transport_factory=...)`` lets its caller supply the stream pair. Ours is the usual one, but its protocol looks at whole
frames before the stream does: deliveries, returns and confirms of our channels are handled at once, everything else (login,
heartbeats, replies, closing, other channels) passes to aiormq unchanged. Our frames are written to the same transport. Only public names
are used.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import aiormq
from yarl import URL

from abe_backend_rabbitmq._errors import ConnectError

_FRAME: Final = struct.Struct(">BHI").unpack_from

_OUT_CLOSE, _OUT_CLOSE_OK = b"\0\x14\0\x28", b"\0\x14\0\x29"
_OUT_END: Final = (b"\0\x0a\0\x32", b"\0\x0a\0\x33")
_HEARTBEAT: Final = b"\x08\0\0\0\0\0\0\xce"
_FRAME_END: Final = 0xCE
_LAST_KIND: Final = 8
_SHORTEST: Final = 8


class Tapped(Protocol):
    """A channel that gets its frames before aiormq does."""

    def take(self, kind: int, data: bytes, position: int, end: int) -> bool:
        """Handle a frame, and return whether it was one of ours. Must not raise."""
        ...

    def lose(self, reason: str) -> None:
        """Mark the channel as closed, with the reason."""
        ...


class Tap(asyncio.StreamReaderProtocol):
    """The asyncio protocol of a connection.

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
        self.channels: dict[int, Tapped] = {}
        self._said = said
        self._pieces: list[bytes] = []
        self._missing = 0
        self._raw = False
        self._fed: float = 0.0
        self.heard: float = loop.time()
        """When data arrived last, by the event loop's clock."""
        self.answered: float = self.heard
        """When data other than heartbeats arrived last."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport. (Other event loops have transport classes of their own: no isinstance.)"""
        self.transport = cast("asyncio.WriteTransport", transport)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Give the frames of our channels to these, and the rest to aiormq, in order.

        1. Pieces of an incomplete frame are collected until it is complete, and joined once.
        2. `_sift` gives our channels their frames.
        3. aiormq gets what is left, or a heartbeat once a second: it detects silence by the frames that it sees.
        4. After bytes that are not AMQP everything goes to aiormq, which reports the error; channels of ours end.
        """
        self.heard = now = self.loop.time()
        if data != _HEARTBEAT:
            self.answered = now
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
        rest, took, amqp = self._sift(data)
        if rest or (took and now - self._fed > 1):
            super().data_received(rest or _HEARTBEAT)
            self._fed = now
        if not amqp:
            self._raw = True  # during the login aiormq reports what is wrong
            if self.channels and self.transport is not None:
                self.end("the broker sent something that is not AMQP")
                self.transport.abort()

    def _sift(self, data: bytes) -> tuple[bytes, bool, bool]:
        """Give the channels their frames. Return what is left for aiormq, whether a frame was taken, and whether it was all AMQP.

        1. A frame is a header of 7 bytes (kind, channel, length of the payload), the payload, and an end byte. Only whole frames are
           looked at: what follows the last of them waits for the next piece, and `_missing` says how much of it has to come.
        2. What cannot be a frame ends the search: aiormq gets everything from there on unread.
        3. A channel of ours takes its frame or leaves it. `keep` is the end of the last frame that was taken: what lies between two
           of those goes to aiormq as one slice.
        """
        position, keep, size, channels, amqp = 0, 0, len(data), self.channels, True
        rest: list[bytes] = []
        while position < size:
            if size - position < _SHORTEST:
                self._missing = position + _SHORTEST - size
                break
            kind, number, length = _FRAME(data, position)
            end = position + length + 8
            if kind > _LAST_KIND or (end <= size and data[end - 1] != _FRAME_END):
                amqp, position = False, size
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
        return b"".join(rest) if rest else b"", keep > 0, amqp

    def eof_received(self) -> bool | None:
        """End the channels."""
        self.end("the broker ended the connection")
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the channels."""
        self.end("the connection was lost" if exc is None else f"the connection was lost: {exc}")
        super().connection_lost(exc)

    def end(self, reason: str) -> None:
        """Mark all channels as closed."""
        for channel in list(self.channels.values()):
            channel.lose(reason)


class _Writer(asyncio.StreamWriter):
    """Watches what aiormq sends: after aiormq closed a channel or the connection, no frame of ours follows."""

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
        """Connect, and return the stream pair; raises `ConnectError`."""
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
