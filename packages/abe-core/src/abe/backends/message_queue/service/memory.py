"""The memory backend: the embedded default, the users' test broker, and the reference implementation of a transport.

What it holds belongs to the process and to a namespace: instances with the same namespace share it, in any event loop and thread. It
passes the same contract as the networked brokers, with leases, attempts, delays and dead letters, on a clock that tests can move.
"""

import asyncio
import heapq
import math
import threading
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from time import time
from typing import TYPE_CHECKING, Final, Self

from abe.backends.message_queue.base import (
    Batching,
    Capabilities,
    Clock,
    DeadLetter,
    Delivery,
    Durability,
    Envelope,
    Failures,
    GroupStats,
    Metadata,
    Middleware,
    Receipt,
    Settlement,
    Transport,
    Verb,
)
from abe.backends.message_queue.base.names import EVERYTHING, matches
from abe.backends.message_queue.base.protocol import FullBackend, MessageQueueBackend
from abe.backends.message_queue.engine import TransportBackend
from abe.codec import Codec
from abe.errors import AbeError, BackpressureError, LeaseLostError, UnroutableError
from abe.settings import QueueSettings

_MOST_ROUTES: Final = 10_000


@dataclass(slots=True, eq=False)
class _Item:
    """A group's copy of a message. `serial` is its place in the group: what was given back goes where it came from."""

    envelope: Envelope
    serial: int
    since: float
    attempts: int = 0


@dataclass(slots=True, eq=False)
class _Held:
    """An item that a consumer holds until it settles it, or the deadline passes."""

    item: _Item
    owner: "_MemoryReceiver"
    deadline: float


class _Queue:
    """A group's messages. Every method needs the namespace's lock."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self.patterns = patterns
        self.ready: deque[_Item] = deque()
        self.delayed: list[tuple[float, int, _Item]] = []
        self.held: dict[Receipt, _Held] = {}
        self.dead: list[tuple[DeadLetter, Envelope]] = []
        self.waiting: dict[_MemoryReceiver, None] = {}
        self._serial = count().__next__
        self._receipt = count().__next__
        self._next_deadline = math.inf

    def put(self, envelope: Envelope, due: float, now: float, attempts: int = 0) -> None:
        item = _Item(envelope, self._serial(), now, attempts)
        if due > now:
            heapq.heappush(self.delayed, (due, item.serial, item))
        else:
            self.ready.append(item)

    def take(self, receiver: "_MemoryReceiver", limit: int, now: float, lease: float) -> list[Delivery]:
        self.mature(now)
        deliveries: list[Delivery] = []
        deadline = now + lease
        while self.ready and len(deliveries) < limit:
            item = self.ready.popleft()
            item.attempts += 1
            receipt = self._receipt()
            self.held[receipt] = _Held(item, receiver, deadline)
            deliveries.append(Delivery(receipt, item.envelope.body, item.envelope, item.attempts))
        if deliveries:
            self._next_deadline = min(self._next_deadline, deadline)
        return deliveries

    def mature(self, now: float) -> None:
        """Make deliverable what is due, and what its consumer kept for too long."""
        while self.delayed and self.delayed[0][0] <= now:
            item = heapq.heappop(self.delayed)[2]
            item.since = now
            self.ready.append(item)
        if self._next_deadline <= now:
            expired = [receipt for receipt, held in self.held.items() if held.deadline <= now]
            self.give_back([self.held.pop(receipt).item for receipt in expired])
            self._next_deadline = min((held.deadline for held in self.held.values()), default=math.inf)

    def next_event(self) -> float:
        """When `mature` will have something to do; never later than that."""
        return min(self._next_deadline, self.delayed[0][0] if self.delayed else math.inf)

    def give_back(self, items: Iterable[_Item]) -> None:
        """Put items back where they came from: before everything that was published after them."""
        returned = sorted(items, key=lambda item: item.serial)
        if returned and self.ready and returned[-1].serial > self.ready[0].serial:
            self.ready = deque(sorted([*returned, *self.ready], key=lambda item: item.serial))
        else:
            self.ready.extendleft(reversed(returned))

    def bury(self, item: _Item, reason: str, error: str) -> None:
        envelope = item.envelope
        letter = DeadLetter(
            id=envelope.id,
            key=envelope.key,
            body=envelope.body,
            headers=envelope.headers or {},
            attempts=item.attempts,
            reason=reason,
            error=error,
            published_at=envelope.published_at / 1000,
            dead_at=time(),
        )
        self.dead.append((letter, envelope))

    def wake(self, *, everybody: bool = False) -> None:
        """Let as many waiting receivers look as there are messages; everybody, when what they wait for may have come nearer."""
        for receiver in list(self.waiting) if everybody else list(self.waiting)[: len(self.ready)]:
            del self.waiting[receiver]
            receiver.wake()


class _Namespace:
    """What one namespace holds, for the whole process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.queues: dict[str, _Queue] = {}
        self.unclaimed: deque[tuple[Envelope, float]] = deque()
        self._routes: dict[str, list[_Queue]] = {}

    def route(self, key: str) -> list[_Queue]:
        queues = self._routes.get(key)
        if queues is None:
            if len(self._routes) >= _MOST_ROUTES:
                self._routes.clear()
            queues = self._routes[key] = [
                queue for queue in self.queues.values() if any(matches(pattern, key) for pattern in queue.patterns)
            ]
        return queues

    def declare(self, group: str, patterns: tuple[str, ...] | None, now: float) -> None:
        queue = self.queues.get(group)
        if queue is None:
            queue = self.queues[group] = _Queue(patterns or EVERYTHING)
        elif patterns is not None:
            queue.patterns = patterns
        self._routes.clear()
        unclaimed, self.unclaimed = self.unclaimed, deque()
        for envelope, due in unclaimed:
            if any(matches(pattern, envelope.key) for pattern in queue.patterns):
                queue.put(envelope, due, now)
            else:
                self.unclaimed.append((envelope, due))
        queue.wake()

    def delete(self, group: str) -> None:
        queue = self.queues.pop(group, None)
        self._routes.clear()
        if queue is not None:
            for receiver in queue.waiting:
                receiver.wake()

    def queue(self, group: str, now: float) -> _Queue:
        """Return the group's queue; one that was deleted is made again."""
        if group not in self.queues:
            self.declare(group, None, now)
        return self.queues[group]


_namespaces: Final[dict[str, _Namespace]] = {}
_namespaces_lock: Final = threading.Lock()


class _MemoryReceiver:
    def __init__(self, namespace: _Namespace, group: str, lease: float, clock: Clock) -> None:
        self._namespace = namespace
        self._group = group
        self._lease = lease
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._stopped = False

    async def receive(self, limit: int) -> Sequence[Delivery]:
        while not self._stopped:
            self._woken.clear()
            with self._namespace.lock:
                queue = self._namespace.queue(self._group, self._clock.time())
                deliveries = queue.take(self, limit, self._clock.time(), self._lease)
                if deliveries:
                    queue.wake()
                    return deliveries
                queue.waiting[self] = None
                due = queue.next_event()
            timer = None if due == math.inf else self._clock.call_at(due, self._woken.set)
            try:
                await self._woken.wait()
            finally:
                if timer is not None:
                    timer.cancel()
                with self._namespace.lock:
                    if queue.waiting.pop(self, self) is self:
                        queue.wake()  # we were chosen; if we do not take it, another one must
        return ()

    def metadata(self, delivery: Delivery) -> Metadata:
        envelope = delivery.header
        assert isinstance(envelope, Envelope)
        return Metadata(envelope.id, envelope.key, envelope.published_at, envelope.headers)

    async def ack(self, receipts: Sequence[Receipt], *, verify: bool) -> Failures:
        # A receipt names a delivery, not a message, so that a late one finds nothing: there is no need to verify more.
        with self._namespace.lock:
            held = self._namespace.queue(self._group, self._clock.time()).held
            return {receipt: _lost() for receipt in receipts if held.pop(receipt, None) is None}

    async def settle(self, settlements: Sequence[Settlement]) -> Failures:
        failures: dict[Receipt, AbeError] = {}
        now = self._clock.time()
        with self._namespace.lock:
            queue = self._namespace.queue(self._group, now)
            released: list[_Item] = []
            for settlement in settlements:
                held = queue.held.pop(settlement.receipt, None)
                if held is None:
                    failures[settlement.receipt] = _lost()
                elif settlement.verb is Verb.DEAD:
                    queue.bury(held.item, settlement.reason, settlement.error)
                elif settlement.verb is Verb.RELEASE:
                    held.item.attempts -= 1
                    released.append(held.item)
                else:
                    queue.put(held.item.envelope, now + settlement.delay, now, held.item.attempts)
            queue.give_back(released)
            queue.wake(everybody=True)
        return failures

    async def renew(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        with self._namespace.lock:
            held = self._namespace.queue(self._group, self._clock.time()).held
            deadline = self._clock.time() + self._lease
            for receipt in receipts:
                if receipt in held:
                    held[receipt].deadline = deadline
            return [receipt for receipt in receipts if receipt not in held]

    async def recover(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        return await self.renew(receipts)

    async def stop(self) -> None:
        self._stopped = True
        self._woken.set()

    async def close(self) -> None:
        with self._namespace.lock:
            queue = self._namespace.queues.get(self._group)
            if queue is not None:
                ours = [receipt for receipt, held in queue.held.items() if held.owner is self]
                queue.give_back([queue.held.pop(receipt).item for receipt in ours])
                queue.wake(everybody=True)

    def wake(self) -> None:
        """Let a waiting `receive` look again, from whatever thread."""
        try:
            self._loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:
            self._stopped = True  # our event loop was closed under us: nobody waits any more


def _lost() -> LeaseLostError:
    return LeaseLostError("the message is not ours any more: its lease had run out")


class _MemoryTransport:
    batching = Batching(messages=250, bytes=1 << 20, flights=1)

    def __init__(self, settings: QueueSettings, clock: Clock) -> None:
        with _namespaces_lock:
            self._namespace = _namespaces.setdefault(settings.namespace, _Namespace())
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
            touched: dict[_Queue, None] = {}
            for envelope in envelopes:
                queues = self._namespace.route(envelope.key)
                if any(self._full(queue) for queue in queues):
                    outcomes.append(
                        BackpressureError(f"a group has {self._max_backlog} messages waiting already (max_backlog)")
                    )
                    continue
                for queue in queues:
                    queue.put(envelope, now + envelope.delay, now)
                    touched[queue] = None
                if not self._namespace.queues:
                    self._namespace.unclaimed.append((envelope, now + envelope.delay))
                no_route = self._namespace.queues and not queues
                outcomes.append(UnroutableError(f"no group wants the key {envelope.key!r}") if no_route else None)
            delayed = any(envelope.delay for envelope in envelopes)
            for queue in touched:
                queue.wake(everybody=delayed)
        return outcomes

    async def declare(self, group: str, patterns: tuple[str, ...] | None) -> None:
        with self._namespace.lock:
            self._namespace.declare(group, patterns, self._clock.time())

    async def delete_group(self, group: str) -> None:
        with self._namespace.lock:
            self._namespace.delete(group)

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        with self._namespace.lock:
            return {group: queue.patterns for group, queue in self._namespace.queues.items()}

    async def subscribe(self, group: str, prefetch: int) -> _MemoryReceiver:
        return _MemoryReceiver(self._namespace, group, self._lease, self._clock)

    async def stats(self, group: str) -> GroupStats:
        now = self._clock.time()
        with self._namespace.lock:
            queue = self._namespace.queues.get(group, _Queue(EVERYTHING))
            queue.mature(now)
            return GroupStats(
                waiting=len(queue.ready),
                in_flight=len(queue.held),
                delayed=len(queue.delayed),
                dead=len(queue.dead),
                oldest=now - queue.ready[0].since if queue.ready else None,
            )

    async def dead_letters(self, group: str, limit: int) -> Sequence[DeadLetter]:
        with self._namespace.lock:
            return [letter for letter, _ in self._dead(group)[:limit]]

    async def find_dead_letter(self, group: str, id: str) -> DeadLetter | None:
        with self._namespace.lock:
            return next((letter for letter, _ in self._dead(group) if letter.id == id), None)

    async def replay(self, group: str, ids: Collection[str] | None) -> int:
        now = self._clock.time()
        with self._namespace.lock:
            chosen = self._take_dead(group, ids)
            for envelope in chosen:
                self._namespace.queues[group].put(envelope, now, now)
            if chosen:
                self._namespace.queues[group].wake()
            return len(chosen)

    async def purge(self, group: str, ids: Collection[str] | None) -> int:
        with self._namespace.lock:
            return len(self._take_dead(group, ids))

    def _dead(self, group: str) -> list[tuple[DeadLetter, Envelope]]:
        return self._namespace.queues[group].dead if group in self._namespace.queues else []

    def _take_dead(self, group: str, ids: Collection[str] | None) -> list[Envelope]:
        dead = self._dead(group)
        chosen = [envelope for letter, envelope in dead if ids is None or letter.id in ids]
        dead[:] = [entry for entry in dead if ids is not None and entry[0].id not in ids]
        return chosen

    def _full(self, queue: _Queue) -> bool:
        return self._max_backlog is not None and len(queue.ready) + len(queue.delayed) >= self._max_backlog


class MemoryBackend(TransportBackend):
    """A message queue inside this process; what it holds ends with the process.

    Args:
        settings: Namespace, lease, limits.
        codec: Payload to bytes and back. Payloads are encoded here too, so that what passes here passes on a broker.
        middleware: Wraps each publish.
        clock: What leases and delays are measured by; give a `ManualClock` to move it in tests.
    """

    capabilities = Capabilities(
        groups=True,
        key_patterns=True,
        ordered=True,
        ordered_per_key=False,
        spurious_duplicates=False,
        dead_letter=True,
        max_delay=math.inf,
        lease=30.0,
        redelivery_bound=0.5,
        publish_dedup=None,
        max_payload_bytes=16 * 1024 * 1024,
        durability=Durability.NONE,
    )

    def __init__(
        self,
        settings: QueueSettings | None = None,
        *,
        codec: Codec | None = None,
        middleware: Sequence[Middleware] = (),
        clock: Clock | None = None,
    ) -> None:
        super().__init__(settings or QueueSettings(), codec=codec, middleware=middleware, clock=clock)

    @classmethod
    def from_env(cls) -> Self:
        """Make an instance from the ``QUEUE_*`` variables."""
        return cls(QueueSettings.from_env())

    def make_transport(self) -> Transport:
        """Return a transport to this process's memory."""
        return _MemoryTransport(self.settings, self._clock)


if TYPE_CHECKING:
    _: type[MessageQueueBackend] = MemoryBackend
    __: type[FullBackend] = MemoryBackend
