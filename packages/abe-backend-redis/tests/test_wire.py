"""Envelopes to stream entries and back."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abe.backends.message_queue.base import Envelope, Metadata
from abe.errors import DecodeError
from abe_backend_redis import _wire

ENTRY = b"1700000000000-5"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
HEADERS = st.none() | st.dictionaries(TEXT, TEXT, min_size=1, max_size=5)


@given(id=TEXT, key=TEXT, published_at=st.integers(0, 2**53), headers=HEADERS, body=st.binary())
def test_what_was_packed_is_unpacked(
    id: str, key: str, published_at: int, headers: dict[str, str] | None, body: bytes
) -> None:
    header = _wire.pack(Envelope(id, key, body, published_at, headers))
    delivery = _wire.delivery(ENTRY, [b"m", header, b"p", body])
    assert (delivery.native, delivery.body, delivery.attempt, delivery.fault) == (ENTRY, body, 1, None)
    assert delivery.header == header
    assert _wire.unpack(header) == Metadata(id, key, published_at, headers)


def test_the_form_is_the_documented_one() -> None:
    assert _wire.pack(Envelope("a", "order.created", b"{}", 17)) == b'[1,"a","order.created",17]'
    assert _wire.pack(Envelope("a", "k", b"{}", 17, {"h": "\u00fc"})) == '[1,"a","k",17,{"h":"\u00fc"}]'.encode()


def test_fields_in_another_order_are_read_alike() -> None:
    delivery = _wire.delivery(ENTRY, [b"p", b"{}", b"x", b"ignored", b"m", b'[1,"a","k",17]'])
    assert (delivery.body, delivery.header, delivery.fault) == (b"{}", b'[1,"a","k",17]', None)


def test_earlier_deliveries_are_added_to_those_of_the_entry() -> None:
    delivery = _wire.delivery(ENTRY, [b"m", b'[1,"a","k",17]', b"p", b"{}", b"a", b"3"], 2)
    assert delivery.attempt == 5


def test_a_stranger_writes_a_body_alone() -> None:
    delivery = _wire.delivery(ENTRY, [b"p", b'{"a": 1}'])
    assert delivery.fault is None
    assert delivery.header == Metadata(ENTRY.decode(), "")


def test_a_stranger_may_name_the_key() -> None:
    assert _wire.delivery(ENTRY, [b"k", b"a.b", b"p", b"{}"]).header == Metadata(ENTRY.decode(), "a.b")
    assert _wire.delivery(ENTRY, [b"k", b"\xff", b"p", b"{}"]).header == Metadata(ENTRY.decode(), "\ufffd")


def test_an_entry_without_a_body_is_faulty() -> None:
    delivery = _wire.delivery(ENTRY, [b"foo", b"bar"])
    assert delivery.fault is not None
    assert delivery.body == b""


@pytest.mark.parametrize("header", [b'[2,"a","k",17]', b"[10,1]", b"", b"{}", b"\xff\x00", b"1"])
def test_an_envelope_of_another_version_is_faulty(header: bytes) -> None:
    delivery = _wire.delivery(ENTRY, [b"m", header, b"p", b"body"])
    assert delivery.fault is not None
    assert delivery.body == b"body"


@pytest.mark.parametrize(
    "header",
    [b"[1,", b"[1,]", b'[1,"a"]', b'[1,2,"k",17]', b'[1,"a","k","x"]', b'[1,"\xff","k",17]', b'[1,"\\ud800","k",17]',
     b'[1,"a","k",17,{"h":1}]', b'[1,"a","k",-1]', b'[1,"a","k",1%s]' % (b"0" * 400), b"[1,%s" % (b"[" * 2000)],
)  # fmt: skip
def test_a_broken_envelope_is_a_decode_error(header: bytes) -> None:
    assert _wire.delivery(ENTRY, [b"m", header, b"p", b"{}"]).header == header
    with pytest.raises(DecodeError, match="envelope"):
        _wire.unpack(header)


@given(fields=st.lists(st.sampled_from([b"m", b"p", b"a", b"k", b"r", b"e", b"t", b"x"]), max_size=8), data=st.data())
def test_no_entry_breaks_the_reader(fields: list[bytes], data: st.DataObject) -> None:
    values = st.binary(max_size=20) | st.just(b"9" * 5000) | st.just(b'[1,"a","k",17]')
    flat = [part for name in fields for part in (name, data.draw(values))]
    assert _wire.delivery(ENTRY, flat).native == ENTRY
    assert _wire.dead_letter(ENTRY, flat).attempts >= 0


def test_a_dead_letter_has_everything() -> None:
    letter = _wire.dead_letter(
        ENTRY,
        [b"m", b'[1,"a","k",1500,{"h":"v"}]', b"p", b"body", b"a", b"4", b"r", b"why", b"e", b"trace", b"t", b"2500"],
    )
    assert (letter.id, letter.key, letter.body, letter.headers) == ("a", "k", b"body", {"h": "v"})
    assert (letter.attempts, letter.reason, letter.error) == (4, "why", "trace")
    assert (letter.published_at, letter.dead_at) == (1.5, 2.5)


@pytest.mark.parametrize(
    "fields",
    [
        [b"p", b"raw"],
        [b"m", b"[1,broken", b"p", b"raw"],
        [b"m", b'[9,"x"]', b"p", b"raw"],
        [b"m", b'[1,"a","k",1%s]' % (b"0" * 400), b"p", b"raw"],
        [b"p", b"raw", b"a", b"many", b"t", b"-", b"r", b"\xff"],
    ],
)
def test_a_dead_letter_that_is_odd_is_shown_by_the_id_of_its_entry(fields: list[bytes]) -> None:
    letter = _wire.dead_letter(ENTRY, fields)
    assert (letter.id, letter.body, letter.attempts, letter.published_at) == (ENTRY.decode(), b"raw", 0, 0)


def test_nothing_is_read_from_fields_that_are_not_pairs() -> None:
    odd: Any = [b"p"]
    with pytest.raises(ValueError):
        _wire.delivery(ENTRY, odd)
