"""Payloads beyond plain JSON: what of Python's types JSON can carry so that a typed handler reads it back equal, and where one cannot.

No text that is made here shows a value: places and kinds only.
"""

import dataclasses
import datetime
import decimal
import enum
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
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
"""What msgspec writes as a string from which it makes an equal value again."""

_KEYS: Final[tuple[type[Any], ...]] = (int, float, enum.Enum, *_LEAVES)
"""What msgspec writes as the key of an object."""

_MODEL: Final = "__pydantic_serializer__"
_DUMP: Final[Mapping[str, Any]] = {"round_trip": True, "warnings": False}
"""How Pydantic writes a model so that it can read it. Its warnings show values, and what they warn of does not read back."""

_FIELD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}\Z")
_MSGSPEC: Final = ("Encoding objects of type", "Only dicts with")
_decode: Final = msgspec.json.Decoder().decode


def is_other_mapping(payload: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether a payload is a mapping and no dict, such as a MappingProxyType."""
    return isinstance(payload, Mapping) and not isinstance(payload, dict)


def is_typed(payload: object) -> bool:
    """Whether a payload is an object that says itself what its fields are."""
    kind = _type(payload)
    marks = ("__dataclass_fields__", "__struct_fields__", "__attrs_attrs__", _MODEL)
    return any(hasattr(kind, mark) for mark in marks)


def encode_typed(payload: Any) -> bytes:
    """Return a payload as a JSON object whose strings may stand for other types.

    Raises:
        PayloadError: It cannot be written, or not so that it could be read back equal.
    """
    body = _encode_model(payload) if hasattr(_type(payload), _MODEL) else _encode_tree(payload)
    if body[:1] != b"{":
        raise PayloadError(
            f"the payload is a {type(payload).__name__}, which is no object in JSON: publish it in a field of one"
        )
    return body


def explain(payload: object, failure: Exception | None = None) -> str:
    """Say where a refused payload leaves the JSON model, for the error's text; if that is nowhere, why it was refused."""
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
        return "it changes on its way through JSON"
    if isinstance(failure, RecursionError):
        # msgspec goes a few levels deeper than Python does.
        return "it is nested too deeply"
    text = str(failure) if isinstance(failure, TypeError) else ""
    return text if text.startswith(_MSGSPEC) else f"it cannot be written ({type(failure).__name__})"


def _encode_tree(payload: Any) -> bytes:
    found, failure = "", None
    try:
        found = _misfit(payload, "payload", typed=True)
        body = b"" if found else _encoder.encode(payload)
        # Two keys that are different in Python and the same in JSON would be one when they are read.
        if body and _encoder.encode(_decode(body)) == body:
            return body
    except PayloadError:
        raise
    except Exception as exc:  # noqa: BLE001 - the payload's own methods are called
        failure = exc
    raise PayloadError(f"the payload is not JSON: {found or _reason(failure)}")


def _encode_model(model: Any) -> bytes:
    """Return the JSON that Pydantic makes of a model or a dataclass of its own, if it makes an equal one of that."""
    kind = _type(model)
    reasons: list[str] = []
    for by_alias in (True, False):
        try:
            body: bytes = kind.__pydantic_serializer__.to_json(model, by_alias=by_alias, **_DUMP)
            back = kind.__pydantic_validator__.validate_json(body)
            if _values(back) == _values(model) and _encoder.encode(_decode(body)):
                return body
            reasons.append(
                "it does not come back equal from JSON, so something in it is hidden or changed as it is written"
            )
        except Exception as exc:  # noqa: BLE001 - validators and serializers are the application's
            reasons.append(f"it cannot be read back from JSON ({_places(exc)})")
    raise PayloadError(
        f"the {kind.__name__} cannot be published as it is: {reasons[0]}. Its model_dump(mode='json') can, if that is what is meant"
    )


def _values(model: Any) -> object:
    # As any: what is of a subclass of its field's type is written as that type, and its own fields would be lost.
    return _type(model).__pydantic_serializer__.to_python(model, serialize_as_any=True, **_DUMP)


def _places(exc: Exception) -> str:
    """Return which fields Pydantic complains of, and what kind of mistake each is."""
    if not type(exc).__module__.startswith("pydantic") or not hasattr(exc, "errors"):
        return type(exc).__name__
    found: list[dict[str, Any]] = cast("Any", exc).errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(_shown, error['loc']))}: {error['type']}" for error in found[:5])


def _dump(value: Any) -> Any:
    """Write what msgspec knows nothing of: a model inside of something else."""
    if hasattr(_type(value), _MODEL):
        return _decode(_encode_model(value))
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


_encoder: Final = msgspec.json.Encoder(enc_hook=_dump)


def _misfit(value: Any, path: str, typed: bool) -> str:
    """Return where and why a value cannot be carried; "" if it can."""
    kind = _type(value)
    if kind is str:
        return "" if _encodable(value) else f"{path} holds half a character (a lone surrogate)"
    if value is None or kind is bool or kind is int:
        return ""
    if kind is float:
        return "" if value - value == 0 else f"{path} is {value}, which JSON has no word for"
    if _is_dict(value):
        return _misfit_of_dict(value, path, typed)
    items: Iterator[tuple[Any, str]]
    if _is_series(value, typed):
        items = ((item, f"{path}[{index}]") for index, item in enumerate(value))
    elif typed and is_typed(value):
        items = _fields(value, path)
    elif typed and isinstance(value, enum.Enum) and _is_told_apart(value):
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
    """Return a step of the way to a place. A key may be a value too: only what looks like the name of a field is shown."""
    return repr(step) if isinstance(step, str) and _FIELD.match(step) else "..."


def _type(value: object) -> Any:
    return type(value)


def _is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)


def _is_series(value: object, typed: bool) -> TypeGuard[Iterable[Any]]:
    return isinstance(value, list) or (typed and isinstance(value, tuple | set | frozenset))


def _fields(value: Any, path: str) -> Iterator[tuple[Any, str]]:
    kind = _type(value)
    if hasattr(kind, _MODEL):
        return  # Pydantic's to judge
    names: Iterable[str] = getattr(kind, "__struct_fields__", ())
    if dataclasses.is_dataclass(value):
        names = [item.name for item in dataclasses.fields(value)]
    for name in names or [item.name for item in getattr(kind, "__attrs_attrs__", ())]:
        item = getattr(value, name, msgspec.UNSET)
        if item is not msgspec.UNSET:
            yield item, f"{path}.{name}"


def _is_told_apart(member: enum.Enum) -> bool:
    """Whether a member of its class is found by its value in JSON."""
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
        return f"{general}, and no string stands for this"
    try:
        _encoder.encode(value)
    except Exception:  # noqa: BLE001 - whatever it is, it cannot be written
        return general
    return f"{general}. Convert it, or publish it in a field of a dataclass, msgspec Struct or Pydantic model, or use JSONCodec(types=True)"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
