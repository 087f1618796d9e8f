"""Reads a handler's parameters: from the signature that is called, with the annotations of the function that it wraps."""

import collections.abc
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType
from typing import Any, Final

from abe.backends.message_queue.base.message import Message
from abe.errors import ConfigurationError

_NAMES: Final[Mapping[str, Any]] = {
    # Often imported under TYPE_CHECKING only; the JSON types refer to one another by name.
    "Any": Any,
    "JSONDict": dict[str, Any],
    "JSONList": list[Any],
    "JSONValue": Any,
    "Mapping": collections.abc.Mapping,
    "Message": Message,
}
_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_EMPTY: Final = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Parameters:
    """The arguments that a handler takes."""

    payload: tuple[Any, ...]
    """The annotations of the parameters that may take the payload, the most likely first; empty: not annotated."""
    message: str | int | None
    """How it takes the `Message` too: by that name, at that position, or (None) not at all."""


def name_of(function: object) -> str:
    """Return the handler's name for log and error texts."""
    while isinstance(function, partial):
        function = function.func  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return getattr(function, "__qualname__", None) or type(function).__qualname__  # pyright: ignore[reportUnknownArgumentType]


def parameters(function: Callable[..., object]) -> Parameters:
    """Return the arguments that a handler takes.

    A decorator that uses ``functools.wraps`` may inject arguments: its own signature determines how it is called, the signature of the
    wrapped function determines the payload's type.

    Raises:
        ConfigurationError: The handler cannot be called with a message, or has an annotation that cannot be resolved.
    """
    try:
        own = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return Parameters((), None)  # a builtin without a signature
    inner = inspect.signature(function)
    names = _Names(function)
    if own.parameters.keys() == inner.parameters.keys():
        message = _message_parameter(list(own.parameters.values()), names)
        payload = list(own.parameters.values())[1 if message == 0 else 0 :][:1]
    else:
        message = _injected_message(own, inner, names)
        payload = _payload_parameters(own, inner)
    _check(function, own, message)
    annotations: list[Any] = []
    for parameter in payload:
        if parameter.annotation is _EMPTY or parameter.kind not in _POSITIONAL:
            break
        annotations.append(names.resolve(parameter.annotation))
    return Parameters(tuple(annotations), message)


def _message_parameter(listed: list[inspect.Parameter], names: "_Names") -> str | int | None:
    for position, parameter in enumerate(listed):
        if not names.is_message(parameter):
            continue
        if position > 0:
            return 1 if parameter.kind is inspect.Parameter.POSITIONAL_ONLY else parameter.name
        second = listed[1] if len(listed) > 1 else None
        if (
            second is not None
            and second.annotation is not _EMPTY
            and second.default is _EMPTY
            and second.kind in _POSITIONAL
        ):
            return None if names.is_message(second) else 0
    return None


def _payload_parameters(own: inspect.Signature, inner: inspect.Signature) -> list[inspect.Parameter]:
    """Return a decorated function's parameter with the name of the wrapper's first one, else all, as the wrapper may insert some."""
    first = next(iter(own.parameters.values()), None)
    if first is not None and first.kind in _POSITIONAL and first.name in inner.parameters:
        return [inner.parameters[first.name]]
    return list(inner.parameters.values())


def _injected_message(own: inspect.Signature, inner: inspect.Signature, names: "_Names") -> str | None:
    """Return the name of the parameter for the Message. Only by name: what a wrapper inserts by position is unknown."""
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.parameters.values())
    taken = next(iter(own.parameters), None)
    for parameter in list(inner.parameters.values())[1:]:
        if parameter.name != taken and names.is_message(parameter) and (takes_any or parameter.name in own.parameters):
            return parameter.name
    return None


def _check(function: Callable[..., object], own: inspect.Signature, message: str | int | None) -> None:
    try:
        if isinstance(message, str):
            own.bind(None, **{message: None})
        else:
            own.bind(*((None,) if message is None else (None, None)))
    except TypeError as exc:
        raise ConfigurationError(
            f"the handler {name_of(function)} must accept one positional argument, the message, or two, the converted payload and its "
            f"Message: {exc}"
        ) from None


class _Names:
    """Resolves the names in a handler's annotations."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._handler = function
        inner: Any = function
        while isinstance(inner, partial):
            inner = inner.func  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if not hasattr(inner, "__code__") and not hasattr(inner, "__func__"):
            inner = getattr(_class(inner), "__call__", inner)  # noqa: B004 - of an object that is callable
        self._owner: Any = getattr(inner, "__self__", None)
        inner = inspect.unwrap(getattr(inner, "__func__", inner))
        self._globals: dict[str, Any] = getattr(inner, "__globals__", {})
        self._locals: dict[str, Any] = _closure(inner)

    def is_message(self, parameter: inspect.Parameter) -> bool:
        """Whether the parameter takes the message itself, by its annotation or else by its name."""
        if parameter.annotation is _EMPTY:
            return parameter.name == "message"
        try:
            wanted = self.resolve(parameter.annotation)
        except ConfigurationError:
            return False
        return wanted is Message or (
            Message in (args := typing.get_args(wanted)) and set(args) <= {Message, type(None)}
        )

    def resolve(self, annotation: Any) -> Any:
        """Return the type that an annotation stands for.

        Raises:
            ConfigurationError: It names something undefined.
        """
        problem: Exception | None = None
        for names in self._places():
            try:
                wanted = _evaluated(annotation, {**_NAMES, **self._globals}, {**names, **self._locals})
            except (NameError, AttributeError, TypeError, SyntaxError) as exc:
                problem = exc
            else:
                return self._bound(wanted)
        raise ConfigurationError(
            f"the handler {name_of(self._handler)} has an annotation that cannot be resolved: {problem}"
        ) from problem

    def _places(self) -> Iterator[Mapping[str, Any]]:
        """Yield no locals first, then those of each calling frame of the handler's module: handlers are often defined in a function."""
        yield {}
        frame: FrameType | None = sys._getframe()  # pyright: ignore[reportPrivateUsage]
        while frame is not None:
            if frame.f_globals is self._globals and frame.f_locals is not self._globals:
                yield frame.f_locals
            frame = frame.f_back

    def _bound(self, wanted: Any) -> Any:
        """Return the type that a type variable of the handler's generic class is bound to."""
        if not isinstance(wanted, typing.TypeVar):
            return wanted
        for base in getattr(_class(self._owner), "__orig_bases__", ()):
            variables = getattr(typing.get_origin(base), "__parameters__", ())
            if wanted in variables:
                return typing.get_args(base)[variables.index(wanted)]
        return wanted


def _class(instance: object) -> type:
    return type(instance)


def _closure(function: Any) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    found: dict[str, Any] = {}
    names = code.co_freevars if type(code) is CodeType else ()
    for name, cell in zip(names, cells, strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    return found


def _evaluated(annotation: Any, names: dict[str, Any], local: dict[str, Any]) -> Any:
    def holder() -> None: ...

    holder.__annotations__ = {"wanted": annotation}
    return typing.get_type_hints(holder, globalns=names, localns=local, include_extras=True)["wanted"]
