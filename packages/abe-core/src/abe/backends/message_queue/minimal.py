"""A provider that has only the three methods of the protocol, made to look like one that has subscriptions.

Its messages are plain dicts. Asking for the next one is all that it can be told.
"""

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator
from types import TracebackType
from typing import Any, Final, Self, cast

from abe.backends.message_queue.base.message import Message
from abe.errors import BackendClosedError, ConfigurationError

_log: Final = logging.getLogger("abe.consumer")
_CLOSING: Final = 5.0
"""Seconds that a provider gets to end its iterator."""


class MinimalSubscription:
    """One message at a time from an async iterator.

    Args:
        messages: What the provider's `consume` returned.

    Raises:
        ConfigurationError: It is no async iterator.
    """

    def __init__(self, messages: AsyncIterable[dict[str, Any]]) -> None:
        given: Any = messages
        if not isinstance(given, AsyncIterable):
            if asyncio.iscoroutine(given):
                given.close()
            raise ConfigurationError(
                f"the provider's consume() must return an async iterator, not a {type(given).__name__}: write it as an async generator"
            )
        self._iterator: AsyncIterator[dict[str, Any]] = aiter(messages)
        self._asking: asyncio.Future[dict[str, Any]] | None = None
        self._stopped = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        try:
            return await self.receive()
        except BackendClosedError:
            raise StopAsyncIteration from None

    def take(self) -> Message | None:
        """Return None: nothing is ever at hand."""
        return None

    async def receive(self) -> Message:
        """Ask the iterator."""
        if self._stopped:
            raise BackendClosedError("the subscription was closed")
        if self._asking is None:
            self._asking = asyncio.ensure_future(anext(self._iterator))
        asking = self._asking
        await asyncio.wait([asking])
        self._asking = None
        if asking.cancelled():
            raise BackendClosedError("the subscription was closed")
        try:
            return cast("Message", asking.result())
        except StopAsyncIteration:
            raise BackendClosedError("the provider has no more messages") from None

    def ack_soon(self, message: Message) -> None:
        """Do nothing: asking for the next message is the acknowledgement."""

    async def release(self, message: Message) -> None:
        """Do nothing: there is no way to tell the provider."""

    async def halt(self) -> None:
        """Take nothing new."""
        await self.stop()

    async def stop(self) -> None:
        """End the wait for a message."""
        self._stopped = True
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking], timeout=_CLOSING)

    async def aclose(self) -> None:
        """Close the iterator, if it can be."""
        await self.stop()
        if self._asking is not None and not self._asking.done():
            _log.warning("the provider does not end its wait for a message, and is left behind")
            return
        close = getattr(self._iterator, "aclose", None)
        if close is not None:
            try:
                async with asyncio.timeout(_CLOSING):
                    await close()
            except TimeoutError:
                _log.warning("the provider did not close its iterator within %g s", _CLOSING)
