"""The protocol of a consumer, which runs a handler over a backend's messages."""

from collections.abc import Coroutine
from typing import Any, Protocol, runtime_checkable

from abe.types import EventHandlerFunc, EventHandlerProtocol


@runtime_checkable
class EventConsumer(Protocol):
    """Runs a handler for each message until it is shut down."""

    def run(self, handler: EventHandlerFunc | EventHandlerProtocol) -> Coroutine[Any, Any, None]:
        """Handle messages until cancelled, or until `shutdown` is done. May be called again after that."""
        ...

    async def shutdown(self) -> None:
        """Stop taking messages, let running handlers finish, settle their messages, and return. May be called repeatedly."""
        ...
