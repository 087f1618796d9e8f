"""The queues of one namespace, looked up, made, described, deleted; and the groups that they are."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from abe.backends.message_queue.base import ExponentialBackoff
from abe.backends.message_queue.base.names import EVERYTHING
from abe.errors import ConfigurationError, PermissionDeniedError
from abe_backend_sqs._attributes import Attributes
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._errors import CLIENT_ERRORS, QueueExistsError, QueueMissingError, translate, translated
from abe_backend_sqs._reader import Reader
from abe_backend_sqs._registry import Group, Registry, tags, topic
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._topics import Topics
from abe_backend_sqs._topology import Topology

_SKEW: Final = 10.0
"""Seconds that the clocks of processes may be apart."""
_TRIES: Final = 4
_BACKOFF: Final = ExponentialBackoff(initial=0.2, maximum=1.0)


class Declared(NamedTuple):
    """What declaring a group has led to."""

    patterns: tuple[str, ...]
    propagation: float
    """Seconds until every publisher must know."""


class Queues:
    """The queues of one namespace: looked up, made, described, deleted.

    Args:
        settings: What they are to be like.
        clients: Asks SQS.
    """

    def __init__(self, settings: SqsSettings, clients: Clients) -> None:
        self.names = Topology(settings.namespace, fifo=settings.fifo)
        self.reader = Reader(settings, clients, self.names)
        self._settings = settings
        self._clients = clients
        self._described = Attributes(settings, clients)
        self._urls: dict[str, str] = {}
        self._checked: set[str] = set()
        """The names of queues that are known to be what they must be."""
        self._topics: Topics | None = Topics(settings, clients) if settings.fanout == "sns" else None
        self._known_by: dict[str, tuple[float, float]] = {}
        """Of each group: since when it is what it is, and by when, by the monotonic clock, every publisher knows."""
        self.deletions: Counter[str] = Counter()
        """How many times groups were deleted through this object."""

    async def registry(self, *, since: float | None = None) -> Registry:
        """Return the groups, as read no longer ago than the setting says, or than `since` by the monotonic clock."""
        return await self.reader.registry(since)

    def forget(self, name: str | None = None) -> None:
        """Look again next time, for the groups and for the queue of that name. A topic that is gone is not published to any more."""
        if name is not None:
            self._urls.pop(name, None)
            self._checked.discard(name)
            if name.startswith("arn:"):
                self.reader.lose_topic(name)
        self.reader.forget()

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
        if name.startswith(self.names.prefix):
            return await self.url(name)
        return await self.ensure(
            name, check=name == self.names.held
        )  # the others were checked when the group was declared

    async def ensure(self, name: str, *, dead: str | None = None, ours: bool = False, check: bool = True) -> str:
        """Have a queue that can keep what is promised, and return its address.

        Args:
            name: Its name.
            dead: The name of the queue of its dead letters.
            ours: Whether one that is there may be changed.
            check: Whether one that is there is looked at.

        Raises:
            ConfigurationError: There is none, and none may be made. Or there is one that cannot.
        """
        dead_url = None if dead is None else await self.ensure(dead, ours=ours)
        try:
            url = await self.url(name)
        except QueueMissingError as exc:
            if not self._settings.ensure:
                raise ConfigurationError(
                    f"there is no queue {name!r} in SQS, and SQS_ENSURE is false: have it made"
                ) from exc
            await self._create(name, await self._described.new(name, dead_url))
            url = self._urls[name]
        if check and name not in self._checked:
            await self._described.check(name, url, dead_url, ours=ours and self._settings.ensure)
            self._checked.add(name)
        return url

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> Declared:
        """Make the group exist; see `Transport.declare`.

        Raises:
            ConfigurationError: The groups are pinned, or queues are made by somebody else, and neither knows this one. Or a queue of this
                name is there that would not keep what it is given.
        """
        registry = await self.registry(since=time.monotonic())
        if self._settings.pinned is not None:
            self._check_pinned(registry, group, patterns if change else None)
        try:
            return await self._declare(registry, group, patterns, change=change)
        except QueueMissingError:  # deleted by another process since we knew its address: the next try makes it
            for name in self._of(group):
                self.forget(name)
            raise

    def _check_pinned(self, registry: Registry, group: str, patterns: tuple[str, ...] | None) -> None:
        known = registry.groups.get(group)
        if known is None or known != (patterns or known):
            wanted = f" with the key patterns {list(patterns)}" if patterns else ""
            raise ConfigurationError(f"SQS_GROUPS has no group {group!r}{wanted}: all groups must be in it")

    async def _declare(
        self, registry: Registry, group: str, patterns: tuple[str, ...] | None, *, change: bool
    ) -> Declared:
        queue, dead, *others = self._of(group)
        present = registry.present.get(group)
        # What has our tags is ours, and what belongs to it.
        ours = present is not None and self._settings.pinned is None
        for name in (dead, *others):
            await self.ensure(name, ours=ours)
        if present is None:
            # One that was deleted underneath gets the patterns again that it had.
            before = None if change else registry.groups.get(group)
            made = await self._make(group, before or patterns or EVERYTHING)
        else:
            await self.ensure(queue, dead=dead, ours=ours)
            since, subscription = registry.since.get(group, 0.0), registry.subscriptions.get(group, "")
            made = Group(group, present, since, subscription)
        wanted = patterns if change and patterns else made.patterns
        subscription = made.subscription or await self._subscription(registry, self._urls[queue])
        if (wanted, subscription) != (made.patterns, made.subscription):
            made = await self._tag(made._replace(patterns=wanted, subscription=subscription))
        elif self._settings.pinned is None and self._settings.ensure:
            await self._tidy(queue)
        return Declared(made.patterns, self._propagation(group, made.since))

    async def _make(self, group: str, wanted: tuple[str, ...]) -> Group:
        """Make the queue by which the group exists, and return what it is now: another process may have made it meanwhile.

        With its tags, in one request: of several who make it with different patterns, one does.
        """
        queue, dead, *_ = self._of(group)
        made = Group(group, wanted, int(time.time() * 1000) / 1000)
        if self._settings.pinned is not None:
            await self.ensure(queue, dead=dead)
            return made._replace(since=0.0)
        try:
            await self.url(queue)
        except QueueMissingError:
            if self._settings.ensure:
                await self._revise(queue)  # before it: one of this name may have been there, with other tags
                await self._create(queue, await self._described.new(queue, await self.ensure(dead)), tags(made))
        url = await self.ensure(queue, dead=dead)
        found = await self.reader.group(url)
        return found or await self._tag(made)

    async def _tag(self, made: Group) -> Group:
        """Say in the tags of its queue what the group is from now on, so that every publisher that looks sees it."""
        queue = self.names.queue(made.name)
        if not self._settings.ensure:
            raise ConfigurationError(
                f"the queue {queue!r} is not tagged as group {made.name!r} with the key patterns "
                f"{list(made.patterns)}, and SQS_ENSURE is false: have it tagged, or set SQS_GROUPS"
            )
        client, url = await self._clients.calls(), await self.url(queue)
        since = 0.0

        async def tag() -> None:
            nonlocal since
            since = int(time.time() * 1000) / 1000
            with translated(self._settings.address):
                # In one call, and by count: what is left of longer lists means nothing.
                await client.tag_queue(QueueUrl=url, Tags=tags(made._replace(since=since)))

        await self._change(queue, tag)
        return made._replace(since=since)

    async def _tidy(self, queue: str) -> None:
        """Leave one revision of a group where a change was interrupted, or two were made at once."""
        listing = (await self.reader.list()).of(self.names.mark_of(queue))
        if len(listing) > 1:
            with suppress(PermissionDeniedError):  # this is for whoever may
                await self._change(queue, _nothing)

    async def delete(self, group: str) -> None:
        """Delete the group's queues: its revisions first, by whose absence publishers know that it is not to come back, then the one by
        which it exists."""
        self._check_deletable(f"group {group!r} is")
        self.deletions[group] += 1
        registry = await self.registry(since=time.monotonic())
        queue, *_ = names = self._of(group)
        for _ in range(2):  # somebody may be changing it
            for url in (await self.reader.list()).of(self.names.mark_of(queue)):
                await self._delete(url)
            for name in names:
                with suppress(QueueMissingError):
                    await self._delete(await self.url(name))
                self.forget(name)
            names = ()
        if self._topics is not None and (subscription := registry.subscriptions.get(group)):
            await self._topics.unsubscribe(subscription)

    async def delete_all(self) -> None:
        """Delete every queue of the namespace, and its topic."""
        self._check_deletable("the namespace is")
        registry = await self.registry(since=time.monotonic())
        client = await self._clients.calls()
        found: list[str] = []
        with translated(self._settings.address):
            page: Mapping[str, Any] = {"NextToken": None}
            while "NextToken" in page:
                more = {"NextToken": page["NextToken"]} if page["NextToken"] else {}
                page = await client.list_queues(QueueNamePrefix=self.names.all, MaxResults=1_000, **more)
                found += page.get("QueueUrls", ())
        for url in sorted(found, key=lambda url: self.names.mark(url.rpartition("/")[2]) is None):  # revisions first
            if self.names.owns(url.rpartition("/")[2]):
                await self._delete(url)
        self.deletions.update(registry.groups)
        self._urls.clear()
        self._checked.clear()
        self.reader.forget()
        if self._topics is not None:
            for subscription in registry.subscriptions.values():
                await self._topics.unsubscribe(subscription)
            if used := next(map(topic, registry.subscriptions.values()), ""):
                await self._topics.delete(used)

    def _check_deletable(self, what: str) -> None:
        if self._settings.pinned is not None or not self._settings.ensure:
            raise ConfigurationError(
                f"{what} not ours to delete: its queues are made by others (SQS_ENSURE, SQS_GROUPS)"
            )

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

    def _propagation(self, group: str, since: float) -> float:
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

    async def _subscription(self, registry: Registry, url: str) -> str:
        if self._topics is None or not self._settings.ensure:
            return ""
        used = next(map(topic, registry.subscriptions.values()), None)
        return await self._topics.subscribe(used or await self._topics.create(self.names.topic), url)

    def _of(self, group: str) -> Sequence[str]:
        """Return the names of a group's queues, first the one by which it exists, then that of its dead letters."""
        names = self.names
        return names.queue(group), names.dead(group), *([names.later(group)] if self._settings.fifo else ())

    async def _change(self, queue: str, change: Callable[[], Awaitable[object]]) -> None:
        """Change a group so that every publisher that looks from now on sees it; `_reader` has the other side.

        1. Have two revisions of it, with which nobody relies on anything that was read. (One alone would be relied on.)
        2. Change it.
        3. Add another revision, and remove those that were there after the change.
        4. If others did the same beside this, begin again without a change: somebody has to be the last, and to leave but one.

        Whoever is ended in between leaves two, until the next change or `_tidy`.
        """
        removed: set[str] = set()
        mark = self.names.mark_of(queue)
        for tries in range(1, _TRIES + 1):
            if not (await self.reader.list()).of(mark):
                await self._revise(queue)
            await self._revise(queue)
            await change()
            before = (await self.reader.list()).of(mark)
            await self._revise(queue)
            for url in before:
                await self._delete(url)
            removed |= before
            if len((await self.reader.list()).of(mark) - removed) == 1:
                break
            change = _nothing
            await asyncio.sleep(_BACKOFF(tries))
        self.forget()

    async def _revise(self, queue: str) -> None:
        await self._create(
            self.names.revision(queue), {"FifoQueue": "true"} if self._settings.fifo else {}, remember=False
        )

    async def _create(
        self,
        name: str,
        attributes: Mapping[str, str],
        labels: Mapping[str, str] | None = None,
        *,
        remember: bool = True,
    ) -> None:
        client = await self._clients.calls()
        more: dict[str, Any] = {"tags": labels} if labels else {}
        with suppress(QueueExistsError), translated(self._settings.address):
            # Where it exists, a process with another lease made it meanwhile.
            reply = await client.create_queue(QueueName=name, Attributes=attributes, **more)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            if remember:
                self._urls[name] = reply["QueueUrl"]
                self._checked.add(name)  # were it another's, its attributes would have to be the same
            return
        if remember:
            self._urls[name] = await self._look_up(name)

    async def _delete(self, url: str) -> None:
        client = await self._clients.calls()
        with suppress(QueueMissingError), translated(self._settings.address):
            await client.delete_queue(QueueUrl=url)

    async def _look_up(self, name: str) -> str:
        client = await self._clients.calls()
        with translated(self._settings.address):
            return (await client.get_queue_url(QueueName=name))["QueueUrl"]


async def _nothing() -> None:
    """Change nothing."""
