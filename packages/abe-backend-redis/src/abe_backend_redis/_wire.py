"""Encodes envelopes as stream entries, and decodes them. Pure.

An entry has two fields: ``m``, a JSON array ``[1, id, key, milliseconds]`` with the headers as a fifth element if there are any, and ``p``,
the body. After a failed attempt it has ``a`` too, the deliveries so far. A foreign message has ``p`` alone, or with ``k``, its key, and
``i``, its id; without ``i``, the entry's id is the message's.
A dead letter has ``r``, ``e`` and ``t`` too: reason, error, and when it became a dead letter, in milliseconds.
"""

from collections.abc import Sequence
from typing import Final, TypeAlias

from abe.backends.message_queue.base import DeadLetter, Delivery, Metadata
from abe.backends.message_queue.base import envelope as _envelope
from abe.backends.message_queue.base.envelope import MARK, UNKNOWN_VERSION, Header, HeaderDecoder, metadata_of
from abe.errors import DecodeError

Fields: TypeAlias = Sequence[bytes]
"""Alternating names and values, as Redis returns them."""

pack: Final = _envelope.encode_header
"""Encodes the field ``m`` of an envelope."""

_decode: Final = HeaderDecoder(Header)


def unpack(header: bytes) -> Metadata:
    """Decode the field ``m``.

    Raises:
        DecodeError: It is malformed.
    """
    return metadata_of(_decode(header))


def delivery(entry: bytes, fields: Fields, count: int = 1) -> Delivery:
    """Make a delivery of a stream entry.

    Args:
        entry: The entry's id in the stream, which identifies the delivery.
        fields: Its fields.
        count: How often this entry was delivered; earlier attempts are in the field ``a``.
    """
    if len(fields) == 4 and fields[0] == b"m" and fields[2] == b"p" and fields[1].startswith(MARK):
        return Delivery(fields[3], fields[1], count, entry)
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    body, header = named.get(b"p"), named.get(b"m")
    attempt = _number(named.get(b"a")) + count
    if body is None:
        return Delivery(b"", _foreign(entry, named), attempt, entry, fault="the entry has no field 'p'")
    if header is None:
        return Delivery(body, _foreign(entry, named), attempt, entry)
    if not header.startswith(MARK):
        return Delivery(body, _foreign(entry, named), attempt, entry, fault=UNKNOWN_VERSION)
    return Delivery(body, header, attempt, entry)


def dead_letter(entry: bytes, fields: Fields) -> DeadLetter:
    """Decode an entry of the dead letters, also one of a foreign or malformed message."""
    named = dict(zip(fields[::2], fields[1::2], strict=True))
    return _envelope.dead_letter(
        _metadata(entry, named),
        named.get(b"p", b""),
        attempts=_number(named.get(b"a")),
        reason=named.get(b"r", b"").decode(errors="replace"),
        error=named.get(b"e", b"").decode(errors="replace"),
        dead_at=_number(named.get(b"t")) / 1000,
    )


def letter_id(entry: bytes, fields: Fields) -> str:
    """Return the id of a dead letter with these fields, of which it needs ``m`` and ``i``."""
    return _metadata(entry, dict(zip(fields[::2], fields[1::2], strict=True))).id


def _metadata(entry: bytes, named: dict[bytes, bytes]) -> Metadata:
    try:
        return unpack(named.get(b"m", b""))
    except DecodeError:
        return _foreign(entry, named)


def _foreign(entry: bytes, named: dict[bytes, bytes]) -> Metadata:
    return Metadata(named.get(b"i", entry).decode(errors="replace"), named.get(b"k", b"").decode(errors="replace"))


def _number(text: bytes | None) -> int:
    return int(text) if text is not None and text.isdigit() and len(text) < 16 else 0
