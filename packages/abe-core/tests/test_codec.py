"""JSON: everything it can hold comes back the same, everything else is refused."""

import datetime
import decimal
import enum
import json
import math
import struct
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abe.codec import Codec, JSONCodec
from abe.errors import DecodeError, PayloadError

CODEC: Codec = JSONCodec()


class Text(str):
    __slots__ = ()


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)
PAYLOADS = st.dictionaries(TEXT, VALUES, max_size=5)


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal in value and type, floats to the bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    return bool(left == right)


def there_and_back(payload: dict[str, Any]) -> dict[str, Any]:
    return CODEC.decode(CODEC.encode(payload))


def nested(depth: int, leaf: Any) -> dict[str, Any]:
    for level in range(depth - 1):
        leaf = {"a": leaf} if level % 2 else [leaf]
    return {"a": leaf}


@contextmanager
def digit_limit(limit: int) -> Iterator[None]:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(limit)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


@given(PAYLOADS)
def test_every_json_value_comes_back_equal_in_value_and_type(payload: dict[str, Any]) -> None:
    assert same(there_and_back(payload), payload)


@given(PAYLOADS)
def test_every_language_can_read_the_body(payload: dict[str, Any]) -> None:
    assert same(json.loads(CODEC.encode(payload).decode("utf-8")), payload)


@given(PAYLOADS)
def test_what_another_writer_wrote_is_read(payload: dict[str, Any]) -> None:
    assert same(CODEC.decode(json.dumps(payload, indent=1).encode()), payload)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_comes_back_to_the_bit(value: float) -> None:
    assert same(there_and_back({"a": value}), {"a": value})


@pytest.mark.parametrize("value", [-0.0, 0.0, 5e-324, sys.float_info.max, sys.float_info.min, 0.1, 1e16, 1e22, 1.0])
def test_the_edges_of_floats_stay_floats(value: float) -> None:
    assert same(there_and_back({"a": value}), {"a": value})


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 2**64 - 1, 2**64, 10**4298, -(10**4298)])
def test_an_integer_of_any_size_that_python_will_print_comes_back(value: int) -> None:
    assert same(there_and_back({"a": value}), {"a": value})


@pytest.mark.parametrize("sign", [1, -1])
def test_an_integer_beyond_python_s_limit_on_digits_is_refused_and_never_shortened(sign: int) -> None:
    with digit_limit(0):
        value = sign * (10**5000 + 1)
        with pytest.raises(PayloadError):
            CODEC.encode({"a": value})
    with digit_limit(4300), pytest.raises(PayloadError):
        CODEC.encode({"a": value})


@pytest.mark.parametrize("digits", [4301, 10_000])
def test_a_received_integer_beyond_the_limit_cannot_be_decoded_and_says_so(digits: int) -> None:
    with pytest.raises(DecodeError):
        CODEC.decode(b'{"a":' + b"9" * digits + b"}")


def test_a_payload_nested_200_deep_comes_back() -> None:
    assert same(there_and_back(nested(200, 1)), nested(200, 1))


@pytest.mark.parametrize(
    "payload", [{}, {"": ""}, {"a": []}, {"a": {}}, {"a": [[], {}, ""]}, {"a": None}, {"\x00\U0010ffff": "\u2028\x7f"}]
)
def test_the_empty_and_the_odd_come_back(payload: dict[str, Any]) -> None:
    assert same(there_and_back(payload), payload)


class Colour(enum.Enum):
    RED = "red"


class Number(int):
    pass


class Struct(msgspec.Struct):
    a: int = 1


REFUSED: dict[str, tuple[Any, str]] = {
    "nan": (math.nan, "payload['a'] is nan"),
    "infinity": (math.inf, "payload['a'] is inf"),
    "minus infinity": (-math.inf, "payload['a'] is -inf"),
    "nested nan": ([{"b": math.nan}], "payload['a'][0]['b'] is nan"),
    "tuple": ((1, 2), "payload['a'] is a tuple"),
    "empty tuple": ((), "payload['a'] is a tuple"),
    "set": ({1}, "payload['a'] is a set"),
    "frozenset": (frozenset({1}), "payload['a'] is a frozenset"),
    "bytes": (b"abc", "payload['a'] is a bytes"),
    "bytearray": (bytearray(b"abc"), "payload['a'] is a bytearray"),
    "memoryview": (memoryview(b"abc"), "payload['a'] is a memoryview"),
    "integer key": ({1: 2}, "payload['a'] has a key that is a int; keys must be strings"),
    "float key": ({1.5: 2}, "payload['a'] has a key that is a float; keys must be strings"),
    "boolean key": ({True: 2}, "payload['a'] has a key that is a bool; keys must be strings"),
    "null key": ({None: 2}, "payload['a'] has a key that is a NoneType; keys must be strings"),
    "tuple key": ({(1,): 2}, "payload['a'] has a key that is a tuple; keys must be strings"),
    "bytes key": ({b"b": 2}, "payload['a'] has a key that is a bytes; keys must be strings"),
    "lone surrogate": ("\ud800", "payload['a'] holds half a character"),
    "lone surrogate in a key": ({"\udfff": 1}, "a key of payload['a'] holds half a character"),
    "decimal": (decimal.Decimal("1.5"), "payload['a'] is a Decimal"),
    "datetime": (datetime.datetime.now(tz=datetime.UTC), "payload['a'] is a datetime"),
    "date": (datetime.date(2026, 1, 1), "payload['a'] is a date"),
    "uuid": (uuid.uuid4(), "payload['a'] is a UUID"),
    "enum": (Colour.RED, "payload['a'] is a Colour"),
    "struct": (Struct(), "payload['a'] is a Struct"),
    "raw": (msgspec.Raw(b"1"), "payload['a'] is a Raw"),
    "object": (object(), "not JSON"),
    "subclass of str": (Text("a"), "Text"),
    "subclass of int": (Number(1), "Number"),
    "complex": (1j, "not JSON"),
    "ellipsis": (..., "not JSON"),
    "generator": ((item for item in "ab"), "not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_json_cannot_hold_is_refused_with_where_it_is(name: str) -> None:
    value, text = REFUSED[name]
    with pytest.raises(PayloadError) as caught:
        CODEC.encode({"a": value})
    assert "not JSON" in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_at_any_depth(name: str) -> None:
    with pytest.raises(PayloadError):
        CODEC.encode(nested(50, REFUSED[name][0]))


@pytest.mark.parametrize("payload", [None, [], [1], "a", 1, 1.5, True, b"{}", ("a",), {1: 2}, {"\ud800": 1}, Struct])
def test_a_payload_that_is_no_object_is_refused(payload: Any) -> None:
    with pytest.raises(PayloadError):
        CODEC.encode(payload)


def test_keys_that_would_become_one_are_refused() -> None:
    with pytest.raises(PayloadError, match="has a key that is a int"):
        CODEC.encode({"a": {1: "x", "1": "x"}})


def test_a_payload_that_holds_itself_is_refused() -> None:
    payload: dict[str, Any] = {}
    payload["a"] = [payload]
    with pytest.raises(PayloadError):
        CODEC.encode(payload)


@pytest.mark.parametrize("leaf", [1, math.nan], ids=["good leaf", "bad leaf"])
def test_no_depth_escapes_as_another_error(leaf: Any) -> None:
    # The interpreter's limits on depth, of its own and of C code, lie somewhere in here.
    for depth in (*range(700, 1100), 5_000, 100_000):
        payload = nested(depth, leaf)
        with suppress(PayloadError):
            CODEC.encode(payload)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b'"a"',
        b"{",
        b'{"a":1}x',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b"{'a':1}",
        b"{a:1}",
        b'{"a":1,}',
        b'{1:"a"}',
        b'{"a":"\xff"}',
        b"\xff\xfe",
        '{"a":1}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b'{"a":"\\ud800"}',
        b'{"a":' * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94.",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_json_object_cannot_be_decoded(body: bytes) -> None:
    with pytest.raises(DecodeError):
        CODEC.decode(body)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_decode_error(body: bytes) -> None:
    with suppress(DecodeError):
        assert isinstance(CODEC.decode(body), dict)


def test_the_error_keeps_the_parser_s_own_as_its_cause() -> None:
    with pytest.raises(DecodeError) as caught:
        CODEC.decode(b"{")
    assert isinstance(caught.value.__cause__, msgspec.DecodeError)


def test_with_types_plain_json_is_what_it_was() -> None:
    codec, payload = JSONCodec(types=True), {"a": [1, 1.5, "b", None, True, {"c": 10**40}]}
    assert codec.encode(payload) == CODEC.encode(payload)
    for depth in (700, 5_000, 100_000):
        with suppress(PayloadError):
            codec.encode(nested(depth, 1))


@attrs.define
class Private:
    _id: int
    name: str = "x"


@dataclass
class Ware:
    n: int = 1


@dataclass
class Gift(Ware):
    to: str = "you"


@dataclass
class Parcel:
    ware: Ware
    tags: set[str] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Counting:
    n: int

    def __post_init__(self) -> None:
        self.n += 1


@pytest.mark.parametrize(
    "payload", [Private(1), Ware(n="1"), Parcel(Gift()), Counting(1)],  # type: ignore[arg-type]
    ids=lambda payload: type(payload).__name__,
)  # fmt: skip
def test_what_its_class_does_not_read_back_is_refused(payload: object) -> None:
    with pytest.raises(PayloadError, match="cannot be published as it is: its class does not decode its JSON"):
        JSONCodec().encode(payload)


def test_sets_and_dates_in_any_field_are_read_back() -> None:
    JSONCodec().encode(Parcel(Ware(), {"a", "b", "c", "d"}, {"since": datetime.date(2026, 1, 1), "share": 1.0}))
