"""The memory backend: the embedded default, the users' test broker, and the reference implementation of a transport.

What it holds belongs to the process and to a namespace: instances with the same namespace share it, in any event loop and thread. It
passes the same contract as the networked brokers, with leases, attempts, delays and dead letters, on a clock that tests can move.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import (
    Batching,
    Capabilities,
    Clock,
    DeadLetter,
    Delivery,
    Disposition,
    Durability,
    Envelope,
    GroupStats,
    Metadata,
    Outcomes,
    Settlement,
    Settling,
    Transport,
)
from abe.backends.message_queue.base.protocol import FullBackend, MessageQueueBackend
from abe.backends.message_queue.base.routing import group_full, lease_lost, unroutable
from abe.backends.message_queue.engine import TransportBackend
from abe.backends.message_queue.service.namespaces import Dead, Held, Item, Namespace, Queue, namespace
from abe.errors import AbeError, UnroutableError
from abe.settings import QueueSettings

_PAGE: Final = 100
"""Dead letters at a time."""


class _MemoryReceiver:
    def __init__(self, namespace: Namespace, group: str, lease: float, clock: Clock) -> None:
        self._namespace = namespace
        self._group = group
        namespace.queue(group)  # or there is no such group
        self._lease = lease
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._stopped = False

    async def receive(self, limit: int) -> Sequence[Delivery]:
        while not self._stopped:
            self._woken.clear()
            with self._namespace.lock:
                queue = self._namespace.queue(self._group)
                deliveries = queue.take(self, limit, self._clock.time(), self._lease)
                if deliveries:
                    queue.wake()
                    return deliveries
                queue.waiting[self] = None
                # A lease taken after this look ends after that time at the earliest.
                due = min(queue.next_event(), self._clock.time() + self._lease)
            timer = self._clock.call_at(due, self._woken.set)
            try:
                await self._woken.wait()
            finally:
                timer.cancel()
                with self._namespace.lock:
                    if queue.waiting.pop(self, self) is self:
                        queue.wake()  # we were chosen; if we do not take it, another one must
        return ()

    def metadata(self, delivery: Delivery) -> Metadata:
        envelope = delivery.header
        assert isinstance(envelope, Envelope)
        return Metadata(envelope.id, envelope.key, envelope.published_at, envelope.headers)

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        # The number is of a delivery, not of a message, so that a late one finds nothing: there is no need to verify more.
        with self._namespace.lock:
            held = self._held()
            return [None if held.pop(delivery.native, None) else lease_lost() for delivery in deliveries]

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        outcomes: list[AbeError | None] = [None] * len(settlements)
        now = self._clock.time()
        with self._namespace.lock:
            queue = self._namespace.queues.get(self._group)
            if queue is None:
                return [lease_lost()] * len(settlements)
            released: list[Item] = []
            for place, settlement in enumerate(settlements):
                held = queue.held.pop(settlement.delivery.native, None)
                if held is None:
                    outcomes[place] = lease_lost()
                elif settlement.disposition is Disposition.DEAD:
                    queue.bury(held.item, settlement.reason, settlement.error)
                elif settlement.disposition is Disposition.RELEASE:
                    held.item.attempts -= 1
                    released.append(held.item)
                else:
                    queue.put(held.item.envelope, now + settlement.delay, now, held.item.attempts)
            queue.give_back(released)
            queue.wake(everybody=True)
        return outcomes

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        with self._namespace.lock:
            held = self._held()
            deadline = self._clock.time() + self._lease
            for delivery in deliveries:
                if delivery.native in held:
                    held[delivery.native].deadline = deadline
            return [delivery for delivery in deliveries if delivery.native not in held]

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        return await self.renew(deliveries)

    async def stop(self) -> None:
        self._stopped = True
        self._woken.set()

    async def close(self) -> None:
        with self._namespace.lock:
            queue = self._namespace.queues.get(self._group)
            if queue is not None:
                ours = [number for number, held in queue.held.items() if held.owner is self]
                queue.give_back([queue.held.pop(number).item for number in ours])
                queue.wake(everybody=True)

    def _held(self) -> dict[int, Held]:
        """Return what the group's consumers hold: nothing, when it was deleted underneath."""
        queue = self._namespace.queues.get(self._group)
        return {} if queue is None else queue.held

    def wake(self) -> bool:
        """Let a waiting `receive` look again, from whatever thread; False when its event loop was closed under it."""
        try:
            self._loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:
            return False
        return True


class _MemoryTransport:
    batching = Batching(messages=250, bytes=1 << 20, max_concurrent=1)
    settling = Settling()

    def __init__(self, settings: QueueSettings, clock: Clock) -> None:
        self._namespace = namespace(settings.namespace)
        self._lease = settings.lease
        self._max_backlog = settings.max_backlog
        self._clock = clock

    async def open(self) -> None:
        """There is nothing to connect to."""

    async def close(self) -> None:
        """What the namespace holds stays with the process."""

    async def ping(self) -> None:
        """We are here."""

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        outcomes: list[AbeError | None] = []
        now = self._clock.time()
        with self._namespace.lock:
            touched: dict[Queue, None] = {}
            for envelope in envelopes:
                queues = self._wanting(envelope)
                if any(self._full(queue) for queue in queues):
                    outcomes.append(group_full())
                    continue
                for queue in queues:
                    queue.put(envelope, now + envelope.delay, now)
                    touched[queue] = None
                outcomes.append(None if queues else self._park(envelope, now))
            delayed = any(envelope.delay for envelope in envelopes)
            for queue in touched:
                queue.wake(everybody=delayed)
        return outcomes

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        with self._namespace.lock:
            return self._namespace.declare(group, patterns, self._clock.time(), change=change)

    async def delete_group(self, group: str) -> None:
        with self._namespace.lock:
            self._namespace.delete(group)

    async def delete_namespace(self) -> None:
        with self._namespace.lock:
            self._namespace.clear()

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        with self._namespace.lock:
            return {group: queue.patterns for group, queue in self._namespace.queues.items()}

    async def subscribe(self, group: str, prefetch: int) -> _MemoryReceiver:
        with self._namespace.lock:
            return _MemoryReceiver(self._namespace, group, self._lease, self._clock)

    async def stats(self, group: str) -> GroupStats:
        now = self._clock.time()
        with self._namespace.lock:
            queue = self._namespace.queue(group)
            queue.mature(now)
            expired = queue.expired(now)
            since = [item.since for item in (*expired, *islice(queue.ready, 1))]
            return GroupStats(
                waiting=len(queue.ready) + len(expired),
                in_flight=len(queue.held) - len(expired),
                delayed=len(queue.delayed),
                dead=len(queue.dead),
                oldest=now - min(since) if since else None,
            )

    async def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        for page in self._pages(group):
            yield [letter for _, (letter, _) in page]
            await asyncio.sleep(0)  # the others have their turn

    async def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        for page in self._pages(group, ids):
            now = self._clock.time()
            with self._namespace.lock:
                queue = self._namespace.queue(group)
                moved = queue.take_dead(number for number, _ in page)
                for envelope in moved:
                    queue.put(envelope, now, now)
                queue.wake()
            yield len(moved)
            await asyncio.sleep(0)

    async def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        for page in self._pages(group, ids):
            with self._namespace.lock:
                removed = self._namespace.queue(group).take_dead(number for number, _ in page)
            yield len(removed)
            await asyncio.sleep(0)

    def _pages(self, group: str, ids: Collection[str] | None = None) -> list[list[tuple[int, Dead]]]:
        """Return the dead letters that are there now, each with its number: they are in memory anyhow."""
        with self._namespace.lock:
            dead = self._namespace.queue(group).dead
            chosen = [item for item in dead.items() if ids is None or item[1][0].id in ids]
        return [chosen[start : start + _PAGE] for start in range(0, len(chosen), _PAGE)]

    def _wanting(self, envelope: Envelope) -> Sequence[Queue]:
        if envelope.group is None:
            return self._namespace.route(envelope.key)
        queue = self._namespace.queues.get(envelope.group)
        return [] if queue is None else [queue]

    def _park(self, envelope: Envelope, now: float) -> UnroutableError | None:
        if self._namespace.queues or envelope.group is not None:
            return unroutable(envelope)
        self._namespace.unclaimed.append((envelope, now + envelope.delay))
        return None

    def _full(self, queue: Queue) -> bool:
        return self._max_backlog is not None and len(queue.ready) + len(queue.delayed) >= self._max_backlog


class MemoryBackend(TransportBackend):
    """A message queue inside this process; what it holds ends with the process.

    Args:
        settings: Namespace, lease, limits.
        codec: Payload to bytes and back. Payloads are encoded here too, so that what passes here passes on a broker.
        middleware: Wraps each publish.
        clock: What leases and delays are measured by; give a `ManualClock` to move it in tests.
    """

    capabilities: Capabilities = Capabilities(
        groups=True,
        key_patterns=True,
        ordered=True,
        ordered_per_key=False,
        spurious_duplicates=False,
        dead_letter=True,
        max_delay=math.inf,
        lease=30.0,
        redelivery_bound=0.5,
        silence_bound=None,
        publish_dedup=None,
        max_payload_bytes=16 * 1024 * 1024,
        durability=Durability.NONE,
    )

    def make_transport(self) -> Transport:
        """Return a transport to this process's memory."""
        return _MemoryTransport(self.settings, self._clock)


if TYPE_CHECKING:
    _: type[MessageQueueBackend] = MemoryBackend
    __: type[FullBackend] = MemoryBackend
