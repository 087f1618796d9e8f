"""Handlers: whatever an application gives us, made into one shape.

A handler is an async function, a function (it runs in a thread), or an object with `handle_event`. Its parameter's annotation decides
what it gets: the message as it is (``dict``, ``Message``, nothing), or the payload converted and validated (a dataclass, TypedDict,
msgspec Struct or Pydantic model).
"""

import asyncio
import contextvars
import inspect
import typing
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final, TypeAlias, cast

import msgspec
import msgspec.inspect

from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.retry import Reject
from abe.errors import ConfigurationError
from abe.types import EventHandlerFunc, EventHandlerProtocol

Handle: TypeAlias = Callable[[Any], Awaitable[object]]
_OBJECTS: Final = (
    msgspec.inspect.AnyType,
    msgspec.inspect.DataclassType,
    msgspec.inspect.DictType,
    msgspec.inspect.StructType,
    msgspec.inspect.TypedDictType,
)
_PLAIN: Final = (dict, Message, Mapping, MutableMapping, object, Any, inspect.Parameter.empty)


def adapt(handler: EventHandlerFunc | EventHandlerProtocol, executor: Callable[[], Executor]) -> Handle:
    """Return an async function of one message.

    Args:
        handler: The application's.
        executor: Called for the threads, once a synchronous handler needs them.

    Raises:
        ConfigurationError: It is no handler, does not take exactly one argument, or asks for a type that no payload can become.
    """
    function = handler.handle_event if isinstance(handler, EventHandlerProtocol) else handler
    if not callable(function):
        raise ConfigurationError(
            f"a handler must be a function of one argument or an object with handle_event(), not {type(handler).__name__}"
        )
    unwrapped = getattr(function, "func", function)  # of a functools.partial
    called = getattr(unwrapped, "__call__", None)  # noqa: B004 - of an object that is callable
    if inspect.isclass(unwrapped):
        raise ConfigurationError(
            f"{unwrapped.__name__} is a class: give an instance of it, or a function, as the handler"
        )
    if any(inspect.isgeneratorfunction(what) or inspect.isasyncgenfunction(what) for what in (unwrapped, called)):
        raise ConfigurationError(
            f"the handler {_name(function)} contains a yield, so that calling it would run nothing: return instead"
        )
    convert = _converter(function)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called):
        call = cast("Handle", function)
    else:
        call = partial(_in_thread, function, executor())
    if convert is None:
        return call
    return partial(_converted, call, convert)


async def _converted(call: Handle, convert: Callable[[Any], object], message: Any) -> object:
    return await call(convert(message))


async def _in_thread(function: Callable[[Any], object], executor: Executor, message: Any) -> object:
    context = contextvars.copy_context()
    result = await asyncio.get_running_loop().run_in_executor(executor, lambda: context.run(function, message))
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError(f"the handler returned a {type(result).__name__}, which nobody runs: its work was not done")
    # A function that returns an awaitable (a lambda around an async one, say) has only begun its work.
    return await result if inspect.isawaitable(result) else result


def _converter(function: Callable[..., object]) -> Callable[[Any], object] | None:
    name = _name(function)
    try:
        signature = inspect.signature(function)
        signature.bind(None)
    except TypeError as exc:
        raise ConfigurationError(
            f"the handler {name} must accept one positional argument, the message: {exc}"
        ) from None
    except ValueError:
        return None  # a builtin without a signature
    parameter = next(iter(signature.parameters.values()))
    try:
        hints = typing.get_type_hints(inspect.unwrap(getattr(function, "func", function)))
    except NameError as exc:
        raise ConfigurationError(f"the handler {name} has an annotation that cannot be resolved: {exc}") from exc
    except TypeError:
        hints = {}  # a callable object: its annotations are on __call__
        hints = typing.get_type_hints(type(function).__call__)
    wanted = hints.get(parameter.name, parameter.annotation)
    if wanted in _PLAIN or typing.get_origin(wanted) in _PLAIN or isinstance(wanted, typing.TypeVar):
        return None
    if hasattr(wanted, "model_validate"):
        return partial(_validate_model, wanted)
    try:
        msgspec.json.schema(wanted)
        fits = _takes_objects(msgspec.inspect.type_info(wanted))
    except TypeError:
        fits = False
    if not fits:
        raise ConfigurationError(
            f"the handler {name} asks for {wanted!r}: annotate it with dict, Message, a dataclass, TypedDict, "
            f"msgspec Struct or Pydantic model: a payload is always an object"
        )
    return partial(_validate, wanted)


def _takes_objects(kind: msgspec.inspect.Type) -> bool:
    if isinstance(kind, msgspec.inspect.UnionType):
        return any(_takes_objects(member) for member in kind.types)
    return isinstance(kind, _OBJECTS)


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__qualname__", repr(function))


def _validate(wanted: Any, message: Any) -> object:
    try:
        return msgspec.convert(dict(message), wanted)
    except msgspec.ValidationError as exc:
        raise Reject(f"the payload does not fit {getattr(wanted, '__name__', wanted)}: {exc}") from exc


def _validate_model(wanted: Any, message: Any) -> object:
    try:
        return wanted.model_validate(dict(message))
    except ValueError as exc:  # Pydantic's ValidationError is one
        raise Reject(f"the payload does not fit {wanted.__name__}: {exc}") from exc
