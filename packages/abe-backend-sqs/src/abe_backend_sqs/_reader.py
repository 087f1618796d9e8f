"""How the groups are read: the list of queues' names again and again, the tags of a queue when its group has changed.

SQS answers five requests for tags a second in an account. So tags are kept queue by queue, and read again only where the list says that
the group has changed; what is read stays read, however often the rest is throttled. One reading is under way at a time, whoever asks for
it, and goes on when those who asked are gone. While what was read last may still be relied on, a publisher goes by it, and the next
reading happens beside it.

How a change is seen (the other side is in `_queues`):

1. A group has a revision, an empty queue whose name is another one each time. Who changes its tags adds one before, so that there are two;
   and when the tags are set, adds another, and removes those that were there.
2. Tags that were read after a list with at most one revision of that group hold for as long as the list has the same one.
3. Where there are two, the tags are read each time: somebody is changing them, or was ended while doing so.

A queue that vanishes while its revision stays was deleted by nobody who deletes groups. Its consumers make it again. Until then those who
know what it wanted still count on it, so that a publish that wants it waits, and fails in the end, in place of passing it by.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from abe.backends.message_queue.base import ExponentialBackoff
from abe.backends.message_queue.base.routing import Routes
from abe.backends.message_queue.base.tasks import SharedTask, result_of
from abe.errors import AbeError, BackendClosedError, BackendConnectionError
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._errors import QueueMissingError, ThrottledError, translated
from abe_backend_sqs._registry import Group, Listing, Registry, common_topic, from_tags
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._topology import FIFO, Topology

_log: Final = logging.getLogger("abe.sqs")

_PAGE: Final = 1_000
_AT_ONCE: Final = 3
"""Requests for tags under way at once."""
_TRIES: Final = 4
_BACKOFF: Final = ExponentialBackoff(initial=0.2, maximum=2.0)
_UNREVISED: Final = 60.0
"""Seconds after which tags are read again where no revision says whether they have changed: their owner sets them by other means."""
_MISSED: Final = 90.0
"""Seconds for which a group counts whose queue was deleted underneath. SQS keeps the name for 60 of them."""


class _Known(NamedTuple):
    """The tags of a queue."""

    group: Group | None
    revisions: frozenset[str]
    """Those of the group that were listed before its tags were read."""
    read_at: float


class Reader:
    """Reads the groups of a namespace.

    Args:
        settings: How long what was read may be relied on.
        clients: Asks SQS.
        names: What the queues are called.
    """

    def __init__(self, settings: SqsSettings, clients: Clients, names: Topology) -> None:
        self._settings = settings
        self._clients = clients
        self._names = names
        self._known: dict[str, _Known] = {}
        self._missing: dict[str, float] = {}
        """Since when the queues of groups are missing that were not deleted as groups are, by the queue's name."""
        self._registry: Registry | None = None
        self._changes = 0
        self._reading = SharedTask(self._read, _closed)
        self._listed = asyncio.Event()
        self._lost_topics: set[str] = set()
        if settings.pinned is not None:
            pinned = dict(settings.pinned)
            self._registry = Registry(pinned, {}, 0.0, Routes(pinned, tuple))

    async def open(self) -> None:
        """Return when SQS has answered once; the tags are read beside what comes next."""
        if self._registry is None:
            self._listed.clear()
            reading = self._reading.start()
            listed = asyncio.ensure_future(self._listed.wait())
            try:
                await asyncio.wait([reading, listed], return_when=asyncio.FIRST_COMPLETED)
            finally:
                listed.cancel()
            if not self._listed.is_set():
                await result_of(reading, _closed)

    async def close(self) -> None:
        """End what is under way."""
        await self._reading.cancel()

    async def registry(self, since: float | None = None) -> Registry:
        """Return the groups, as they were no longer ago than the setting says, or than `since` by the monotonic clock."""
        while (found := self._fresh(since)) is None:
            await self._reading.join()
        if self._settings.pinned is None and time.monotonic() - found.looked_at > self._settings.registry_ttl / 2:
            self._reading.start()  # so that it is there when this one must not be relied on any more
        return found

    def forget(self) -> None:
        """Rely on nothing that was read so far, nor on what is being read, but for tags of which the list says that they hold."""
        if self._settings.pinned is None:
            self._registry = None
            self._changes += 1

    def lose_topic(self, arn: str) -> None:
        """Publish to a topic no more."""
        self._lost_topics.add(arn)

    async def list(self) -> Listing:
        """Look at the names of the queues."""
        client = await self._clients.calls()
        queues: dict[str, str] = {}
        revisions: dict[str, set[str]] = {}
        with translated(self._settings.address):
            page: Mapping[str, Any] = {"NextToken": None}
            while "NextToken" in page:
                more = {"NextToken": page["NextToken"]} if page["NextToken"] else {}
                page = await client.list_queues(QueueNamePrefix=self._names.listed, MaxResults=_PAGE, **more)
                for url in page.get("QueueUrls", ()):
                    name = url.rpartition("/")[2]
                    if name.endswith(FIFO) is not self._settings.fifo:
                        continue
                    if (mark := self._names.mark(name)) is not None:
                        revisions.setdefault(mark, set()).add(url)
                    elif name.startswith(self._names.prefix):
                        queues[name] = url
        return Listing(queues, {mark: frozenset(urls) for mark, urls in revisions.items()})

    async def group(self, url: str) -> Group | None:
        """Read the tags of a queue."""
        client = await self._clients.calls()
        tries = 0
        while True:
            try:
                with translated(self._settings.address):
                    return from_tags((await client.list_queue_tags(QueueUrl=url)).get("Tags", {}))
            except QueueMissingError:
                raise
            except BackendConnectionError as exc:
                tries += 1
                # Throttling ends by itself: what others were answered, they do not ask again.
                if tries >= _TRIES and not isinstance(exc, ThrottledError):
                    raise
                await asyncio.sleep(_BACKOFF(tries))

    def _fresh(self, since: float | None) -> Registry | None:
        found = self._registry
        if found is None or self._settings.pinned is not None:
            return found
        oldest = time.monotonic() - self._settings.registry_ttl if since is None else since
        return found if found.looked_at > oldest else None

    async def _read(self) -> None:
        try:
            await self._read_groups()
        except AbeError as exc:
            _log.debug("the groups could not be read: %s", exc)  # perhaps nobody waits for it
            raise

    async def _read_groups(self) -> None:
        started, changes = time.monotonic(), self._changes
        listing = await self.list()
        self._listed.set()
        wanting = [name for name in listing.queues if not self._holds(name, listing)]
        await _in_turn([_reading(self._read_one, name, listing) for name in wanting])
        members = self._members(listing)
        arn = common_topic(members.values(), time.time() - self._settings.topic_after)
        registry = Registry.of(
            members.values(),
            started,
            arn if arn not in self._lost_topics else "",
            listing,
            (members[name].name for name in self._missing),
        )
        if changes == self._changes:  # else it may be from before a change of ours
            self._registry = registry

    async def _read_one(self, name: str, listing: Listing) -> None:
        read_at, revisions = time.monotonic(), listing.of(self._names.mark_of(name))
        group: Group | None = None
        with suppress(QueueMissingError):  # deleted since it was listed: the next list says so
            group = await self.group(listing.queues[name])
        before = self._known.get(name)
        if group is None and before is not None and before.group is not None and revisions:
            # Without its tags, and with a revision: it was deleted underneath, and is being made again.
            self._known[name] = before._replace(revisions=frozenset())
            self._missing.setdefault(name, time.monotonic())
        else:
            self._known[name] = _Known(group, revisions, read_at)
            self._missing.pop(name, None)

    def _holds(self, name: str, listing: Listing) -> bool:
        """Whether the tags that were read last are those that the queue has now."""
        known = self._known.get(name)
        revisions = listing.of(self._names.mark_of(name))
        if known is None or known.revisions != revisions or len(revisions) > 1 or name in self._missing:
            return False
        return bool(revisions) or time.monotonic() - known.read_at < _UNREVISED

    def _members(self, listing: Listing) -> Mapping[str, Group]:
        """Return the groups by the names of their queues, those included that are missing and may come back."""
        now = time.monotonic()
        for name in [each for each in self._known if each not in listing.queues]:
            group = self._known[name].group
            if group is None or not listing.of(self._names.mark_of(name)):
                self._forget(name)
                continue
            if name not in self._missing:
                _log.warning("the queue of group %r was deleted by other means than delete_group", group.name)
            self._missing.setdefault(name, now)
        for name in [each for each, since in self._missing.items() if now - since > _MISSED]:
            _log.warning("the queue %r that was deleted has not come back, so its group is gone", name)
            self._forget(name)
        found = {name: known.group for name, known in self._known.items() if known.group is not None}
        # One that is missing is reached by no topic.
        return {
            name: group._replace(subscription="") if name in self._missing else group for name, group in found.items()
        }

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._missing.pop(name, None)


def _reading(
    read: Callable[[str, Listing], Awaitable[None]], name: str, listing: Listing
) -> Callable[[], Awaitable[None]]:
    return lambda: read(name, listing)


async def _in_turn(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Make calls, a few at once, until they are through or one has failed."""
    left = iter(calls)

    async def work() -> None:
        for call in left:
            await call()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(_AT_ONCE, len(calls))):
                group.create_task(work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _closed() -> BackendClosedError:
    return BackendClosedError("the connection to SQS was closed")
