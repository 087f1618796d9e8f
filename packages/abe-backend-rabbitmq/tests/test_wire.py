"""Envelopes as AMQP properties, and properties that others wrote."""

import struct
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import commands
from pamqp.header import ContentHeader

from abe.backends.message_queue.base import Envelope
from abe.errors import DecodeError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._properties import encoded, parse
from abe_backend_rabbitmq._wire import Header

FRAME = 128 * 1024
unhurried = settings(deadline=None)
KEY = "orders.created"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ids = texts.filter(lambda text: 1 <= len(text.encode()) <= 200)
names = (
    st.sampled_from(
        [
            "x-request-id",
            "x-death",
            "x-delivery-count",
            "x-opt-1",
            "CC",
            "BCC",
            "CCTV",
            "abe-key",
            "abe-attempt",
            "n" * 129,
        ]
    )
    | st.builds("{}{}".format, st.sampled_from(["", "x-", "abe-", "CC", "é"]), texts)
).filter(bool)
envelopes = st.builds(
    Envelope,
    id=ids,
    key=ids,
    body=st.binary(max_size=20),
    published_at=st.integers(0, 253_402_300_799_999),
    headers=st.none() | st.dictionaries(names, texts, max_size=5).map(lambda headers: headers or None),
)


def sized(kind: bytes, value: bytes) -> bytes:
    return kind + len(value).to_bytes(4, "big") + value


def table(fields: dict[bytes, bytes]) -> bytes:
    return b"".join(bytes((len(name),)) + name + field for name, field in fields.items())


def fixed(kinds: str, size: int) -> st.SearchStrategy[bytes]:
    return st.builds(
        bytes.__add__, st.sampled_from([kind.encode() for kind in kinds]), st.binary(min_size=size, max_size=size)
    )


odd_names = (st.binary(min_size=1, max_size=9) | st.just(b"n" * 255)).filter(lambda name: not name.startswith(b"abe-"))
fields = st.recursive(
    fixed("tbB", 1)
    | fixed("su", 2)
    | fixed("Iif", 4)
    | fixed("D", 5)
    | fixed("lLdT", 8)
    | fixed("V", 0)
    | st.builds(sized, st.sampled_from([b"S", b"x"]), st.binary(max_size=9)),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda each: sized(b"A", b"".join(each)))
        | st.dictionaries(odd_names, inner, max_size=3).map(lambda each: sized(b"F", table(each)))
    ),
)
"""Headers' values of every type that AMQP has, as they stand."""


def with_headers(given: dict[bytes, bytes], flags: bytes = b"\x20\x00", rest: bytes = b"") -> bytes:
    headers = table(given)
    return flags + len(headers).to_bytes(4, "big") + headers + rest


def nested(depth: int) -> bytes:
    """A table in a table in a table."""
    value = b"V"
    for level in range(depth):
        value = sized(b"F", b"\x01k" + value) if level % 2 else sized(b"A", value)
    return value


def header(raw: bytes, key: str = KEY, exchange: str = "abe:test") -> Header:
    return Header(raw, exchange, key)


def stranger(**properties: Any) -> bytes:
    """Properties as a client on pamqp writes them."""
    return commands.Basic.Properties(**properties).marshal()


def read_by_pamqp(raw: bytes) -> commands.Basic.Properties:
    content = ContentHeader()
    content.unmarshal(b"\x00\x3c\x00\x00" + bytes(8) + raw)
    return content.properties


@unhurried
@given(envelopes)
def test_what_is_packed_is_read_again(envelope: Envelope) -> None:
    raw = _wire.pack(envelope)
    delivery = _wire.delivery(7, header(raw, envelope.key), envelope.body, False)
    assert (delivery.native, delivery.body, delivery.attempt, delivery.fault) == (7, envelope.body, 1, None)
    assert _wire.metadata(header(raw, envelope.key), envelope.body) == (
        envelope.id,
        envelope.key,
        envelope.published_at,
        envelope.headers,
    )
    assert _wire.message_id(raw) == envelope.id


@unhurried
@given(envelopes)
def test_pamqp_reads_what_is_packed(envelope: Envelope) -> None:
    properties = read_by_pamqp(_wire.pack(envelope, ("abe-key", envelope.key), ("abe-due", 12)))
    assert properties.message_id == envelope.id
    assert (properties.content_type, properties.delivery_mode) == ("application/json", 2)
    headers = properties.headers or {}
    assert headers["abe-published-at"] == envelope.published_at
    assert (headers["abe-version"], headers["abe-key"], headers["abe-due"]) == (_wire.VERSION, envelope.key, 12)
    for name, value in (envelope.headers or {}).items():
        if (
            not name.startswith(("x-death", "x-delivery-count", "x-opt-", "abe-"))
            and name not in ("CC", "BCC")
            and len(name.encode()) <= 128
        ):
            assert headers[name] == value


@unhurried
@given(envelopes)
def test_the_short_way_of_reading_agrees_with_the_long_one(envelope: Envelope) -> None:
    raw = _wire.pack(envelope)
    parsed = parse(raw)
    parsed.fields = dict(sorted(parsed.fields.items(), reverse=True))
    by_another_hand, reordered = read_by_pamqp(raw).marshal(), parsed.marshal()
    found = _wire.metadata(header(raw), b"")
    assert found == _wire.metadata(header(by_another_hand), b"") == _wire.metadata(header(reordered), b"")


def test_names_that_rabbitmq_uses_never_stand_in_the_table_of_headers() -> None:
    reserved = {
        "x-death": "a",
        "x-delivery-count": "b",
        "x-first-death-queue": "c",
        "CC": "d",
        "BCC": "e",
        "abe-attempt": "f",
    }
    raw = _wire.pack(Envelope("1", KEY, b"", 1, reserved | {"x-request-id": "g", "CCTV": "h"}))
    assert set(parse(raw).headers) == {"abe-version", "abe-published-at", "abe-headers", "x-request-id", "CCTV"}
    assert _wire.delivery(1, header(raw), b"", False).attempt == 1


def test_a_stranger_needs_no_properties() -> None:
    raw = stranger()
    first, again = (_wire.metadata(header(raw), b'{"a": 1}') for _ in range(2))
    assert first == again
    assert first.id
    assert first[1:] == (KEY, 0, None)
    assert _wire.metadata(header(raw), b'{"a": 2}').id != first.id
    delivery = _wire.delivery(1, header(raw), b"", False)
    assert (delivery.attempt, delivery.fault) == (1, None)


def test_a_stranger_s_message_keeps_its_id_when_it_is_delivered_again() -> None:
    first = _wire.metadata(header(stranger()), b"x").id
    again = header(stranger(headers={"x-delivery-count": 3}))
    assert _wire.metadata(again, b"x").id == first
    assert parse(_wire.copy(again, b"x", 4)).message_id == first
    assert _wire.delivery(1, again, b"x", True).attempt == 4


def test_a_stranger_s_headers_are_read_as_text_where_they_can_be() -> None:
    given = {
        "name": "é",
        "number": 5,
        "large": -(2**40),
        "share": 1.5,
        "x-request-id": "r",
        "table": {"a": {"b": 1}},
        "array": [1, "a"],
        "nothing": None,
        "CC": ["other"],
        "x-death": [{"count": 1}],
    }
    when = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    found = _wire.metadata(header(stranger(headers=given, timestamp=when, message_id="m")), b"")
    assert found.headers == {"name": "é", "number": "5", "large": str(-(2**40)), "share": "1.5", "x-request-id": "r"}
    assert (found.id, found.published_at) == ("m", int(when.timestamp() * 1000))


@unhurried
@given(st.dictionaries(odd_names, fields, max_size=4))
def test_headers_of_any_kind_survive_reading_and_copying(given: dict[bytes, bytes]) -> None:
    raw = with_headers(given)
    assert parse(raw).fields == given
    assert parse(parse(raw).marshal()).fields == given
    delivery = _wire.delivery(1, header(raw), b"{}", False)
    assert (delivery.attempt, delivery.fault) == (1, None)
    _wire.metadata(header(raw), b"{}")
    _wire.dead_letter(header(raw), b"{}")
    copied = parse(_wire.copy(header(raw), b"{}", 2)).fields
    assert {name: field for name, field in copied.items() if not name.startswith(b"abe-")} == {
        name: field for name, field in given.items() if name not in (b"CC", b"BCC")
    }


def test_a_copy_keeps_what_the_stranger_gave_to_the_last_bit() -> None:
    given = {
        b"share": b"d" + struct.pack(">d", 0.1),
        b"n" * 200: sized(b"S", b"long"),
        b"raw": sized(b"x", b"\xff"),
        b"latin": sized(b"S", b"\xe9"),
        b"\xff": sized(b"S", b"a name that is no text"),
        b"sum": b"D\x02" + struct.pack(">i", -2_000_000_001),
        b"never": b"T" + b"\xff" * 8,
        b"deep": nested(1_000),
    }
    properties = parse(
        stranger(
            content_type="text/plain",
            content_encoding="gzip",
            correlation_id="c",
            reply_to="r",
            priority=3,
            headers={"k": 1},
        )
    )
    properties.fields = given
    raw = _wire.copy(header(properties.marshal()), b"", 2)
    copied = parse(raw)
    assert copied.fields == given | {
        b"abe-key": sized(b"S", KEY.encode()),
        b"abe-attempt": b"l" + (2).to_bytes(8, "big"),
    }
    assert properties.values.items() < (copied.values | {"delivery_mode": b"", "message_id": b""}).items() | {
        ("delivery_mode", b"\x02")
    }
    del copied.fields[b"deep"], copied.fields[b"never"], copied.fields[b"\xff"]
    read = read_by_pamqp(copied.marshal())
    assert (read.content_type, read.content_encoding, read.correlation_id) == ("text/plain", "gzip", "c")
    assert (read.reply_to, read.priority, read.delivery_mode) == ("r", 3, 2)


def test_a_copy_leaves_out_what_the_broker_added() -> None:
    given = {
        "x-death": [{"count": 2, "queue": "q"}],
        "x-first-death-queue": "q",
        "x-last-death-reason": "expired",
        "x-delivery-count": 3,
        "CC": ["other"],
        "abe-due": 5,
        "x-request-id": "r",
    }
    raw = stranger(headers=given, message_id="m", expiration="100", user_id="guest", delivery_mode=1)
    copied = parse(_wire.copy(header(raw), b"", 2))
    assert copied.headers == {"x-request-id": "r", "abe-key": KEY, "abe-attempt": 2}
    assert copied.values == {"delivery_mode": b"\x02", "message_id": b"\x01m"}


@unhurried
@given(envelopes, st.integers(0, 1000), st.integers(0, 5))
def test_a_copy_of_ours_says_what_the_message_said(envelope: Envelope, attempt: int, redelivered: int) -> None:
    raw = _wire.pack(envelope)
    for times in (attempt, attempt + 1):
        raw = _wire.copy(header(raw, envelope.key), envelope.body, times)
    moved = header(raw, "0.1.queue", "abe:test:due")
    assert _wire.metadata(moved, envelope.body) == (envelope.id, envelope.key, envelope.published_at, envelope.headers)
    counted = parse(raw)
    counted.fields[b"x-delivery-count"] = encoded(redelivered)
    delivery = _wire.delivery(1, header(counted.marshal()), envelope.body, redelivered > 0)
    assert (delivery.attempt, delivery.fault) == (attempt + 1 + redelivered + 1, None)
    assert delivery.uncertain == redelivered


@unhurried
@given(envelopes, texts, texts)
def test_a_dead_letter_says_what_became_of_the_message(envelope: Envelope, reason: str, error: str) -> None:
    raw = _wire.buried(header(_wire.pack(envelope), envelope.key), envelope.body, 3, reason, error)
    letter = _wire.dead_letter(Header(raw, "", "abe:test:dead:g"), envelope.body)
    assert (letter.id, letter.key, letter.body, letter.attempts) == (envelope.id, envelope.key, envelope.body, 3)
    assert (letter.reason, letter.error) == (reason, error)
    assert letter.headers == (envelope.headers or {})
    assert letter.published_at == envelope.published_at / 1000
    assert letter.dead_at > 1_700_000_000


@pytest.mark.parametrize("own", [0, 16_000, 60_000, 120_000, FRAME - 60], ids=str)
def test_a_dead_letter_fits_into_one_frame_whatever_the_texts(own: int) -> None:
    raw = stranger(headers={"h": "v" * own}, message_id="m")
    raw = _wire.buried(header(raw), b"", 2, "é" * 100_000, "\U0001f600" * 100_000 + "the end")
    assert len(raw) + 20 <= FRAME
    letter = _wire.dead_letter(Header(raw, "", "dead"), b"")
    assert (letter.id, letter.key, letter.attempts) == ("m", KEY, 2)
    if own <= 60_000:
        assert letter.headers == {"h": "v" * own}
        assert letter.reason.startswith("é" * 1000)
        assert letter.error.endswith("\U0001f600" * 1000 + "the end")


def test_text_that_is_no_unicode_can_be_written_into_a_dead_letter() -> None:
    raw = _wire.buried(header(stranger()), b"", 1, "\udcff", "a\ud800b")
    letter = _wire.dead_letter(Header(raw, "", "dead"), b"")
    assert (letter.reason, letter.error) == ("?", "a?b")


def test_the_broker_s_dead_letter_is_read_too() -> None:
    raw = stranger(headers={"x-death": [{"count": 1}], "x-delivery-count": 1000, "n": "v"}, message_id="m")
    letter = _wire.dead_letter(Header(raw, "", "dead"), b"b")
    assert (letter.id, letter.key, letter.attempts, letter.headers) == ("m", "", 1001, {"n": "v"})
    assert (letter.reason, letter.dead_at) == ("dead-lettered by the broker", 0)


@unhurried
@given(st.binary(max_size=60))
def test_bytes_that_are_no_properties_are_a_fault_and_nothing_else(raw: bytes) -> None:
    delivery = _wire.delivery(1, header(raw), b"{}", False)
    assert delivery.attempt >= 1
    if delivery.fault is None:
        _wire.metadata(header(raw), b"{}")
    assert _wire.dead_letter(header(raw), b"{}").body == b"{}"
    parse(_wire.copy(header(raw), b"{}", 1))
    _wire.message_id(raw)
    _wire.due(header(raw))
    _wire.routing_key(header(raw))


@unhurried
@given(envelopes, st.data())
def test_properties_of_ours_that_were_damaged_are_an_error_of_ours(envelope: Envelope, data: st.DataObject) -> None:
    raw = bytearray(_wire.pack(envelope))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    for redelivered in (False, True):
        _wire.delivery(1, header(damaged), b"", redelivered)
    with suppress(DecodeError):
        _wire.metadata(header(damaged), b"")
    parse(_wire.copy(header(damaged), b"", 1))


@pytest.mark.parametrize("depth", [10, 300, 9_000])
def test_tables_inside_each_other_are_carried_however_deep_they_go(depth: int) -> None:
    raw = with_headers({b"deep": nested(depth), b"name": sized(b"S", b"v")})
    delivery = _wire.delivery(1, header(raw), b"{}", False)
    assert (delivery.attempt, delivery.fault) == (1, None)
    assert _wire.metadata(header(raw), b"{}").headers == {"name": "v"}
    assert parse(_wire.copy(header(raw), b"{}", 2)).fields[b"deep"] == nested(depth)
    letter = _wire.dead_letter(header(_wire.buried(header(raw), b"{}", 2, "reason", "error")), b"{}")
    assert (letter.key, letter.headers, letter.reason) == (KEY, {"name": "v"}, "reason")


@pytest.mark.parametrize("seconds", [2**64 - 1, 2**63, 1_700_000_000_000, 253_402_300_800])
def test_a_time_that_is_none_is_left_out_and_the_message_is_read(seconds: int) -> None:
    raw = b"\x00\x40" + seconds.to_bytes(8, "big")
    assert _wire.delivery(1, header(raw), b"{}", False).fault is None
    assert _wire.metadata(header(raw), b"{}").published_at == 0
    assert _wire.dead_letter(header(raw), b"{}").published_at == 0
    ours = _wire.pack(Envelope("i", KEY, b"", seconds * 1000 % 2**63 | 1 << 60))
    assert _wire.metadata(header(ours), b"").published_at in (0, (seconds * 1000 % 2**63 | 1 << 60) // 1000 * 1000)


def test_text_that_is_none_costs_the_message_nothing() -> None:
    raw = with_headers(
        {b"name": sized(b"S", b"\xff\xfe"), b"\xff": sized(b"S", b"v"), b"good": sized(b"S", "é".encode())},
        b"\x20\x80",
        b"\x02\xff\xfe",
    )
    assert _wire.delivery(1, header(raw), b"{}", False).fault is None
    found = _wire.metadata(header(raw), b"{}")
    assert found.id == "\ufffd\ufffd"
    assert found.headers == {"\ufffd": "v", "good": "é"}
    assert parse(_wire.copy(header(raw), b"{}", 2)).values["message_id"] == b"\x02\xff\xfe"


def test_an_envelope_of_another_version_is_a_fault() -> None:
    raw = stranger(headers={"abe-version": 9}, message_id="m")
    assert "version" in (_wire.delivery(1, header(raw), b"", False).fault or "")


@pytest.mark.parametrize("packed", ["", "[]", '{"a": 1}', "{", "[" * 10_000, '{"a":' * 10_000])
def test_headers_that_travelled_together_and_cannot_be_read_are_a_fault(packed: str) -> None:
    raw = stranger(headers={"abe-headers": packed, "n": "v"}, message_id="m")
    assert "headers" in (_wire.delivery(1, header(raw), b"", False).fault or "")
    with pytest.raises(DecodeError, match="headers"):
        _wire.metadata(header(raw), b"")
    assert _wire.dead_letter(header(raw), b"").id == "m"


def test_a_copy_that_was_given_back_keeps_its_uncertain_attempts_apart() -> None:
    sent = header(_wire.pack(Envelope("id", "k", b"{}", 1)))
    given_back = header(_wire.copy(sent, b"{}", 5, ("abe-uncertain", 3)))
    again = _wire.delivery(1, given_back, b"{}", False)
    assert (again.attempt, again.uncertain) == (6, 3)
    assert _wire.doubts(given_back) == (3, 0)
    certain = _wire.delivery(1, header(_wire.copy(given_back, b"{}", 5)), b"{}", False)
    assert (certain.attempt, certain.uncertain) == (6, 0)
