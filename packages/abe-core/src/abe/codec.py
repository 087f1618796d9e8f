"""Encodes payloads as bytes and decodes them: the `Codec` protocol, and JSON.

Every language reads JSON. There is no pickle codec: unpickling runs any code that the author of a body put into it.
"""

from typing import Any, Final, Protocol

import msgspec

from abe.errors import ConfigurationError, DecodeError, PayloadError
from abe.payloads import encode_typed, explain, is_other_mapping, is_typed
from abe.types import MessageQueuePayload


class Codec(Protocol):
    """Encodes a payload as a body, and decodes it. Must be pure, and may be called from any thread."""

    def encode(self, payload: Any) -> bytes:
        """Return the body of a payload given to `publish`.

        Raises:
            PayloadError: `decode` would not return an equal payload. The text says where and why, and contains no value.
        """
        ...

    def decode(self, body: bytes) -> MessageQueuePayload:
        """Return the payload.

        Raises:
            DecodeError: This codec cannot decode the body. The text contains nothing of the body.
        """
        ...


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode
_decode_object: Final = msgspec.json.Decoder(dict[str, Any]).decode


class JSONCodec:
    """UTF-8 JSON by msgspec: values that JSON cannot represent are refused, never changed.

    msgspec alone encodes NaN as null, sets and tuples as lists, integer keys as strings, and bytes as base64. Decoding
    the result and comparing it with the payload refuses them all, at C speed.

    A typed object (a dataclass, msgspec Struct, attrs or Pydantic instance) is encoded by its own library as a JSON object, if that is
    decoded to an equal value.

    Args:
        types: Encode, everywhere, values that a typed handler decodes to equal ones: a datetime as RFC 3339, a UUID or Decimal as a string,
            and so on (table in the README of abe-core). A handler of a plain dict gets these strings. False: only inside typed objects.
    """

    def __init__(self, *, types: bool = False) -> None:
        self._types = types

    def encode(self, payload: Any) -> bytes:
        """Return the payload as compact UTF-8 JSON; see `Codec.encode`."""
        failure = None
        try:
            body = _encode(payload)
            # Any changed value makes them unequal; NaN equals nothing.
            if _decode(body) == payload and body[:1] == b"{":
                return body
        except Exception as exc:  # noqa: BLE001 - comparing calls the payload's own methods
            failure = exc
        # Outside the except block: the encoder's error may contain the payload, so it must not become this error's context.
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
        except Exception as exc:  # noqa: BLE001 - any failure means that the body cannot be decoded
            failure = type(exc).__name__
        raise DecodeError(f"the body is not a JSON object ({failure})")


def check_codec(codec: Codec | None) -> Codec:
    """Return the codec; for None, JSON.

    Raises:
        ConfigurationError: It is not a codec; the text says what is expected.
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
