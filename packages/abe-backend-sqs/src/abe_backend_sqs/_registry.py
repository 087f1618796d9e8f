"""Reads and changes the groups: lists the queues' names periodically, and reads the tags of a queue when its group has changed.

SQS answers five requests for tags a second in an account. So tags are kept queue by queue, and read again only where the list says that
the group has changed; throttling of some queues does not discard the tags of others. Concurrent callers share one reading, and
cancelling a caller does not cancel it. Publishers may use a registry for `SQS_REGISTRY_TTL_SECONDS`; the next one is read meanwhile.

SQS has no lock and no transaction, so changes are announced by queues that are always empty. A group has one, its revision, whose name
is new each time. To change a group's tags (`RegistryKeeper.change`):

1. Add a revision, so that there are two (where there was none, add two: one alone means that nothing is changing).
2. Set the tags.
3. Add another revision, and remove those that were there after the tags were set.
4. List them. If there is not exactly one left, another process changed the group too: begin again, without setting tags.

A process that dies in between leaves two, until the next change or declaration removes one. To read them (`RegistryKeeper._holds`):

1. List the names of queues, and then read tags.
2. Use tags that were read after a list with at most one revision of the group for as long as lists have the same one.
3. Where there are two, read the tags each time.

So tags that were read before step 2 of a change are read again after step 3, as the revision is another one.

A queue that is missing while its revision exists was not deleted by `delete_group`. Its consumers create it again. Until then publishers
keep the group, so that a publish that it wants is retried, and fails in the end, and is not confirmed without it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final, NamedTuple

from abe.backends.message_queue.base import ExponentialBackoff
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.routing import Routes
from abe.backends.message_queue.base.tasks import SharedTask, result_of
from abe.errors import AbeError, BackendClosedError, BackendConnectionError
from abe_backend_sqs import _queue
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._errors import QueueMissingError, ThrottledError
from abe_backend_sqs._queue import Queue
from abe_backend_sqs._tags import Group, Listing, Registry, common_topic, from_tags
from abe_backend_sqs._topology import FIFO, Topology

_log: Final = Log("abe.sqs")

_MAX_CONCURRENT: Final = 3
"""Requests for tags, at once."""
_TRIES: Final = 4
_BACKOFF: Final = ExponentialBackoff(initial=0.2, maximum=2.0)
_UNREVISED: Final = 60.0
"""Seconds after which the tags of a group without a revision are read again: its owner sets them by other means."""
_MISSED: Final = 90.0
"""Seconds for which a group is kept whose queue was deleted underneath. SQS blocks the name for 60 of them."""


class _Known(NamedTuple):
    """The tags of a queue."""

    group: Group | None
    revisions: frozenset[Queue]
    """The group's revisions that were listed before its tags were read."""
    read_at: float


class RegistryKeeper:
    """Reads and changes the groups of a namespace.

    Args:
        clients: The AWS clients.
        names: The queues' names.
    """

    def __init__(self, clients: Clients, names: Topology) -> None:
        self._settings = clients.settings
        self._clients = clients
        self._names = names
        self._known: dict[str, _Known] = {}
        self._missing: dict[str, float] = {}
        """Since when queues are missing that were not deleted by `delete_group`, by name."""
        self._registry: Registry | None = None
        self._changes = 0
        self._reading = SharedTask(self._read, _closed)
        self._listed = asyncio.Event()
        self._concurrent = asyncio.Semaphore(_MAX_CONCURRENT)
        self._lost_topics: set[str] = set()
        if self._settings.pinned is not None:
            pinned = dict(self._settings.pinned)
            self._registry = Registry(pinned, {}, 0.0, Routes(pinned, tuple))

    async def open(self) -> None:
        """Return when SQS has answered once; the tags are read in the background."""
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
        """Cancel the reading in progress."""
        await self._reading.cancel()

    async def registry(self, since: float | None = None) -> Registry:
        """Return a registry that is not older than `SQS_REGISTRY_TTL_SECONDS`, or that was read after `since` (monotonic clock)."""
        while (found := self._fresh(since)) is None:
            await self._reading.join()
        if self._settings.pinned is None and time.monotonic() - found.looked_at > self._settings.registry_ttl / 2:
            self._reading.start()  # so that the next one is there when this one expires
        return found

    def forget(self) -> None:
        """Drop the registry, and the one that is being read. Tags that the next list confirms are kept."""
        if self._settings.pinned is None:
            self._registry = None
            self._changes += 1

    def misses(self, name: str) -> bool:
        """Whether the queue of that name is known to be missing, though it was not deleted by `delete_group`."""
        return name in self._missing

    def lose_topic(self, arn: str) -> None:
        """Do not use a topic any more."""
        self._lost_topics.add(arn)

    async def list(self) -> Listing:
        """List the groups' queues and revisions."""
        queues: dict[str, Queue] = {}
        revisions: dict[str, set[Queue]] = {}
        for queue in await _queue.list_all(self._clients, self._names.listed):
            if queue.name.endswith(FIFO) is not self._settings.fifo:
                continue
            if (mark := self._names.revised(queue.name)) is not None:
                revisions.setdefault(mark, set()).add(queue)
            elif queue.name.startswith(self._names.prefix):
                queues[queue.name] = queue
        return Listing(queues, {mark: frozenset(found) for mark, found in revisions.items()})

    async def group(self, queue: Queue) -> Group | None:
        """Read the tags of a queue."""
        tries = 0
        while True:
            try:
                return from_tags(await queue.tags())
            except QueueMissingError:
                raise
            except BackendConnectionError as exc:
                tries += 1
                # Throttling ends by itself: other processes do not repeat what was answered.
                if tries >= _TRIES and not isinstance(exc, ThrottledError):
                    raise
                await asyncio.sleep(_BACKOFF(tries))

    async def revisions(self, name: str) -> frozenset[Queue]:
        """Return the revisions of the group whose queue has that name."""
        return (await self.list()).of(name)

    async def revise(self, name: str) -> None:
        """Add a revision of the group whose queue has that name."""
        attributes = {"FifoQueue": "true"} if self._settings.fifo else {}
        await _queue.create(self._clients, self._names.revision(name), attributes)

    async def change(self, name: str, change: Callable[[], Awaitable[object]] | None = None) -> None:
        """Change the group whose queue has that name, so that every publisher that reads from now on sees it: steps 1 to 4 above.

        Args:
            name: The queue's name.
            change: Sets the tags; called once. None: only the revisions are reduced to one.
        """
        removed: set[Queue] = set()
        for tries in range(1, _TRIES + 1):
            if not await self.revisions(name):
                await self.revise(name)
            await self.revise(name)
            if change is not None:
                await change()
                change = None
            before = await self.revisions(name)
            await self.revise(name)
            for revision in before:
                await revision.remove()
            removed |= before
            if len(await self.revisions(name) - removed) == 1:
                break
            await asyncio.sleep(_BACKOFF(tries))
        self.forget()

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
            _log.debug("the groups could not be read: %s", exc)  # perhaps no caller waits for it
            raise

    async def _read_groups(self) -> None:
        started, changes = time.monotonic(), self._changes
        listing = await self.list()
        self._listed.set()
        wanting = [name for name in listing.queues if not self._holds(name, listing)]
        try:
            async with asyncio.TaskGroup() as tasks:
                for name in wanting:
                    tasks.create_task(self._read_one(name, listing))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
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
        revisions = listing.of(name)
        group: Group | None = None
        async with self._concurrent:
            read_at = time.monotonic()
            with suppress(QueueMissingError):  # deleted since it was listed: the next list says so
                group = await self.group(listing.queues[name])
        before = self._known.get(name)
        if group is None and before is not None and before.group is not None and revisions:
            # Without its tags, and with a revision: it was deleted underneath, and is being created again.
            self._known[name] = before._replace(revisions=frozenset())
            self._missing.setdefault(name, time.monotonic())
        else:
            self._known[name] = _Known(group, revisions, read_at)
            self._missing.pop(name, None)

    def _holds(self, name: str, listing: Listing) -> bool:
        """Whether the tags that were read last are still those of the queue."""
        known = self._known.get(name)
        revisions = listing.of(name)
        if known is None or known.revisions != revisions or len(revisions) > 1 or name in self._missing:
            return False
        if known.group is None and revisions:
            return False  # it is being made, and SQS may not show all of it yet
        return bool(revisions) or time.monotonic() - known.read_at < _UNREVISED

    def _members(self, listing: Listing) -> Mapping[str, Group]:
        """Return the groups by the names of their queues, including those that are missing and may be created again."""
        now = time.monotonic()
        for name in [each for each in self._known if each not in listing.queues]:
            group = self._known[name].group
            if group is None or not listing.of(name):
                self._forget(name)
                continue
            if name not in self._missing:
                _log.warning("the queue of group %r was deleted by other means than delete_group", group.name)
            self._missing.setdefault(name, now)
        for name in [each for each, since in self._missing.items() if now - since > _MISSED]:
            _log.warning("the deleted queue %r was not created again, so its group does not exist any more", name)
            self._forget(name)
        found = {name: known.group for name, known in self._known.items() if known.group is not None}
        # A topic does not reach a queue that is missing.
        return {
            name: group._replace(subscription="") if name in self._missing else group for name, group in found.items()
        }

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._missing.pop(name, None)


def _closed() -> BackendClosedError:
    return BackendClosedError("the connection to SQS was closed")
