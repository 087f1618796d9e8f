"""Envelopes to AMQP properties and back. Pure.

The body is the message's body. Its properties are the standard ones (content type, delivery mode, message id, timestamp in seconds) and
headers: ``abe-version``, ``abe-published-at`` in milliseconds, and the application's own under their names. Those whose names are
reserved, by RabbitMQ or us, or too long are together in ``abe-headers`` as JSON. A copy that we move (a retry, a dead letter, a message
that was parked) also has ``abe-key``, and ``abe-attempt``, the deliveries before (``abe-uncertain`` of them may have been lost
connections), and one that is to be handled alone ``abe-alone``, the name under which that is recorded; a dead letter ``abe-reason``,
``abe-error`` and ``abe-dead-at`` in milliseconds; one that waits ``abe-due`` and ``abe-until`` in milliseconds, a parked one ``abe-
for``, the groups that have no copy yet, if others have one.

Properties are bytes here: the flags and the values, as in a content header after the size of the body.
"""

import hashlib
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from abe.backends.message_queue.base import DeadLetter, Delivery, Envelope, Metadata
from abe.backends.message_queue.base import envelope as _envelope
from abe.backends.message_queue.base.envelope import UNKNOWN_VERSION, VERSION
from abe.errors import DecodeError
from abe_backend_rabbitmq._properties import Properties, Value, encoded, parse

_FLAGS: Final = b"\xb0\xc0"  # content type, headers, delivery mode, message id, timestamp
_HEAD: Final = _FLAGS + b"\x10application/json"
_VERSION_FIELD: Final = b"\x0babe-versionb" + bytes((VERSION,))
_TIME_FIELD: Final = b"\x10abe-published-atl"
_OURS: Final = len(_HEAD) + 4
_FIRST: Final = _VERSION_FIELD + _TIME_FIELD
_NAMES: Final = _OURS + len(_FIRST)
_PERSISTENT: Final = b"\x02"
_TEXT: Final = ord("S")
_MARK: Final = b"abe-attempt"
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_BROKERS: Final = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count", "x-opt-")
_RESERVED: Final = ("abe-", *_BROKERS)
_ADDRESSES: Final = ("CC", "BCC")
"""Headers that name more routing keys: RabbitMQ acts on them."""
_NOT_COPIED: Final = frozenset(
    (
        b"CC",
        b"BCC",
        b"abe-due",
        b"abe-until",
        b"abe-for",
        b"abe-reason",
        b"abe-error",
        b"abe-dead-at",
        b"abe-uncertain",
        b"abe-alone",
    )
)
_BROKERS_BYTES: Final = tuple(name.encode() for name in _BROKERS)
_MOST_NAMES: Final = 1_000
_LONGEST_NAME: Final = 128
"""Bytes of a header's name, by AMQP's specification. More would fit, but other clients cut it off."""
_LONGEST_TEXT: Final = 32_000
"""Bytes of a dead letter's reason, and of its error."""
_MOST: Final = 128 * 1024 - 20
"""Bytes of properties: they must fit into one frame, by default of 128 KiB, or the broker ends the connection."""
_LAST_TIME: Final = 253_402_300_799_999
"""Milliseconds since the epoch, in the year 9999: a later value is no time."""
_FIELDS: Final = 100
"""Bytes that a dead letter's own fields take beside their texts."""

NEWS: Final = b"\x10\x00\x01"
"""Properties of a transient message: a delivery mode of 1."""

_names: Final[dict[str, bytes]] = {}
_fields: Final[dict[bytes, str]] = {}


class Header(NamedTuple):
    """What the broker delivers with a body: properties, exchange and routing key."""

    properties: bytes
    exchange: str
    key: str


def pack(envelope: Envelope, *extra: tuple[str, str | int]) -> bytes:
    """Return the properties of a message.

    Args:
        envelope: The message.
        extra: More headers of ours.
    """
    published_at, headers = envelope.published_at, envelope.headers
    table = _VERSION_FIELD + _TIME_FIELD + _U64.pack(published_at)
    if headers or extra:
        table += _pack_headers(headers or {}, extra)
    raw = envelope.id.encode()
    return b"".join(
        (_HEAD, _U32.pack(len(table)), table, _PERSISTENT, bytes((len(raw),)), raw, _U64.pack(published_at // 1000))
    )


def _pack_headers(headers: Mapping[str, str], extra: tuple[tuple[str, str | int], ...]) -> bytes:
    parts: list[bytes] = []
    packed: dict[str, str] = {}
    for name, text in headers.items():
        field = _names.get(name) or _name(name)
        if field:
            value = text.encode()
            parts += (field, _U32.pack(len(value)), value)
        else:
            packed[name] = text
    if packed:
        extra = (*extra, ("abe-headers", msgspec.json.encode(packed).decode()))
    for name, given in extra:
        parts += (bytes((len(name),)), name.encode(), encoded(given))
    return b"".join(parts)


def _name(name: str) -> bytes:
    raw = name.encode()
    if len(raw) > _LONGEST_NAME or _reserved(name):
        return b""
    if len(_names) >= _MOST_NAMES:
        _names.clear()
    return _names.setdefault(name, bytes((len(raw),)) + raw + b"S")


def _reserved(name: str) -> bool:
    return name.startswith(_RESERVED) or name in _ADDRESSES


def delivery(number: int, header: Header, body: bytes, redelivered: bool) -> Delivery:
    """Make a delivery of what the broker pushed.

    Args:
        number: `Delivery.native`: the channel's generation and the delivery tag.
        header: The message's header.
        body: The body.
        redelivered: Whether the broker says that it may have been delivered before.
    """
    raw = header.properties
    if not redelivered and raw.startswith(_HEAD) and raw.startswith(_FIRST, _OURS) and _MARK not in raw:
        return Delivery(body, header, 1, number)
    try:
        headers = parse(raw).headers
        _strings(headers)
    except Exception as exc:  # noqa: BLE001 - it affects this message only
        why = str(exc) if isinstance(exc, DecodeError) else repr(exc)
        return Delivery(body, header, 1, number, fault=why)
    version = headers.get("abe-version", VERSION)
    fault = None if version == VERSION else UNKNOWN_VERSION
    # The broker counts lost connections too; a released copy names how many of its attempts were uncertain.
    uncertain = _number(headers, "abe-uncertain") + _number(headers, "x-delivery-count")
    return Delivery(body, header, attempts(headers), number, fault=fault, uncertain=uncertain)


def attempts(headers: Mapping[str, Value]) -> int:
    """Return which delivery this is, 1 for the first, from a message's headers."""
    return _number(headers, "abe-attempt") + _number(headers, "x-delivery-count") + 1


def metadata(header: Header, body: bytes) -> Metadata:
    """Return the metadata of a message.

    Raises:
        DecodeError: The properties are not AMQP's, or the headers cannot be decoded.
    """
    quick = _quick(header.properties)
    if quick is not None:
        id, published_at, headers = quick
        return Metadata(id, header.key, published_at, headers)
    properties = parse(header.properties)
    return _metadata(properties, header, body, _strings(properties.headers))


def _metadata(properties: Properties, header: Header, body: bytes, headers: dict[str, str]) -> Metadata:
    given = properties.headers
    id = properties.message_id or foreign_id(header, body)
    return Metadata(id, original_key(header, given), _published_at(properties, given), headers or None)


def _quick(raw: bytes) -> tuple[str, int, Mapping[str, str] | None] | None:
    """Read properties as `pack` writes them without anything extra; None: they have another form."""
    if not (raw.startswith(_HEAD) and raw.startswith(_FIRST, _OURS)):
        return None
    end = _OURS + _U32.unpack_from(raw, _OURS - 4)[0]
    headers: dict[str, str] | None = None
    position = _NAMES + 8
    try:
        if position < end:
            headers = {}
        while position < end:
            after = position + 1 + raw[position]
            field = raw[position:after]
            name = _fields.get(field) or _field(field)
            if not name or raw[after] != _TEXT:
                return None
            position = after + 5 + _U32.unpack_from(raw, after + 1)[0]
            assert headers is not None
            headers[name] = str(raw[after + 5 : position], "utf-8")
        start = end + 2
        published_at = _U64.unpack_from(raw, _NAMES)[0]
        if published_at > _LAST_TIME:
            return None
        return str(raw[start : start + raw[end + 1]], "utf-8"), published_at, headers
    except (ValueError, IndexError, struct.error):
        return None


def _field(field: bytes) -> str:
    name = str(field[1:], "utf-8")
    if _reserved(name):
        return ""
    if len(_fields) >= _MOST_NAMES:
        _fields.clear()
    return _fields.setdefault(field, name)


def message_id(raw: bytes) -> str:
    """Return the id in properties that we wrote."""
    try:
        if raw.startswith(_HEAD):
            end = _OURS + _U32.unpack_from(raw, _OURS - 4)[0]
            return str(raw[end + 2 : end + 2 + raw[end + 1]], "utf-8", "replace")
        return parse(raw).message_id
    except (DecodeError, IndexError, struct.error):
        return ""


def copy(header: Header, body: bytes, attempt: int, *extra: tuple[str, str | int]) -> bytes:
    """Return the properties of a copy that replaces a message, without what the broker added.

    With ``x-death`` kept, the broker would drop the copy when it passes the same queues again.

    Args:
        header: The message's header.
        body: Its body.
        attempt: Deliveries so far.
        extra: More headers of ours.
    """
    properties = _parsed(header)
    given = properties.headers
    ours: tuple[tuple[str, str | int], ...] = (
        ("abe-key", original_key(header, given)),
        ("abe-attempt", attempt),
        *extra,
    )
    fields = {name.encode(): encoded(value) for name, value in ours}
    kept = {
        name: field
        for name, field in properties.fields.items()
        if not name.startswith(_BROKERS_BYTES) and name not in _NOT_COPIED
    }
    properties.fields = kept | fields
    if not properties.message_id:
        properties.values["message_id"] = _short(foreign_id(header, body))
    properties.values["delivery_mode"] = _PERSISTENT
    for name in ("expiration", "user_id"):
        properties.values.pop(name, None)
    raw = properties.marshal()
    if len(raw) > _MOST:  # the headers of a foreign message filled a frame: there is no room for ours beside them
        properties.fields = fields
        raw = properties.marshal()
    return raw


def buried(header: Header, body: bytes, attempt: int, reason: str, error: str) -> bytes:
    """Return the properties of a dead letter. Of long texts the reason's beginning is kept, and the error's end."""
    room = _MOST - _FIELDS - len(copy(header, body, attempt))
    why = reason.encode(errors="replace")[: max(0, min(_LONGEST_TEXT, room // 2))]
    trace = error.encode(errors="replace")
    trace = trace[max(0, len(trace) - max(0, min(_LONGEST_TEXT, room - len(why)))) :]
    return copy(
        header,
        body,
        attempt,
        ("abe-reason", why.decode(errors="ignore")),
        ("abe-error", trace.decode(errors="ignore")),
        ("abe-dead-at", int(time.time() * 1000)),
    )


def dead_letter(header: Header, body: bytes) -> DeadLetter:
    """Return a dead letter; it may come from the broker's own dead-lettering, or be a foreign message."""
    properties = _parsed(header)
    given = properties.headers
    by_us = "abe-dead-at" in given
    try:
        headers = _strings(given)
    except DecodeError:
        headers = {}
    return _envelope.dead_letter(
        _metadata(properties, header, body, headers),
        body,
        attempts=_number(given, "abe-attempt") if by_us else attempts(given),
        reason=str(given.get("abe-reason") or ("" if by_us else "dead-lettered by the broker")),
        error=str(given.get("abe-error") or ""),
        dead_at=_number(given, "abe-dead-at") / 1000,
    )


def due(header: Header) -> int:
    """Return when a parked message is due, in milliseconds since the epoch; 0: at once."""
    return _number(_parsed(header).headers, "abe-due")


def until(header: Header) -> int:
    """Return when a delayed message leaves its level, in milliseconds since the epoch; 0: it is not recorded."""
    return _number(_parsed(header).headers, "abe-until")


def counted(header: Header) -> int:
    """Return the attempts that a message had before it was copied."""
    return _number(_parsed(header).headers, "abe-attempt")


def doubts(header: Header) -> tuple[int, int]:
    """Return how many attempts of a copy were uncertain when it was made, and how often it has come back to its queue since."""
    headers = _parsed(header).headers
    return _number(headers, "abe-uncertain"), _number(headers, "x-delivery-count")


def alone(header: Header) -> str:
    """Return the name under which it is recorded that a message is handled alone; empty: it is not to be."""
    name = _parsed(header).headers.get("abe-alone")
    return name if isinstance(name, str) else ""


def left_to(header: Header) -> Sequence[str]:
    """Return the groups that have no copy of a parked message yet, if others have one; empty: any group may get it."""
    named = _parsed(header).headers.get("abe-for")
    return named.split(" ") if isinstance(named, str) else ()


def routing_key(header: Header) -> str:
    """Return the key that a message was published with."""
    return original_key(header, _parsed(header).headers)


def original_key(header: Header, given: Mapping[str, Value]) -> str:
    """Return the key that a message was published with; empty if it was published to a queue directly."""
    key = given.get("abe-key")
    return key if isinstance(key, str) else header.key if header.exchange else ""


def identity(header: Header, body: bytes) -> str:
    """Return the id of a message, or `foreign_id` if it has none."""
    return message_id(header.properties) or foreign_id(header, body)


def digest(header: Header, body: bytes) -> str:
    """Return what names a message for a queue: the same at each delivery."""
    return hashlib.blake2b(identity(header, body).encode() + b"\0" + body, digest_size=12).hexdigest()


def foreign_id(header: Header, body: bytes) -> str:
    """Return an id for a message without one: the same at each delivery."""
    return hashlib.blake2b(body + header.key.encode(), digest_size=12).hexdigest()


def _parsed(header: Header) -> Properties:
    """Parse properties; empty if they cannot be parsed."""
    try:
        return parse(header.properties)
    except DecodeError:
        return Properties()


def _short(text: str) -> bytes:
    raw = text.encode()
    return bytes((len(raw),)) + raw


def _strings(given: Mapping[str, Value]) -> dict[str, str]:
    """Return the application's headers. Numbers of a foreign message become text; tables and arrays are left out."""
    found = {
        name: value if isinstance(value, str) else str(value)
        for name, value in given.items()
        if isinstance(value, str | int | float) and not _reserved(name)
    }
    packed = given.get("abe-headers")
    if isinstance(packed, str):
        try:
            found |= msgspec.json.decode(packed, type=dict[str, str])
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise DecodeError(f"the headers cannot be read: {exc}") from exc
    return found


def _number(given: Mapping[str, Value], name: str) -> int:
    value = given.get(name)
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def _published_at(properties: Properties, given: Mapping[str, Value]) -> int:
    moment = _number(given, "abe-published-at") or properties.timestamp * 1000
    return moment if moment <= _LAST_TIME else 0
