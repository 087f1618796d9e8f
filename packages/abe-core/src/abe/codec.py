"""Payload to bytes and back: the `Codec` protocol, and JSON.

JSON is what every language reads. Pickle is not offered: unpickling runs whatever code a stranger put into the body.
"""

from typing import Any, Final, Protocol

import msgspec

from abe.errors import ConfigurationError, DecodeError, PayloadError
from abe.payloads import encode_typed, explain, is_other_mapping, is_typed
from abe.types import MessageQueuePayload


class Codec(Protocol):
    """Turns a payload into a body and a body into a payload. Must be pure, and may be called from any thread."""

    def encode(self, payload: Any) -> bytes:
        """Return the body of what `publish` was given.

        Raises:
            PayloadError: The payload would not come back equal from `decode`. Its text says where and why, and shows no value.
        """
        ...

    def decode(self, body: bytes) -> MessageQueuePayload:
        """Return the payload.

        Raises:
            DecodeError: The body is not this codec's. Its text shows nothing of the body.
        """
        ...


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode
_decode_object: Final = msgspec.json.Decoder(dict[str, Any]).decode


class JSONCodec:
    """UTF-8 JSON by msgspec, guarded: what JSON cannot hold is refused, never changed.

    msgspec alone writes NaN as null, sets and tuples as lists, integer keys as strings, and bytes as base64. Decoding
    what was written and comparing it with the payload refuses them all, at C speed.

    A typed object (a dataclass, msgspec Struct, attrs or Pydantic instance) is written as the JSON object that its own library makes of it,
    if it comes back equal from there.

    Args:
        types: Write everywhere what a typed handler reads back equal: a datetime as RFC 3339, a UUID or Decimal as a string, and so on (the
            README of abe-core has the table). A handler that takes a plain dict gets these strings. False: only inside of typed objects.
    """

    def __init__(self, *, types: bool = False) -> None:
        self._types = types

    def encode(self, payload: Any) -> bytes:
        """Return the payload as compact UTF-8 JSON; see `Codec.encode`."""
        failure = None
        try:
            body = _encode(payload)
            # A changed value anywhere makes the two differ; NaN differs from everything.
            if _decode(body) == payload and body[:1] == b"{":
                return body
        except Exception as exc:  # noqa: BLE001 - comparing calls the payload's own methods
            failure = exc
        # Outside of the handler: the parser's error may hold the payload, and must not be this one's context.
        if is_other_mapping(payload):
            return self.encode(dict(payload))
        if self._types or is_typed(payload):
            return encode_typed(payload)
        raise PayloadError(explain(payload, failure))

    def decode(self, body: bytes) -> MessageQueuePayload:
        """Return the JSON object in `body`; see `Codec.decode`."""
        try:
            return _decode_object(body)
        except msgspec.MsgspecError as exc:
            raise DecodeError(f"the body is not a JSON object: {exc}") from exc
        except Exception as exc:  # noqa: BLE001 - whatever comes from a broker is a body that can be decoded, or not
            failure = type(exc).__name__
        raise DecodeError(f"the body is not a JSON object ({failure})")


def check_codec(codec: Codec | None) -> Codec:
    """Return the codec; for None, JSON.

    Raises:
        ConfigurationError: It is none; the text says what would be right.
    """
    if codec is None:
        return JSONCodec()
    if isinstance(codec, type):
        raise ConfigurationError(f"codec must be an instance: write {codec.__name__}(), not {codec.__name__}")
    if not all(callable(getattr(codec, method, None)) for method in ("encode", "decode")):
        raise ConfigurationError(
            f"codec must have encode() and decode(), as JSONCodec() has, and a {type(codec).__name__} has not"
        )
    return codec
