"""The queues of one namespace, looked up, made, described, deleted; and the groups that they are."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from abe.backends.message_queue.base import ExponentialBackoff
from abe.backends.message_queue.base.names import EVERYTHING
from abe.errors import BackendConnectionError, ConfigurationError, PermissionDeniedError
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._errors import CLIENT_ERRORS, QueueExistsError, QueueMissingError, translate, translated
from abe_backend_sqs._registry import Group, Listing, Registry, common_topic, from_tags, tags, topic
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._topics import Topics
from abe_backend_sqs._topology import FIFO, Topology

_RETENTION: Final = 14 * 86_400
"""Seconds that SQS keeps a message at most."""
_BACKSTOP: Final = 1_000
"""Deliveries after which SQS itself buries a message. We count, and bury sooner."""
_SKEW: Final = 10.0
"""Seconds that the clocks of processes may be apart."""
_AT_ONCE: Final = 5
_TRIES: Final = 4
_BACKOFF: Final = ExponentialBackoff(initial=0.2, maximum=1.0)
_PAGE: Final = 1_000


class Queues:
    """The queues of one namespace: looked up, made, described, deleted.

    Args:
        settings: What they are to be like.
        clients: Asks SQS.
    """

    def __init__(self, settings: SqsSettings, clients: Clients) -> None:
        self.names = Topology(settings.namespace, fifo=settings.fifo)
        self._settings = settings
        self._clients = clients
        self._urls: dict[str, str] = {}
        self._registry: Registry | None = None
        self._topics: Topics | None = Topics(settings, clients) if settings.fanout == "sns" else None
        self._lost_topics: set[str] = set()
        self._known_by: dict[str, tuple[float, float]] = {}
        """Of each group: since when it is what it is, and by when, by the monotonic clock, every publisher knows."""
        self._changes = 0
        self._reading: asyncio.Lock = asyncio.Lock()
        self.patterns: dict[str, tuple[str, ...]] = {}
        """Those of the groups that were declared here, as we last knew them."""
        self.deletions: Counter[str] = Counter()
        """How many times groups were deleted through this object."""
        if settings.pinned is not None:
            self._registry = Registry(dict(settings.pinned), {}, 0.0, {})

    async def registry(self, *, since: float | None = None) -> Registry:
        """Return the groups, as read no longer ago than the setting says, or than `since` by the monotonic clock."""
        if (found := self._fresh(since)) is not None:
            return found
        async with self._reading:
            return self._fresh(since) or await self._read()

    def forget(self, name: str | None = None) -> None:
        """Look again next time, for the groups and for the queue of that name. A topic that is gone is not published to any more."""
        if name is not None:
            self._urls.pop(name, None)
        if name is not None and name.startswith("arn:"):
            self._lost_topics.add(name)
        if self._settings.pinned is None:
            self._registry = None
            self._changes += 1

    async def url(self, name: str) -> str:
        """Return the address of a queue.

        Raises:
            QueueMissingError: There is none.
        """
        if name not in self._urls:
            self._urls[name] = await self._look_up(name)
        return self._urls[name]

    async def store(self, name: str) -> str:
        """Return the address of a queue that messages are put into: made again if it is missing, unless it is a group's own.

        Raises:
            QueueMissingError: There is no such group.
        """
        return await (self.url(name) if name.startswith(self.names.prefix) else self.ensure(name))

    async def ensure(self, name: str, *, dead: str | None = None) -> str:
        """Have a queue, and return its address.

        Args:
            name: Its name.
            dead: The name of the queue of its dead letters.

        Raises:
            ConfigurationError: There is none, and none may be made.
        """
        try:
            return await self.url(name)
        except QueueMissingError as exc:
            if not self._settings.ensure:
                raise ConfigurationError(
                    f"there is no queue {name!r} in SQS, and SQS_ENSURE is false: have it made"
                ) from exc
        attributes = {"VisibilityTimeout": str(self._settings.visibility), "MessageRetentionPeriod": str(_RETENTION)}
        if dead is not None:
            policy = {"deadLetterTargetArn": await self._arn(await self.ensure(dead)), "maxReceiveCount": _BACKSTOP}
            attributes["RedrivePolicy"] = json.dumps(policy)
        if name.endswith(FIFO):
            attributes["FifoQueue"] = "true"
        client = await self._clients.calls()
        try:
            with translated(self._settings.address):
                # With its attributes, in one request: one that is made and not described yet would keep messages for four days.
                reply = await client.create_queue(QueueName=name, Attributes=attributes)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
                self._urls[name] = reply["QueueUrl"]
        except QueueExistsError:  # made meanwhile by a process with another lease
            return await self.url(name)
        return self._urls[name]

    async def declare(self, group: str, patterns: tuple[str, ...] | None) -> float:
        """Make the group exist, with these patterns, and return the seconds until every publisher must know.

        Raises:
            ConfigurationError: The groups are pinned, or queues are made by somebody else, and neither knows this one.
        """
        registry = await self.registry(since=time.monotonic())
        known = registry.groups.get(group)
        wanted = patterns or known or EVERYTHING
        if known != wanted and self._settings.pinned is not None:
            raise ConfigurationError(
                f"SQS_GROUPS has no group {group!r} with the key patterns {list(wanted)}: all groups must be in it"
            )
        self.patterns[group] = wanted
        try:
            return await self._declare(registry, group, wanted)
        except QueueMissingError:  # deleted by another process since we knew its address: the next try makes it
            for name in self._of(group):
                self.forget(name)
            raise

    async def _declare(self, registry: Registry, group: str, wanted: tuple[str, ...]) -> float:
        queue, dead, *others = self._of(group)
        await self.ensure(dead)
        url = await self.ensure(queue, dead=dead)
        for name in others:
            await self.ensure(name)
        known = registry.subscriptions.get(group, "")
        subscription = known or await self._subscription(registry, url)
        since = registry.since.get(group, 0.0)
        if registry.groups.get(group) == wanted and subscription == known:
            if registry.listing is not None and not registry.listing.settled and self._settings.ensure:
                with suppress(PermissionDeniedError):  # tidying up is for whoever may
                    await self._change(_nothing)
            return self._ignorance(group, since)
        if not self._settings.ensure:
            raise ConfigurationError(
                f"the queue {queue!r} is not tagged as group {group!r} with the key patterns "
                f"{list(wanted)}, and SQS_ENSURE is false: have it tagged, or set SQS_GROUPS"
            )
        client = await self._clients.calls()

        async def tag() -> None:
            nonlocal since
            since = int(time.time() * 1000) / 1000
            with translated(self._settings.address):
                # In one call, and by count: what is left of longer lists means nothing.
                await client.tag_queue(QueueUrl=url, Tags=tags(Group(group, wanted, since, subscription)))

        await self._change(tag)
        return self._ignorance(group, since)

    async def delete(self, group: str) -> None:
        """Delete the group's queues, first the one by which it exists."""
        if self._settings.pinned is not None or not self._settings.ensure:
            raise ConfigurationError(
                f"group {group!r} is not ours to delete: its queues are made by others (SQS_ENSURE, SQS_GROUPS)"
            )
        self.deletions[group] += 1
        registry = await self.registry(since=time.monotonic())
        for name in self._of(group):
            with suppress(QueueMissingError):
                await self._delete(await self.url(name))
            self.forget(name)
        if self._topics is not None and (subscription := registry.subscriptions.get(group)):
            await self._topics.unsubscribe(subscription)

    async def group_counts(self, group: str) -> tuple[int, int, int]:
        """Return how many messages of the group wait, are held and are delayed."""
        if not self._settings.fifo:
            return await self.counts(self.names.queue(group))
        (waiting, held, _), later = await asyncio.gather(
            self.counts(self.names.queue(group)), self.counts(self.names.later(group))
        )
        return waiting, held, sum(later)

    async def counts(self, name: str) -> tuple[int, int, int]:
        """Return how many messages wait, are held and are delayed, as SQS counts: approximately."""
        client, url = await self._clients.calls(), await self.url(name)
        kinds: Final = (
            "ApproximateNumberOfMessages",
            "ApproximateNumberOfMessagesNotVisible",
            "ApproximateNumberOfMessagesDelayed",
        )
        try:
            found: Mapping[str, Any] = await client.get_queue_attributes(QueueUrl=url, AttributeNames=kinds)
        except CLIENT_ERRORS as exc:
            error = translate(exc, self._settings.address)
            if isinstance(error, QueueMissingError):
                self.forget(name)
            raise error from exc
        waiting, held, delayed = (int(found.get("Attributes", {}).get(kind, 0)) for kind in kinds)
        return waiting, held, delayed

    def _ignorance(self, group: str, since: float) -> float:
        """Return for how long a publisher may still go by what it read before a group's tags were set by a request that began at that time.

        They are set by now, and perhaps only since now: the request may have taken as long as it is given.
        """
        now, ttl = time.monotonic(), self._settings.registry_ttl
        if time.time() >= since + max(_SKEW, self._settings.publish_timeout) + ttl:
            return 0.0
        known = self._known_by.get(group)
        if known is None or known[0] != since:
            known = self._known_by[group] = since, now + ttl
        return max(0.0, known[1] - now)

    def _fresh(self, since: float | None) -> Registry | None:
        found = self._registry
        if found is None or self._settings.pinned is not None:
            return found
        oldest = time.monotonic() - self._settings.registry_ttl if since is None else since
        return found if found.looked_at > oldest else None

    async def _subscription(self, registry: Registry, url: str) -> str:
        if self._topics is None or not self._settings.ensure:
            return ""
        used = next(map(topic, registry.subscriptions.values()), None)
        return await self._topics.subscribe(used or await self._topics.create(self.names.topic), url)

    def _of(self, group: str) -> Sequence[str]:
        """Return the names of a group's queues, first the one by which it exists, then that of its dead letters."""
        names = self.names
        return names.queue(group), names.dead(group), *([names.later(group)] if self._settings.fifo else ())

    async def _read(self) -> Registry:
        started, changes, known = time.monotonic(), self._changes, self._registry
        listing = await self._list()
        if known is not None and listing.settled and listing == known.listing:
            members: Sequence[Group] = known.members
        else:
            members = await self._members(listing.queues)
        arn = common_topic(members, time.time() - self._settings.topic_after)
        registry = Registry.of(members, started, arn if arn not in self._lost_topics else "", listing)
        if changes == self._changes:  # else it may be from before a change of ours
            self._registry = registry
        self.patterns.update((group, found) for group, found in registry.groups.items() if group in self.patterns)
        return registry

    async def _list(self) -> Listing:
        client = await self._clients.calls()
        found: list[str] = []
        with translated(self._settings.address):
            page: Mapping[str, Any] = {"NextToken": None}
            while "NextToken" in page:
                more = {"NextToken": page["NextToken"]} if page["NextToken"] else {}
                page = await client.list_queues(QueueNamePrefix=self.names.listed, MaxResults=_PAGE, **more)
                found += [url for url in page.get("QueueUrls", ()) if url.endswith(FIFO) is self._settings.fifo]
        names = {url: url.rpartition("/")[2] for url in found}
        return Listing(
            frozenset(url for url, name in names.items() if name.startswith(self.names.prefix)),
            frozenset(url for url, name in names.items() if self.names.is_revision(name)),
        )

    async def _members(self, urls: Collection[str]) -> Sequence[Group]:
        client = await self._clients.calls()
        asking = asyncio.Semaphore(_AT_ONCE)

        async def ask(url: str) -> Group | None:
            async with asking:
                for tries in range(1, _TRIES + 1):
                    try:
                        with translated(self._settings.address):
                            return from_tags((await client.list_queue_tags(QueueUrl=url)).get("Tags", {}))
                    except QueueMissingError:
                        return None  # deleted since it was listed
                    except BackendConnectionError:  # five a second are all that SQS answers in an account
                        if tries == _TRIES:
                            raise
                        await asyncio.sleep(_BACKOFF(tries))
            return None

        return [each for each in await asyncio.gather(*map(ask, urls)) if each is not None]

    async def _change(self, change: Callable[[], Awaitable[object]]) -> None:
        """Change the groups so that every publisher that looks from now on sees it. (Tags are too expensive to be read each time.)

        A publisher relies on the tags that it read for as long as it lists the one revision that it listed before. So there are two
        during the change, with which nobody relies on anything, and one that nobody listed before after it. Whoever is ended in between
        leaves two, until the next change.
        """
        removed: set[str] = set()
        for tries in range(1, _TRIES + 1):
            if not (await self._list()).revisions:
                await self._revise()  # one alone would be relied on
            await self._revise()
            await change()
            before = (await self._list()).revisions
            await self._revise()
            for url in before:
                await self._delete(url)
            removed |= before
            if len((await self._list()).revisions - removed) == 1:
                break
            change = _nothing  # others made changes beside ours: somebody has to be the last, and to leave but one
            await asyncio.sleep(_BACKOFF(tries))
        self.forget()

    async def _revise(self) -> None:
        client = await self._clients.calls()
        kind = {"Attributes": {"FifoQueue": "true"}} if self._settings.fifo else {}
        with translated(self._settings.address):
            await client.create_queue(QueueName=self.names.revision(), **kind)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    async def _delete(self, url: str) -> None:
        client = await self._clients.calls()
        with suppress(QueueMissingError), translated(self._settings.address):
            await client.delete_queue(QueueUrl=url)

    async def _look_up(self, name: str) -> str:
        client = await self._clients.calls()
        with translated(self._settings.address):
            return (await client.get_queue_url(QueueName=name))["QueueUrl"]

    async def _arn(self, url: str) -> str:
        client = await self._clients.calls()
        with translated(self._settings.address):
            found = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
            return found["Attributes"]["QueueArn"]


async def _nothing() -> None:
    """Change nothing."""
