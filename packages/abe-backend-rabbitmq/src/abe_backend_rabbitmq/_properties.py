"""AMQP's properties and bytes: by pamqp, but so that headers keep their types. Pure.

pamqp would round doubles to floats, cut names off at 128 bytes, and refuse strings that are not UTF-8.
"""

import struct
from decimal import Decimal
from typing import Any, Final, cast

from pamqp import commands, encode
from pamqp.header import ContentHeader

from abe.errors import DecodeError

_BEFORE: Final = b"\x00\x3c\x00\x00" + bytes(8)
"""What stands before the properties in a content header."""

_sized: Final = struct.Struct(">cI").pack
_double: Final = struct.Struct(">cd").pack
_decimal: Final = struct.Struct(">cBi").pack


class Properties(commands.Basic.Properties):
    """Properties whose headers keep their types."""

    def encode_property(self, name: str, value: Any) -> bytes:
        """Encode a property."""
        return encoded(value)[1:] if name == "headers" else super().encode_property(name, value)


def parse(raw: bytes) -> Properties:
    """Read properties, whoever wrote them.

    Raises:
        DecodeError: They are not what AMQP writes.
    """
    properties = Properties()
    try:
        ContentHeader(properties=properties).unmarshal(_BEFORE + raw)
    except (ValueError, IndexError, struct.error, OverflowError, OSError, RecursionError) as exc:
        raise DecodeError(f"the properties cannot be read: {exc}") from exc
    return properties


def encoded(value: Any) -> bytes:
    """Return a header's value as it stands in a table, its type first."""
    match value:
        case str():
            raw = value.encode(errors="replace")
            return _sized(b"S", len(raw)) + raw
        case bytes():  # a string that is not UTF-8
            return _sized(b"S", len(value)) + value
        case bytearray():
            return _sized(b"x", len(value)) + value
        case int() if not isinstance(value, bool):
            return b"l" + value.to_bytes(8, "big", signed=True)
        case float():
            return _double(b"d", value)
        case Decimal():
            scale = -int(value.as_tuple().exponent)
            return _decimal(b"D", scale, int(value.scaleb(scale)))
        case list():
            raw = b"".join(encoded(each) for each in cast("Any", value))
            return _sized(b"A", len(raw)) + raw
        case dict():
            raw = b"".join(_sized_name(name) + encoded(each) for name, each in cast("Any", value).items())
            return _sized(b"F", len(raw)) + raw
        case _:
            return encode.encode_table_value(value)


def _sized_name(name: str) -> bytes:
    raw = name.encode()
    return bytes((len(raw),)) + raw
