"""Finds, creates, tags and deletes the groups of one namespace, each of which is several queues."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from abe.backends.message_queue.base.names import EVERYTHING
from abe.errors import ConfigurationError, PermissionDeniedError
from abe_backend_sqs import _attributes, _queue
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._errors import QueueExistsError, QueueMissingError
from abe_backend_sqs._queue import Counts, Queue
from abe_backend_sqs._registry import RegistryKeeper
from abe_backend_sqs._tags import Group, Registry, tags, topic
from abe_backend_sqs._topics import Topics
from abe_backend_sqs._topology import Topology

_SKEW: Final = 10.0
"""Seconds that the clocks of processes may be apart."""


class Declared(NamedTuple):
    """The result of declaring a group."""

    patterns: tuple[str, ...]
    propagation: float
    """Seconds until every publisher knows it."""


class Groups:
    """The groups of one namespace, and their queues.

    Args:
        clients: The AWS clients.
    """

    def __init__(self, clients: Clients) -> None:
        self._settings = clients.settings
        self._clients = clients
        self.names = Topology(clients.settings.namespace, fifo=clients.settings.fifo)
        self.keeper = RegistryKeeper(clients, self.names)
        self.topics = Topics(clients)
        self.deletions: Counter[str] = Counter()
        """How many times groups were deleted through this object."""
        self._queues: dict[str, Queue] = {}
        self._checked: set[str] = set()
        """The names of queues whose attributes are known to be right."""
        self._known_by: dict[str, tuple[float, float]] = {}
        """Of each group: since when it has its tags, and when, by the monotonic clock, every publisher knows them."""

    def forget(self, name: str | None = None) -> None:
        """Forget the registry, and the queue of that name: the next use reads them again. A deleted topic is not used any more."""
        if name is not None:
            self._queues.pop(name, None)
            self._checked.discard(name)
            if name.startswith("arn:"):
                self.keeper.lose_topic(name)
        self.keeper.forget()

    def not_found(self, name: str) -> None:
        """Forget the registry and the queue, as `forget`, after a publish that did not find that queue.

        If the queue is known to be missing already, the registry is kept: it is not read again at each retry.
        """
        if name in self._queues or not self.keeper.misses(name):
            self.forget(name)

    async def find(self, name: str) -> Queue:
        """Return a queue.

        Raises:
            QueueMissingError: There is none.
        """
        if name not in self._queues:
            self._queues[name] = await _queue.find(self._clients, name)
        return self._queues[name]

    async def store(self, name: str) -> Queue:
        """Return a queue to store messages in; create it again if it is missing, unless it is a group's own.

        Raises:
            QueueMissingError: There is no such group.
        """
        if name.startswith(self.names.prefix):
            return await self.find(name)
        # The others were checked when the group was declared.
        return await self.ensure(name, check=name == self.names.parked)

    async def ensure(self, name: str, *, dead: str | None = None, ours: bool = False, check: bool = True) -> Queue:
        """Return a queue that fulfils the contract; create it if it does not exist.

        Args:
            name: The queue's name.
            dead: The name of the queue of its dead letters.
            ours: Whether an existing one may be changed.
            check: Whether an existing one is checked.

        Raises:
            ConfigurationError: It does not exist, and may not be created; or it exists, and does not fulfil the contract.
        """
        dead_letters = None if dead is None else await self.ensure(dead, ours=ours)
        try:
            queue = await self.find(name)
        except QueueMissingError as exc:
            if not self._settings.ensure:
                raise ConfigurationError(
                    f"there is no queue {name!r} in SQS, and SQS_ENSURE is false: create it"
                ) from exc
            queue = await self._create(name, dead_letters)
        if check and name not in self._checked:
            await _attributes.check(queue, dead_letters, ours=ours and self._settings.ensure)
            self._checked.add(name)
        return queue

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> Declared:
        """Create the group if it does not exist; see `Transport.declare`.

        Raises:
            ConfigurationError: The group is not among the pinned ones; or a queue is missing, and may not be created; or an existing queue
                does not fulfil the contract.
        """
        registry = await self.keeper.registry(time.monotonic())
        if self._settings.pinned is not None:
            self._check_pinned(registry, group, patterns if change else None)
        try:
            return await self._declare(registry, group, patterns, change=change)
        except QueueMissingError:  # deleted by another process meanwhile: the retry creates it
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
        name, dead, *others = self._of(group)
        present = registry.present.get(group)
        # A queue with our tags is ours, and so are those that belong to it.
        ours = present is not None and self._settings.pinned is None
        for each in (dead, *others):
            await self.ensure(each, ours=ours)
        if present is None:
            # One that was deleted underneath gets its old patterns again.
            before = None if change else registry.groups.get(group)
            made = await self._make(group, before or patterns or EVERYTHING)
        else:
            await self.ensure(name, dead=dead, ours=ours)
            since, subscription = registry.since.get(group, 0.0), registry.subscriptions.get(group, "")
            made = Group(group, present, since, subscription, registry.wanted_since(group))
        wanted = patterns if change and patterns else made.patterns
        subscription = made.subscription or await self._subscription(registry, await self.find(name))
        if (wanted, subscription) != (made.patterns, made.subscription):
            wanted_since = made.wanted_since if wanted == made.patterns else _now()
            changed = made._replace(patterns=wanted, subscription=subscription, wanted_since=wanted_since)
            made = await self._tag(changed)
        elif self._settings.pinned is None and self._settings.ensure:
            await self._tidy(name)
        return Declared(made.patterns, self._propagation(group, made.since))

    async def _make(self, group: str, wanted: tuple[str, ...]) -> Group:
        """Create the group's own queue, and return the group: another process may have created it meanwhile.

        The queue gets its tags in the same request: of several processes with different patterns, one creates it.
        """
        name, dead, *_ = self._of(group)
        now = _now()
        made = Group(group, wanted, now, wanted_since=now)
        if self._settings.pinned is not None:
            await self.ensure(name, dead=dead)
            return made._replace(since=0.0)
        try:
            await self.find(name)
        except QueueMissingError:
            if self._settings.ensure:
                await self.keeper.revise(name)  # first: a queue of this name may have existed with other tags
                await self._create(name, await self.ensure(dead), tags(made))
                self.keeper.forget()  # it was read before
        found = await self.keeper.group(await self.ensure(name, dead=dead))
        return found or await self._tag(made)

    async def _tag(self, made: Group) -> Group:
        """Set the tags of the group's queue, so that every publisher that reads them from now on sees the change."""
        name = self.names.queue(made.name)
        if not self._settings.ensure:
            raise ConfigurationError(
                f"the queue {name!r} is not tagged as group {made.name!r} with the key patterns "
                f"{list(made.patterns)}, and SQS_ENSURE is false: tag it, or set SQS_GROUPS"
            )
        queue = await self.find(name)

        async def tag() -> None:
            nonlocal made
            made = made._replace(since=_now())
            # In one call, with the number of parts: left-over parts of a longer list are ignored.
            await queue.tag(tags(made))

        await self.keeper.change(name, tag)
        return made

    async def _tidy(self, name: str) -> None:
        """Reduce a group's revisions to one, if a change was interrupted, or two were made at once."""
        if len(await self.keeper.revisions(name)) > 1:
            with suppress(PermissionDeniedError):  # it is optional
                await self.keeper.change(name)

    async def delete(self, group: str) -> None:
        """Delete the group's queues: its revisions first, whose absence tells publishers that the group was deleted and is not only
        missing; then its own queue."""
        self._check_deletable(f"group {group!r} is")
        self.deletions[group] += 1
        registry = await self.keeper.registry(time.monotonic())
        first, *_ = names = self._of(group)
        for _ in range(2):  # another process may be changing it
            for revision in await self.keeper.revisions(first):
                await revision.remove()
            for name in names:
                with suppress(QueueMissingError):
                    await (await self.find(name)).remove()
                self.forget(name)
            names = ()
        if self._settings.fanout == "sns" and (subscription := registry.subscriptions.get(group)):
            await self.topics.unsubscribe(subscription)

    async def delete_all(self) -> None:
        """Delete every queue of the namespace, and its topic."""
        self._check_deletable("the namespace is")
        registry = await self.keeper.registry(time.monotonic())
        found = await _queue.list_all(self._clients, self.names.all)
        for queue in sorted(found, key=lambda queue: self.names.revised(queue.name) is None):  # revisions first
            if self.names.owns(queue.name):
                await queue.remove()
        self.deletions.update(registry.groups)
        self._queues.clear()
        self._checked.clear()
        self.keeper.forget()
        if self._settings.fanout == "sns":
            for subscription in registry.subscriptions.values():
                await self.topics.unsubscribe(subscription)
            if used := next(map(topic, registry.subscriptions.values()), ""):
                await self.topics.delete(used)

    def _check_deletable(self, what: str) -> None:
        if self._settings.pinned is not None or not self._settings.ensure:
            raise ConfigurationError(
                f"{what} not ours to delete: its queues are made by others (SQS_ENSURE, SQS_GROUPS)"
            )

    async def group_counts(self, group: str) -> Counts:
        """Return how many messages the group has. Those in the queue of delays of a FIFO group are delayed."""
        if not self._settings.fifo:
            return await self.counts(self.names.queue(group))
        counts, delayed = await asyncio.gather(
            self.counts(self.names.queue(group)), self.counts(self.names.delayed(group))
        )
        return counts._replace(delayed=sum(delayed))

    async def counts(self, name: str) -> Counts:
        """Return how many messages a queue has.

        Raises:
            QueueMissingError: There is none.
        """
        queue = await self.find(name)
        try:
            return await queue.counts()
        except QueueMissingError:
            self.forget(name)
            raise

    def _propagation(self, group: str, since: float) -> float:
        """Return for how many seconds publishers may use a registry from before the group's tags were set.

        `since` is when the request that set them began. It may have taken up to its timeout, so they may be set only since now.
        """
        now, ttl = time.monotonic(), self._settings.registry_ttl
        if time.time() >= since + max(_SKEW, self._settings.publish_timeout) + ttl:
            return 0.0
        known = self._known_by.get(group)
        if known is None or known[0] != since:
            known = self._known_by[group] = since, now + ttl
        return max(0.0, known[1] - now)

    async def _subscription(self, registry: Registry, queue: Queue) -> str:
        if self._settings.fanout != "sns" or not self._settings.ensure:
            return ""
        used = next(map(topic, registry.subscriptions.values()), None)
        return await self.topics.subscribe(used or await self.topics.create(self.names.topic), queue)

    def _of(self, group: str) -> Sequence[str]:
        """Return the names of a group's queues: its own, that of its dead letters, that of its delays."""
        names = self.names
        return names.queue(group), names.dead(group), *([names.delayed(group)] if self._settings.fifo else ())

    async def _create(self, name: str, dead_letters: Queue | None, labels: Mapping[str, str] | None = None) -> Queue:
        """Create a queue with its attributes: one that gets them later would lose messages that are older than four days until then."""
        attributes = await _attributes.wanted(self._settings, name, dead_letters)
        try:
            queue = await _queue.create(self._clients, name, attributes, labels)
        except QueueExistsError:  # a process with another lease created it meanwhile
            queue = await _queue.find(self._clients, name)
        else:
            self._checked.add(name)  # if another process created it, its attributes are the same
        self._queues[name] = queue
        return queue


def _now() -> float:
    """Return the time in seconds since the epoch, in the whole milliseconds that tags have."""
    return int(time.time() * 1000) / 1000
