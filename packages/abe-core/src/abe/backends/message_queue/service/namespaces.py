"""The memory backend's namespaces: the broker behind its transport, shared by all threads of the process."""

import heapq
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count
from time import time
from typing import Final, Protocol, TypeAlias

import msgspec

from abe.backends.message_queue.base import DeadLetter, Delivery, Envelope
from abe.backends.message_queue.base.names import EVERYTHING
from abe.backends.message_queue.base.routing import Routes, group_missing, matches_any

Dead: TypeAlias = tuple[DeadLetter, Envelope]


class Waiter(Protocol):
    """A receiver that waits for messages."""

    def wake(self) -> bool:
        """Wake the receiver; called from any thread, with the namespace's lock held. Return False if its event loop is closed."""
        ...


class Item(msgspec.Struct, eq=False):
    """A group's copy of a message. `serial` is its place in the group, to which it returns when it is given back.

    `owner` is the last consumer that took it. It has the item until it settles it, or another one takes it after `deadline`.
    """

    envelope: Envelope
    serial: int
    since: float
    attempts: int = 0
    owner: Waiter | None = None
    deadline: float = 0.0


class Queue:
    """A group's messages. Every method needs the namespace's lock.

    Args:
        patterns: The keys that it wants.
        number: Returns the number of a delivery or dead letter. None is used twice, even if the group is deleted and created again.
    """

    def __init__(self, patterns: tuple[str, ...], number: Callable[[], int]) -> None:
        self.patterns = patterns
        self.ready: deque[Item] = deque()
        self.delayed: list[tuple[float, int, Item]] = []
        self.held: dict[int, Item] = {}
        self.dead: dict[int, Dead] = {}
        self.waiting: dict[Waiter, None] = {}
        self._serial = count().__next__
        self._number = number
        self._next_deadline = math.inf

    @property
    def backlog(self) -> int:
        """How many messages wait, delayed ones included."""
        return len(self.ready) + len(self.delayed)

    def put(self, envelope: Envelope, due: float, now: float, attempts: int = 0) -> None:
        item = Item(envelope, self._serial(), now, attempts)
        if due <= now:
            self.ready.append(item)
        else:
            heapq.heappush(self.delayed, (due, item.serial, item))

    def take(self, receiver: "Waiter", limit: int, now: float, lease: float) -> list[Delivery]:
        if self.delayed:
            self.mature(now)
        items = self._take_expired(receiver, limit, now) if self._next_deadline <= now else []
        items += [self.ready.popleft() for _ in range(min(limit - len(items), len(self.ready)))]
        deliveries: list[Delivery] = []
        deadline = now + lease
        for item in items:
            item.attempts += 1
            item.owner = receiver
            item.deadline = deadline
            number = self._number()
            self.held[number] = item
            envelope = item.envelope
            deliveries.append(Delivery(envelope.body, envelope, item.attempts, number))
        if deliveries and deadline < self._next_deadline:
            self._next_deadline = deadline
        return deliveries

    def _take_expired(self, receiver: "Waiter", limit: int, now: float) -> list[Item]:
        """Take items whose leases ran out from other consumers; the receiver is about to renew its own."""
        expired = sorted(
            (item.serial, number)
            for number, item in self.held.items()
            if item.deadline <= now and item.owner is not receiver
        )
        items = [self.held.pop(number) for _, number in expired[:limit]]
        self._next_deadline = min((item.deadline for item in self.held.values()), default=math.inf)
        return items

    def mature(self, now: float) -> None:
        """Make due messages deliverable."""
        while self.delayed and self.delayed[0][0] <= now:
            item = heapq.heappop(self.delayed)[2]
            item.since = now
            self.ready.append(item)

    def expired(self, now: float) -> list[Item]:
        """Return the items whose leases ran out."""
        return [item for item in self.held.values() if item.deadline <= now]

    def next_event(self, now: float, lease: float) -> float:
        """Return a time at which, or before which, the next message becomes due, or the next lease ends.

        Args:
            now: When the receiver looked.
            lease: Its lease. Where one of its own has ended, which it is about to renew, it is to look again after a tenth of that.
        """
        event = self._next_deadline
        if event <= now:
            running = (item.deadline for item in self.held.values() if item.deadline > now)
            event = min(now + lease / 10, min(running, default=math.inf))
        return min(event, self.delayed[0][0] if self.delayed else math.inf)

    def give_back(self, items: Iterable[Item]) -> None:
        """Put items back where they came from: before everything that was published after them."""
        returned = sorted(items, key=lambda item: item.serial)
        for item in returned:
            item.owner = None  # a reference would keep its event loop alive
        if returned and self.ready and returned[-1].serial > self.ready[0].serial:
            self.ready = deque(sorted([*returned, *self.ready], key=lambda item: item.serial))
        else:
            self.ready.extendleft(reversed(returned))

    def bury(self, item: Item, reason: str, error: str) -> None:
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
        self.dead[self._number()] = letter, envelope

    def take_dead(self, chosen: Iterable[int]) -> list[Envelope]:
        """Take those of these dead letters that are still there."""
        return [self.dead.pop(number)[1] for number in chosen if number in self.dead]

    def wake(self, *, everybody: bool = False) -> None:
        """Wake as many waiting receivers as there are messages; all of them (`everybody`) if their next event may come earlier."""
        wanted = len(self.waiting) if everybody else len(self.ready)
        while self.waiting and wanted:
            receiver = next(iter(self.waiting))
            del self.waiting[receiver]
            wanted -= receiver.wake()


class Namespace:
    """The groups and unclaimed messages of one namespace, for the whole process."""

    def __init__(self) -> None:
        self.lock: threading.RLock = threading.RLock()
        self.queues: dict[str, Queue] = {}
        self.unclaimed: deque[tuple[Envelope, float]] = deque()
        self._number = count().__next__
        self._reroute()

    def _reroute(self) -> None:
        patterns = {group: queue.patterns for group, queue in self.queues.items()}
        self.routes: Routes[list[Queue]] = Routes(patterns, lambda groups: [self.queues[group] for group in groups])
        """The queues that get a key."""

    def declare(
        self, group: str, patterns: tuple[str, ...] | None, now: float, *, change: bool = False
    ) -> tuple[str, ...]:
        queue = self.queues.get(group)
        if queue is None:
            queue = self.queues[group] = Queue(patterns or EVERYTHING, self._number)
        elif patterns is not None and change:
            queue.patterns = patterns
        self._reroute()
        unclaimed, self.unclaimed = self.unclaimed, deque()
        for envelope, due in unclaimed:
            if matches_any(queue.patterns, envelope.key):
                queue.put(envelope, due, now)
            else:
                self.unclaimed.append((envelope, due))
        queue.wake(everybody=True)
        return queue.patterns

    def delete(self, group: str) -> None:
        queue = self.queues.pop(group, None)
        self._reroute()
        if queue is not None:
            for receiver in queue.waiting:
                receiver.wake()

    def clear(self) -> None:
        for group in list(self.queues):
            self.delete(group)
        self.unclaimed.clear()

    def queue(self, group: str) -> Queue:
        """Return the group's queue.

        Raises:
            GroupMissingError: There is no such group.
        """
        queue = self.queues.get(group)
        if queue is None:
            raise group_missing(group)
        return queue


_namespaces: Final[dict[str, Namespace]] = {}
_lock: Final = threading.Lock()


def namespace(name: str) -> Namespace:
    """Return the process's namespace of that name."""
    with _lock:
        return _namespaces.setdefault(name, Namespace())


def forget(name: str) -> None:
    """Drop a namespace with all that it holds."""
    with _lock:
        _namespaces.pop(name, None)
