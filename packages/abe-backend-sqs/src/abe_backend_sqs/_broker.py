"""SQS as transport and receivers share it: its clients, the groups, and what goes on in the background."""

import asyncio
from collections import defaultdict
from contextlib import suppress
from typing import Final

from abe.backends.message_queue.base.tasks import Background
from abe.errors import BackendConnectionError
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._copies import Copies
from abe_backend_sqs._delays import Delays
from abe_backend_sqs._errors import QueueMissingError
from abe_backend_sqs._groups import Groups
from abe_backend_sqs._inflight import Settled
from abe_backend_sqs._polls import Poll
from abe_backend_sqs._publisher import Publisher
from abe_backend_sqs._settings import SqsSettings

lingering: Final = Background()
"""What outlives its transport for as long as its last poll."""


class Broker:
    """One namespace in one account and region.

    Args:
        settings: Where it is, and as whom to ask.
    """

    def __init__(self, settings: SqsSettings) -> None:
        self.settings = settings
        self.clients = Clients(settings)
        self.groups = Groups(self.clients)
        self.copies = Copies(settings, self.groups.names)
        self.publisher = Publisher(self.groups, settings)
        self.settled = Settled()
        self.detached: defaultdict[str, list[Poll]] = defaultdict(list)
        """Polls of consumers that are gone, by queue."""
        self.background = Background()
        """What must not be cancelled with the one who asked for it."""
        self.closed = asyncio.Event()
        # A publisher that may be behind by less than SQS's own second of polling is one of an emulator, which counts exactly.
        self.thorough: bool = settings.registry_ttl >= 1
        """Whether a look at a queue asks all of SQS's servers, whatever they have counted."""
        self._delays: dict[str, Delays] = {}
        self._opened = False
        self._opening = 0

    def delays(self, group: str) -> Delays:
        """Return what moves the group's delayed messages to its FIFO queue."""
        if group not in self._delays:
            self._delays[group] = Delays(self.publisher, self.copies, self.background.start, group)
        return self._delays[group]

    def check_open(self) -> None:
        """Raise a `BackendConnectionError` where it was closed."""
        if self.closed.is_set():
            raise BackendConnectionError("the connection to SQS was closed")

    async def open(self) -> None:
        """Make the client, and look whether SQS answers and knows us."""
        self.check_open()
        if self._opened:
            return
        self._opening += 1
        try:
            if self.settings.pinned is None:
                await self.groups.keeper.open()
            else:  # the groups are known without asking; the address of one of their queues is not
                with suppress(QueueMissingError):  # whoever needs it makes it, or says that it is missing
                    await self.groups.find(self.groups.names.queue(self.settings.pinned[0][0]))
            self._opened = True
        finally:
            self._opening -= 1
            if not self._opened and not self._opening:
                await self.groups.keeper.close()  # whoever gives up has nothing to close
                await self.clients.reset()

    async def close(self) -> None:
        """Disconnect; polls that are under way are waited for in the background, so that what they bring is given back."""
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
