"""Handlers: checks an application's handler and adapts it to one async function of a message.

A handler is an async function, a function (it runs in a thread), or an object with `handle_event`. The annotation of its parameter
decides what it receives: the message itself (``dict``, ``Message``, no annotation), or the payload, converted and validated (a dataclass,
TypedDict, attrs class, msgspec Struct, Pydantic model, or a union of them). A handler of a converted payload can take the `Message` as a
second parameter, annotated with `Message` or called ``message``.
"""

import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias, cast

from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.conversion import Convert, converter
from abe.backends.message_queue.signatures import Parameters, name_of, parameters
from abe.backends.message_queue.threads import ThreadCall, Threads
from abe.backends.message_queue.time_limit import TimeLimit
from abe.errors import ConfigurationError
from abe.types import EventHandlerFunc, EventHandlerProtocol

Handle: TypeAlias = Callable[[Any], Awaitable[object]]
AnyHandler: TypeAlias = EventHandlerFunc | EventHandlerProtocol | Callable[[Any, Message], object]
"""A function of the converted payload, or of that and its Message, or an object with `handle_event`."""


class CheckedHandler:
    """An application's handler, with a checked signature.

    Args:
        handler: The application's handler.

    Raises:
        ConfigurationError: It is no handler, does not take one message, or asks for a type that no payload converts to.
    """

    def __init__(self, handler: AnyHandler) -> None:
        self._function = function = _function(handler)
        asked = parameters(function)
        self._convert = _converter(function, asked)
        self._as_second = asked.message
        called = getattr(_unbound(function), "__call__", None)  # noqa: B004 - of an object that is callable
        self.in_thread: bool = not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called))
        """Whether it is synchronous, and so runs in a thread."""

    def bound(self, threads: Threads | None, limit: TimeLimit | None) -> Handle:
        """Return an async function of one message.

        Args:
            threads: The threads of a synchronous handler.
            limit: The handler's time limit.
        """
        call: Callable[[Any], Any] = self._function
        if self._convert is not None or self._as_second is not None:
            call = partial(_passed, self._function, self._convert or _as_it_is, self._as_second)
        if threads is not None:
            return partial(_in_thread, call, threads, limit)
        if limit is not None:
            return partial(limit.run, call)
        return cast("Handle", call)


def _function(handler: object) -> Callable[..., Any]:
    # Not isinstance: a mock without a spec has every attribute.
    named = "handle_event" in dir(handler) or (not callable(handler) and hasattr(handler, "handle_event"))
    function: Any = cast("EventHandlerProtocol", handler).handle_event if named else handler
    if not callable(function):
        raise ConfigurationError(
            f"a handler must be a function of one argument or an object with handle_event(), not {type(handler).__name__}"
        )
    unwrapped = _unbound(function)
    if inspect.isclass(unwrapped):
        raise ConfigurationError(
            f"{unwrapped.__name__} is a class: give an instance of it, or a function, as the handler"
        )
    called = getattr(unwrapped, "__call__", None)  # noqa: B004 - of an object that is callable
    if any(inspect.isgeneratorfunction(what) or inspect.isasyncgenfunction(what) for what in (unwrapped, called)):
        raise ConfigurationError(
            f"the handler {name_of(function)} contains a yield, so calling it would run nothing: use return"
        )
    return cast("Callable[..., Any]", function)


def _unbound(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return function  # pyright: ignore[reportUnknownVariableType]


def _converter(function: Callable[..., object], asked: Parameters) -> Convert | None:
    """Return the converter for the payload's parameter, by the first candidate annotation that a payload converts to."""
    problem: TypeError | None = None
    for wanted in asked.payload:
        try:
            return converter(wanted)
        except TypeError as exc:
            problem = problem or exc
    if problem is None:
        return None
    raise ConfigurationError(
        f"the handler {name_of(function)} asks for {asked.payload[0]!r}: annotate it with dict, Message, a dataclass, TypedDict, attrs "
        f"class, msgspec Struct or Pydantic model, or a union of them ({problem})"
    ) from problem


def _as_it_is(message: Any) -> object:
    return message


def _passed(function: Callable[..., Any], convert: Convert, as_second: str | int | None, message: Any) -> Any:
    if as_second is None:
        return function(convert(message))
    if isinstance(as_second, str):
        return function(convert(message), **{as_second: message})
    return function(message, convert(message)) if as_second == 0 else function(convert(message), message)


async def _in_thread(
    function: Callable[[Any], object], threads: Threads, limit: TimeLimit | None, message: Any
) -> object:
    if limit is None:
        return await _call_in_thread(function, threads, _unlimited, message)
    return await limit.run(partial(_call_in_thread, function, threads, limit.began), message, in_thread=True)


async def _call_in_thread(
    function: Callable[[Any], object], threads: Threads, begun: Callable[[ThreadCall], object], message: Any
) -> object:
    result = await threads.run(function, message, begun)
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError(f"the handler returned a {type(result).__name__}, which is never run: its work was not done")
    # A function that returns an awaitable, such as a lambda around an async function, has only started its work.
    return await result if inspect.isawaitable(result) else result


def _unlimited(call: ThreadCall) -> None:
    """Do nothing: there is no time limit."""
