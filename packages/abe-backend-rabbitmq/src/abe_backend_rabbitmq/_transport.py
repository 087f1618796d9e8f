"""RabbitMQ's transport: the primitives that the engine calls."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from abe.backends.message_queue.base import Batching, DeadLetter, Envelope, GroupStats, Outcomes, Receiving, Settling
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.backends.message_queue.base.routing import group_missing
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import BackendConnectionError
from abe_backend_rabbitmq._broker import Broker
from abe_backend_rabbitmq._dead_letters import DeadLetters
from abe_backend_rabbitmq._errors import ChannelNotFound
from abe_backend_rabbitmq._fan_out import FanOut
from abe_backend_rabbitmq._movers import Movers
from abe_backend_rabbitmq._receiver import RabbitMQReceiver
from abe_backend_rabbitmq._settings import RabbitMQSettings
from abe_backend_rabbitmq._topology import LEVELS


class RabbitMQTransport:
    """Exchanges and quorum queues in one vhost.

    Args:
        settings: The provider's settings.
    """

    batching = Batching(messages=250, bytes=512 * 1024, max_concurrent=4)
    receiving = Receiving()
    settling = Settling()

    def __init__(self, settings: RabbitMQSettings) -> None:
        if settings.max_backlog is not None:
            self.batching = Batching(messages=250, bytes=512 * 1024, max_concurrent=1)
        self._broker = Broker(settings)
        self._fan_out = FanOut(self._broker)
        self._dead_letters = DeadLetters(self._broker)
        self._receivers: set[RabbitMQReceiver] = set()
        self._movers = Movers(self._broker, self._made)

    async def open(self) -> None:
        """Open the publishing connection, and declare what every namespace has."""
        await self._broker.publisher.open()

    async def close(self) -> None:
        """Stop background work, and close the connections."""
        await gather_all(self._broker.registry.close(), self._movers.close())
        await self._broker.close()

    async def ping(self) -> None:
        """Ask the broker for a queue that every namespace has."""
        await self._broker.control.call(
            lambda channel: channel.queue_declare(self._broker.topology.parked, passive=True)
        )

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        """Publish, and wait for the confirms."""
        return await self._fan_out.send(envelopes)

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Register the group, declare its queues and bindings, and move the parked messages that it wants.

        The caller waits for the moving for half of the publish timeout at most; it continues in the background.
        """
        wanted, made = await self._broker.groups.declare(group, patterns, change=change)
        if made:
            moving = self._broker.parked.start()
            await asyncio.wait([moving], timeout=self._broker.settings.publish_timeout / 2)
            if moving.done() and not moving.cancelled():
                moving.result()
        return wanted

    async def restore(self, group: str) -> None:
        """Declare a group again that was deleted underneath, with its last known patterns."""
        await self._broker.groups.restore(group)

    async def delete_group(self, group: str) -> None:
        """Delete the group with its queues and bindings."""
        await self._broker.groups.delete(group)

    async def delete_namespace(self) -> None:
        """Delete the namespace with all its groups."""
        await self._broker.groups.delete_namespace()

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Read the registry."""
        return await self._broker.groups.all()

    async def subscribe(self, group: str, prefetch: int) -> RabbitMQReceiver:
        """Start a consumer."""
        await self._broker.groups.lately()  # `RabbitMQReceiver.made` compares versions
        receiver = RabbitMQReceiver(self._broker, group, prefetch, self._leave)
        try:
            await receiver.start()
        except BackendConnectionError as exc:
            if isinstance(exc.__cause__, ChannelNotFound):
                raise group_missing(group) from exc
            raise
        self._receivers.add(receiver)
        self._movers.join(group)
        return receiver

    async def stats(self, group: str) -> GroupStats:
        """Count the group's messages. AMQP does not tell those that are in flight in other processes."""
        names, count = self._broker.topology, self._broker.control.count
        waiting_now = await count(names.queue(group))
        if waiting_now is None:
            raise group_missing(group)
        delayed = 0
        for level in range(LEVELS):
            waiting = await count(names.waiting(group, level))
            if waiting is None:
                break
            delayed += waiting
        return GroupStats(
            waiting=waiting_now,
            in_flight=sum(receiver.in_flight for receiver in self._receivers if receiver.group == group),
            delayed=delayed + self._movers.in_flight(group),
            dead=await count(names.dead(group)) or 0,
            oldest=None,
        )

    def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        """List the dead letters, a page at a time."""
        return self._dead_letters.pages(group)

    def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Move dead letters back to the group, a page at a time."""
        return self._dead_letters.replay(group, ids)

    def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Remove dead letters, a page at a time."""
        return self._dead_letters.purge(group, ids)

    async def _leave(self, receiver: RabbitMQReceiver) -> None:
        """Remove a receiver that closes. Idempotent."""
        if receiver in self._receivers:
            self._receivers.discard(receiver)
            await self._movers.leave(receiver.group)

    def _made(self, group: str, version: int) -> None:
        """Have receivers that consume a former queue of a group consume again.

        RabbitMQ neither cancels nor serves a consumer whose queue is deleted and at once declared again.
        """
        for receiver in self._receivers:
            if receiver.group == group:
                receiver.made(version)


if TYPE_CHECKING:
    _: type[TransportProtocol] = RabbitMQTransport
