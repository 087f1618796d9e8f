"""What a backend has while it is open in one event loop."""

import asyncio

from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.base.transport import Transport
from abe.backends.message_queue.engine.inbox import Inbox
from abe.backends.message_queue.engine.publisher import Publisher
from abe.errors import BackendClosedError
from abe.settings import QueueSettings


class Session:
    """A transport, its publisher and the inboxes that take from it, all of the running event loop."""

    def __init__(self, transport: Transport, settings: QueueSettings) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.transport = transport
        self.publisher: Publisher = Publisher(
            transport,
            self.opened,
            timeout=settings.publish_timeout,
            max_count=settings.max_unconfirmed,
            max_bytes=settings.max_unconfirmed_bytes,
        )
        self.inboxes: set[Inbox] = set()
        self._undeclared = settings.groups
        self._close_timeout = settings.close_timeout
        self._closing: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()

    async def opened(self) -> None:
        """Return once the transport is connected, and the groups of the settings exist."""
        await self.transport.open()
        if self._undeclared:
            for group in self._undeclared:
                await self.transport.declare(group, None)
            self._undeclared = ()

    @property
    def ended(self) -> bool:
        """Whether it is being closed."""
        return self._ended.is_set()

    async def pause(self, seconds: float) -> None:
        """Wait before another try.

        Raises:
            BackendClosedError: The session is being closed: there will be none.
        """
        if await pause(self._ended, seconds):
            raise BackendClosedError("the backend was closed")

    async def close(self) -> None:
        """Finish what is on its way, end the subscriptions, and disconnect, whatever the broker does."""
        if self._closing is None:
            self._closing = self.loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._ended.set()
        try:
            await asyncio.gather(
                self.publisher.close(self._close_timeout),
                *(inbox.close() for inbox in self.inboxes),
            )
        finally:
            await self.transport.close()
