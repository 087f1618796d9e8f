"""Envelopes on SQS messages and back."""

import base64
import json
from typing import Any

import pytest

from abe.backends.message_queue.base import Envelope, Metadata
from abe_backend_sqs import _wire
from abe_backend_sqs._wire import BATCH, LIMIT, Entry

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


def test_the_size_is_counted_as_sqs_counts_it() -> None:
    entry = _wire.pack(Envelope("id", "k", "é".encode(), 5))
    assert entry.size == 2 + len("abe") + len("String") + len('[1,"id","k",5]')


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


def test_a_stranger_s_message_is_read_with_what_it_says() -> None:
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


def test_a_copy_says_the_same_and_keeps_a_stranger_s_attributes() -> None:
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


def test_what_sqs_itself_buried_is_a_dead_letter_too() -> None:
    letter = _wire.dead_letter(received(_wire.pack(Envelope("id", "k", b"{}", 1)), count=1001))
    assert (letter.reason, letter.attempts, letter.dead_at) == ("moved by SQS", 1000, 1.0)


def test_the_body_is_json_that_any_language_reads() -> None:
    assert json.loads(_wire.pack(Envelope("id", "k", b'{"n":1}', 1)).body) == {"n": 1}
