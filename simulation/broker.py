"""The broker of a simulated world: the memory transport's namespace, in a process of its own, which keeps the books."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from abe.backends.message_queue.base import Delivery, Disposition, Envelope, Settlement
from abe.backends.message_queue.base.transport import Outcomes
from abe.backends.message_queue.service import namespaces
from abe.backends.message_queue.service.namespaces import Item, Namespace
from abe.settings import QueueSettings
from abe.testing.simulation.world import Host, World
from simulation.history import Delivery as Recorded
from simulation.history import History, Message


def number_of(envelope: Envelope) -> int:
    """Return the number of a message of the load."""
    return int(envelope.id.removeprefix("m"))


class Broker:
    """What the namespace is to a world.

    Args:
        world: Where it is.
        history: Where it keeps the books.
        settings: Those of all backends.
    """

    def __init__(self, world: World, history: History, settings: QueueSettings) -> None:
        self.world = world
        self.host: Host = world.host("broker")
        self.history = history
        self.namespace: Namespace = namespaces.namespace(settings.namespace)
        self.max_attempts: int = settings.max_attempts
        self.limits: dict[object, tuple[int, str, int]] = {}
        """The number, the host and the prefetch of each receiver."""
        self.uncertain: dict[tuple[str, int], int] = {}
        """How many deliveries of a message to a group may have been no more than a lost connection."""
        self.alone: dict[tuple[str, int], int] = {}
        """How often a message of a group was handled with nothing else in hand, of those that were given back for that."""

    def time(self) -> float:
        """Return the broker's time in seconds: the world's."""
        return self.world.now

    def call_at(self, when: float, callback: Callable[[], object]) -> Any:
        """Call `callback` in the event loop that runs now, once the broker's time is `when`."""
        host = self.world.running
        assert host is not None
        return host.loop.call_later(max(0.0, when - self.world.now), callback)

    def joined(self, receiver: object, host: str, prefetch: int) -> None:
        """Take note of a receiver."""
        self.limits[receiver] = len(self.limits) + 1, host, prefetch

    def give_back(self, group: str, receiver: object, unseen: Collection[int], keep: Collection[int] | None) -> None:
        """Make deliverable again what a receiver holds and does not know of.

        Args:
            group: Its group.
            receiver: The receiver.
            unseen: The deliveries whose answers it never got.
            keep: Those that it keeps over a new connection, where there are no leases; None: all but the unseen.
        """
        queue = self.namespace.queues.get(group)
        if queue is None:
            return
        lost = [
            number
            for number, item in queue.held.items()
            if item.owner is receiver and (number in unseen if keep is None else number not in keep)
        ]
        for number in lost:
            queue.held[number].attempts -= 1
            delivery = self.history.deliveries[number]
            if delivery.begun is not None and not delivery.done:
                self.history.violated(f"delivery {number} is taken back by a receiver that recovers, and it is in hand")
            self.ended(number, "recovered")
        queue.give_back([queue.held.pop(number) for number in lost])
        queue.wake(everybody=True)

    def lost(self, group: str, receiver: object) -> None:
        """Make deliverable again what a receiver holds, as its connection is lost; that counts as a delivery."""
        queue = self.namespace.queues.get(group)
        if queue is None:
            return
        lost = [number for number, item in queue.held.items() if item.owner is receiver]
        for number in lost:
            name = group, id(queue.held[number].envelope)
            self.uncertain[name] = self.uncertain.get(name, 0) + 1
            if name in self.alone and self.limits[receiver][2] == 1:
                self.alone[name] += 1
            self.ended(number, "lost")
        queue.give_back([queue.held.pop(number) for number in lost])
        queue.wake(everybody=True)

    def left(self, group: str, receiver: object) -> None:
        """Take note of what a receiver still holds, as it leaves."""
        queue = self.namespace.queues.get(group)
        if queue is not None:
            for number, item in queue.held.items():
                if item.owner is receiver:
                    self.ended(number, "closed")

    def items(self, group: str, settlements: Iterable[Settlement]) -> list[Item | None]:
        """Return what these settlements are about, as far as it is held."""
        queue = self.namespace.queues.get(group)
        return [None if queue is None else queue.held.get(each.delivery.native) for each in settlements]

    def group_gone(self, group: str) -> None:
        """Take note that a group was deleted, with all that was in it."""
        self.history.note("broker", "deleted", group)
        self.history.deleted[group].append(self.world.now)
        for number, delivery in self.history.deliveries.items():
            if delivery.group == group and not delivery.ended:
                self.ended(number, "deleted")

    def strange(self, message: Message) -> None:
        """Store a message that no codec can decode, as another program may."""
        message.told.append("confirmed")
        message.strange = True
        envelope = Envelope(f"m{message.number}", message.key, b"\xff{", 0)
        with self.namespace.lock:
            for queue in self.namespace.routes[message.key]:
                message.wanted_by.add(self.named(queue))
                queue.put(envelope, self.world.now, self.world.now)
                queue.wake()

    def named(self, queue: namespaces.Queue) -> str:
        """Return the name of the group of a queue; empty, where it was deleted."""
        return next((name for name, each in self.namespace.queues.items() if each is queue), "")

    def ended(self, number: int, how: str) -> None:
        """Take note of how a delivery ended."""
        delivery = self.history.deliveries[number]
        if delivery.ended:
            self.history.violated(f"delivery {number} ended as {delivery.ended}, and again as {how}")
        delivery.ended, delivery.ended_at = how, self.world.now
        if how == "acked" and delivery.message.strange:
            self.history.violated(f"delivery {number} cannot be decoded, and is acknowledged")
        if how not in ("acked", "released", "closed"):
            self.history.note(
                "broker", how, f"m{delivery.message.number} {delivery.group} #{number} from {delivery.host}"
            )

    def acked(self, deliveries: Iterable[Delivery], outcomes: Outcomes) -> None:
        """Take note of acknowledgements that were carried out."""
        for delivery, error in zip(deliveries, outcomes, strict=True):
            if error is None:
                self.ended(delivery.native, "acked")

    def settled(
        self, group: str, settlements: Iterable[Settlement], items: Iterable[Item | None], outcomes: Outcomes
    ) -> None:
        """Take note of settlements that were carried out."""
        for settlement, item, error in zip(settlements, items, outcomes, strict=True):
            if error is None:
                if item is not None:
                    self._counted(settlement, item, (group, id(item.envelope)))
                self.ended(settlement.delivery.native, _ENDS[settlement.disposition.value])
                self._check_attempts(self.history.deliveries[settlement.delivery.native])

    def _counted(self, settlement: Settlement, item: Item, name: tuple[str, int]) -> None:
        """Take note of what a settlement says of attempts that are uncertain."""
        if settlement.alone:
            self.alone[name] = 0
        elif settlement.disposition is Disposition.RETRY:
            item.attempts -= settlement.delivery.uncertain
            self.uncertain.pop(name, None)
            self.alone.pop(name, None)
        elif settlement.disposition is Disposition.RETURN:
            self.uncertain[name] = self.uncertain.get(name, 0) + 1

    def _check_attempts(self, delivery: Recorded) -> None:
        """See to it that a handler's message is dead after its last attempt, and not before."""
        if delivery.begun is None or self.history.troubled(delivery.host, delivery.at, self.world.now):
            return  # the count is the broker's, or the settlement was given up
        last = delivery.attempt - delivery.original.uncertain >= self.max_attempts
        if delivery.ended == "buried" and not last and "reject" not in delivery.done:
            self.history.violated(
                f"m{delivery.message.number} is dead after {delivery.attempt} attempts of {self.max_attempts}"
            )
        if delivery.ended == "retried" and last:
            self.history.violated(
                f"m{delivery.message.number} is retried after attempt {delivery.attempt} of {self.max_attempts}"
            )

    def queue_type(self) -> type[namespaces.Queue]:
        """Return the class of its queues."""
        broker = self

        class RecordedQueue(namespaces.Queue):
            """A queue that keeps the books."""

            def put(self, envelope: Envelope, due: float, now: float, attempts: int = 0) -> None:
                super().put(envelope, due, now, attempts)
                if not attempts:
                    message = broker.history.messages[number_of(envelope)]
                    group = broker.named(self)
                    message.stored[group] += 1
                    if due <= now:
                        broker.history.order[group].append(message.number)

            def take(self, receiver: Any, limit: int, now: float, lease: float) -> list[Delivery]:
                before = set(self.held)
                deliveries = super().take(receiver, limit, now, lease)
                for number in sorted(before - set(self.held)):
                    broker.ended(number, "expired")
                broker.taken(self, receiver, deliveries)
                return deliveries

            def bury(self, item: Item, reason: str, error: str) -> None:
                super().bury(item, reason, error)
                number = number_of(item.envelope)
                broker.history.note("broker", "bury", f"m{number} attempts={item.attempts} {reason}")
                if reason == "max_attempts" and item.attempts < broker.max_attempts:
                    broker.history.violated(
                        f"m{number} is dead after {item.attempts} attempts of {broker.max_attempts}"
                    )

        return RecordedQueue

    def taken(self, queue: namespaces.Queue, receiver: object, deliveries: Iterable[Delivery]) -> None:
        """Take note of deliveries."""
        identity, host, prefetch = self.limits[receiver]
        group = self.named(queue)
        for delivery in deliveries:
            assert isinstance(delivery.header, Envelope)
            message = self.history.messages[number_of(delivery.header)]
            number = delivery.native
            delivery.uncertain = self.uncertain.get((group, id(delivery.header)), 0)
            delivery.alone = self.alone.get((group, id(delivery.header))) if prefetch == 1 else None
            self.history.deliveries[number] = Recorded(
                number, message, group, host, identity, delivery.attempt, self.world.now, delivery
            )
            facts = f"m{message.number} {group} #{number} attempt={delivery.attempt} to {host}/{identity}"
            self.history.note("broker", "deliver", facts)
        known = self.history.deliveries
        held = sum(
            item.owner is receiver and item.deadline > self.world.now and not known[number].original.lost
            for number, item in queue.held.items()
        )
        if held > prefetch and not self.history.buggy[host]:  # what a provider's bug left is out of the engine's sight
            self.history.violated(
                f"receiver {identity} of {host} has {held} messages in flight, and its bound is {prefetch}"
            )


_ENDS = {"retry": "retried", "release": "released", "dead": "buried", "return": "returned"}
