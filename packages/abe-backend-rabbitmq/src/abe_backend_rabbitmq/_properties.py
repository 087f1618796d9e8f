"""Parses and encodes the properties of AMQP messages. Pure.

Only the top level is parsed, and values stay bytes: they are decoded on access, tables and arrays inside the headers never. So properties
of foreign messages can be parsed whatever their values and nesting are, and a copy has the same bytes.
"""

import struct
from collections.abc import Mapping
from typing import Final, TypeAlias

from abe.errors import DecodeError

Value: TypeAlias = str | int | float | None

_NAMES: Final = (
    "content_type",
    "content_encoding",
    "headers",
    "delivery_mode",
    "priority",
    "correlation_id",
    "reply_to",
    "expiration",
    "message_id",
    "timestamp",
    "type",
    "user_id",
    "app_id",
    "cluster_id",
)
"""In the order of their flags, the highest bit first."""
_SIZES: Final[Mapping[str, int]] = {"delivery_mode": 1, "priority": 1, "timestamp": 8}
_UNKNOWN_FLAGS: Final = 3

_FIXED: Final[Mapping[int, int]] = {
    ord(kind): size
    for kinds, size in (("tbB", 1), ("su", 2), ("Iif", 4), ("D", 5), ("lLdT", 8), ("V\0", 0))
    for kind in kinds
}
"""How many bytes a header's value takes, by its type."""
_SIZED: Final = frozenset(b"SxAF")
"""Types whose values begin with their size."""
_NUMBERS: Final[Mapping[int, struct.Struct]] = {
    ord(kind): struct.Struct(f">{code}")
    for kind, code in zip("tbBsuIilLfd", ("?", "b", "B", "h", "H", "i", "I", "q", "q", "f", "d"), strict=True)
}
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_TEXT: Final = ord("S")


class Properties:
    """The properties of one message, as bytes.

    Attributes:
        values: Each property but the headers, by its name.
        fields: Each header by its name: its type and value.
    """

    __slots__ = ("fields", "values")

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.fields: dict[bytes, bytes] = {}

    @property
    def headers(self) -> dict[str, Value]:
        """The headers, decoded. Whatever is neither text nor a number is None."""
        return {str(name, "utf-8", "replace"): _decoded(field) for name, field in self.fields.items()}

    @property
    def message_id(self) -> str:
        """The message's id; empty where it has none."""
        return str(self.values.get("message_id", b"")[1:], "utf-8", "replace")

    @property
    def timestamp(self) -> int:
        """Seconds since the epoch; 0 where it has none."""
        return int.from_bytes(self.values.get("timestamp", b""), "big")

    def marshal(self) -> bytes:
        """Encode all properties."""
        values = self.values
        if self.fields:
            table = b"".join(bytes((len(name),)) + name + field for name, field in self.fields.items())
            values = {**values, "headers": _U32.pack(len(table)) + table}
        flags = sum(1 << 15 - place for place, name in enumerate(_NAMES) if name in values)
        return _U16.pack(flags) + b"".join(values[name] for name in _NAMES if name in values)


def parse(raw: bytes) -> Properties:
    """Parse properties, those of foreign messages included.

    Raises:
        DecodeError: The bytes are not properties of AMQP.
    """
    try:
        return _taken_apart(raw)
    except (ValueError, IndexError, struct.error) as exc:
        raise DecodeError(f"the properties cannot be read: {exc}") from exc


def encoded(value: str | int) -> bytes:
    """Encode a header's value as in a table, its type first."""
    if isinstance(value, int):
        return b"l" + value.to_bytes(8, "big", signed=True)
    raw = value.encode(errors="replace")
    return b"S" + _U32.pack(len(raw)) + raw


def _taken_apart(raw: bytes) -> Properties:
    properties = Properties()
    flags, position = _U16.unpack_from(raw)[0], 2
    for place, name in enumerate(_NAMES):
        if not flags & 1 << 15 - place:
            continue
        if name == "headers":
            end = position + 4 + _U32.unpack_from(raw, position)[0]
            properties.fields = _fields(raw, position + 4, end)
        else:
            end = position + (_SIZES.get(name) or 1 + raw[position])
            properties.values[name] = raw[position:end]
        position = end
    if position > len(raw) or flags & _UNKNOWN_FLAGS:
        raise ValueError("they are cut off, or have unknown flags")
    return properties


def _fields(raw: bytes, position: int, end: int) -> dict[bytes, bytes]:
    if end > len(raw):
        raise ValueError("the headers are cut off")
    found: dict[bytes, bytes] = {}
    while position < end:
        start = position + 1 + raw[position]
        kind = raw[start]
        if kind in _SIZED:
            after = start + 5 + _U32.unpack_from(raw, start + 1)[0]
        elif kind in _FIXED:
            after = start + 1 + _FIXED[kind]
        else:
            raise ValueError(f"a header is of the unknown type {chr(kind)!r}")
        if after > end:
            raise ValueError("a header is cut off")
        found[raw[position + 1 : start]] = raw[start:after]
        position = after
    return found


def _decoded(field: bytes) -> Value:
    kind = field[0]
    if kind == _TEXT:
        try:
            return str(field[5:], "utf-8")
        except UnicodeDecodeError:
            return None
    number = _NUMBERS.get(kind)
    if number is None:
        return None
    value: Value = number.unpack_from(field, 1)[0]
    return value
