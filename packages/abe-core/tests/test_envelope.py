"""The envelope's header: what is written is read again, and what others wrote is a fault and no crash."""

from dataclasses import asdict
from typing import Any

import pytest

from abe.backends.message_queue.base import Envelope, Metadata
from abe.backends.message_queue.base.envelope import (
    MARK,
    UNKNOWN_VERSION,
    Header,
    HeaderDecoder,
    dead_letter,
    encode_header,
    metadata_of,
)
from abe.errors import DecodeError


class Longer(Header, array_like=True, frozen=True):
    """A provider's header."""

    attempts: int = 0


decode = HeaderDecoder(Header)


@pytest.mark.parametrize("headers", [None, {}, {"a": "b", "é": "\N{SNOWMAN}"}])
def test_a_header_is_read_as_it_was_written(headers: dict[str, str] | None) -> None:
    written = encode_header(Envelope("id", "kéy", b"body", 1_700_000_000_000, headers))
    assert written.startswith(MARK)
    metadata = Metadata("id", "kéy", 1_700_000_000_000, headers)
    assert metadata_of(decode(written)) == metadata_of(decode(written.decode())) == metadata


def test_a_provider_adds_elements_that_may_be_missing() -> None:
    longer = HeaderDecoder(Longer)
    assert longer(b'[1,"i","k",5]').attempts == 0
    assert longer(b'[1,"i","k",5,null,3]').attempts == 3
    assert metadata_of(decode(b'[1,"i","k",5,null,3]')) == Metadata("i", "k", 5)


@pytest.mark.parametrize("header", [b"", b'[2,"i","k",5]', b"[1 ,", b"\xff", "", "[2,", "\ud800", "\N{SNOWMAN}" * 9])
def test_a_header_of_another_version_says_so(header: Any) -> None:
    with pytest.raises(DecodeError, match=UNKNOWN_VERSION if header != "\ud800" else "cannot be read"):
        decode(header)


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"]",
        b'"i"]',
        b'"i","k",-1]',
        b'"i","k",5.5]',
        b'"i","k",9007199254740993]',
        b'"i","k",5,{"a":1}]',
        b'"i","k",5,' + b"[" * 100_000,
        b'"\xff","k",5]',
    ],
)
def test_a_header_that_is_not_ours_cannot_be_read(rest: bytes) -> None:
    with pytest.raises(DecodeError, match="the envelope cannot be read"):
        decode(MARK + rest)


def test_a_dead_letter_tells_times_in_seconds() -> None:
    letter = dead_letter(Metadata("i", "k", 1500), b"b", attempts=3, reason="r", error="e", dead_at=2.5)
    assert asdict(letter) == {
        "id": "i",
        "key": "k",
        "body": b"b",
        "headers": {},
        "attempts": 3,
        "reason": "r",
        "error": "e",
        "published_at": 1.5,
        "dead_at": 2.5,
    }
