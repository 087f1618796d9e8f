"""The primitives: what the engine asks of RabbitMQ."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import Batching, DeadLetter, Envelope, GroupStats
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.backends.message_queue.base.names import EVERYTHING
from abe.errors import AbeError, BackendConnectionError, PublishUnknownError, UnroutableError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._browser import Browser, Found
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import Connection, Link
from abe_backend_rabbitmq._errors import ChannelNotFound
from abe_backend_rabbitmq._groups import Groups
from abe_backend_rabbitmq._ladder import Ladder
from abe_backend_rabbitmq._outlet import Outlet, moved
from abe_backend_rabbitmq._receiver import RabbitMQReceiver
from abe_backend_rabbitmq._registry import Registry, RegistryKeeper
from abe_backend_rabbitmq._settings import RabbitMQSettings
from abe_backend_rabbitmq._topology import LEVELS, Topology
from abe_backend_rabbitmq._wire import Header

_log: Final = logging.getLogger("abe.rabbitmq")
_STALE: Final = 20
"""Times that the groups may change under one batch before it counts as failed."""


class RabbitMQTransport:
    """Exchanges and quorum queues in one vhost.

    It has two connections, one to publish and one to consume: a broker that is short of memory stops reading from those that publish, and
    acknowledgements must go on.

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
        self.outlet = Outlet(settings, lambda connection: self._groups.prepare(connection))
        self.ladder = Ladder(self.outlet.control, self.topology)
        self._keeper = RegistryKeeper(self.outlet.control, self.topology, settings.publish_timeout)
        self._groups = Groups(self.outlet, self._keeper, self.ladder, self.topology)
        self._patterns: dict[str, tuple[str, ...]] = {}
        self._consuming = Link(settings, "abe-consume", _nothing)

    async def open(self) -> None:
        """Connect to publish, and make what every namespace has."""
        await self.outlet.open()

    async def close(self) -> None:
        """Disconnect."""
        await self._keeper.close()
        await asyncio.gather(self.outlet.close(), self._consuming.close())

    async def ping(self) -> None:
        """Ask for a queue that is always there."""
        await self.outlet.control.call(lambda channel: channel.queue_declare(self.topology.held, passive=True))

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Publish, and wait for the confirms."""
        if any(envelope.delay for envelope in envelopes):
            return await self._send_some_later(envelopes)
        return await self.outlet.publish([self._outgoing(envelope) for envelope in envelopes])

    async def declare(self, group: str, patterns: tuple[str, ...] | None) -> None:
        """Register the group, make its queues and bindings, and move the held messages that it wants."""
        self._patterns[group] = await self._keeper.exclusively(partial(self._groups.declare, group, patterns))

    async def restore(self, group: str) -> None:
        """Make a group again that was deleted underneath, with the patterns that it had when we last knew."""
        patterns = self._patterns.get(group, EVERYTHING)
        await self._keeper.exclusively(partial(self._groups.declare, group, None, patterns))

    async def delete_group(self, group: str) -> None:
        """Delete what the group has."""
        await self._keeper.exclusively(partial(self._groups.delete, group))

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Read the registry."""
        return await self._groups.all()

    async def subscribe(self, group: str, prefetch: int) -> RabbitMQReceiver:
        """Make a consumer."""
        receiver = RabbitMQReceiver(self, group, prefetch)
        await receiver.start()
        self.receivers.add(receiver)
        return receiver

    async def consume_channel(self) -> Channel:
        """Open a channel on the connection to consume."""
        return await (await self._consuming.get()).channel()

    async def stats(self, group: str) -> GroupStats:
        """Count. What consumers of other processes hold, AMQP does not tell."""
        names, count = self.topology, self.outlet.count
        delayed = 0
        for level in range(LEVELS):
            waiting = await count(names.waiting(group, level))
            if waiting is None:
                break
            delayed += waiting
        return GroupStats(
            waiting=await count(names.queue(group)) or 0,
            in_flight=sum(receiver.holding for receiver in self.receivers if receiver.group == group),
            delayed=delayed,
            dead=await count(names.dead(group)) or 0,
            oldest=None,
        )

    async def dead_letters(self, group: str, limit: int) -> Sequence[DeadLetter]:
        """Look at all of them, and remember the oldest."""
        return await self._letters(group, lambda letter, found: found < limit)

    async def find_dead_letter(self, group: str, id: str) -> DeadLetter | None:
        """Look at all of them, and remember that one."""
        letters = await self._letters(group, lambda letter, found: letter.id == id and not found)
        return letters[0] if letters else None

    async def replay(self, group: str, ids: Collection[str] | None) -> int:
        """Put copies into the group's queue, then remove them here: a crash between doubles them and never loses them."""
        queue = self.topology.queue(group)

        async def replay(browser: Browser, page: Sequence[Found]) -> None:
            outcomes = await self.outlet.move(
                [moved("", queue, header, body) for _, header, body in page], bounded=True
            )
            await browser.remove([tag for i, (tag, _, _) in enumerate(page) if not outcomes or outcomes[i] is None])
            for error in outcomes:
                if error is not None:
                    raise error

        return await self._each(group, ids, replay)

    async def purge(self, group: str, ids: Collection[str] | None) -> int:
        """Remove them."""
        queue = self.topology.dead(group)

        async def all() -> int:
            if await self.outlet.count(queue) is None:
                return 0
            return (await self.outlet.control.call(lambda channel: channel.queue_purge(queue))).message_count or 0

        async def purge(browser: Browser, page: Sequence[Found]) -> None:
            await browser.remove([tag for tag, _, _ in page])

        return await (self._keeper.exclusively(all) if ids is None else self._each(group, ids, purge))

    def look_at_held(self) -> None:
        """Hand out held messages, in a while."""
        self._keeper.begin(self._groups.hand_over)

    def _outgoing(self, envelope: Envelope) -> Outgoing:
        if envelope.group is None:
            return Outgoing(self.topology.exchange, envelope.key, _wire.pack(envelope), envelope.body, envelope.id)
        properties = _wire.pack(envelope, ("abe-key", envelope.key))
        return Outgoing("", self.topology.queue(envelope.group), properties, envelope.body, envelope.id)

    async def _letters(self, group: str, wanted: Callable[[DeadLetter, int], bool]) -> Sequence[DeadLetter]:
        """Return the dead letters that are wanted; how many were so far is told too."""
        found: list[DeadLetter] = []

        def keep(header: Header, body: bytes) -> bool:
            letter = _wire.dead_letter(header, body)
            if wanted(letter, len(found)):
                found.append(letter)
            return False

        async def look() -> Sequence[DeadLetter]:
            async with self.outlet.browse(self.topology.dead(group), keep) as browser:
                if browser is not None:
                    async for _ in browser.pages():
                        pass
            return found

        return await self._keeper.exclusively(look)

    async def _each(
        self, group: str, ids: Collection[str] | None, work: Callable[[Browser, Sequence[Found]], Awaitable[None]]
    ) -> int:
        """Do something with dead letters (None: all of them) a page at a time, which removes them, and return how many."""

        def keep(header: Header, body: bytes) -> bool:
            return ids is None or _wire.dead_letter(header, body).id in ids

        async def each() -> int:
            async with self.outlet.browse(self.topology.dead(group), keep, emptying=ids is None) as browser:
                if browser is None:
                    return 0
                async for page in browser.pages():
                    await work(browser, page)
                return browser.removed

        return await self._keeper.exclusively(each)

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
                    await self.outlet.prepare()
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


async def _nothing(_: Connection) -> None:
    """There is nothing to prepare."""


if TYPE_CHECKING:
    _: type[TransportProtocol] = RabbitMQTransport
