"""SQS's transport: the primitives that the engine calls."""

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Generator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import Batching, DeadLetter, Envelope, GroupStats, Outcomes, Receiving, Settling
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.backends.message_queue.base.routing import group_missing
from abe.errors import ConfigurationError
from abe_backend_sqs import _wire
from abe_backend_sqs._broker import Broker
from abe_backend_sqs._browser import Browser
from abe_backend_sqs._errors import QueueMissingError, translated
from abe_backend_sqs._parked import Parked
from abe_backend_sqs._receiver import SqsReceiver
from abe_backend_sqs._settings import SqsSettings

_LINGER: Final = 0.02
"""Seconds that an acknowledgement without a waiting caller may wait for others to share its request."""


class SqsTransport:
    """Queues in one account and region.

    Args:
        settings: The provider's settings.
    """

    def __init__(self, settings: SqsSettings) -> None:
        # With several calls at once, messages could get into a FIFO queue in another order.
        self.batching = Batching(messages=100, bytes=1_048_576, max_concurrent=1 if settings.fifo else 4)
        self.receiving = Receiving(messages=_wire.BATCH, max_concurrent=settings.pollers)
        # Requests are billed. In a FIFO queue, later messages wait for each deletion.
        self.settling = Settling(messages=_wire.BATCH, linger=0.0 if settings.fifo else _LINGER)
        self.broker = Broker(settings)
        self._settings = settings
        self._groups = self.broker.groups
        self._parked = Parked(self.broker)
        self._waited: set[str] = set(settings.groups)

    async def open(self) -> None:
        """Make the client, and check that SQS answers and accepts the credentials."""
        await self.broker.open()

    async def close(self) -> None:
        """Disconnect. Polls in progress are waited for in the background, so that their messages are given back."""
        await self.broker.close()

    async def ping(self) -> None:
        """List one queue."""
        client = await self.broker.clients.calls()
        with translated(self._settings.address):
            await client.list_queues(QueueNamePrefix=self._groups.names.prefix, MaxResults=1)

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        """Store each message in the queues of the groups that want it."""
        registry = await self._groups.keeper.registry()
        outcomes = await self.broker.publisher.send(envelopes, registry)
        if not registry.groups:
            # A group that was created meanwhile may have browsed the parked messages before these were stored. If this process ends before
            # it has browsed them, they stay parked. The wait is short: the messages are stored, and must not become unknown.
            await self._parked.hand_over()
        return outcomes

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Declare the group, wait until every publisher knows it, and move the parked messages that it wants."""
        declared = await self._groups.declare(group, patterns, change=change)
        if declared.propagation:
            self._parked.new_groups.add(group)
        if group in self._waited and not change:
            # Groups of the settings are declared before the first publish, which need not wait; subscribing waits.
            self._waited.discard(group)
        elif declared.propagation:
            self._check_timeout()
            await asyncio.sleep(declared.propagation)
        if group not in self._parked.new_groups:  # the process that created it may have died
            self._parked.look()
            return declared.patterns
        # Another process may have created it at the same moment: by now the registry has the patterns that hold.
        wanted = (await self._groups.keeper.registry()).groups.get(group, declared.patterns)
        await self._parked.hand_over()
        return wanted

    async def delete_group(self, group: str) -> None:
        """Delete the group's queues."""
        await self._groups.delete(group)

    async def delete_namespace(self) -> None:
        """Delete all queues of the namespace, and its topic."""
        await self._groups.delete_all()

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Read the registry."""
        return (await self._groups.keeper.registry(time.monotonic())).present

    async def subscribe(self, group: str, prefetch: int) -> SqsReceiver:
        """Start a consumer. SQS knows no consumers: each delivery has a receipt handle of its own."""
        with _existing(group):
            queue = await self._groups.find(self._groups.names.queue(group))
        await self.broker.clients.polls()
        self.broker.check_open()
        return SqsReceiver(self.broker, group, queue)

    async def stats(self, group: str) -> GroupStats:
        """Count, approximately. A message that waits for its retry counts as in flight, as both are invisible in SQS."""
        with _existing(group):
            waiting, in_flight, delayed = await self._groups.group_counts(group)
        dead = 0
        with suppress(QueueMissingError):  # deleted: the next dead letter creates it again
            dead = sum(await self._groups.counts(self._groups.names.dead(group)))
        return GroupStats(waiting=waiting, in_flight=in_flight, delayed=delayed, dead=dead, oldest=None)

    async def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        """Browse the dead letters in pages, which stay invisible until the end. Each page is sorted, not the whole."""
        async with self._dead(group) as browser, aclosing(browser.pages()) as pages:
            async for page in pages:
                yield sorted(map(_wire.dead_letter, page), key=lambda letter: letter.dead_at)

    async def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Store copies in the group's queue, then delete the dead letters."""
        name = self._groups.names.queue(group)
        async with self._dead(group) as browser, aclosing(browser.chosen(ids)) as pages:
            async for chosen in pages:
                copies = [self.broker.copies.replayed(group, message).entry for message in chosen]
                results = await self.broker.publisher.post(name, copies) if copies else ()
                stored = [message for message, result in zip(chosen, results, strict=True) if result is None]
                await browser.delete(stored)
                yield len(stored)
                if error := next(filter(None, results), None):
                    raise error

    async def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Delete dead letters one by one: SQS's own purge would delete later ones too."""
        async with self._dead(group) as browser, aclosing(browser.chosen(ids)) as pages:
            async for chosen in pages:
                await browser.delete(chosen)
                yield len(chosen)

    def _check_timeout(self) -> None:
        ttl, timeout = self._settings.registry_ttl, self._settings.publish_timeout
        if ttl >= timeout:
            raise ConfigurationError(
                f"SQS_REGISTRY_TTL_SECONDS ({ttl:g}) must be less than QUEUE_PUBLISH_TIMEOUT_SECONDS ({timeout:g}): "
                f"declaring a new group takes that long"
            )

    @asynccontextmanager
    async def _dead(self, group: str) -> AsyncGenerator[Browser]:
        with _existing(group):
            await self._groups.counts(self._groups.names.queue(group))
        async with Browser(self.broker, self._groups.names.dead(group)) as browser:
            yield browser


@contextmanager
def _existing(group: str) -> Generator[None]:
    """Turn a missing queue into a missing group.

    Raises:
        GroupMissingError: The group's queue is missing.
    """
    try:
        yield
    except QueueMissingError as exc:
        raise group_missing(group) from exc


if TYPE_CHECKING:
    _: type[TransportProtocol] = SqsTransport
