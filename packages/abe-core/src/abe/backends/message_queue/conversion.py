"""Converts a payload to the type that a handler asks for, by the rules of that type's library for reading JSON.

msgspec reads dataclasses, TypedDicts, attrs classes and its own Structs. Pydantic reads its models, its dataclasses, and types that
contain one or have Pydantic annotations; and, if it is installed, types that msgspec cannot read, such as unions of dataclasses.
"""

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, Final, TypeAlias

import msgspec
import msgspec.inspect

from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.report import describe_validation, is_validation_error
from abe.backends.message_queue.retry import Reject, Retry

Convert: TypeAlias = Callable[[Any], object]
_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode
_PLAIN: Final = (dict, Message, Mapping, MutableMapping, object, Any, collections.abc.Mapping, typing.Dict)  # noqa: UP006
_OBJECTS: Final = (
    msgspec.inspect.AnyType,
    msgspec.inspect.DataclassType,
    msgspec.inspect.DictType,
    msgspec.inspect.StructType,
    msgspec.inspect.TypedDictType,
)


def converter(wanted: Any) -> Convert | None:
    """Return the function that converts a payload to the wanted type; None if the message itself has that type.

    Raises:
        TypeError: No payload converts to that type; the text says why.
    """
    wanted = _simplified(wanted)
    if _is_plain(wanted):
        return None
    parts = list(_parts(wanted))
    for part in parts:
        if dataclasses.is_dataclass(part) and _has_own_init(part):
            raise TypeError(f"{_name(part)} has its own __init__, which would not be called")
    if any(_belongs_to_pydantic(part) for part in parts):
        return _by_pydantic(wanted)
    try:
        msgspec.json.schema(wanted)  # refuses types of no supported library
        fits = _takes_objects(msgspec.inspect.type_info(wanted))
    except (TypeError, NameError) as exc:
        try:
            return _by_pydantic(wanted, described=True)
        except TypeError as other:
            raise TypeError(str(exc).split("\n")[0]) from other
    if not fits:
        raise TypeError("a payload is always an object")
    return partial(_converted, partial(msgspec.convert, type=wanted, str_keys=True), _name(wanted), ())


def _by_pydantic(wanted: Any, *, described: bool = False) -> Convert:
    try:
        adapter: Any = import_module("pydantic").TypeAdapter(wanted)
    except ImportError:
        raise TypeError("msgspec cannot read it, and Pydantic is not installed") from None
    except Exception as exc:
        raise TypeError(str(exc).split("\n")[0]) from exc
    try:
        schema: dict[str, Any] | None = adapter.json_schema()
    except Exception:  # noqa: BLE001 - some types can be read, but have no schema
        schema = None
    if described if schema is None else not _describes_objects(schema, schema.get("$defs", {})):
        raise TypeError("a payload is always an object")

    def convert(payload: dict[str, Any]) -> object:
        try:
            body = _encode(payload)
            is_json = _decode(body) == payload
        except (TypeError, ValueError, RecursionError):
            return adapter.validate_python(payload)
        # An application's codec may return bytes or datetimes, which must not be parsed from text.
        return adapter.validate_json(body) if is_json else adapter.validate_python(payload)

    return partial(_converted, convert, _name(wanted), frozenset(_names(schema)))


def _converted(convert: Convert, name: str, names: Collection[str], message: Any) -> object:
    try:
        return convert(dict(message))
    except (Reject, Retry):
        raise
    except Exception as exc:  # noqa: BLE001 - the type's own checks may raise anything, and would on every attempt
        problem = describe_validation(exc, names) if is_validation_error(exc) else f"it raised {type(exc).__name__}"
    # Outside the except block: the original error shows the payload, so it must not become this error's context.
    raise Reject(f"the payload does not fit {name}: {problem}")


def _simplified(wanted: Any) -> Any:
    """Strip wrappers that do not change what an object must be: NewType, ``| None``, a TypeVar with a bound."""
    inner = wanted
    if type(wanted) is typing.TypeVar:
        inner = wanted.__bound__ or (_union(wanted.__constraints__) if wanted.__constraints__ else wanted)
    elif type(wanted).__name__ == "TypeAliasType" and hasattr(wanted, "__value__"):
        inner = wanted.__value__
    elif _is_union(wanted):
        inner = _union([member for member in typing.get_args(wanted) if member is not type(None)])
    else:
        inner = getattr(wanted, "__supertype__", wanted)
    return inner if inner is wanted or inner == wanted else _simplified(inner)


def _union(members: Sequence[Any]) -> Any:
    kind = members[0]
    for member in members[1:]:
        kind = kind | member
    return kind


def _is_plain(wanted: Any) -> bool:
    if typing.get_origin(wanted) is typing.Annotated:
        return not any(map(_belongs_to_pydantic, wanted.__metadata__)) and _is_plain(_simplified(wanted.__origin__))
    if type(wanted) is typing.TypeVar or any(wanted is plain for plain in _PLAIN):
        return True
    if _is_union(wanted):
        return all(_is_plain(_simplified(member)) for member in typing.get_args(wanted))
    if typing.get_origin(wanted) not in _PLAIN:
        return False
    if not (arguments := typing.get_args(wanted)):  # typing.Mapping
        return True
    return arguments[0] in (str, Any, object) and (
        arguments[1] in (Any, object) or type(arguments[1]) is typing.TypeVar
    )


def _parts(wanted: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield the type and its parts, recursively, annotations included."""
    seen = set() if seen is None else seen
    if id(wanted) in seen:
        return
    seen.add(id(wanted))
    yield wanted
    inner: list[Any] = [*typing.get_args(wanted), *getattr(wanted, "__metadata__", ())]
    plain = typing.get_origin(wanted) or wanted
    if hasattr(plain, "__value__"):
        inner.append(plain.__value__)
    if hasattr(plain, "__supertype__"):
        inner.append(plain.__supertype__)
    if isinstance(plain, type) and plain.__module__ not in ("builtins", "typing", "abc", "collections.abc"):
        yield plain
        with suppress(NameError, TypeError):  # the library that reads the type reports it
            inner.extend(typing.get_type_hints(plain, include_extras=True).values())
        if dataclasses.is_dataclass(plain):
            inner.extend(field.default for field in dataclasses.fields(plain))
    for part in inner:
        yield from _parts(part, seen)


def _belongs_to_pydantic(part: Any) -> bool:
    if isinstance(part, type) and any(
        hasattr(part, name)
        for name in ("__pydantic_core_schema__", "__pydantic_validator__", "__get_pydantic_core_schema__")
    ):
        return True
    return type(part).__module__.split(".")[0] in ("pydantic", "pydantic_core", "annotated_types")


def _has_own_init(part: Any) -> bool:
    owner = (
        next((base for base in part.__mro__ if "__init__" in vars(base)), object) if isinstance(part, type) else object
    )
    made = getattr(owner, "__dataclass_params__", None)
    return owner is not object and not _belongs_to_pydantic(part) and (made is None or not made.init)


def _is_union(wanted: Any) -> bool:
    return typing.get_origin(wanted) in (typing.Union, types.UnionType)


def _takes_objects(kind: msgspec.inspect.Type) -> bool:
    if isinstance(kind, msgspec.inspect.UnionType):
        return any(_takes_objects(member) for member in kind.types)
    if isinstance(kind, msgspec.inspect.Metadata):
        return _takes_objects(kind.type)
    return isinstance(kind, _OBJECTS) and not getattr(kind, "array_like", False)


def _describes_objects(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> bool:
    if "$ref" in schema:
        schema = definitions.get(schema["$ref"].rpartition("/")[2], {})
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return any(_describes_objects(member, definitions) for member in schema[word])
    return bool(schema.get("type", "object") == "object")


def _names(schema: Any) -> Iterator[str]:
    """Yield the names of fields and types: the parts of a location that reveal nothing of a payload."""
    if isinstance(schema, dict):
        for name, inner in schema.items():  # pyright: ignore[reportUnknownVariableType]
            if name in ("properties", "$defs", "mapping") and isinstance(inner, dict):
                yield from inner  # pyright: ignore[reportUnknownVariableType]
            yield from _names(inner)
    elif isinstance(schema, list):
        for inner in schema:  # pyright: ignore[reportUnknownVariableType]
            yield from _names(inner)


def _name(wanted: Any) -> str:
    return getattr(wanted, "__name__", None) or str(wanted)
