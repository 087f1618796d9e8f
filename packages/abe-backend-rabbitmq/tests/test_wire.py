"""Envelopes as AMQP properties, and properties that others wrote."""

import math
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import commands
from pamqp.header import ContentHeader

from abe.backends.message_queue.base import Envelope
from abe.errors import DecodeError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._properties import parse
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
    published_at=st.integers(0, 2**53 - 1),
    headers=st.none() | st.dictionaries(names, texts, max_size=5).map(lambda headers: headers or None),
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | texts
    | st.binary(max_size=9).map(bytearray)
    | st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1)).map(lambda when: when.replace(microsecond=0, tzinfo=UTC))
    | st.builds(
        lambda digits, scale: Decimal(digits).scaleb(-scale), st.integers(-(2**31), 2**31 - 1), st.integers(0, 255)
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts.filter(lambda t: len(t.encode()) < 256), inner, max_size=3)
    ),
)


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
    assert (delivery.receipt, delivery.body, delivery.attempt, delivery.fault) == (7, envelope.body, 1, None)
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
    by_another_hand = parse(raw).marshal()
    reordered = commands.Basic.Properties(
        **{name: getattr(parse(raw), name) for name in parse(raw).__slots__}
    ).marshal()
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
    assert set(parse(raw).headers or {}) == {"abe-version", "abe-published-at", "abe-headers", "x-request-id", "CCTV"}
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
@given(st.dictionaries(texts.filter(lambda text: len(text.encode()) < 256), values, max_size=4))
def test_headers_of_any_kind_survive_reading_and_writing(given: dict[str, Any]) -> None:
    properties = parse(
        b"\xb0\xc0"
        + stranger(content_type="a", headers={"k": 1}, delivery_mode=1, message_id="i", timestamp=datetime.now(UTC))[2:]
    )
    properties.headers = given
    assert parse(properties.marshal()).headers == given


def test_a_copy_keeps_what_the_stranger_gave_to_the_last_bit() -> None:
    given = {
        "share": 0.1,
        "n" * 200: "long",
        "raw": bytearray(b"\xff"),
        "latin": b"\xe9",
        "sum": Decimal("-20000000.01"),
        "deep": [{"a": math.inf}],
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
    properties.headers = given
    copied = parse(_wire.copy(header(properties.marshal()), b"", 2))
    assert copied.headers == given | {"abe-key": KEY, "abe-attempt": 2}
    assert (copied.content_type, copied.content_encoding, copied.correlation_id) == ("text/plain", "gzip", "c")
    assert (copied.reply_to, copied.priority, copied.delivery_mode) == ("r", 3, 2)


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
    assert (copied.expiration, copied.user_id, copied.delivery_mode) == (None, None, 2)


@unhurried
@given(envelopes, st.integers(0, 1000), st.integers(0, 5))
def test_a_copy_of_ours_says_what_the_message_said(envelope: Envelope, attempt: int, redelivered: int) -> None:
    raw = _wire.pack(envelope)
    for times in (attempt, attempt + 1):
        raw = _wire.copy(header(raw, envelope.key), envelope.body, times)
    moved = header(raw, "0.1.queue", "abe:test:due")
    assert _wire.metadata(moved, envelope.body) == (envelope.id, envelope.key, envelope.published_at, envelope.headers)
    counted = parse(raw)
    counted.headers = (counted.headers or {}) | {"x-delivery-count": redelivered}
    delivery = _wire.delivery(1, header(counted.marshal()), envelope.body, redelivered > 0)
    assert (delivery.attempt, delivery.fault) == (attempt + 1 + redelivered + 1, None)


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


def test_tables_without_end_inside_each_other_are_a_fault() -> None:
    table = b""
    for _ in range(9_000):
        table = b"\x01kF" + len(table).to_bytes(4, "big") + table
    raw = b"\x20\x00" + len(table).to_bytes(4, "big") + table
    assert "cannot be read" in (_wire.delivery(1, header(raw), b"", False).fault or "")


def test_an_envelope_of_another_version_is_a_fault() -> None:
    raw = stranger(headers={"abe-version": 9}, message_id="m")
    assert "version" in (_wire.delivery(1, header(raw), b"", False).fault or "")


@pytest.mark.parametrize("packed", ["", "[]", '{"a": 1}', "{"])
def test_headers_that_travelled_together_and_cannot_be_read_are_a_fault(packed: str) -> None:
    raw = stranger(headers={"abe-headers": packed, "n": "v"}, message_id="m")
    assert "headers" in (_wire.delivery(1, header(raw), b"", False).fault or "")
    with pytest.raises(DecodeError, match="headers"):
        _wire.metadata(header(raw), b"")
    assert _wire.dead_letter(header(raw), b"").id == "m"
