"""Envelopes to SQS messages and back. Pure.

The body is the payload's text, or its base64 where SQS would refuse the text. The message attribute ``abe`` is a JSON
array ``[1, id, key, milliseconds]``, then as far as needed: headers or null, the deliveries so far, the time in
milliseconds before which it must not be delivered, 1 for a body in base64 (2 for an empty one, which SQS does not
carry), and 1 for what is meant for one group alone. A foreign program writes a body alone, or with the attributes ``key``,
``id`` (without it SQS's own is the message's) and ``encoding``, which may be ``base64``. A dead letter has the attribute
``abe-dead`` besides: ``[attempts, reason, error, milliseconds]``. A message that leaves a FIFO queue has the message
group that it had there as ``abe-order``.

SQS takes ten attributes, and 1 MiB with them. What is published leaves room for ours; a foreign message may leave none. Then its
copies lose, in this order: the texts of the reason and the error; attributes that mean nothing here; the message group; ``abe-dead``; the
deliveries so far, which are counted from 0 again. They never lose the body, nor its encoding.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec

from abe.backends.message_queue.base import DeadLetter, Delivery, Envelope, Metadata
from abe.backends.message_queue.base import envelope as _envelope
from abe.backends.message_queue.base.envelope import VERSION, Header, HeaderDecoder, Milliseconds, encode, metadata_of
from abe.backends.message_queue.base.routing import matches_any
from abe.errors import DecodeError
from abe_backend_sqs._answers import FAULT

LIMIT: Final = 1_048_576
"""Bytes of a message, and of a batch of them: body, and names, types and values of attributes. SQS's, since 2025."""
RESERVE: Final = 512
"""Bytes of it that a published message leaves free: a retry notes the attempts, a dead letter at least when it died."""
BATCH: Final = 10
"""Messages of a request."""
LONGEST_WAIT: Final = 15 * 86_400_000
"""Milliseconds from now for which a message may be made to wait: SQS keeps it for 14 days."""
ATTRIBUTES: Final = 10
"""Attributes of a message. SQS's."""

_META, _DEAD, _ORDER = "abe", "abe-dead", "abe-order"
_DIGITS: Final = 15
"""Digits of a number of SQS's: enough for a time in milliseconds, and exact as a float."""
_FIELDS: Final = ("DataType", "StringValue", "BinaryValue")
_PLAIN: Final = ("encoding", "key", "id")
"""Attributes that a foreign message may have; ours have ``abe`` instead."""
_NOTE: Final = 64
"""Bytes that are enough for ``abe-dead`` without its texts."""
_TOKEN: Final = re.compile("[!-~]{1,128}")
"""What a message group or a deduplication id may be (the API reference of SendMessage)."""
_FORBIDDEN: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What SQS refuses in a body or attribute (the API reference of SendMessage)."""

Message: TypeAlias = Mapping[str, Any]
"""A message as ReceiveMessage returns it."""


class Entry(NamedTuple):
    """A message as SendMessageBatch takes it."""

    body: str
    attributes: Mapping[str, Mapping[str, Any]]
    size: int
    delay: int = 0
    """Whole seconds."""
    group: str = ""
    """The message group, and with it the deduplication id: of a FIFO queue only."""
    dedup: str = ""


class _Meta(Header, array_like=True, frozen=True):
    attempts: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    due: Milliseconds = 0
    encoded: int = 0
    only: int = 0


class _Death(msgspec.Struct, array_like=True, frozen=True):
    attempts: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    reason: str
    error: str
    at: Milliseconds


_decode_meta: Final = HeaderDecoder(_Meta)
_decode_death: Final = msgspec.json.Decoder(_Death).decode


class Parsed(NamedTuple):
    """The parts of a received message."""

    metadata: Metadata
    body: bytes
    attempts: int
    """Deliveries before those that SQS counts."""
    due: int
    """Milliseconds since the epoch; 0: at once."""
    fault: str | None
    only: bool = False
    """Whether it is meant for the group that has it, whatever that group's patterns say."""


def pack(envelope: Envelope, *, attempts: int = 0, due: int = 0) -> Entry:
    """Return the entry of an envelope, without a delay."""
    text, encoded = _as_text(envelope.body)
    size = len(text) if encoded else len(envelope.body)
    headers = None if envelope.headers is None else dict(envelope.headers)
    fields: list[object] = [VERSION, envelope.id, envelope.key, envelope.published_at, headers, attempts, due, encoded]
    fields.append(int(envelope.group is not None))
    value, length = _noted(fields)
    return Entry(text, {_META: value}, size + length)


def repack(message: Message, *, attempts: int, due: int = 0, only: bool = False) -> Entry:
    """Return the entry of a copy of a received message, with these attempts and due time.

    With `only` it is meant for the group that it goes to, whatever that group's patterns say.

    A message that cannot be read is copied unchanged, and so is a foreign one that leaves no room for attempts and time.
    """
    parsed, attributes = parse(message), _attributes(message)
    others = {name: value for name, value in attributes.items() if name not in (_META, _DEAD, _ORDER)}
    if parsed.fault is None:
        id, key, published_at, headers = parsed.metadata
        group = "" if only or parsed.only else None
        copy = Envelope(id, key, parsed.body, published_at, headers, group=group)
        entry = pack(copy, attempts=attempts, due=due)
        if entry.size <= LIMIT:
            return _sized(entry.body, {**entry.attributes, **others}) if others else entry
    if (known := attributes.get(_META)) is not None:
        others[_META] = known
    return _sized(_text_of(message.get("Body")), others)


def bury(message: Message, *, attempts: int, reason: str, error: str, at: int) -> Entry:
    """Return the dead letter of a received message. The texts are cut if they do not fit."""
    attributes = {name: value for name, value in _attributes(message).items() if name != _DEAD}
    if group := _system(message, "MessageGroupId"):
        attributes.setdefault(_ORDER, _string(group))  # as `leaving` will, so that there is room for it
    body = _text_of(message.get("Body"))
    room, text = LIMIT - _measure(body, attributes) - len(_DEAD) - len("String"), ""
    for share in (room // 2, room // 12, 0):  # a character may take six bytes in JSON
        text = _legal(encode(_Death(attempts, _cut(reason, share // 4), _cut(error, share), at)).decode())
        if len(text.encode()) <= room:
            break
    return _sized(body, {**attributes, _DEAD: _string(text)})


def in_order(entry: Entry, group: str, dedup: str) -> Entry:
    """Return the entry for a FIFO queue. A key or an id that SQS would refuse is replaced by its hash."""
    return entry._replace(group=_token(group), dedup=_token(dedup))


def leaving(message: Message, entry: Entry) -> Entry:
    """Return the entry of a message that leaves a FIFO queue for a while, with its message group as an attribute."""
    return _sized(entry.body, {**entry.attributes, _ORDER: _string(order(message))})._replace(delay=entry.delay)


def left(message: Message) -> bool:
    """Return whether a message was in a FIFO queue before, or may have been: a foreign one may have no room for the attribute."""
    return _ORDER in _attributes(message) or _META not in _attributes(message)


def order(message: Message) -> str:
    """Return the message group that a message was in, or that its key makes."""
    known = _value(_attributes(message), _ORDER) or _system(message, "MessageGroupId")
    return known or parse(message).metadata.key or str(message.get("MessageId", "none"))


def wants(patterns: Sequence[str], message: Message) -> bool:
    """Whether a message's key matches one of the patterns."""
    return matches_any(patterns, parse(message).metadata.key)


def published(message: Message, since: float) -> bool:
    """Whether it was published to all groups that want its key since then (in seconds since the epoch), not put into one queue alone."""
    parsed = parse(message)
    ours = _META in _attributes(message) and parsed.fault is None and not parsed.only
    return ours and parsed.metadata.published_at >= since * 1000


def parse(message: Message) -> Parsed:
    """Parse a message. An error becomes its `fault`, and affects no other message."""
    try:
        return _parse(message)
    except Exception as exc:  # noqa: BLE001 - the other messages of the answer are to be read
        # The text may hold parts of the message, which are not for logs.
        return _faulty(message, f"the message cannot be read ({type(exc).__name__})")


def _parse(message: Message) -> Parsed:
    attributes, text = _attributes(message), _text_of(message.get("Body"))
    if (broken := _system(message, FAULT)) is not None:
        return _faulty(message, f"the message is not of its form: {broken}")
    header = _value(attributes, _META)
    if header is None:
        try:
            body = _from_text(text, _value(attributes, "encoding") == "base64")
        except ValueError:
            return _faulty(message, "the body is not base64, as its attribute says")
        return Parsed(_foreign(message), body, 0, 0, None)
    try:
        meta = _decode_meta(header)
        body = _from_text(text, meta.encoded)
    except DecodeError as exc:
        return _faulty(message, str(exc))
    except ValueError as exc:
        return _faulty(message, f"the body cannot be read: {exc}")
    return Parsed(metadata_of(meta), body, meta.attempts, meta.due, None, bool(meta.only))


def _faulty(message: Message, fault: str) -> Parsed:
    return Parsed(_foreign(message), _text_of(message.get("Body")).encode(errors="replace"), 0, 0, fault)


def delivery(message: Message, parsed: Parsed) -> Delivery:
    """Make a delivery of a received message."""
    attempt = parsed.attempts + received(message)
    return Delivery(parsed.body, parsed.metadata, attempt, message["ReceiptHandle"], fault=parsed.fault)


def received(message: Message) -> int:
    """Return how often SQS has delivered it, this time included."""
    return max(1, _count(_system(message, "ApproximateReceiveCount"), 1))


def sent(message: Message) -> int:
    """Return when it was sent to its queue, in milliseconds since the epoch, by the clock of SQS; 0 if unknown."""
    return _count(_system(message, "SentTimestamp"), 0)


def identity(message: Message) -> str:
    """Return what the copies of an unreadable message have in common; empty for a readable one, which has an id."""
    text = f"{_text_of(message.get('Body'))}\0{_value(_attributes(message), _META)}"
    return "" if parse(message).fault is None else hashlib.sha256(text.encode(errors="replace")).hexdigest()


def size(message: Message) -> int:
    """Return how many bytes a message takes."""
    return _measure(_text_of(message.get("Body")), _attributes(message))


def dead_letter(message: Message) -> DeadLetter:
    """Return a dead letter, also of a message that SQS itself has moved, as a last resort."""
    parsed = parse(message)
    try:
        death = _decode_death(_value(_attributes(message), _DEAD) or "")
    except (msgspec.MsgspecError, RecursionError, ValueError):
        full = _measure(_text_of(message.get("Body")), _attributes(message)) > LIMIT - _NOTE
        reason = "unknown, as the message leaves no room for it" if full else "moved by SQS"
        death = _Death(max(1, parsed.attempts + received(message) - 1), reason, "", sent(message))
    return _envelope.dead_letter(
        parsed.metadata,
        parsed.body,
        attempts=death.attempts,
        reason=death.reason,
        error=death.error,
        dead_at=death.at / 1000,
    )


def batches(entries: Sequence[Entry], limit: int = LIMIT) -> Iterator[Sequence[int]]:
    """Return the positions of entries in groups that each fit into a request."""
    batch: list[int] = []
    size = 0
    for position, entry in enumerate(entries):
        if batch and (len(batch) == BATCH or size + entry.size > limit):
            yield batch
            batch, size = [], 0
        batch.append(position)
        size += entry.size
    if batch:
        yield batch


def _noted(fields: list[object]) -> tuple[Mapping[str, Any], int]:
    """Return the metadata as the value of an attribute, and the bytes that the attribute takes."""
    while not fields[-1] and len(fields) > 4:
        fields.pop()
    raw = encode(fields)
    text = raw.decode()
    if raw.isascii():
        size = len(raw)
    else:
        text = _legal(text)
        size = len(text.encode())
    return _string(text), len(_META) + len("String") + size


def _string(text: str) -> Mapping[str, Any]:
    return {"DataType": "String", "StringValue": text}


def _sized(body: str, attributes: Mapping[str, Mapping[str, Any]]) -> Entry:
    """Return the entry with those of the attributes that fit, the most important first."""
    # botocore's replies hold fields that its requests refuse, so only those of a request are taken.
    clean = {
        name: {field: value[field] for field in _FIELDS if value.get(field) is not None}
        for name, value in attributes.items()
        if any(value.get(field) is not None for field in _FIELDS[1:])
    }
    size = _measure(body, clean)
    if size <= LIMIT and len(clean) <= ATTRIBUTES:
        return Entry(body, clean, size)
    kept: dict[str, Mapping[str, Any]] = {}
    size = len(body.encode())
    others = [name for name in clean if name not in _PLAIN]
    for name in (_META, *(() if _META in clean else _PLAIN), _DEAD, _ORDER, *others, *_PLAIN):
        if name in clean and name not in kept and len(kept) < ATTRIBUTES:
            more = _measure("", {name: clean[name]})
            if size + more <= LIMIT:
                kept[name] = clean[name]
                size += more
    return Entry(body, kept, size)


def _measure(body: str, attributes: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the size as SQS counts it."""
    return len(body.encode()) + sum(
        len(name.encode())
        + sum(len((value.get(field) or "").encode()) for field in _FIELDS[:2])
        + len(value.get("BinaryValue") or b"")
        for name, value in attributes.items()
    )


def _as_text(body: bytes) -> tuple[str, int]:
    """Return the body as text for SQS, and its encoding: 0 as it is, 1 base64, 2 empty."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = ""
    if text and (text.isprintable() or not _FORBIDDEN.search(text)):  # the first is quicker, and true of most
        return text, 0
    return (base64.b64encode(body).decode(), 1) if body else ("AA==", 2)


def _from_text(text: str, encoded: int) -> bytes:
    if encoded == 2:
        return b""
    return base64.b64decode(text, validate=True) if encoded else text.encode()


def _legal(text: str) -> str:
    """Escape, in a JSON text, the two characters that JSON allows and SQS does not."""
    return text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")


def _cut(text: str, size: int) -> str:
    return text.encode(errors="replace")[: max(0, size)].decode(errors="ignore")


def _attributes(message: Message) -> Mapping[str, Mapping[str, Any]]:
    found: Mapping[str, Mapping[str, Any]] = message.get("MessageAttributes") or {}
    return found


def _value(attributes: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
    """Return the text of an attribute; None where there is none, or it is binary."""
    found = attributes.get(name, {}).get("StringValue")
    return found if isinstance(found, str) else None


def _system(message: Message, name: str) -> str | None:
    """Return a system attribute of a message; None if it is missing."""
    given: Mapping[str, object] = message.get("Attributes") or {}
    found = given.get(name)
    return None if found is None else str(found)


def _count(text: str | None, default: int) -> int:
    """Parse a number of SQS's; return the default for a malformed or impossible one."""
    return int(text) if text is not None and text.isdecimal() and len(text) <= _DIGITS else default


def _text_of(value: object) -> str:
    return value if isinstance(value, str) else ""


def _foreign(message: Message) -> Metadata:
    """Return the metadata of a foreign message."""
    attributes = _attributes(message)
    return Metadata(_value(attributes, "id") or str(message.get("MessageId", "")), _value(attributes, "key") or "")


def _token(text: str) -> str:
    return text if _TOKEN.fullmatch(text) else f"sha256-{hashlib.sha256(text.encode()).hexdigest()}"
