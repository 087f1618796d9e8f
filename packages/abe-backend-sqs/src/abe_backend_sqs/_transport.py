"""The primitives: what the engine asks of SQS."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from abe.backends.message_queue.base import Batching, DeadLetter, Envelope, ExponentialBackoff, GroupStats
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.base.names import EVERYTHING
from abe.errors import AbeError, BackendConnectionError, ConfigurationError
from abe_backend_sqs import _wire
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._copies import Copies
from abe_backend_sqs._drawer import Drawer
from abe_backend_sqs._errors import QueueMissingError, translated
from abe_backend_sqs._later import Later
from abe_backend_sqs._polls import Poll
from abe_backend_sqs._queues import Queues
from abe_backend_sqs._receiver import SqsReceiver
from abe_backend_sqs._sender import Sender
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._wire import Entry, Message

_log: Final = logging.getLogger("abe.sqs")
_BACKOFF: Final = ExponentialBackoff(initial=0.1, maximum=5.0)

_lingering: Final[set[asyncio.Task[None]]] = set()
"""What outlives its transport for as long as its last poll, held so that it is not collected."""


class SqsTransport:
    """Queues in one account and region."""

    def __init__(self, settings: SqsSettings) -> None:
        self.settings = settings
        # More than one at a time, and what is sent first would not always be first in a FIFO queue.
        self.batching = Batching(messages=100, bytes=1_048_576, flights=1 if settings.fifo else 4)
        self.clients = Clients(settings)
        self.queues = Queues(settings, self.clients)
        self.copies = Copies(settings, self.queues.names)
        self.sender = Sender(settings, self.clients, self.queues)
        self.left_behind: defaultdict[str, list[Poll]] = defaultdict(list)
        """Polls of consumers that are gone, by queue."""
        self._later: dict[str, Later] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._opened = False
        self._closed = asyncio.Event()
        self._handing_over: asyncio.Task[None] | None = None
        self._looks: set[bool] = set()
        self._waited: set[str] = set(settings.groups)
        self._fresh: set[str] = set()
        """Groups that are new, until the held messages that they want are theirs."""
        # A publisher that may be behind by less than SQS's own second of polling is one of an emulator, which counts exactly.
        self._thorough = settings.registry_ttl >= 1

    async def open(self) -> None:
        """Make the client, and look whether SQS answers and knows us."""
        self._check_open()
        if self._opened:
            return
        if self.settings.pinned is None:
            await self.queues.registry()
        else:  # it is known without asking; the address of one of its queues is not
            with suppress(QueueMissingError):  # whoever needs it makes it, or says that it is missing
                await self.queues.url(self.queues.names.queue(self.settings.pinned[0][0]))
        self._opened = True

    async def close(self) -> None:
        """Disconnect; polls that are under way are waited for in the background, so that what they bring is given back."""
        self._closed.set()
        if not self._background:
            await self.clients.close()
            return
        task = asyncio.get_running_loop().create_task(self._close_later())
        _lingering.add(task)
        task.add_done_callback(_lingering.discard)

    async def ping(self) -> None:
        """Ask for one queue's name."""
        client = await self.clients.calls()
        with translated(self.settings.address):
            await client.list_queues(QueueNamePrefix=self.queues.names.prefix, MaxResults=1)

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Put each message into the queues of the groups that want it."""
        registry = await self.queues.registry()
        outcomes = await self.sender.send(envelopes, registry)
        if not registry.groups:
            # A group that was made meanwhile may have looked for them before they came. If this process ends before it looks, nobody does;
            # but they are stored, and who publishes is not to wait so long that it takes that for unknown.
            looking = self._look_at_held(thorough=self._thorough)
            await asyncio.wait([looking], timeout=self.settings.publish_timeout / 4)
        return outcomes

    async def declare(self, group: str, patterns: tuple[str, ...] | None) -> None:
        """Make the group known, wait until every publisher knows it, and move the held messages that it wants."""
        ignorance = await self.queues.declare(group, patterns)
        if ignorance:
            self._fresh.add(group)
        if group in self._waited and patterns is None:
            # Groups of the settings are declared on the way to the first publish, which needs none to wait; who subscribes does.
            self._waited.discard(group)
        elif ignorance:
            self._check_patience()
            await asyncio.sleep(ignorance)
        if group not in self._fresh:  # whoever made it may have been ended before the rest
            self._look_at_held(thorough=False)
            return
        wanted = (await self.queues.registry()).groups.get(group, patterns or EVERYTHING)
        await self._move_held({group: wanted}, thorough=self._thorough)
        self._fresh.discard(group)

    async def restore(self, group: str) -> None:
        """Make a group again that was deleted underneath, with the patterns that it had when we last knew."""
        known = await self.groups()
        await self.declare(group, None if group in known else self.queues.patterns.get(group))

    async def delete_group(self, group: str) -> None:
        """Delete the group's queues."""
        await self.queues.delete(group)

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Read the registry."""
        return (await self.queues.registry(since=time.monotonic())).groups

    async def subscribe(self, group: str, prefetch: int) -> SqsReceiver:
        """Make a consumer. SQS knows none: each message's receipt is its own."""
        name = self.queues.names.queue(group)
        url = await self.queues.url(name)
        await self.clients.polls()
        self._check_open()
        return SqsReceiver(self, group, name, url)

    async def stats(self, group: str) -> GroupStats:
        """Count, approximately. A message that waits for its retry counts as in flight, as SQS hides both alike."""
        try:
            (waiting, held, later), dead = await asyncio.gather(
                self.queues.group_counts(group), self.queues.counts(self.queues.names.dead(group))
            )
        except QueueMissingError:
            return GroupStats(waiting=0, in_flight=0, delayed=0, dead=0, oldest=None)
        return GroupStats(waiting=waiting, in_flight=held, delayed=later, dead=sum(dead), oldest=None)

    async def dead_letters(self, group: str, limit: int) -> Sequence[DeadLetter]:
        """Take all of them for a moment: a queue has no order that could be read from one end."""
        letters: list[DeadLetter] = []
        async with self._dead(group) as drawer:
            async for batch in drawer.take():
                letters += map(_wire.dead_letter, batch)
        return sorted(letters, key=lambda letter: letter.dead_at)[:limit]

    async def find_dead_letter(self, group: str, id: str) -> DeadLetter | None:
        """Look through them until it comes."""
        async with self._dead(group) as drawer:
            async for batch in drawer.take():
                for letter in map(_wire.dead_letter, batch):
                    if letter.id == id:
                        return letter
        return None

    async def replay(self, group: str, ids: Collection[str] | None) -> int:
        """Copy them back, then delete them."""
        replayed = 0
        async with self._dead(group) as drawer:
            async for chosen in _chosen(drawer, ids):
                copies = [self.copies.replayed(group, message).entry for message in chosen]
                results = await self.sender.post(self.queues.names.queue(group), copies)
                stored = [message for message, result in zip(chosen, results, strict=True) if result is None]
                await drawer.delete(stored)
                replayed += len(stored)
                if error := next(filter(None, results), None):
                    raise error
        return replayed

    async def purge(self, group: str, ids: Collection[str] | None) -> int:
        """Delete them one by one: SQS's own purge takes what comes meanwhile, too."""
        removed = 0
        async with self._dead(group) as drawer:
            async for chosen in _chosen(drawer, ids):
                await drawer.delete(chosen)
                removed += len(chosen)
        return removed

    def later(self, group: str) -> Later:
        """Return what moves the group's delayed messages to its FIFO queue."""
        return self._later.setdefault(group, Later(self, group))

    def in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what must not be cancelled with the one who asked for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise BackendConnectionError("the connection to SQS was closed")

    def _check_patience(self) -> None:
        ttl, patience = self.settings.registry_ttl, self.settings.publish_timeout
        if ttl >= patience:
            raise ConfigurationError(
                f"SQS_REGISTRY_TTL_SECONDS ({ttl:g}) must be less than QUEUE_PUBLISH_TIMEOUT_SECONDS ({patience:g}): "
                f"declaring a new group takes that long"
            )

    def _dead(self, group: str) -> Drawer:
        return Drawer(self, self.queues.names.dead(group), thorough=self._thorough)

    def _look_at_held(self, *, thorough: bool) -> asyncio.Task[None]:
        """Hand held messages to the groups that there are, in the background, until it succeeds."""
        self._looks.add(thorough)
        if self._handing_over is None or self._handing_over.done():
            self._handing_over = self.in_background(self._hand_over())
        return self._handing_over

    async def _hand_over(self) -> None:
        failures = 0
        while self._looks:
            thorough = max(self._looks)
            self._looks.clear()  # who asks from now on may have messages that this look misses
            try:
                registry = await self.queues.registry(since=time.monotonic())
                oldest_first = sorted(registry.groups, key=lambda group: registry.since.get(group, 0.0))
                if oldest_first:
                    await self._move_held({each: registry.groups[each] for each in oldest_first}, thorough=thorough)
            except AbeError as exc:
                if not exc.retryable:
                    _log.debug("held messages are left to those who may look at them: %s", exc)
                    return
                level = logging.DEBUG if failures else logging.WARNING
                _log.log(level, "held messages could not be handed out, trying again: %s", exc)
                failures += 1
                self._looks.add(thorough)
                if await pause(self._closed, _BACKOFF(failures)):
                    return

    async def _move_held(self, groups: Mapping[str, tuple[str, ...]], *, thorough: bool) -> None:
        """Move each held message to the first of the groups that wants it.

        Raises:
            BackendConnectionError: Some could not be moved, and may be next time.
        """
        failed: list[AbeError] = []
        async with Drawer(self, self.queues.names.held, thorough=thorough) as held:
            async for batch in held.take():
                for group, patterns in groups.items():
                    wanted = [message for message in batch if _wire.wants(patterns, message)]
                    moved = await self._unhold(group, wanted, failed)
                    await held.delete(moved)
                    batch = [message for message in batch if message not in moved]
        if failed:
            raise BackendConnectionError(f"held messages could not be moved: {failed[0]}") from failed[0]

    async def _unhold(self, group: str, messages: Sequence[Message], failed: list[AbeError]) -> Sequence[Message]:
        """Put held messages into the group's queue, with what is left of their delays, and return those that are there."""
        entries: dict[str, list[tuple[Message, Entry]]] = {}
        for message in messages:
            name, entry = self.copies.unheld(group, message)
            entries.setdefault(name, []).append((message, entry))
        moved: list[Message] = []
        for name, some in entries.items():
            results = await self.sender.post(name, [entry for _, entry in some])
            moved += [message for (message, _), result in zip(some, results, strict=True) if result is None]
            failed += [result for result in results if result is not None and result.retryable]
        return moved

    async def _close_later(self) -> None:
        try:
            while self._background:
                await asyncio.wait(self._background)
        finally:  # also where the event loop ends first
            await self.clients.close()


async def _chosen(drawer: Drawer, ids: Collection[str] | None) -> AsyncIterator[Sequence[Message]]:
    """Take out dead letters with these ids (None: all), each id once: one that is replayed may be back before we are through."""
    left = None if ids is None else set(ids)
    async for batch in drawer.take():
        if left is None:
            yield batch
            continue
        chosen: list[Message] = []
        for message in batch:
            if (id := _wire.dead_letter(message).id) in left:
                left.discard(id)
                chosen.append(message)
        if chosen:
            yield chosen
        if not left:
            return


if TYPE_CHECKING:
    _: type[TransportProtocol] = SqsTransport
