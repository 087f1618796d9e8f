"""The memory backend: the embedded default, the users' test broker, and the reference implementation of a transport.

What it holds belongs to the process and to a namespace: instances with the same namespace share it, in any event loop and thread. It
passes the same contract as the networked brokers, with leases, attempts, delays and dead letters, on a clock that tests can move.
"""

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
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
from abe.backends.message_queue.base.names import EVERYTHING
from abe.backends.message_queue.base.protocol import FullBackend, MessageQueueBackend
from abe.backends.message_queue.engine import TransportBackend
from abe.backends.message_queue.service.namespaces import Item, Namespace, Queue, namespace
from abe.codec import Codec
from abe.errors import AbeError, BackpressureError, LeaseLostError, UnroutableError
from abe.settings import QueueSettings

_MOST_ROUTES: Final = 10_000


class _MemoryReceiver:
    def __init__(self, namespace: Namespace, group: str, lease: float, clock: Clock) -> None:
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
            released: list[Item] = []
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

    def wake(self) -> bool:
        """Let a waiting `receive` look again, from whatever thread; False when its event loop was closed under it."""
        try:
            self._loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:
            return False
        return True


def _lost() -> LeaseLostError:
    return LeaseLostError("the message is not ours any more: its lease had run out")


class _MemoryTransport:
    batching = Batching(messages=250, bytes=1 << 20, flights=1)

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
            queue = self._namespace.queues.get(group, Queue(EVERYTHING))
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
