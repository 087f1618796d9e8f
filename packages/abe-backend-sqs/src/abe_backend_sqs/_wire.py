"""Envelopes to SQS messages and back. Pure.

The body is the payload's text, or its base64 where SQS would refuse the text. The message attribute ``abe`` is a JSON
array ``[1, id, key, milliseconds]``, then as far as needed: headers or null, the deliveries so far, the time in
milliseconds before which it must not be delivered, and 1 for a body in base64 (2 for an empty one, which SQS does not
carry). A stranger writes a body alone, or with the attributes ``key``, ``id`` (without it SQS's own is the message's) and
``encoding``, which may be ``base64``. A dead letter has the attribute ``abe-dead`` besides: ``[attempts, reason, error,
milliseconds]``. A message that leaves a FIFO queue has the message group that it had there as ``abe-order``.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec

from abe.backends.message_queue.base import DeadLetter, Delivery, Envelope, Metadata
from abe.backends.message_queue.base.names import matches

VERSION: Final = 1
LIMIT: Final = 1_048_576
"""Bytes of a message, and of a batch of them: body, and names, types and values of attributes. SQS's, since 2025."""
RESERVE: Final = 512
"""Bytes of it that a published message leaves free: a retry notes the attempts, a dead letter at least when it died."""
BATCH: Final = 10
"""Messages of a request."""

_META, _DEAD, _ORDER = "abe", "abe-dead", "abe-order"
_MARK: Final = f"[{VERSION},"
_TOKEN: Final = re.compile("[!-~]{1,128}")
"""What a message group or a deduplication id may be (the API reference of SendMessage)."""
_FORBIDDEN: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What SQS takes in a body or attribute, and nothing else (the API reference of SendMessage)."""

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


class _Meta(msgspec.Struct, array_like=True, frozen=True):
    version: int
    id: str
    key: str
    published_at: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    headers: dict[str, str] | None = None
    attempts: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    due: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    encoded: int = 0


class _Death(msgspec.Struct, array_like=True, frozen=True):
    attempts: int
    reason: str
    error: str
    at: int


_encode: Final = msgspec.json.Encoder().encode
_decode_meta: Final = msgspec.json.Decoder(_Meta).decode
_decode_death: Final = msgspec.json.Decoder(_Death).decode


class Parsed(NamedTuple):
    """What a received message says."""

    metadata: Metadata
    body: bytes
    attempts: int
    """Deliveries before those that SQS counts."""
    due: int
    """Milliseconds since the epoch; 0: at once."""
    fault: str | None


def pack(envelope: Envelope, *, attempts: int = 0, due: int = 0) -> Entry:
    """Return the entry of an envelope, without a delay."""
    text, encoded = _as_text(envelope.body)
    return _entry(
        text,
        _Meta(
            VERSION, envelope.id, envelope.key, envelope.published_at, _dict(envelope.headers), attempts, due, encoded
        ),
    )


def repack(message: Message, *, attempts: int, due: int = 0) -> Entry:
    """Return an entry that says what a received message says, but for the deliveries so far and the time it is due.

    A message that cannot be read, or a stranger's, stays what it is as far as it can: it has no place for either.
    """
    parsed = parse(message)
    others = {name: value for name, value in _attributes(message).items() if name not in (_META, _DEAD, _ORDER)}
    if parsed.fault is not None and _META in _attributes(message):
        kept = {_META: _attributes(message)[_META]}
        return _sized(message.get("Body", ""), {**kept, **others})
    meta = parsed.metadata
    text, encoded = _as_text(parsed.body)
    entry = _entry(
        text, _Meta(VERSION, meta.id, meta.key, meta.published_at, _dict(meta.headers), attempts, due, encoded)
    )
    return _sized(entry.body, {**entry.attributes, **others}) if others else entry


def bury(message: Message, *, attempts: int, reason: str, error: str, at: int) -> Entry:
    """Return the dead letter of a received message. The texts are cut where they would not fit."""
    body, attributes = (
        message.get("Body", ""),
        {name: value for name, value in _attributes(message).items() if name != _DEAD},
    )
    room = LIMIT - _sized(body, attributes).size - len(_DEAD) - len("String") - 64
    for share in (room // 2, room // 12):  # a character may take six bytes in JSON
        death = _Death(attempts, _cut(reason, share // 4), _cut(error, share), at)
        text = _legal(_encode(death).decode())
        if len(text.encode()) <= room:
            break
    else:
        text = _encode(_Death(attempts, "", "", at)).decode()
    return _sized(body, {**attributes, _DEAD: {"DataType": "String", "StringValue": text}})


def in_order(entry: Entry, group: str, dedup: str) -> Entry:
    """Return the entry as a FIFO queue takes it. A key or an id that it would refuse takes part as its hash."""
    return entry._replace(group=_token(group), dedup=_token(dedup))


def leaving(message: Message, entry: Entry) -> Entry:
    """Return the entry of a message that leaves a FIFO queue for a while: it remembers its message group."""
    value = {"DataType": "String", "StringValue": order(message)}
    return _sized(entry.body, {**entry.attributes, _ORDER: value})._replace(delay=entry.delay)


def order(message: Message) -> str:
    """Return the message group that a message was in, or that its key makes."""
    known = message.get("Attributes", {}).get("MessageGroupId") or ""
    remembered = _attributes(message).get(_ORDER, {}).get("StringValue")
    return str(remembered or known) or parse(message).metadata.key or str(message["MessageId"])


def wants(patterns: Sequence[str], message: Message) -> bool:
    """Whether a message's key matches one of the patterns."""
    key = parse(message).metadata.key
    return any(matches(pattern, key) for pattern in patterns)


def ours(message: Message) -> bool:
    """Whether we wrote it, and can read it: what a stranger put into a queue is meant for that queue."""
    return _META in _attributes(message) and parse(message).fault is None


def parse(message: Message) -> Parsed:
    """Read a message, whatever it is."""
    attributes, text = _attributes(message), str(message.get("Body", ""))
    header = attributes.get(_META, {}).get("StringValue")
    if header is None:
        try:
            body = _from_text(text, attributes.get("encoding", {}).get("StringValue") == "base64")
        except binascii.Error as exc:
            return Parsed(_stranger(message), text.encode(), 0, 0, f"the body is not base64: {exc}")
        return Parsed(_stranger(message), body, 0, 0, None)
    if not header.startswith(_MARK):
        fault = "the envelope is of a version that is not known here"
        return Parsed(_stranger(message), text.encode(), 0, 0, fault)
    try:
        meta = _decode_meta(header)
        body = _from_text(text, meta.encoded)
    except (msgspec.MsgspecError, binascii.Error, ValueError) as exc:
        return Parsed(_stranger(message), text.encode(), 0, 0, f"the envelope cannot be read: {exc}")
    return Parsed(Metadata(meta.id, meta.key, meta.published_at, meta.headers), body, meta.attempts, meta.due, None)


def delivery(message: Message, parsed: Parsed) -> Delivery:
    """Make a delivery of a received message."""
    attempt = parsed.attempts + received(message)
    return Delivery(message["ReceiptHandle"], parsed.body, parsed.metadata, attempt, parsed.fault)


def received(message: Message) -> int:
    """Return how often SQS has delivered it, this time included."""
    return int(message.get("Attributes", {}).get("ApproximateReceiveCount", 1))


def dead_letter(message: Message) -> DeadLetter:
    """Read a dead letter, whatever it once was: SQS itself moves messages too, as a last resort."""
    parsed = parse(message)
    text = _attributes(message).get(_DEAD, {}).get("StringValue", "")
    try:
        death = _decode_death(text)
    except msgspec.MsgspecError:
        sent = int(message.get("Attributes", {}).get("SentTimestamp", 0))
        death = _Death(max(1, parsed.attempts + received(message) - 1), "moved by SQS", "", sent)
    return DeadLetter(
        id=parsed.metadata.id,
        key=parsed.metadata.key,
        body=parsed.body,
        headers=parsed.metadata.headers or {},
        attempts=death.attempts,
        reason=death.reason,
        error=death.error,
        published_at=parsed.metadata.published_at / 1000,
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


def _entry(text: str, meta: _Meta) -> Entry:
    fields: list[object] = [
        meta.version,
        meta.id,
        meta.key,
        meta.published_at,
        meta.headers,
        meta.attempts,
        meta.due,
        meta.encoded,
    ]
    while not fields[-1]:
        fields.pop()
        if len(fields) == 4:
            break
    return _sized(text, {_META: {"DataType": "String", "StringValue": _legal(_encode(fields).decode())}})


def _sized(body: str, attributes: Mapping[str, Mapping[str, Any]]) -> Entry:
    # botocore's replies hold fields that its requests refuse, so only those of a request are taken.
    kept = {
        name: {field: value[field] for field in ("DataType", "StringValue", "BinaryValue") if field in value}
        for name, value in attributes.items()
    }
    size = len(body.encode()) + sum(
        len(name.encode()) + sum(len(part.encode() if isinstance(part, str) else part) for part in value.values())
        for name, value in kept.items()
    )
    return Entry(body, kept, size)


def _as_text(body: bytes) -> tuple[str, int]:
    """Return the body as SQS takes it, and 1 if that is base64."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = ""
    if text and not _FORBIDDEN.search(text):
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


def _stranger(message: Message) -> Metadata:
    attributes = _attributes(message)
    id = attributes.get("id", {}).get("StringValue") or message.get("MessageId", "")
    return Metadata(id, attributes.get("key", {}).get("StringValue") or "")


def _token(text: str) -> str:
    return text if _TOKEN.fullmatch(text) else f"sha256-{hashlib.sha256(text.encode()).hexdigest()}"


def _dict(headers: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if headers is None else dict(headers)
