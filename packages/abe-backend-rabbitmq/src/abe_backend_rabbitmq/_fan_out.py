"""Publishes to the exchange, which copies to the groups; or a copy to each group, for delayed messages and with `max_backlog`.

A delayed message waits in a queue of its group. And a nack says that the queue of some group refused the message, not which one: the
others have it. So with `max_backlog` the copies are published and confirmed one by one, first to the group that refused last: if it
refuses again, no group has the message. Which groups have a message is remembered, so that the retry leaves them out.
"""

import time
from collections.abc import Sequence
from typing import Final

from abe.backends.message_queue.base import Envelope
from abe.backends.message_queue.base.routing import unroutable
from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    GroupMissingError,
    PermissionDeniedError,
    PublishUnknownError,
    UnroutableError,
)
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._broker import Broker
from abe_backend_rabbitmq._channel import Outgoing
from abe_backend_rabbitmq._errors import ChannelNotFound
from abe_backend_rabbitmq._registry import Registry
from abe_backend_rabbitmq._topology import AT_ONCE

_STALE: Final = 20
"""Times that the groups may change under one batch before it counts as failed."""

_FRESH: Final = 1.0
"""Seconds between two reads of the registry because a queue refused a message."""


class _Job:
    """One message that is copied to each group.

    Attributes:
        envelope: The message. (The reference keeps its `id()` from being reused.)
        done: The groups that have it.
        failed: The errors of the copies that were not accepted in this try, by group.
        final: Its outcome in this try if it does not follow from its copies.
        blind: Whether it is unknown which groups have it, so that another copy could be a duplicate.
        checked: Whether the registry was read again because no group in it wants the message.
        since: When it was tried last.
    """

    __slots__ = ("blind", "checked", "done", "envelope", "failed", "final", "since")

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        self.done: set[str] = set()
        self.failed: dict[str, AbeError] = {}
        self.final: AbeError | None = None
        self.blind = self.checked = False
        self.since = time.monotonic()

    def outcome(self) -> AbeError | None:
        """Return its outcome in this try."""
        if self.final is not None or not self.failed:
            return self.final
        error = next(iter(self.failed.values()))
        if not self.done:
            return error
        names = ", ".join(map(repr, sorted(self.failed)))
        partial = PublishUnknownError(f"not every group that wants the message has it, {names} not yet: {error}")
        partial.__cause__ = error
        return partial


class FanOut:
    """Publishes envelopes.

    Args:
        broker: Publishes, and has the groups.
    """

    def __init__(self, broker: Broker) -> None:
        self._bounded = broker.settings.max_backlog is not None
        self._remember = 2 * broker.settings.publish_timeout
        self._broker = broker
        self._groups = broker.groups
        self._topology = broker.topology
        self._partial: dict[int, _Job] = {}
        self._refusing: dict[str, float] = {}
        self._looked = 0.0

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Publish, and return each one's outcome; see `Transport.send`."""
        if not (self._bounded or self._partial or any(each.delay for each in envelopes)):
            return await self._whole(envelopes)
        self._forget()
        jobs = {i: self._job(each) for i, each in enumerate(envelopes) if self._is_copied(each)}
        rest = [i for i in range(len(envelopes)) if i not in jobs]
        outcomes: list[AbeError | None] = [None] * len(envelopes)
        try:
            results = await self._whole([envelopes[i] for i in rest]) if rest else ()
        except AbeError as exc:
            results = [exc] * len(rest)
        for i, result in zip(rest, results or [None] * len(rest), strict=True):
            outcomes[i] = result
        if jobs:
            await self._copy([job for job in jobs.values() if not job.blind])
        for i, job in jobs.items():
            outcome = outcomes[i] = job.outcome()
            if not isinstance(outcome, PublishUnknownError):
                self._partial.pop(id(job.envelope), None)
            elif job.done:  # the engine sends it again
                self._keep(job)
        return outcomes if any(outcomes) else ()

    def _is_copied(self, envelope: Envelope) -> bool:
        return bool(envelope.delay) or (envelope.group is None and (self._bounded or id(envelope) in self._partial))

    def _job(self, envelope: Envelope) -> _Job:
        job = self._partial.get(id(envelope))
        if job is None:
            return _Job(envelope)
        job.failed.clear()
        job.final = job.final if job.blind else None
        return job

    def _keep(self, job: _Job) -> None:
        self._partial.pop(id(job.envelope), None)
        self._partial[id(job.envelope)] = job  # the newest is the last
        job.since = time.monotonic()

    def _forget(self) -> None:
        """Forget messages that were not retried for long: their publishers gave up."""
        oldest = time.monotonic() - self._remember
        while self._partial and (first := next(iter(self._partial.values()))).since < oldest:
            del self._partial[id(first.envelope)]

    async def _whole(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Publish to the exchange, which copies to the groups, or to one group's queue."""
        results = await self._broker.publisher.publish([self._outgoing(each) for each in envelopes])
        if not results:
            return results
        outcomes = list(results)
        for i, (envelope, outcome) in enumerate(zip(envelopes, results, strict=True)):
            if isinstance(outcome, UnroutableError) and envelope.group is not None:
                outcomes[i] = unroutable(envelope)
            elif isinstance(outcome, BackpressureError) and envelope.group is None:
                outcomes[i] = await self._refused(envelope, outcome)
        return outcomes

    def _outgoing(self, envelope: Envelope) -> Outgoing:
        id, key, body = envelope.id, envelope.key, envelope.body
        if envelope.group is None:
            return Outgoing(self._topology.exchange, key, _wire.pack(envelope), body, id)
        return Outgoing("", self._topology.queue(envelope.group), _wire.pack(envelope, ("abe-key", key)), body, id)

    async def _refused(self, envelope: Envelope, refusal: BackpressureError) -> AbeError:
        """Return the outcome of a message that a queue refused: rejected if at most one group wants it, otherwise unknown."""
        now = time.monotonic()
        if now - self._looked > _FRESH:
            self._looked = now
            self._groups.forget()
        try:
            wanting = (await self._groups.known()).wanting(envelope.key)
        except AbeError:
            wanting = None
        if wanting is not None and len(wanting) <= 1:
            return refusal
        unknown = PublishUnknownError(f"{refusal}; other groups that want the message may have it")
        unknown.__cause__ = refusal
        job = _Job(envelope)  # the retry publishes to each group
        if wanting is None:
            job.final, job.blind = unknown, True
        self._keep(job)
        return unknown

    async def _copy(self, jobs: Sequence[_Job]) -> None:
        """Publish a copy to each group that wants it, as the groups are now."""
        mended = False
        failure: AbeError = BackendConnectionError("the groups change faster than messages can be copied to them")
        for _ in range(_STALE):
            try:
                jobs = await self._round(await self._groups.known(), jobs)
            except PermissionDeniedError as exc:
                failure = exc
                break
            except AbeError as exc:
                if not isinstance(exc.__cause__, ChannelNotFound) or mended:
                    failure = exc
                    break
                mended = True  # the exchange of delayed messages was deleted
                await self._broker.prepare()
            else:
                if not jobs:
                    return
                self._groups.forget()
        blind = isinstance(failure, PermissionDeniedError)
        for job in jobs:
            if blind and not job.envelope.delay and not job.done:  # the registry may not be read
                job.final = (await self._whole([job.envelope]) or (None,))[0]
            else:
                job.failed[""] = failure

    async def _round(self, registry: Registry, jobs: Sequence[_Job]) -> Sequence[_Job]:
        """Publish by one version of the registry, and return the jobs for which it was stale."""
        stale: list[_Job] = []
        later: list[tuple[_Job, str, Outgoing]] = []
        for job in jobs:
            copies = await self._copies(registry, job)
            if copies is None:
                stale.append(job)
            elif job.envelope.delay:
                later += [(job, group, copy) for group, copy in copies]
            elif not copies and not job.done:  # the broker decides whether it is unroutable or parked
                job.final = (await self._whole([job.envelope]) or (None,))[0]
            elif not await self._one_by_one(job, copies):
                stale.append(job)
        results = await self._publish([copy for _, _, copy in later])
        for place, (job, group, _) in enumerate(later):
            if not _note(job, group, results[place] if results else None) and job not in stale:
                stale.append(job)
        return stale

    async def _one_by_one(self, job: _Job, copies: Sequence[tuple[str, Outgoing]]) -> bool:
        """Publish to one group after the other, first to those that refused last; return False if the registry was stale."""
        for group, copy in sorted(copies, key=lambda each: -self._refusing.get(each[0], 0.0)):
            [result] = await self._publish([copy]) or [None]
            if not _note(job, group, result):
                return False
            if isinstance(result, BackpressureError):
                self._refusing[group] = time.monotonic()
                if not job.done:
                    return True  # no group has it
            else:
                self._refusing.pop(group, None)
        return True

    async def _publish(self, copies: Sequence[Outgoing]) -> Sequence[AbeError | None]:
        try:
            return await self._broker.publisher.publish(copies) if copies else ()
        except AbeError as exc:
            return [exc] * len(copies)

    async def _copies(self, registry: Registry, job: _Job) -> Sequence[tuple[str, Outgoing]] | None:
        """Return the copies to the groups that have none yet; None: the registry must be read again.

        A delayed publish:

        1. `Delays.place` picks the level, whose queue is declared, under the registry's lock, before anything is published to it.
        2. The copy goes to the exchange `later`, with the key "<version of the registry>.<level>.<group>". The only binding of `later`,
           to `delay`, is that of the newest version: the broker returns a copy by a stale registry, and the registry is read again.
        3. `delay` routes by level and group to the level's queue ("now": the group's queue; "parked": the parked messages).
        4. A mover of the group's consumers moves it on when it is due: see `_movers`.
        """
        envelope = job.envelope
        key, delay, group = envelope.key, envelope.delay, envelope.group
        later = self._topology.later
        groups = registry.wanting(key) if group is None else [group] if group in registry.groups else []
        if not groups and not job.done and delay and (registry.groups or group is not None):
            if not job.checked:
                job.checked = True
                return None
            job.final = unroutable(envelope)
            return ()
        if not registry.groups and delay:
            due = int((time.time() + delay) * 1000) + 1
            properties = _wire.pack(envelope, ("abe-key", key), ("abe-due", due))
            return [("", Outgoing(later, f"{registry.version}.parked", properties, envelope.body, envelope.id))]
        copies: list[tuple[str, Outgoing]] = []
        for name in groups:
            if name in job.done:
                continue
            words = f"{AT_ONCE}.{name}"
            waiting: tuple[tuple[str, int], ...] = ()
            if delay:
                try:
                    _, words, waiting = await self._broker.delays.place(name, delay)
                except GroupMissingError:
                    return None  # it was deleted meanwhile
            properties = _wire.pack(envelope, ("abe-key", key), *waiting)
            copies.append(
                (name, Outgoing(later, f"{registry.version}.{words}", properties, envelope.body, envelope.id))
            )
        return copies


def _note(job: _Job, group: str, result: AbeError | None) -> bool:
    """Record the outcome of a copy; return False if the registry by which it was published was stale."""
    if isinstance(result, UnroutableError):
        return False
    if result is None:
        job.done.add(group)
    else:
        job.failed[group] = result
    return True
