"""A provider that has only the three methods of the protocol, made to look like one that has subscriptions.

Its messages are plain dicts. Asking for the next one is all that it can be told.
"""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self, cast

from abe.backends.message_queue.base.message import Message
from abe.errors import BackendClosedError


class MinimalSubscription:
    """One message at a time from an async iterator.

    Args:
        iterator: What the provider's `consume` returned.
    """

    def __init__(self, iterator: AsyncIterator[dict[str, Any]]) -> None:
        self._iterator = iterator
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

    async def stop(self) -> None:
        """End the wait for a message."""
        self._stopped = True
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def aclose(self) -> None:
        """Close the iterator, if it can be."""
        await self.stop()
        close = getattr(self._iterator, "aclose", None)
        if close is not None:
            await close()
