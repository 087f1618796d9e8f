"""Stores messages: fans published ones out to the groups' queues, and stores copies of those that are moved."""

import asyncio
import itertools
import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

from abe.backends.message_queue.base import Envelope, Outcomes
from abe.backends.message_queue.base.routing import group_full, unroutable
from abe.errors import AbeError, BackendConnectionError, PayloadTooLargeError, PublishUnknownError
from abe_backend_sqs import _wire
from abe_backend_sqs._copies import LONGEST_DELAY, delayed
from abe_backend_sqs._errors import QueueMissingError
from abe_backend_sqs._groups import Groups
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._tags import Registry
from abe_backend_sqs._topics import SNS_LIMIT
from abe_backend_sqs._wire import Entry

_MAX_CONCURRENT: Final = 48
"""Requests that store messages, at once."""


class _Partial(NamedTuple):
    """A message that only some of its queues have."""

    envelope: Envelope
    """The reference keeps its `id()` from being reused."""
    names: set[str]
    """The queues that have it."""
    since: float
    """When it was tried last, by the monotonic clock."""


class Publisher:
    """Stores messages in queues.

    Args:
        groups: Finds the queues.
        settings: The provider's settings.
    """

    def __init__(self, groups: Groups, settings: SqsSettings) -> None:
        self.groups: Groups = groups
        self._settings = settings
        self._concurrent = asyncio.Semaphore(_MAX_CONCURRENT)
        self._counting = asyncio.Lock()
        self._partial: dict[int, _Partial] = {}
        """By the envelope's `id()`. A retry passes the same object, for as long as a publish may take. Another publish with the same
        message id passes another object, and must reach all queues."""

    async def send(self, envelopes: Sequence[Envelope], registry: Registry) -> Outcomes:
        """Publish: to the queue of each group that wants the key, or to the parked messages where there is no group."""
        self._forget_partial()
        if self._settings.max_backlog is None:
            return await self._fan_out(envelopes, registry, None)
        async with self._counting:
            wanting = {group for envelope in envelopes for group in _wanting(envelope, registry)}
            return await self._fan_out(envelopes, registry, await self._free(wanting, self._settings.max_backlog))

    async def post(self, name: str, entries: Sequence[Entry]) -> Outcomes:
        """Store messages in a queue, and return each one's outcome. In a FIFO queue they keep their order."""
        batches = list(_wire.batches(entries, SNS_LIMIT if _is_topic(name) else _wire.LIMIT))
        if len(batches) == 1:
            return await self._send(name, entries)
        outcomes: list[AbeError | None] = [None] * len(entries)

        async def send(positions: Sequence[int]) -> None:
            results = await self._send(name, [entries[position] for position in positions])
            for position, result in zip(positions, results, strict=True):
                outcomes[position] = result

        if self._settings.fifo:
            for index, positions in enumerate(batches):
                await send(positions)
                failed = next((each for each in map(outcomes.__getitem__, positions) if each and each.retryable), None)
                if failed is not None:  # later ones must not overtake it
                    error = BackendConnectionError(f"not sent, as one before it failed: {failed}")
                    for position in itertools.chain(*batches[index + 1 :]):
                        outcomes[position] = error
                    break
        else:
            await asyncio.gather(*map(send, batches))
        return outcomes

    async def _fan_out(
        self, envelopes: Sequence[Envelope], registry: Registry, room: dict[str, int] | None
    ) -> Outcomes:
        outcomes: list[AbeError | None] = [None] * len(envelopes)
        queues: dict[str, list[tuple[int, Entry]]] = {}
        for position, envelope in enumerate(envelopes):
            groups = _wanting(envelope, registry)
            entry = self._entry(envelope, parked=not registry.groups)
            outcomes[position] = error = _too_large(entry) or self._refusal(envelope, registry, groups, room)
            if error is None:
                for name in self._destinations(envelope, entry, registry, groups):
                    queues.setdefault(name, []).append((position, entry))
        await self._post_all(envelopes, queues, outcomes)
        return outcomes if any(outcomes) else ()

    def _destinations(
        self, envelope: Envelope, entry: Entry, registry: Registry, groups: Sequence[str]
    ) -> Sequence[str]:
        """Return the names of the message's queues; or the ARN of the topic, for one without a delay that all groups want."""
        names = self.groups.names
        if not registry.groups:
            return [names.parked]
        if self._settings.fanout == "sns" and len(groups) == len(registry.groups) and envelope.group is None:
            topic = registry.topic
            if topic and not envelope.delay and entry.size <= SNS_LIMIT:
                return [topic]
        return [*map(names.delayed if self._settings.fifo and envelope.delay else names.queue, groups)]

    def _entry(self, envelope: Envelope, *, parked: bool) -> Entry:
        """Return the entry of an envelope. A parked message is delayed in the queue of the group that gets it."""
        due = math.ceil((time.time() + envelope.delay) * 1000) if envelope.delay else 0
        if due and not parked:
            return delayed(_wire.pack(envelope, due=due if envelope.delay > LONGEST_DELAY else 0), envelope.delay)
        entry = _wire.pack(envelope, due=due)
        if not self._settings.fifo:
            return entry
        # Each key is a message group of parked messages: those that no group wants must not block the others.
        order = envelope.key if parked else self._settings.message_group or envelope.key
        return _wire.in_order(entry, order, envelope.id)

    def _refusal(
        self, envelope: Envelope, registry: Registry, groups: Sequence[str], room: dict[str, int] | None
    ) -> AbeError | None:
        if not groups and (registry.groups or envelope.group is not None):
            return unroutable(envelope)
        if not registry.groups or room is None:
            return None
        stored = self._stored_in(envelope)  # by an earlier try: they need no room any more
        names = self.groups.names
        left = [each for each in groups if names.queue(each) not in stored and names.delayed(each) not in stored]
        if any(room[group] <= 0 for group in left):
            if stored:
                return PublishUnknownError("some groups have the message, and another has max_backlog messages waiting")
            return group_full()
        for group in left:
            room[group] -= 1
        return None

    async def _free(self, groups: Collection[str], most: int) -> dict[str, int]:
        async def room(group: str) -> int:
            try:
                waiting, _, delayed = await self.groups.group_counts(group)
            except QueueMissingError:
                return most  # sending to it fails by itself
            return most - waiting - delayed

        return dict(zip(groups, await asyncio.gather(*map(room, groups)), strict=True))

    async def _post_all(
        self,
        envelopes: Sequence[Envelope],
        queues: Mapping[str, Sequence[tuple[int, Entry]]],
        outcomes: list[AbeError | None],
    ) -> None:
        """Post to every queue; a message that only some of them stored is remembered, so that its retry leaves those out."""

        async def post(name: str, some: Sequence[tuple[int, Entry]]) -> None:
            left = [each for each in some if name not in self._stored_in(envelopes[each[0]])] if self._partial else some
            results = await self.post(name, [entry for _, entry in left]) if left else ()
            for (position, _), result in zip(left, results, strict=True):
                if result is None:
                    done.setdefault(position, set()).add(name)
                else:
                    failed.setdefault(position, []).append((name, result))

        done: dict[int, set[str]] = {}
        failed: dict[int, list[tuple[str, AbeError]]] = {}
        if len(queues) == 1:
            await post(*next(iter(queues.items())))
        else:
            await asyncio.gather(*(post(name, some) for name, some in queues.items()))
        if not failed and not self._partial:
            return
        for position, envelope in enumerate(envelopes):
            if position in failed:
                outcomes[position] = self._partial_failure(envelope, done.get(position, set()), failed[position])
            else:
                self._partial.pop(id(envelope), None)

    def _stored_in(self, envelope: Envelope) -> Collection[str]:
        found = self._partial.get(id(envelope))
        return found.names if found else ()

    def _forget_partial(self) -> None:
        """Forget messages that are retried no more. The first ones are the oldest."""
        oldest = time.monotonic() - self._settings.publish_timeout
        while self._partial and (first := next(iter(self._partial.values()))).since < oldest:
            del self._partial[id(first.envelope)]

    def _partial_failure(self, envelope: Envelope, done: set[str], failed: Sequence[tuple[str, AbeError]]) -> AbeError:
        errors = [error for _, error in failed]
        # An error of a message that may be stored comes first, then a permanent one.
        worst = min(errors, key=lambda error: (not error.maybe_accepted, error.retryable))
        known = self._partial.pop(id(envelope), None)
        if known is None and not done:
            return worst
        names = done if known is None else done | known.names
        self._partial[id(envelope)] = _Partial(envelope, names, time.monotonic())  # the newest is the last
        missing = ", ".join(name for name, _ in failed)
        error = PublishUnknownError(f"some queues have the message, and these may have not: {missing}: {worst}")
        error.__cause__ = worst
        return error

    async def _send(self, name: str, entries: Sequence[Entry]) -> Outcomes:
        async with self._concurrent:
            try:
                if _is_topic(name):
                    return await self.groups.topics.publish(name, entries)
                return await (await self.groups.store(name)).send(entries)
            except AbeError as exc:
                if isinstance(exc, QueueMissingError):
                    self.groups.not_found(name)
                return [exc] * len(entries)


def _wanting(envelope: Envelope, registry: Registry) -> Sequence[str]:
    """Return the groups that get a message."""
    if envelope.group is None:
        return registry.routes[envelope.key]
    return (envelope.group,) if envelope.group in registry.groups else ()


def _is_topic(name: str) -> bool:
    return name.startswith("arn:")


def _too_large(entry: Entry) -> AbeError | None:
    most = _wire.LIMIT - _wire.RESERVE
    if entry.size <= most:
        return None
    return PayloadTooLargeError(
        f"the message is {entry.size} bytes of {most} with its headers, as SQS carries it; "
        f"the rest of its {_wire.LIMIT} is for what a retry or a dead letter adds"
    )
