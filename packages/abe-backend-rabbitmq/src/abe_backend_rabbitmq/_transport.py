"""The primitives: what the engine asks of RabbitMQ."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import Batching, DeadLetter, Envelope, GroupStats
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.errors import AbeError, BackendConnectionError, PublishUnknownError, UnroutableError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import Link
from abe_backend_rabbitmq._control import Control
from abe_backend_rabbitmq._errors import ChannelNotFound
from abe_backend_rabbitmq._groups import Groups
from abe_backend_rabbitmq._ladder import Ladder
from abe_backend_rabbitmq._letters import DeadLetters, missing
from abe_backend_rabbitmq._losses import Losses
from abe_backend_rabbitmq._outlet import Outlet
from abe_backend_rabbitmq._pace import CONSUMER_TIMEOUT
from abe_backend_rabbitmq._parked import Parked
from abe_backend_rabbitmq._receiver import RabbitMQReceiver
from abe_backend_rabbitmq._registry import Registry, RegistryKeeper
from abe_backend_rabbitmq._settings import RabbitMQSettings
from abe_backend_rabbitmq._topology import LEVELS, Topology

_log: Final = logging.getLogger("abe.rabbitmq")
_STALE: Final = 20
"""Times that the groups may change under one batch before it counts as failed."""


class RabbitMQTransport:
    """Exchanges and quorum queues in one vhost.

    It has a connection to publish, one to consume, and one for what is rare: a broker that is short of memory stops reading from those
    that publish, and acknowledgements and requests must go on.

    Args:
        settings: Where to, and as whom.
    """

    batching = Batching(messages=250, bytes=512 * 1024, flights=4)

    def __init__(self, settings: RabbitMQSettings) -> None:
        self.settings = settings
        self.topology = Topology(settings.namespace, settings.exchange, settings.max_backlog)
        if settings.max_backlog is not None:
            self.batching = Batching(messages=250, bytes=512 * 1024, flights=1)
        self.receivers: set[RabbitMQReceiver] = set()
        self.losses = Losses()
        self.consumer_timeout = CONSUMER_TIMEOUT
        """The node's, in seconds, as far as we know."""
        self.control = Control(Link(settings, "abe-control"))
        self.outlet = Outlet(settings, self._prepare)
        self.ladder = Ladder(self.control, self.topology)
        timeout = settings.publish_timeout
        self._keeper = RegistryKeeper(self.control, self.topology, timeout)
        self._groups = Groups(self.control, self._keeper, self.ladder, self.topology)
        self._parked = Parked(self.control, self.outlet, self._keeper, self.ladder, self.topology, timeout)
        self._letters = DeadLetters(self.control, self.outlet, self.topology, timeout)
        self._consuming = Link(settings, "abe-consume")

    async def open(self) -> None:
        """Connect to publish, and make what every namespace has."""
        await self.outlet.open()

    async def close(self) -> None:
        """Disconnect."""
        await self._keeper.close()
        await asyncio.gather(self.outlet.close(), self._consuming.close(), self.control.close())

    async def ping(self) -> None:
        """Ask for a queue that is always there."""
        await self.control.call(lambda channel: channel.queue_declare(self.topology.held, passive=True))

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Publish, and wait for the confirms."""
        if any(envelope.delay for envelope in envelopes):
            return await self._send_some_later(envelopes)
        return await self.outlet.publish([self._outgoing(envelope) for envelope in envelopes])

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
        receiver = RabbitMQReceiver(self, group, prefetch)
        try:
            await receiver.start()
        except BackendConnectionError as exc:
            if isinstance(exc.__cause__, ChannelNotFound):
                raise missing(group) from exc
            raise
        self.receivers.add(receiver)
        return receiver

    async def consume_channel(self) -> Channel:
        """Open a channel on the connection to consume."""
        return await (await self._consuming.get()).channel()

    async def stats(self, group: str) -> GroupStats:
        """Count. What consumers of other processes hold, AMQP does not tell."""
        names, count = self.topology, self.control.count
        waiting_now = await count(names.queue(group))
        if waiting_now is None:
            raise missing(group)
        delayed = 0
        for level in range(LEVELS):
            waiting = await count(names.waiting(group, level))
            if waiting is None:
                break
            delayed += waiting
        return GroupStats(
            waiting=waiting_now,
            in_flight=sum(receiver.holding for receiver in self.receivers if receiver.group == group),
            delayed=delayed,
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

    def look_at_held(self) -> None:
        """Hand out held messages, in a while."""
        self._parked.look()

    async def _prepare(self) -> None:
        await self._groups.prepare(await self.control.connection())

    def _outgoing(self, envelope: Envelope) -> Outgoing:
        if envelope.group is None:
            return Outgoing(self.topology.exchange, envelope.key, _wire.pack(envelope), envelope.body, envelope.id)
        properties = _wire.pack(envelope, ("abe-key", envelope.key))
        return Outgoing("", self.topology.queue(envelope.group), properties, envelope.body, envelope.id)

    async def _send_some_later(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Publish when some have a delay: of those, a copy to each group that wants it, as the groups are now."""
        outcomes: list[AbeError | None] = [None] * len(envelopes)
        copies = {(i, ""): self._outgoing(each) for i, each in enumerate(envelopes) if not each.delay}
        waiting = {i for i, each in enumerate(envelopes) if each.delay}
        done: set[tuple[int, str]] = set()
        failure: AbeError = BackendConnectionError("the groups change faster than delayed messages can be published")
        mended = published = False
        for _ in range(_STALE):
            try:
                registry = await self._groups.known()
                for i in waiting:
                    try:
                        later = await self._later(registry, envelopes[i])
                        copies |= {(i, group): copy for group, copy in later if (i, group) not in done}
                    except UnroutableError as exc:
                        outcomes[i] = exc
                results = await self.outlet.publish(list(copies.values())) if copies else ()
                published = True
            except AbeError as exc:
                if isinstance(exc.__cause__, ChannelNotFound) and not mended:
                    mended = True  # an exchange of the ladder was deleted
                    await self._prepare()
                    continue
                if not published:
                    raise
                failure = exc
                break
            waiting = set[int]()
            for place, (i, group) in enumerate(copies):
                result = results[place] if results else None
                if isinstance(result, UnroutableError) and envelopes[i].delay:
                    waiting.add(i)
                elif result is None:
                    done.add((i, group))
                else:
                    outcomes[i] = result
            if not waiting:
                return outcomes if any(outcomes) else ()
            copies = {}
            self._groups.forget()
        halfway = {i for i, _ in done}
        for i in waiting:
            outcomes[i] = PublishUnknownError(f"some groups have it, not all: {failure}") if i in halfway else failure
        return outcomes

    async def _later(self, registry: Registry, envelope: Envelope) -> Sequence[tuple[str, Outgoing]]:
        id, key, body, _, _, delay, group = envelope
        later = self.topology.later
        if group is not None and group not in registry.groups:
            raise UnroutableError(f"there is no group {group!r}")
        if not registry.groups:
            due = int((time.time() + delay) * 1000) + 1
            properties = _wire.pack(envelope, ("abe-key", key), ("abe-due", due))
            return [("", Outgoing(later, f"{registry.version}.held", properties, body, id))]
        groups = registry.wanting(key) if group is None else [group]
        if not groups:
            raise UnroutableError(f"no group wants the key {key!r}")
        properties = _wire.pack(envelope, ("abe-key", key))
        words = {group: await self.ladder.digits(group, delay) for group in groups}
        return [
            (group, Outgoing(later, f"{registry.version}.{words[group]}", properties, body, id)) for group in groups
        ]


if TYPE_CHECKING:
    _: type[TransportProtocol] = RabbitMQTransport
