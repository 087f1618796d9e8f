"""The primitives: what the engine asks of RabbitMQ."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import Batching, DeadLetter, Envelope, GroupStats, Outcomes, Settling
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.backends.message_queue.base.routing import group_missing
from abe.errors import BackendConnectionError, GroupMissingError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import Link
from abe_backend_rabbitmq._control import Control
from abe_backend_rabbitmq._errors import ChannelNotFound
from abe_backend_rabbitmq._groups import Groups
from abe_backend_rabbitmq._ladder import Ladder, Place
from abe_backend_rabbitmq._letters import DeadLetters
from abe_backend_rabbitmq._losses import Losses
from abe_backend_rabbitmq._mover import Movers
from abe_backend_rabbitmq._outlet import Outlet
from abe_backend_rabbitmq._pace import CONSUMER_TIMEOUT
from abe_backend_rabbitmq._parked import Parked
from abe_backend_rabbitmq._receiver import RabbitMQReceiver
from abe_backend_rabbitmq._registry import RegistryKeeper
from abe_backend_rabbitmq._sender import Sender
from abe_backend_rabbitmq._settings import RabbitMQSettings
from abe_backend_rabbitmq._topology import LEVELS, Topology

_log: Final = logging.getLogger("abe.rabbitmq")


class RabbitMQTransport:
    """Exchanges and quorum queues in one vhost.

    It has a connection to publish, one to consume, and one for what is rare: a broker that is short of memory stops reading from those
    that publish, and acknowledgements and requests must go on.

    Args:
        settings: Where to, and as whom.
    """

    batching = Batching(messages=250, bytes=512 * 1024, max_concurrent=4)
    settling = Settling()

    def __init__(self, settings: RabbitMQSettings) -> None:
        self.settings = settings
        self.topology = Topology(settings.namespace, settings.exchange, settings.max_backlog)
        if settings.max_backlog is not None:
            self.batching = Batching(messages=250, bytes=512 * 1024, max_concurrent=1)
        self.receivers: set[RabbitMQReceiver] = set()
        self.losses = Losses()
        self.consumer_timeout = CONSUMER_TIMEOUT
        """The node's, in seconds, as far as we know."""
        self.control = Control(Link(settings, "abe-control"))
        self.outlet = Outlet(settings, self._prepare)
        self.ladder = Ladder(self.topology, lambda group, level: self._groups.build(group, level))
        timeout = settings.publish_timeout
        self._keeper = RegistryKeeper(self.control, self.topology, timeout, self._writable)
        self._groups = Groups(self.control, self._keeper, self.ladder, self.topology, self._tell)
        self._parked = Parked(self.control, self.outlet, self._keeper, self.ladder, self.topology, timeout)
        self._letters = DeadLetters(self.control, self.outlet, self.topology, timeout)
        self._sender = Sender(settings, self.outlet, self._groups, self.ladder, self.topology, self._prepare)
        self._consuming = Link(settings, "abe-consume")
        self.movers = Movers(
            self.control, self.outlet, self.ladder, self.topology, self.consume_channel, self._groups, self._made
        )

    async def open(self) -> None:
        """Connect to publish, and make what every namespace has."""
        await self.outlet.open()

    async def close(self) -> None:
        """Disconnect."""
        await asyncio.gather(self._keeper.close(), self.movers.close())
        await asyncio.gather(self.outlet.close(), self._consuming.close(), self.control.close())

    async def ping(self) -> None:
        """Ask for a queue that is always there."""
        await self.control.call(lambda channel: channel.queue_declare(self.topology.held, passive=True))

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        """Publish, and wait for the confirms."""
        return await self._sender.send(envelopes)

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Register the group, make its queues and bindings, and move the held messages that it wants.

        Those are moved to the end even if they are so many that the caller does not wait for it.
        """
        wanted, made = await self._groups.declare(group, patterns, change=change)
        if made:
            moving = self._keeper.start(self._parked.hand_over())
            await asyncio.wait([moving], timeout=self.settings.publish_timeout / 2)
            if moving.done() and not moving.cancelled():
                moving.result()
        return wanted

    async def restore(self, group: str) -> None:
        """Make a group again that was deleted underneath, with the patterns that it had when we last knew."""
        await self._groups.restore(group)

    async def delete_group(self, group: str) -> None:
        """Delete what the group has."""
        await self._groups.delete(group)

    async def delete_namespace(self) -> None:
        """Delete what every group has, and what the namespace has."""
        await self._groups.delete_namespace()

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Read the registry."""
        return await self._groups.all()

    async def subscribe(self, group: str, prefetch: int) -> RabbitMQReceiver:
        """Make a consumer."""
        await self._groups.lately()  # whose queue it is that is consumed: see `RabbitMQReceiver.made`
        receiver = RabbitMQReceiver(self, group, prefetch)
        try:
            await receiver.start()
        except BackendConnectionError as exc:
            if isinstance(exc.__cause__, ChannelNotFound):
                raise group_missing(group) from exc
            raise
        self.receivers.add(receiver)
        self.movers.join(group)
        return receiver

    async def consume_channel(self) -> Channel:
        """Open a channel on the connection to consume."""
        return await (await self._consuming.get()).channel()

    async def stats(self, group: str) -> GroupStats:
        """Count. What consumers of other processes hold, AMQP does not tell."""
        names, count = self.topology, self.control.count
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
            in_flight=sum(receiver.holding for receiver in self.receivers if receiver.group == group),
            delayed=delayed + self.movers.held(group),
            dead=await count(names.dead(group)) or 0,
            oldest=None,
        )

    def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        """Look at all of them, a page at a time."""
        return self._letters.pages(group)

    def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Move them, a page at a time."""
        return self._letters.replay(group, ids)

    def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Remove them, a page at a time."""
        return self._letters.purge(group, ids)

    async def place(self, group: str, delay: float) -> Place:
        """Return where a message waits; a group that was deleted underneath is made again."""
        try:
            return await self.ladder.place(group, delay)
        except GroupMissingError:
            await self._groups.restore(group)
            return await self.ladder.place(group, delay)

    @property
    def version(self) -> int:
        """The newest version of the registry that was seen."""
        return self._groups.version

    async def look(self) -> None:
        """Read the registry."""
        await self._groups.now()

    def look_at_held(self) -> None:
        """Hand out held messages, in a while."""
        self._parked.look()

    async def _tell(self, news: str) -> None:
        """Tell everybody who consumes; nobody needs to listen."""
        await self.outlet.move([Outgoing(self.topology.news, "", _wire.NEWS, news.encode(), "")])

    async def _writable(self) -> None:
        """Find out whether the broker takes messages. (One without a body is taken even while it does not.)

        Raises:
            BlockedError: It is short of memory or disk.
        """
        await self._tell("writing")

    def _made(self, group: str, version: int) -> None:
        """Have those begin anew who have consumed a group's queue since before it was made.

        A consumer of a queue that is deleted and at once made again is neither cancelled nor served by RabbitMQ.
        """
        for receiver in self.receivers:
            if receiver.group == group:
                receiver.made(version)

    async def _prepare(self) -> None:
        await self._groups.prepare(await self.control.connection())


if TYPE_CHECKING:
    _: type[TransportProtocol] = RabbitMQTransport
