"""Every name the provider uses in SQS, what its queues are like, and which groups there are.

A queue's name is the namespace, what it is for, and the group, with a hyphen before and after the middle one. In the
outer two a hyphen is doubled and a dot becomes ``-_``, so that no two names fall together; what is too long ends in a
hash instead. A group exists when its queue has the tags that say so, which are set when everything else about it is done.
"""

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from abe.backends.message_queue.base.names import EVERYTHING, matches
from abe.errors import ConfigurationError
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._errors import CLIENT_ERRORS, QueueMissingError, translate, translated
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._topics import Topics

FIFO: Final = ".fifo"
_ROOM: Final = 34
"""Characters of a namespace or group in a queue's name, which has 80 at most."""
_HASH: Final = 24
_GROUP_TAG: Final = "abe-group"
_PATTERNS_TAG: Final = "abe-patterns-"
_PARTS_TAG: Final = "abe-patterns"
_SINCE_TAG: Final = "abe-since"
_SUBSCRIPTION_TAG: Final = "abe-subscription"
_TAG_ROOM: Final = 256
_MOST_TAGS: Final = 40
"""Of the 50 that a queue may have: the others are the owner's."""
_RETENTION: Final = 14 * 86_400
"""Seconds that SQS keeps a message at most."""
_BACKSTOP: Final = 1_000
"""Deliveries after which SQS itself buries a message. We count, and bury sooner."""
_MOST_ROUTES: Final = 10_000
_AT_ONCE: Final = 10
_PAGE: Final = 1_000


class Topology:
    """The names in one namespace."""

    def __init__(self, namespace: str, *, fifo: bool = False) -> None:
        self._namespace = _part(namespace)
        self._suffix = suffix = FIFO if fifo else ""
        self.prefix = f"{self._namespace}-group-"
        """What the names of all groups' queues begin with."""
        self.held = f"{self._namespace}-held{suffix}"
        """Queue: published before any group existed."""

    def queue(self, group: str) -> str:
        """Queue: the group's messages."""
        return f"{self.prefix}{_part(group)}{self._suffix}"

    @property
    def topic(self) -> str:
        """Topic: what every group wants, with SQS_FANOUT=sns."""
        return f"{self._namespace}-topic"

    def dead(self, group: str) -> str:
        """Queue: the group's dead letters."""
        return f"{self._namespace}-dead-{_part(group)}{self._suffix}"

    def later(self, group: str) -> str:
        """Queue: what waits for its time, beside a FIFO queue, which can delay no single message."""
        return f"{self._namespace}-later-{_part(group)}"


class Group(NamedTuple):
    """What the tags of a queue say."""

    name: str
    patterns: tuple[str, ...]
    since: float
    """Seconds since the epoch, by the clock of whoever set them."""
    subscription: str = ""
    """The ARN of the queue's subscription to the namespace's topic, where it has one."""


def tags(group: Group) -> dict[str, str]:
    """Return the tags of a group's queue. A tag may not hold every character, so the patterns travel as base64.

    Raises:
        ConfigurationError: There are more patterns than a queue's tags can hold.
    """
    text = base64.urlsafe_b64encode(json.dumps(group.patterns, ensure_ascii=False).encode()).decode()
    parts = [text[start : start + _TAG_ROOM] for start in range(0, len(text), _TAG_ROOM)]
    if len(parts) > _MOST_TAGS:
        raise ConfigurationError(
            f"group {group.name!r}: its {len(group.patterns)} key patterns are more than the tags of a queue can hold"
        )
    named = {f"{_PATTERNS_TAG}{index}": part for index, part in enumerate(parts)}
    if group.subscription:
        named[_SUBSCRIPTION_TAG] = group.subscription
    return {_GROUP_TAG: group.name, _SINCE_TAG: str(int(group.since * 1000)), _PARTS_TAG: str(len(parts)), **named}


def from_tags(found: Mapping[str, str]) -> Group | None:
    """Read them; None where they say nothing that can be read: the queue is being made, or not ours."""
    try:
        text = "".join(found[f"{_PATTERNS_TAG}{index}"] for index in range(int(found[_PARTS_TAG])))
        patterns = json.loads(base64.urlsafe_b64decode(text))
        since = int(found.get(_SINCE_TAG, 0)) / 1000
        return Group(found[_GROUP_TAG], tuple(patterns), since, found.get(_SUBSCRIPTION_TAG, ""))
    except (KeyError, TypeError, ValueError):
        return None


class Registry(NamedTuple):
    """The groups as they were when somebody looked."""

    groups: Mapping[str, tuple[str, ...]]
    since: Mapping[str, float]
    """When they became what they are, in seconds since the epoch."""
    looked_at: float
    """By the monotonic clock, before the first question was asked."""
    routes: dict[str, tuple[str, ...]]
    """The groups that want a key."""
    subscriptions: Mapping[str, str] = {}
    """The subscription of each group's queue, where it has one."""

    @property
    def topic(self) -> str:
        """The ARN of the topic that reaches every group; empty where there is none."""
        topics = {self.subscriptions.get(group, "").rpartition(":")[0] for group in self.groups}
        return topics.pop() if len(topics) == 1 else ""

    def route(self, key: str) -> tuple[str, ...]:
        """Return the groups that want the key."""
        found = self.routes.get(key)
        if found is None:
            if len(self.routes) >= _MOST_ROUTES:
                self.routes.clear()
            found = tuple(
                group for group, patterns in self.groups.items() if any(matches(each, key) for each in patterns)
            )
            self.routes[key] = found
        return found


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
        self.deletions: int = 0
        """Groups that were deleted through this object."""
        self._reading: asyncio.Lock = asyncio.Lock()
        if settings.pinned is not None:
            self._registry = Registry(dict(settings.pinned), {}, 0.0, {})

    async def registry(self, *, since: float | None = None) -> Registry:
        """Return the groups, as read no longer ago than the setting says, or than `since` by the monotonic clock."""
        if (found := self._fresh(since)) is not None:
            return found
        async with self._reading:
            return self._fresh(since) or await self._read()

    def forget(self, name: str | None = None) -> None:
        """Look again next time, for the groups and for the queue of that name."""
        if name is not None:
            self._urls.pop(name, None)
        if self._settings.pinned is None:
            self._registry = None

    async def url(self, name: str) -> str:
        """Return the address of a queue.

        Raises:
            QueueMissingError: There is none.
        """
        if name not in self._urls:
            client = await self._clients.calls()
            with translated(self._settings.address):
                self._urls[name] = (await client.get_queue_url(QueueName=name))["QueueUrl"]
        return self._urls[name]

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
        client = await self._clients.calls()
        with translated(self._settings.address):
            # Made bare: with attributes, one that another process made meanwhile, with others, would be an error.
            kind = {"Attributes": {"FifoQueue": "true"}} if name.endswith(FIFO) else {}
            url = (await client.create_queue(QueueName=name, **kind))["QueueUrl"]  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            await client.set_queue_attributes(QueueUrl=url, Attributes=attributes)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        self._urls[name] = url
        return url

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
        url = await self.ensure(self.names.queue(group), dead=self.names.dead(group))
        if self._settings.fifo:
            await self.ensure(self.names.later(group))
        subscribing = self._settings.ensure and self._topics is not None
        unsubscribed = subscribing and not registry.subscriptions.get(group)
        if known == wanted and not unsubscribed:
            return self._ignorance(registry.since.get(group, 0.0))
        if not self._settings.ensure:
            raise ConfigurationError(
                f"the queue {self.names.queue(group)!r} is not tagged as group {group!r} with the key patterns "
                f"{list(wanted)}, and SQS_ENSURE is false: have it tagged, or set SQS_GROUPS"
            )
        subscription = registry.subscriptions.get(group, "")
        if self._topics is not None and unsubscribed:
            subscription = await self._topics.subscribe(self.names.topic, url)
        client, since = await self._clients.calls(), time.time()
        with translated(self._settings.address):
            # In one call, and by count: what is left of longer lists means nothing.
            await client.tag_queue(QueueUrl=url, Tags=tags(Group(group, wanted, since, subscription)))
        self.forget()
        return self._ignorance(since)

    async def delete(self, group: str) -> None:
        """Delete the group's queues, first the one by which it exists."""
        if self._settings.pinned is not None or not self._settings.ensure:
            raise ConfigurationError(
                f"group {group!r} is not ours to delete: its queues are made by others (SQS_ENSURE, SQS_GROUPS)"
            )
        self.deletions += 1
        others = [self.names.later(group)] if self._settings.fifo else []
        if self._topics is not None:
            registry = await self.registry(since=time.monotonic())
            if subscription := registry.subscriptions.get(group):
                await self._topics.unsubscribe(subscription)
        for name in (self.names.queue(group), self.names.dead(group), *others):
            try:
                client, url = await self._clients.calls(), await self.url(name)
                with translated(self._settings.address):
                    await client.delete_queue(QueueUrl=url)
            except QueueMissingError:
                pass
            self.forget(name)

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

    def _ignorance(self, since: float) -> float:
        """Return for how long a publisher may still go by what it read before that time."""
        left = since + self._settings.registry_ttl - time.time()
        return min(max(0.0, left), self._settings.registry_ttl)  # the clock may be another machine's

    def _fresh(self, since: float | None) -> Registry | None:
        found = self._registry
        if found is None or self._settings.pinned is not None:
            return found
        oldest = time.monotonic() - self._settings.registry_ttl if since is None else since
        return found if found.looked_at > oldest else None

    async def _read(self) -> Registry:
        started = time.monotonic()
        client = await self._clients.calls()
        found: list[str] = []
        with translated(self._settings.address):
            page: Mapping[str, Any] = {"NextToken": None}
            while "NextToken" in page:
                more = {"NextToken": page["NextToken"]} if page["NextToken"] else {}
                page = await client.list_queues(QueueNamePrefix=self.names.prefix, MaxResults=_PAGE, **more)
                found += [url for url in page.get("QueueUrls", ()) if url.endswith(FIFO) is self._settings.fifo]
        asking = asyncio.Semaphore(_AT_ONCE)

        async def ask(url: str) -> Group | None:
            async with asking:
                try:
                    with translated(self._settings.address):
                        return from_tags((await client.list_queue_tags(QueueUrl=url)).get("Tags", {}))
                except QueueMissingError:
                    return None  # deleted since it was listed

        groups = sorted(each for each in await asyncio.gather(*map(ask, found)) if each is not None)
        patterns, since = {each.name: each.patterns for each in groups}, {each.name: each.since for each in groups}
        subscriptions = {each.name: each.subscription for each in groups if each.subscription}
        self._registry = Registry(patterns, since, started, {}, subscriptions)
        return self._registry

    async def _arn(self, url: str) -> str:
        client = await self._clients.calls()
        with translated(self._settings.address):
            found = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
        return found["Attributes"]["QueueArn"]


def _part(name: str) -> str:
    text = name.replace("-", "--").replace(".", "-_")
    if len(text) <= _ROOM:
        return text
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH]
    # What is kept is for people only. No escape ends in "-x", so that no shorter name is taken for this one.
    return f"{text[: _ROOM - _HASH - 2].rstrip('-')}-x{digest}"
