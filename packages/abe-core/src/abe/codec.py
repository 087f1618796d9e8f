"""Payload to bytes and back: the `Codec` protocol, and JSON.

JSON is what every language reads. Pickle is not offered: unpickling runs whatever code a stranger put into the body.
"""

from typing import Any, Final, Protocol

import msgspec

from abe.errors import DecodeError, PayloadError
from abe.types import MessageQueuePayload


class Codec(Protocol):
    """Turns a payload into a body and a body into a payload. Must be pure, and may be called from any thread."""

    def encode(self, payload: MessageQueuePayload) -> bytes:
        """Return the body.

        Raises:
            PayloadError: The payload would not come back equal from `decode`.
        """
        ...

    def decode(self, body: bytes) -> MessageQueuePayload:
        """Return the payload.

        Raises:
            DecodeError: The body is not this codec's.
        """
        ...


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode
_decode_object: Final = msgspec.json.Decoder(dict[str, Any]).decode


class JSONCodec:
    """UTF-8 JSON by msgspec, guarded: what JSON cannot hold is refused, never changed.

    msgspec alone writes NaN as null, sets and tuples as lists, integer keys as strings, and bytes as base64. Decoding
    what was written and comparing it with the payload refuses them all, at C speed.
    """

    def encode(self, payload: MessageQueuePayload) -> bytes:
        """Return the payload as compact UTF-8 JSON; see `Codec.encode`."""
        try:
            body = _encode(payload)
            # A changed value anywhere makes the two differ; NaN differs from everything.
            if _decode(body) == payload and body[:1] == b"{":
                return body
        except (TypeError, ValueError, RecursionError, OverflowError) as exc:
            raise PayloadError(_explain(payload, str(exc))) from exc
        raise PayloadError(_explain(payload))

    def decode(self, body: bytes) -> MessageQueuePayload:
        """Return the JSON object in `body`; see `Codec.decode`."""
        try:
            return _decode_object(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise DecodeError(f"the body is not a JSON object: {exc}") from exc


def _explain(payload: object, why: str = "it changes on its way through JSON") -> str:
    """Say where a refused payload leaves the JSON model, for the error's text; if that is nowhere, why it was refused."""
    if type(payload) is not dict:
        return f"the payload is a {type(payload).__name__}: it must be a dict with string keys"
    try:
        return f"the payload is not JSON: {_misfit(payload, 'payload') or why}"  # pyright: ignore[reportUnknownArgumentType]
    except RecursionError:
        # msgspec goes a few levels deeper than Python does.
        return "the payload is not JSON, and nested too deeply to say where"


def _misfit(value: object, path: str) -> str:
    if isinstance(value, dict):
        for key, item in value.items():  # pyright: ignore[reportUnknownVariableType]
            if type(key) is not str:  # pyright: ignore[reportUnknownArgumentType]
                return f"{path} has the key {key!r}; keys must be strings"
            if found := _misfit(key, f"a key of {path}") or _misfit(item, f"{path}[{key!r}]"):  # pyright: ignore[reportUnknownArgumentType]
                return found
        return ""
    if isinstance(value, list):
        for index, item in enumerate(value):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            if found := _misfit(item, f"{path}[{index}]"):  # pyright: ignore[reportUnknownArgumentType]
                return found
        return ""
    if isinstance(value, str):
        return "" if _encodable(value) else f"{path} is {value!r}, which holds half a character (a lone surrogate)"
    if value is None or isinstance(value, bool | int):
        return ""
    if isinstance(value, float):
        return "" if value - value == 0 else f"{path} is {value}, which JSON has no word for"
    return f"{path} is a {type(value).__name__}; JSON has only objects, lists, strings, numbers, booleans and null"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
