"""Envelopes on SQS messages and back."""

import base64
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

from abe.backends.message_queue.base import Envelope, Metadata
from abe_backend_sqs import _wire
from abe_backend_sqs._wire import ATTRIBUTES, BATCH, LIMIT, RESERVE, Entry

HEADERS = {"h": "1", "nul": "\x00", "not a character": "\uffff"}


def received(entry: Entry, count: int = 1) -> dict[str, Any]:
    """Return what SQS would deliver for an entry."""
    return {
        "MessageId": "sqs-id",
        "ReceiptHandle": "handle",
        "Body": entry.body,
        "MessageAttributes": dict(entry.attributes),
        "Attributes": {"ApproximateReceiveCount": str(count), "SentTimestamp": "1000"},
    }


@pytest.mark.parametrize("body", [b'{"n":1}', '{"t":"é😀\uffff"}'.encode(), b"", b"\xff\x00", b"\x01", b"\n\t"])
def test_an_envelope_arrives_as_it_was_whatever_its_body(body: bytes) -> None:
    envelope = Envelope("id", "order.created", body, 1234, HEADERS)
    entry = _wire.pack(envelope)
    parsed = _wire.parse(received(entry))
    assert (parsed.metadata, parsed.body, parsed.fault) == (Metadata("id", "order.created", 1234, HEADERS), body, None)


@pytest.mark.parametrize("text", ["\x00", "\x1f", "\ufffe", "\uffff", "\x0b"])
def test_nothing_that_sqs_refuses_is_sent(text: str) -> None:
    entry = _wire.pack(Envelope("id", "k", text.encode(), 1, {"h": text, text: ""}))
    sent = entry.body + "".join(value["StringValue"] for value in entry.attributes.values())
    assert not set(sent) & set("\x00\x1f\ufffe\uffff\x0b")


def test_plain_json_is_sent_as_it_is_and_the_attribute_is_short() -> None:
    entry = _wire.pack(Envelope("id", "k", b'{"n":1}', 5))
    assert entry.body == '{"n":1}'
    assert entry.attributes["abe"]["StringValue"] == '[1,"id","k",5]'


@pytest.mark.parametrize("body", [b"{}", "é".encode(), b"", b"\xff", "\uffff".encode()])
@pytest.mark.parametrize("key", ["k", "é", "\uffff"])
def test_the_size_is_counted_as_sqs_counts_it(body: bytes, key: str) -> None:
    entry = _wire.pack(Envelope("id", key, body, 5))
    assert entry.size == measured(entry)
    assert _wire.pack(Envelope("id", "k", b"{}", 5)).size == 2 + len("abe") + len("String") + len('[1,"id","k",5]')


def test_batches_are_bounded_by_count_and_by_bytes_to_the_byte() -> None:
    small = Entry("x", {}, 1)
    assert [len(batch) for batch in _wire.batches([small] * 25)] == [BATCH, BATCH, 5]
    half, more = Entry("", {}, LIMIT // 2), Entry("", {}, LIMIT // 2 + 1)
    assert [list(batch) for batch in _wire.batches([half, half, half])] == [[0, 1], [2]]
    assert [list(batch) for batch in _wire.batches([half, more, half])] == [[0], [1], [2]]
    assert list(_wire.batches([])) == []


def test_the_attempt_is_what_sqs_counts_on_top_of_what_came_before() -> None:
    message = received(_wire.pack(Envelope("id", "k", b"{}", 1), attempts=3), count=2)
    assert _wire.delivery(message, _wire.parse(message)).attempt == 5


def test_a_foreign_message_is_read_with_what_it_says() -> None:
    plain = {"MessageId": "m", "ReceiptHandle": "h", "Body": '{"n":1}'}
    assert _wire.parse(plain).metadata == Metadata("m")
    named = {
        **plain,
        "Body": base64.b64encode(b"\xff").decode(),
        "MessageAttributes": {
            name: {"DataType": "String", "StringValue": text}
            for name, text in {"key": "k", "id": "i", "encoding": "base64"}.items()
        },
    }
    parsed = _wire.parse(named)
    assert (parsed.metadata, parsed.body, parsed.fault) == (Metadata("i", "k"), b"\xff", None)


@pytest.mark.parametrize("header", ['[9,"id","k",0]', "[1,", '[1,"id"]', '[1,"id","k",-1]', "{}", ""])
def test_an_envelope_that_cannot_be_read_is_a_fault_and_keeps_its_body(header: str) -> None:
    message = {
        "MessageId": "m",
        "ReceiptHandle": "h",
        "Body": "{}",
        "MessageAttributes": {"abe": {"DataType": "String", "StringValue": header}},
    }
    parsed = _wire.parse(message)
    assert parsed.fault
    assert parsed.body == b"{}"
    assert parsed.metadata.id == "m"
    again = _wire.repack(message, attempts=0)
    assert (again.body, again.attributes["abe"]["StringValue"]) == ("{}", header)


def test_a_copy_says_the_same_and_keeps_a_foreign_message_s_attributes() -> None:
    message = received(_wire.pack(Envelope("id", "k", b"{}", 7, HEADERS)))
    message["MessageAttributes"]["theirs"] = {"DataType": "Number", "StringValue": "1", "StringListValues": []}
    entry = _wire.repack(message, attempts=4, due=99)
    parsed = _wire.parse(received(entry))
    assert (parsed.metadata, parsed.attempts, parsed.due) == (Metadata("id", "k", 7, HEADERS), 4, 99)
    assert entry.attributes["theirs"] == {"DataType": "Number", "StringValue": "1"}


def test_a_dead_letter_tells_everything() -> None:
    message = received(_wire.pack(Envelope("id", "k", b"{}", 7000, HEADERS)), count=3)
    letter = _wire.dead_letter(received(_wire.bury(message, attempts=3, reason="why", error="trace\x00", at=9000)))
    assert (letter.id, letter.key, letter.body, letter.headers) == ("id", "k", b"{}", HEADERS)
    assert (letter.attempts, letter.reason, letter.error) == (3, "why", "trace\x00")
    assert (letter.published_at, letter.dead_at) == (7.0, 9.0)


def test_a_dead_letter_fits_however_long_the_error_is() -> None:
    message = received(_wire.pack(Envelope("id", "k", b"x" * 1_024_000, 1)))
    for error in ("e" * LIMIT, "\x00" * LIMIT, "😀" * LIMIT):
        entry = _wire.bury(message, attempts=1, reason=error, error=error, at=1)
        assert entry.size <= LIMIT
        assert _wire.dead_letter(received(entry)).reason


THEIRS = {f"theirs-{n}": {"DataType": "String", "StringValue": "x"} for n in range(ATTRIBUTES)}


def foreign(size: int, attributes: Mapping[str, Any] | None = None, group: str = "") -> dict[str, Any]:
    """Return a foreign message of exactly that size."""
    message = received(Entry("", attributes or {}, 0))
    message["Body"] = "x" * (size - measured(Entry("", attributes or {}, 0)))
    if group:
        message["Attributes"]["MessageGroupId"] = group
    return message


def measured(entry: Entry) -> int:
    """Count as SQS does: body, and names, types and values of attributes."""
    values = [part for name, value in entry.attributes.items() for part in (name, *value.values())]
    return sum(len(part if isinstance(part, bytes) else part.encode()) for part in (entry.body, *values))


def says(**attributes: str) -> dict[str, Any]:
    return {name: {"DataType": "String", "StringValue": text} for name, text in attributes.items()}


@pytest.mark.parametrize("left", [0, 1, 13, 40, 46, 64, 100, 143, 200, 300, 1_000, 10_000])
@pytest.mark.parametrize("attributes", [{}, THEIRS, says(key="k", id="i"), says(encoding="base64", id="i" * 500)])
@pytest.mark.parametrize("group", ["", "g" * 128])
def test_a_copy_of_any_message_is_one_that_sqs_takes(left: int, attributes: dict[str, Any], group: str) -> None:
    message = foreign(LIMIT - left, attributes, group)
    if "encoding" in attributes:
        message["Body"] = (b"/" * (len(message["Body"]) // 4 * 4)).decode()  # no text when decoded
    before = _wire.parse(message)
    dead = _wire.bury(message, attempts=5, reason="r" * 200, error="e" * 20_000, at=9000)
    again = _wire.repack(message, attempts=2, due=2**41)
    assert (dead.body, again.body) == (message["Body"], message["Body"])
    for entry in (dead, _wire.leaving(message, dead), again, _wire.leaving(message, again)):
        assert entry.size == measured(entry) <= LIMIT
        assert len(entry.attributes) <= ATTRIBUTES
        after = _wire.parse(received(entry))
        assert (after.metadata, after.body, after.fault) == (before.metadata, before.body, None)
    letter = _wire.dead_letter(received(dead))
    assert letter.body == before.body
    assert (letter.attempts, letter.dead_at) == (5, 9.0) or left < 46


def test_ten_attributes_are_ten_with_ours_among_them() -> None:
    message = foreign(1_000, {**THEIRS, **says(key="k", id="i", encoding="x")}, "group")
    for _ in range(3):
        del message["MessageAttributes"][next(iter(message["MessageAttributes"]))]
    dead = _wire.leaving(message, _wire.bury(message, attempts=1, reason="why", error="", at=1))
    assert {"abe-dead", "abe-order", "key", "id", "encoding"} < set(dead.attributes)
    assert len(dead.attributes) == ATTRIBUTES
    again = _wire.leaving(message, _wire.repack(message, attempts=1))
    assert [name for name in again.attributes if not name.startswith("theirs")] == ["abe", "abe-order", "encoding"]
    assert len(again.attributes) == ATTRIBUTES


def test_the_texts_go_before_a_foreign_message_s_attributes_and_these_before_the_note() -> None:
    note = len("abe-dead") + len("String") + len('[1,"","",1]')
    bury = partial(_wire.bury, attempts=1, reason="why", error="trace", at=1)
    nine = dict(list(THEIRS.items())[:-1])
    exact = bury(foreign(LIMIT - note, nine | says(key="k")))
    assert exact.size == LIMIT - len("theirs-9Stringx")
    one = dict(list(THEIRS.items())[:1])
    exact = bury(foreign(LIMIT - note, one))
    assert (exact.size, set(exact.attributes)) == (LIMIT, {"abe-dead", "theirs-0"})
    tight = bury(foreign(LIMIT - note + 1, one))
    assert set(tight.attributes) == {"abe-dead"}
    full = bury(foreign(LIMIT - note + 1))
    assert not full.attributes
    assert "no room" in _wire.dead_letter(received(full)).reason


def test_the_texts_take_what_is_left_and_leave_the_message_group_its_room() -> None:
    message = foreign(LIMIT - 1_000, group="g" * 128)
    entry = _wire.leaving(message, _wire.bury(message, attempts=1, reason="why", error="e" * 5_000, at=1))
    letter = _wire.dead_letter(received(entry))
    assert letter.reason == "why"
    assert 300 < len(letter.error) < 1_000
    assert _wire.order(received(entry)) == "g" * 128
    assert entry.size <= LIMIT


def test_a_body_that_is_not_the_base64_it_is_said_to_be_is_a_fault_in_its_copies_too() -> None:
    message = received(Entry("no base64!", says(encoding="base64", key="k"), 0))
    again = received(_wire.repack(message, attempts=1))
    assert _wire.parse(message).fault == _wire.parse(again).fault is not None
    assert again["Body"] == "no base64!"


def test_ours_of_the_largest_size_keeps_everything() -> None:
    entry = _wire.pack(Envelope("id", "k", b"x" * (LIMIT - RESERVE - 26), 7000))
    assert entry.size == LIMIT - RESERVE
    message = received(entry)
    message["Attributes"]["MessageGroupId"] = "g" * 128
    again = received(_wire.leaving(message, _wire.repack(message, attempts=2**31, due=2**41)))
    assert set(again["MessageAttributes"]) == {"abe", "abe-order"}
    dead = _wire.leaving(again, _wire.bury(again, attempts=2**31, reason="", error="", at=2**41))
    assert set(dead.attributes) == {"abe", "abe-order", "abe-dead"}
    assert dead.size <= LIMIT


def test_what_sqs_itself_buried_is_a_dead_letter_too() -> None:
    letter = _wire.dead_letter(received(_wire.pack(Envelope("id", "k", b"{}", 1)), count=1001))
    assert (letter.reason, letter.attempts, letter.dead_at) == ("moved by SQS", 1000, 1.0)


def test_the_body_is_json_that_any_language_reads() -> None:
    assert json.loads(_wire.pack(Envelope("id", "k", b'{"n":1}', 1)).body) == {"n": 1}
