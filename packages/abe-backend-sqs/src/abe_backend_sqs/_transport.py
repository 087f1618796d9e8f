"""The primitives: what the engine asks of SQS."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Generator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from abe.backends.message_queue.base import (
    Batching,
    DeadLetter,
    Envelope,
    ExponentialBackoff,
    GroupStats,
    Outcomes,
    Settling,
)
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.base.routing import group_missing
from abe.backends.message_queue.base.tasks import Background
from abe.errors import AbeError, BackendConnectionError, ConfigurationError
from abe_backend_sqs import _wire
from abe_backend_sqs._browser import Browser
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._copies import Copies
from abe_backend_sqs._errors import QueueMissingError, translated
from abe_backend_sqs._held import Settled
from abe_backend_sqs._later import Later
from abe_backend_sqs._polls import Poll
from abe_backend_sqs._queues import Queues
from abe_backend_sqs._receiver import SqsReceiver
from abe_backend_sqs._registry import Registry
from abe_backend_sqs._sender import Sender
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._wire import Entry, Message

_log: Final = logging.getLogger("abe.sqs")
_BACKOFF: Final = ExponentialBackoff(initial=0.1, maximum=5.0)
_CLOCKS: Final = 5_000
"""Milliseconds that clocks may be apart."""
_FULL_LOOK: Final = 100_000
"""Parked messages of a look. SQS lets 120,000 of a queue be out of sight at once."""
_SHORT_LOOK: Final = 1_000
_LINGER: Final = 0.02
"""Seconds for which an acknowledgement that nobody waits for may wait for others to share its request."""
_T = TypeVar("_T")

_LOOKS: Final = 5
"""Looks at parked messages, some of which others have out of sight."""

_lingering: Final = Background()
"""What outlives its transport for as long as its last poll."""


class SqsTransport:
    """Queues in one account and region."""

    def __init__(self, settings: SqsSettings) -> None:
        self.settings = settings
        # More than one at a time, and what is sent first would not always be first in a FIFO queue.
        self.batching = Batching(messages=100, bytes=1_048_576, max_concurrent=1 if settings.fifo else 4)
        # Requests are billed. In a FIFO queue, others wait for each deletion.
        self.settling = Settling(messages=_wire.BATCH, linger=0.0 if settings.fifo else _LINGER)
        self.clients = Clients(settings)
        self.queues = Queues(settings, self.clients)
        self.copies = Copies(settings, self.queues.names)
        self.sender = Sender(settings, self.clients, self.queues)
        self.left_behind: defaultdict[str, list[Poll]] = defaultdict(list)
        """Polls of consumers that are gone, by queue."""
        self.settled: Settled = Settled()
        self._later: dict[str, Later] = {}
        self._background = Background()
        self._opened = False
        self._opening = 0
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
        self._opening += 1
        try:
            await self._look()
            self._opened = True
        finally:
            self._opening -= 1
            if not self._opened and not self._opening:
                await self.queues.reader.close()  # whoever gives up has nothing to close
                await self.clients.reset()

    async def _look(self) -> None:
        if self.settings.pinned is None:
            await self.queues.reader.open()
            return
        # It is known without asking; the address of one of its queues is not.
        with suppress(QueueMissingError):  # whoever needs it makes it, or says that it is missing
            await self.queues.url(self.queues.names.queue(self.settings.pinned[0][0]))

    async def close(self) -> None:
        """Disconnect; polls that are under way are waited for in the background, so that what they bring is given back."""
        self._closed.set()
        await self.queues.reader.close()
        if not self._background:
            await self.clients.close()
            return
        _lingering.start(self._close_later())

    async def ping(self) -> None:
        """Ask for one queue's name."""
        client = await self.clients.calls()
        with translated(self.settings.address):
            await client.list_queues(QueueNamePrefix=self.queues.names.prefix, MaxResults=1)

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        """Put each message into the queues of the groups that want it."""
        registry = await self.queues.registry()
        outcomes = await self.sender.send(envelopes, registry)
        if not registry.groups:
            # A group that was made meanwhile may have looked for them before they came. If this process ends before it looks, nobody does;
            # but they are stored, and who publishes is not to wait so long that it takes that for unknown.
            looking = self._look_at_held(thorough=self._thorough)
            await asyncio.wait([looking], timeout=self.settings.publish_timeout / 4)
        return outcomes

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Make the group known, wait until every publisher knows it, and move the parked messages that it wants."""
        declared = await self.queues.declare(group, patterns, change=change)
        if declared.propagation:
            self._fresh.add(group)
        if group in self._waited and not change:
            # Groups of the settings are declared on the way to the first publish, which needs none to wait; who subscribes does.
            self._waited.discard(group)
        elif declared.propagation:
            self._check_timeout()
            await asyncio.sleep(declared.propagation)
        if group not in self._fresh:  # whoever made it may have been ended before the rest
            self._look_at_held(thorough=False)
            return declared.patterns
        # Others may have made it at the same moment: what everybody reads by now is what it is.
        wanted = (await self.queues.registry()).groups.get(group, declared.patterns)
        looking = self._look_at_held(thorough=self._thorough)
        # However many are parked, it goes on beside what comes next.
        await asyncio.wait([looking], timeout=self.settings.publish_timeout / 4)
        return wanted

    async def delete_group(self, group: str) -> None:
        """Delete the group's queues."""
        await self.queues.delete(group)

    async def delete_namespace(self) -> None:
        """Delete all queues."""
        await self.queues.delete_all()

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Read the registry."""
        return (await self.queues.registry(since=time.monotonic())).present

    async def subscribe(self, group: str, prefetch: int) -> SqsReceiver:
        """Make a consumer. SQS knows none: each message's receipt is its own."""
        name = self.queues.names.queue(group)
        with _existing(group):
            url = await self.queues.url(name)
        await self.clients.polls()
        self._check_open()
        return SqsReceiver(self, group, name, url)

    async def stats(self, group: str) -> GroupStats:
        """Count, approximately. A message that waits for its retry counts as in flight, as SQS hides both alike."""
        with _existing(group):
            waiting, held, later = await self.queues.group_counts(group)
        dead = (0, 0, 0)
        with suppress(QueueMissingError):  # lost: it is made again when a message dies
            dead = await self.queues.counts(self.queues.names.dead(group))
        return GroupStats(waiting=waiting, in_flight=held, delayed=later, dead=sum(dead), oldest=None)

    async def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        """Take them out of sight page by page, and put them all back at the end: a queue has no order that could be read from one end."""
        async with self._dead(group) as browser, aclosing(browser.pages()) as pages:
            async for page in pages:
                yield sorted(map(_wire.dead_letter, page), key=lambda letter: letter.dead_at)

    async def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Copy them back, then delete them."""
        async with aclosing(self._chosen(group, ids)) as pages:
            async for browser, chosen in pages:
                copies = [self.copies.replayed(group, message).entry for message in chosen]
                results = await self.sender.post(self.queues.names.queue(group), copies) if copies else ()
                stored = [message for message, result in zip(chosen, results, strict=True) if result is None]
                await browser.delete(stored)
                yield len(stored)
                if error := next(filter(None, results), None):
                    raise error

    async def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Delete them one by one: SQS's own purge takes what comes meanwhile, too."""
        async with aclosing(self._chosen(group, ids)) as pages:
            async for browser, chosen in pages:
                await browser.delete(chosen)
                yield len(chosen)

    def later(self, group: str) -> Later:
        """Return what moves the group's delayed messages to its FIFO queue."""
        return self._later.setdefault(group, Later(self, group))

    def in_background(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Run what must not be cancelled with the one who asked for it."""
        return self._background.start(work)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise BackendConnectionError("the connection to SQS was closed")

    def _check_timeout(self) -> None:
        ttl, timeout = self.settings.registry_ttl, self.settings.publish_timeout
        if ttl >= timeout:
            raise ConfigurationError(
                f"SQS_REGISTRY_TTL_SECONDS ({ttl:g}) must be less than QUEUE_PUBLISH_TIMEOUT_SECONDS ({timeout:g}): "
                f"declaring a new group takes that long"
            )

    @asynccontextmanager
    async def _dead(self, group: str) -> AsyncGenerator[Browser]:
        with _existing(group):
            await self.queues.counts(self.queues.names.queue(group))
        async with Browser(self, self.queues.names.dead(group), thorough=self._thorough) as browser:
            yield browser

    async def _chosen(
        self, group: str, ids: Collection[str] | None
    ) -> AsyncGenerator[tuple[Browser, Sequence[Message]]]:
        """Go through the dead letters with these ids (None: all), page by page.

        Those that were dead when it began: one that is replayed, and dies again before we are through, is not met again. It is told by
        when it was put into the queue; and as clocks may differ, one of an id that was chosen before is another only where it was
        put there long before.
        """
        done: set[str] = set()
        async with self._dead(group) as browser, aclosing(browser.pages()) as pages:
            async for page in pages:
                chosen: list[Message] = []
                for message in page:
                    letter, sent = _wire.dead_letter(message), _wire.sent(message)
                    same = _wire.identity(message) or letter.id
                    new = sent > browser.started or (same in done and sent > browser.started - _CLOCKS)
                    if not new and (ids is None or letter.id in ids):
                        chosen.append(message)
                        done.add(same)
                yield browser, chosen

    def _look_at_held(self, *, thorough: bool) -> asyncio.Task[None]:
        """Hand parked messages to the groups that there are, in the background, until it succeeds."""
        self._looks.add(thorough)
        if self._handing_over is None or self._handing_over.done():
            self._handing_over = self.in_background(self._hand_over())
        return self._handing_over

    async def _hand_over(self) -> None:
        failures = unfinished = 0
        while self._looks:
            thorough = max(self._looks)
            self._looks.clear()  # who asks from now on may have messages that this look misses
            try:
                registry = await self.queues.registry(since=time.monotonic())
                groups = {name: registry.present[name] for name in sorted(registry.present, key=_by_age(registry))}
                complete, moved = await self._move_held(groups, thorough=thorough) if groups else (True, 0)
                self._fresh.difference_update(groups)
            except AbeError as exc:
                if not exc.retryable:
                    _log.debug("parked messages are left to those who may look at them: %s", exc)
                    return
                level = logging.DEBUG if failures else logging.WARNING
                _log.log(level, "parked messages could not be handed out, trying again: %s", exc)
                failures += 1
                self._looks.add(thorough)
                if await pause(self._closed, _BACKOFF(failures)):
                    return
            else:
                # Where others were looking at some, they may have wanted other messages.
                unfinished = 0 if complete else 1 if moved else unfinished + 1
                if 0 < unfinished < _LOOKS:
                    self._looks.add(thorough)
                    if await pause(self._closed, _BACKOFF(unfinished)):
                        return

    async def _move_held(self, groups: Mapping[str, tuple[str, ...]], *, thorough: bool) -> tuple[bool, int]:
        """Move each parked message to the first of the groups that wants it; return whether all were looked at, and how many were moved.

        Raises:
            BackendConnectionError: Some could not be moved, and may be next time.
        """
        # Groups that were there before want none of them, but where whoever made one was ended before it had looked.
        most = _FULL_LOOK if thorough or not self._fresh.isdisjoint(groups) else _SHORT_LOOK
        count = 0
        failed: list[AbeError] = []
        async with (
            Browser(self, self.queues.names.held, thorough=thorough, most=most) as parked,
            aclosing(parked.pages(1)) as pages,
        ):
            async for page in pages:
                left: Sequence[Message] = page
                for group, patterns in groups.items():
                    wanted = [message for message in left if _wire.wants(patterns, message)]
                    moved = await self._unhold(group, wanted, failed)
                    await parked.delete(moved)
                    count += len(moved)
                    left = [message for message in left if message not in moved]
                if self._closed.is_set():
                    break
        if failed:
            raise BackendConnectionError(f"parked messages could not be moved: {failed[0]}") from failed[0]
        return parked.complete, count

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
            await self._background.drain()
        finally:  # also where the event loop ends first
            await self.clients.close()


def _by_age(registry: Registry) -> Callable[[str], float]:
    return lambda group: registry.since.get(group, 0.0)


@contextmanager
def _existing(group: str) -> Generator[None]:
    """Say that there is no such group where its queue is missing.

    Raises:
        GroupMissingError: So it is.
    """
    try:
        yield
    except QueueMissingError as exc:
        raise group_missing(group) from exc


if TYPE_CHECKING:
    _: type[TransportProtocol] = SqsTransport
