"""The memory backend: the embedded default, the users' test broker, and the reference implementation of a transport.

Messages belong to the process and to a namespace: instances with the same namespace share them, in any event loop and thread. It
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
    Receiving,
    Settlement,
    Settling,
    Transport,
)
from abe.backends.message_queue.base.clock import Timer
from abe.backends.message_queue.base.protocol import FullBackend, MessageQueueBackend
from abe.backends.message_queue.base.routing import group_full, lease_lost, unroutable
from abe.backends.message_queue.engine import TransportBackend
from abe.backends.message_queue.service.namespaces import Dead, Item, Namespace, Queue, namespace
from abe.errors import AbeError, UnroutableError
from abe.settings import QueueSettings

_PAGE: Final = 100
"""Dead letters in a page."""


class _MemoryReceiver:
    def __init__(self, namespace: Namespace, group: str, lease: float, clock: Clock) -> None:
        self._namespace = namespace
        self._group = group
        namespace.queue(group)  # raises GroupMissingError
        self._lease = lease
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None
        self._timer: Timer | None = None
        self._timer_due = math.inf
        self._stopped = False

    async def receive(self, limit: int) -> Sequence[Delivery]:
        while not self._stopped:
            now = self._clock.time()
            with self._namespace.lock:
                queue = self._namespace.queue(self._group)
                deliveries = queue.take(self, limit, now, self._lease)
                if deliveries:
                    queue.wake()
                    return deliveries
                queue.waiting[self] = None
                # A lease taken after this look ends after that time at the earliest.
                due = min(queue.next_event(now, self._lease), now + self._lease)
            self._look_at(due)
            self._waiting = self._loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
                with self._namespace.lock:
                    if queue.waiting.pop(self, self) is self:
                        queue.wake()  # it was woken: if it takes nothing, another one must
        return ()

    def metadata(self, delivery: Delivery) -> Metadata:
        envelope = delivery.header
        assert isinstance(envelope, Envelope)
        headers = None if envelope.headers is None else dict(envelope.headers)  # all groups share the envelope
        return Metadata(envelope.id, envelope.key, envelope.published_at, headers)

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        # The number is that of the delivery, not of the message, so a late one finds nothing: `verify` needs no more.
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
                item = queue.held.pop(settlement.delivery.native, None)
                if item is None:
                    outcomes[place] = lease_lost()
                elif settlement.disposition is Disposition.DEAD:
                    queue.bury(item, settlement.reason, settlement.error)
                elif settlement.disposition is Disposition.RELEASE:
                    item.attempts -= 1
                    released.append(item)
                else:
                    queue.put(item.envelope, now + settlement.delay, now, item.attempts)
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
        if self._timer is not None:
            self._timer.cancel()
        self._look()

    async def close(self) -> None:
        with self._namespace.lock:
            queue = self._namespace.queues.get(self._group)
            if queue is not None:
                ours = [number for number, item in queue.held.items() if item.owner is self]
                queue.give_back([queue.held.pop(number) for number in ours])
                queue.wake(everybody=True)

    def _held(self) -> dict[int, Item]:
        """Return the group's items in flight; none if it was deleted underneath."""
        queue = self._namespace.queues.get(self._group)
        return {} if queue is None else queue.held

    def wake(self) -> bool:
        """Wake a waiting `receive`, from any thread; return False if its event loop is closed."""
        try:
            if asyncio.get_running_loop() is self._loop:
                self._look()
                return True
        except RuntimeError:
            pass  # the thread runs no event loop
        try:
            self._loop.call_soon_threadsafe(self._look)
        except RuntimeError:
            return False
        return True

    def _look(self) -> None:
        """Wake a waiting `receive`."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _look_at(self, due: float) -> None:
        """Wake `receive` at that time. An earlier timer stays: looking once too often costs less than another timer."""
        if due < self._timer_due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._timer_due = self._clock.call_at(due, self._on_time), due

    def _on_time(self) -> None:
        self._timer, self._timer_due = None, math.inf
        self._look()


class MemoryTransport:
    """The process's memory as a broker.

    Args:
        settings: Namespace, lease, backlog.
        clock: Measures leases and delays.
    """

    batching: Batching = Batching(messages=250, bytes=1 << 20, max_concurrent=1)
    receiving: Receiving = Receiving()
    settling: Settling = Settling(at_once=True)

    def __init__(self, settings: QueueSettings, clock: Clock) -> None:
        self._namespace = namespace(settings.namespace)
        self._lease = settings.lease
        self._max_backlog = settings.max_backlog
        self._clock = clock

    async def open(self) -> None:
        """Do nothing: there is no connection."""

    async def close(self) -> None:
        """Do nothing: the messages stay with the process."""

    async def ping(self) -> None:
        """Do nothing: the broker is this process."""

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        now = self._clock.time()
        namespace, limit = self._namespace, self._max_backlog
        outcomes: list[AbeError | None] = []
        awaited: dict[Queue, bool] = {}  # whether their receivers' next event may come earlier
        with namespace.lock:
            for envelope in envelopes:
                queues = namespace.routes[envelope.key] if envelope.group is None else self._of(envelope.group)
                if limit is not None and any(queue.backlog >= limit for queue in queues):
                    outcomes.append(group_full())
                    continue
                for queue in queues:
                    queue.put(envelope, now + envelope.delay, now)
                    if queue.waiting:
                        awaited[queue] = envelope.delay > 0 or awaited.get(queue, False)
                outcomes.append(None if queues else self._park(envelope, now))
            for queue, nearer in awaited.items():
                queue.wake(everybody=nearer)
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
            await asyncio.sleep(0)  # other tasks run

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
        """Return all current dead letters, each with its number: they are in memory anyhow."""
        with self._namespace.lock:
            dead = self._namespace.queue(group).dead
            chosen = [item for item in dead.items() if ids is None or item[1][0].id in ids]
        return [chosen[start : start + _PAGE] for start in range(0, len(chosen), _PAGE)]

    def _of(self, group: str) -> list[Queue]:
        queue = self._namespace.queues.get(group)
        return [] if queue is None else [queue]

    def _park(self, envelope: Envelope, now: float) -> UnroutableError | None:
        if self._namespace.queues or envelope.group is not None:
            return unroutable(envelope)
        self._namespace.unclaimed.append((envelope, now + envelope.delay))
        return None


class MemoryBackend(TransportBackend):
    """A message queue inside this process; its messages end with the process.

    Args:
        settings: Namespace, lease, limits.
        codec: Payload to bytes and back. Payloads are encoded here too, so that one that is accepted here is accepted by a broker.
        middleware: Wraps each publish.
        clock: Measures leases and delays; a `ManualClock` in tests.
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
        return MemoryTransport(self.settings, self._clock)


if TYPE_CHECKING:
    _: type[MessageQueueBackend] = MemoryBackend
    __: type[FullBackend] = MemoryBackend
