"""Middleware: wraps every publish and every handled message."""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from abe.backends.message_queue.base.message import Message
from abe.errors import ConfigurationError
from abe.types import MessageQueuePayload


@dataclass(frozen=True, slots=True)
class Publication:
    """A message that is about to be published; middleware may pass on a changed copy (``dataclasses.replace``)."""

    key: str
    payload: MessageQueuePayload
    headers: Mapping[str, str] | None = None
    id: str | None = None
    delay: float = 0.0
    mandatory: bool = False
    group: str | None = None
    timeout: float | None = None


PublishNext: TypeAlias = Callable[[Publication], Awaitable[None]]
HandleNext: TypeAlias = Callable[[Message], Awaitable[object]]


class Middleware:
    """Override the methods that you need; each must await `forward` to continue."""

    async def publish(self, publication: Publication, forward: PublishNext) -> None:
        """Wrap a publish. Runs in the caller's task."""
        await forward(publication)

    async def handle(self, message: Message, forward: HandleNext) -> None:
        """Wrap a handler. An exception counts as the handler's failure."""
        await forward(message)


_Item = TypeVar("_Item")


async def completed(call: Callable[[_Item], Awaitable[object]], what: str, item: _Item) -> None:
    """Call an async function of the application, and see to it that its work is done.

    Args:
        call: The function.
        what: Its name, for the error.
        item: Its argument.

    Raises:
        TypeError: As `check_completed`.
    """
    result = await call(item)
    if result is not None:
        check_completed(result, what)


def check_completed(result: object, what: str) -> None:
    """Check what an async function has returned.

    Raises:
        TypeError: It is a coroutine or the like, which nobody awaits: its work was not done.
    """
    if not (inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result)):
        return
    if inspect.iscoroutine(result):
        result.close()
    raise TypeError(f"{what} returned a {type(result).__name__} that is never run: is an await missing?")


def check_middleware(middleware: Sequence[Middleware]) -> Sequence[Middleware]:
    """Return the layers, as a tuple.

    Raises:
        ConfigurationError: It is not a sequence of instances of `Middleware`; the text says what is expected.
    """
    given: Any = middleware
    if isinstance(given, Middleware):
        raise ConfigurationError(f"middleware must be a sequence: write [{type(given).__name__}(...)], with brackets")
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise ConfigurationError(f"middleware must be a sequence of Middleware, not {type(given).__name__}")
    for layer in middleware:
        if isinstance(layer, type):
            raise ConfigurationError(f"middleware must be instances: write {layer.__name__}(), not {layer.__name__}")
        if not isinstance(layer, Middleware):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"middleware must be instances of Middleware, not of {type(layer).__name__}")
    return tuple(middleware)
