"""What the transport and its receivers share: the clients, the groups, background tasks."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, TypeAlias

from abe.backends.message_queue.base.tasks import Background
from abe.errors import BackendConnectionError
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._copies import Copies
from abe_backend_sqs._delays import Delays
from abe_backend_sqs._errors import QueueMissingError
from abe_backend_sqs._groups import Groups
from abe_backend_sqs._inflight import Settled
from abe_backend_sqs._publisher import Publisher
from abe_backend_sqs._queue import Queue
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._wire import Message

Poll: TypeAlias = "asyncio.Task[tuple[Sequence[Message], float]]"
"""A request for messages. It returns what it brought, and until when that is ours, by the monotonic clock."""

lingering: Final = Background()
"""Tasks that close the clients of a transport after its last poll."""


class Broker:
    """One namespace in one account and region.

    Args:
        settings: The provider's settings.
    """

    def __init__(self, settings: SqsSettings) -> None:
        self.settings = settings
        self.clients = Clients(settings)
        self.groups = Groups(self.clients)
        self.copies = Copies(settings, self.groups.names)
        self.publisher = Publisher(self.groups, settings)
        self.settled = Settled()
        self.detached: dict[Poll, tuple[Queue, int]] = {}
        """Polls whose `receive` was stopped or cancelled, with their queue, and the messages that each may bring."""
        self.background = Background()
        """Tasks that must not be cancelled with their callers."""
        self.closed = asyncio.Event()
        # A time to live of the registry below SQS's own second of polling means an emulator, which counts exactly.
        self.thorough: bool = settings.registry_ttl >= 1
        """Whether browsing a queue asks all of SQS's servers, whatever they have counted."""
        self._delays: dict[str, Delays] = {}
        self._opened = False
        self._opening = 0

    def delays(self, group: str) -> Delays:
        """Return the mover of the group's delayed messages to its FIFO queue."""
        if group not in self._delays:
            self._delays[group] = Delays(self.publisher, self.copies, self.background.start, group)
        return self._delays[group]

    def check_open(self) -> None:
        """Raise a `BackendConnectionError` if it was closed."""
        if self.closed.is_set():
            raise BackendConnectionError("the connection to SQS was closed")

    async def open(self) -> None:
        """Make the client, and check that SQS answers and accepts the credentials."""
        self.check_open()
        if self._opened:
            return
        self._opening += 1
        try:
            if self.settings.pinned is None:
                await self.groups.keeper.open()
            else:  # the groups are known without a request; the address of one of their queues is not
                with suppress(QueueMissingError):  # a later operation creates it, or reports it
                    await self.groups.find(self.groups.names.queue(self.settings.pinned[0][0]))
            self._opened = True
        finally:
            self._opening -= 1
            if not self._opened and not self._opening:
                await self.groups.keeper.close()  # nothing stays open after a failure
                await self.clients.reset()

    async def close(self) -> None:
        """Disconnect. Polls in progress are waited for in the background, so that their messages are given back."""
        self.closed.set()
        await self.groups.keeper.close()
        if self.background:
            lingering.start(self._close_later())
        else:
            await self.clients.close()

    async def _close_later(self) -> None:
        try:
            await self.background.drain()
        finally:  # also where the event loop ends first
            await self.clients.close()
