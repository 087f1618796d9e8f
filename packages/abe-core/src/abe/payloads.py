"""Payloads beyond plain JSON: encodes Python types that a typed handler decodes to an equal value, and explains those that it cannot.

No error text contains a value, only locations and types.
"""

import dataclasses
import datetime
import decimal
import enum
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, TypeGuard, cast

import msgspec

from abe.errors import PayloadError

_LEAVES: Final = (
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    uuid.UUID,
    decimal.Decimal,
    bytes,
    bytearray,
    memoryview,
)
"""Types that msgspec encodes as a string, and decodes to an equal value."""

_KEYS: Final[tuple[type[Any], ...]] = (int, float, enum.Enum, *_LEAVES)
"""Types that msgspec encodes as an object's key."""

_MODEL: Final = "__pydantic_serializer__"
_DUMP: Final[Mapping[str, Any]] = {"round_trip": True, "warnings": False}
"""Options with which Pydantic can decode what it encoded. Its warnings show values; the comparison finds what they are about."""

_FIELD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}\Z")
_MSGSPEC: Final = ("Encoding objects of type", "Only dicts with")
_decode: Final = msgspec.json.Decoder().decode


def is_other_mapping(payload: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether a payload is a mapping but not a dict, such as a MappingProxyType."""
    return isinstance(payload, Mapping) and not isinstance(payload, dict)


def is_typed(payload: object) -> bool:
    """Whether a payload is an object with declared fields, such as a dataclass."""
    kind = _type(payload)
    marks = ("__dataclass_fields__", "__struct_fields__", "__attrs_attrs__", _MODEL)
    return any(hasattr(kind, mark) for mark in marks)


def encode_typed(payload: Any) -> bytes:
    """Return a payload as a JSON object, with other types encoded as strings.

    Raises:
        PayloadError: It cannot be encoded, or would not be decoded to an equal value.
    """
    body = _encode_model(payload) if hasattr(_type(payload), _MODEL) else _encode_tree(payload)
    if body[:1] != b"{":
        raise PayloadError(
            f"the payload is a {type(payload).__name__}, which is not a JSON object: publish it in a field of one"
        )
    return body


def explain(payload: object, failure: Exception | None = None) -> str:
    """Return the error text for a refused payload: where it is outside the JSON model, or else why it was refused."""
    if not _is_dict(payload):
        form = "a dict with string keys, or a dataclass, msgspec Struct or Pydantic model"
        return f"the payload is a {type(payload).__name__}: it must be {form}"
    found = ""
    try:
        found = _misfit(payload, "payload", typed=False)
    except Exception as exc:  # noqa: BLE001 - the payload's own methods are called
        failure = exc
    return f"the payload is not JSON: {found or _reason(failure)}"


def _reason(failure: Exception | None) -> str:
    if failure is None:
        return "it changes when it is encoded as JSON"
    if isinstance(failure, RecursionError):
        # msgspec allows a few levels more than Python does.
        return "it is nested too deeply"
    text = str(failure) if isinstance(failure, TypeError) else ""
    return text if text.startswith(_MSGSPEC) else f"it cannot be encoded ({type(failure).__name__})"


def _encode_tree(payload: Any) -> bytes:
    found, failure = "", None
    try:
        found = _misfit(payload, "payload", typed=True)
        body = b"" if found else _encoder.encode(payload)
        # Keys that differ in Python and are equal in JSON would be merged when decoded.
        if body and _encoder.encode(_decode(body)) == body:
            return body if not is_typed(payload) else _read_back(payload, body)
    except PayloadError:
        raise
    except Exception as exc:  # noqa: BLE001 - the payload's own methods are called
        failure = exc
    raise PayloadError(f"the payload is not JSON: {found or _reason(failure)}")


class _OtherTypeError(Exception):
    """Another library decodes it."""


def _other_type(kind: Any, _: object) -> Any:
    raise _OtherTypeError(kind)


@lru_cache(maxsize=256)
def _decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind, dec_hook=_other_type)


def _read_back(payload: Any, body: bytes) -> bytes:
    """Return the JSON of a typed object, if its class decodes it to an equal value."""
    if _reads_back(payload, body):
        return body
    raise PayloadError(
        f"the {_type(payload).__name__} cannot be published as it is: its class does not decode its JSON to an equal value, as a "
        f"field has a value of another type than declared, or is not encoded"
    )


def _reads_back(payload: Any, body: bytes) -> bool:
    """Whether the payload's class decodes its JSON to the same, as far as msgspec can tell.

    It does not if a field has a value of another type, or an instance of a subclass, or is left out (as private attributes of attrs are).
    """
    try:
        back = _decoder(_type(payload)).decode(body)
    except msgspec.ValidationError:
        return False
    except Exception:  # noqa: BLE001 - msgspec does not decode this class, or its annotations cannot be resolved
        return True
    before, after = _decode(body), _decode(_encoder.encode(back))
    return bool(before == after) or _unordered(before) == _unordered(after)


def _unordered(value: Any) -> Any:
    """Return decoded JSON with each list sorted: some were sets."""
    if _is_dict(value):
        return {key: _unordered(item) for key, item in value.items()}
    return sorted(map(_unordered, value), key=repr) if _is_list(value) else value


def _encode_model(model: Any) -> bytes:
    """Return Pydantic's JSON for one of its models or dataclasses, if it decodes that to an equal value."""
    kind = _type(model)
    reasons: list[str] = []
    for by_alias in (True, False):
        try:
            body: bytes = kind.__pydantic_serializer__.to_json(model, by_alias=by_alias, **_DUMP)
            back = kind.__pydantic_validator__.validate_json(body)
            if _values(back) == _values(model) and _encoder.encode(_decode(body)):
                return body
            reasons.append(
                "decoding its JSON does not give an equal value, so a field is left out or changed when it is encoded"
            )
        except Exception as exc:  # noqa: BLE001 - validators and serializers are application code
            reasons.append(f"its JSON cannot be decoded ({_places(exc)})")
    raise PayloadError(
        f"the {kind.__name__} cannot be published as it is: {reasons[0]}. Its model_dump(mode='json') can"
    )


def _values(model: Any) -> object:
    # serialize_as_any: an instance of a subclass of its field's type is otherwise encoded without its own fields.
    return _type(model).__pydantic_serializer__.to_python(model, serialize_as_any=True, **_DUMP)


def _places(exc: Exception) -> str:
    """Return the fields that Pydantic refused, each with its error type."""
    if not type(exc).__module__.startswith("pydantic") or not hasattr(exc, "errors"):
        return type(exc).__name__
    found: list[dict[str, Any]] = cast("Any", exc).errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(_shown, error['loc']))}: {error['type']}" for error in found[:5])


def _dump(value: Any) -> Any:
    """Encode a type that msgspec does not know: a model inside of another object."""
    if hasattr(_type(value), _MODEL):
        return _decode(_encode_model(value))
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


_encoder: Final = msgspec.json.Encoder(enc_hook=_dump)


def _misfit(value: Any, path: str, typed: bool) -> str:
    """Return where and why a value cannot be encoded; "" if it can."""
    kind = _type(value)
    if kind is str:
        return "" if _encodable(value) else f"{path} holds half a character (a lone surrogate)"
    if value is None or kind is bool or kind is int:
        return ""
    if kind is float:
        return "" if value - value == 0 else f"{path} is {value}, which JSON cannot represent"
    if _is_dict(value):
        return _misfit_of_dict(value, path, typed)
    items: Iterator[tuple[Any, str]]
    if _is_series(value, typed):
        items = ((item, f"{path}[{index}]") for index, item in enumerate(value))
    elif typed and is_typed(value):
        items = _fields(value, path)
    elif typed and isinstance(value, enum.Enum) and _is_identifiable(value):
        return ""
    elif typed and kind in _LEAVES:
        return f"{path} has an offset with seconds, which would be rounded" if _is_rounded(value) else ""
    else:
        return f"{path} is a {kind.__name__}; {_instead(value, typed)}"
    return next((found for item, where in items if (found := _misfit(item, where, typed))), "")


def _misfit_of_dict(value: dict[Any, Any], path: str, typed: bool) -> str:
    for key, item in value.items():
        found = _misfit_of_key(key, path, typed) or _misfit(item, f"{path}[{_shown(key)}]", typed)
        if found:
            return found
    return ""


def _misfit_of_key(key: Any, path: str, typed: bool) -> str:
    kind = _type(key)
    if kind is str or (typed and kind is not bool and isinstance(key, _KEYS)):
        return _misfit(key, f"a key of {path}", typed)
    return f"{path} has a key that is a {kind.__name__}; keys must be strings"


def _shown(step: object) -> str:
    """Return one part of a location. A key may be data too: only one that looks like a field's name is shown."""
    return repr(step) if isinstance(step, str) and _FIELD.match(step) else "..."


def _type(value: object) -> Any:
    return type(value)


def _is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _is_series(value: object, typed: bool) -> TypeGuard[Iterable[Any]]:
    return isinstance(value, list) or (typed and isinstance(value, tuple | set | frozenset))


def _fields(value: Any, path: str) -> Iterator[tuple[Any, str]]:
    kind = _type(value)
    if hasattr(kind, _MODEL):
        return  # checked by Pydantic
    names: Iterable[str] = getattr(kind, "__struct_fields__", ())
    if dataclasses.is_dataclass(value):
        names = [item.name for item in dataclasses.fields(value)]
    for name in names or [item.name for item in getattr(kind, "__attrs_attrs__", ())]:
        item = getattr(value, name, msgspec.UNSET)
        if item is not msgspec.UNSET:
            yield item, f"{path}.{name}"


def _is_identifiable(member: enum.Enum) -> bool:
    """Whether an enum's members can be identified by their JSON values."""
    values = [other.value for other in type(member)]
    return all(type(value) is str and _encodable(value) for value in values) or all(
        type(value) is int for value in values
    )


def _is_rounded(value: Any) -> bool:
    offset = value.utcoffset() if isinstance(value, datetime.datetime | datetime.time) else None
    return offset is not None and offset.total_seconds() % 60 != 0


def _instead(value: Any, typed: bool) -> str:
    general = "JSON has only objects, lists, strings, numbers, booleans and null"
    if typed:
        return f"{general}, and no string represents this type"
    try:
        _encoder.encode(value)
    except Exception:  # noqa: BLE001 - any failure means that it cannot be encoded
        return general
    return f"{general}. Convert it, or publish it in a field of a dataclass, msgspec Struct or Pydantic model, or use JSONCodec(types=True)"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
