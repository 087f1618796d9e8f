"""The primitives: what the engine asks of RabbitMQ."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiormq.abc import AbstractChannel

from abe.backends.message_queue.base import Batching, DeadLetter, Envelope, GroupStats
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.backends.message_queue.base.names import EVERYTHING, matches
from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    PublishUnknownError,
    UnroutableError,
)
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._browser import Browser
from abe_backend_rabbitmq._channel import Opened, Outgoing
from abe_backend_rabbitmq._connection import Connection, Control, Link, finished
from abe_backend_rabbitmq._errors import ChannelNotFound, translated
from abe_backend_rabbitmq._receiver import RabbitMQReceiver
from abe_backend_rabbitmq._registry import Entry, Registry, RegistryKeeper
from abe_backend_rabbitmq._settings import RabbitMQSettings
from abe_backend_rabbitmq._topology import LEVELS, Topology, ladder

_log: Final = logging.getLogger("abe.rabbitmq")
_PAGE: Final = 500
_STALE: Final = 20
"""Times that the groups may change under one batch before it counts as failed."""

_TRIES, _PAUSE = 200, 0.005

_T = TypeVar("_T")


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
        self._publishing = Link(settings, "abe-publish", self._prepare)
        self._consuming = Link(settings, "abe-consume", _nothing)
        self._control = Control(self._publishing)
        self._keeper = RegistryKeeper(self._control, self.topology, settings.publish_timeout)
        self._channel: Opened | None = None
        self._opening = asyncio.Lock()
        self._registry: Registry | None = None
        self._rungs = -1
        self._ladders: dict[str, int] = {}
        self._tasks: set[asyncio.Task[object]] = set()

    async def open(self) -> None:
        """Connect to publish, and make what every namespace has."""
        await self._publish_channel()

    async def close(self) -> None:
        """Disconnect."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(self._publishing.close(), self._consuming.close())

    async def ping(self) -> None:
        """Ask for a queue that is always there."""
        await self._control.call(lambda channel: channel.queue_declare(self.topology.held, passive=True))

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Publish, and wait for the confirms."""
        channel = await self._publish_channel()
        connection = self._publishing.current
        if connection is not None and connection.blocked:
            try:
                async with asyncio.timeout(self.settings.publish_timeout / 2):
                    await connection.unblocked()
            except TimeoutError:
                full = BackpressureError(
                    f"rabbitmq at {connection.address} takes no messages now: it is short of memory or disk"
                )
                return [full] * len(envelopes)
        if any(envelope.delay for envelope in envelopes):
            return await self._send_some_later(envelopes)
        exchange = self.topology.exchange
        return await self._deliver(
            channel, [Outgoing(exchange, each.key, _wire.pack(each), each.body, each.id) for each in envelopes]
        )

    async def move(self, messages: Sequence[Outgoing]) -> Sequence[AbeError | None]:
        """Publish copies of messages that we hold.

        Raises:
            BackendConnectionError: It is not known of any of them whether it was accepted; it does no harm to repeat it.
        """
        try:
            return await (await self._publish_channel()).publish(messages)
        except PublishUnknownError as exc:
            raise BackendConnectionError(str(exc)) from exc

    async def declare(self, group: str, patterns: tuple[str, ...] | None) -> None:
        """Register the group, make its queues and bindings, and move the held messages that it wants."""
        await self._exclusively(partial(self._declare, group, patterns))

    async def delete_group(self, group: str) -> None:
        """Delete what the group has."""
        await self._exclusively(partial(self._delete_group, group))

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Read the registry."""
        registry = await self._exclusively(self._keeper.read)
        return {group: tuple(entry.patterns) for group, entry in sorted(registry.groups.items())}

    async def subscribe(self, group: str, prefetch: int) -> RabbitMQReceiver:
        """Make a consumer."""
        receiver = RabbitMQReceiver(self, group, prefetch)
        await receiver.start()
        self.receivers.add(receiver)
        return receiver

    async def consume_channel(self) -> Opened:
        """Open a channel on the connection to consume."""
        return await (await self._consuming.get()).channel()

    async def stats(self, group: str) -> GroupStats:
        """Count. What consumers of other processes hold, AMQP does not tell."""
        names = self.topology
        delayed = 0
        for level in range(LEVELS):
            count = await self._count(names.waiting(group, level))
            if count is None:
                break
            delayed += count
        return GroupStats(
            waiting=await self._count(names.queue(group)) or 0,
            in_flight=sum(receiver.holding for receiver in self.receivers if receiver.group == group),
            delayed=delayed,
            dead=await self._count(names.dead(group)) or 0,
            oldest=None,
        )

    async def dead_letters(self, group: str, limit: int) -> Sequence[DeadLetter]:
        """Look at the oldest, and put them back."""

        async def look() -> Sequence[DeadLetter]:
            async with self._browse(self.topology.dead(group), limit) as browser:
                return [_wire.dead_letter(header, body) for _, header, body in browser.found]

        return await self._exclusively(look)

    async def find_dead_letter(self, group: str, id: str) -> DeadLetter | None:
        """Look through all of them."""

        async def find() -> DeadLetter | None:
            async with self._browse(self.topology.dead(group)) as browser:
                letters = (_wire.dead_letter(header, body) for _, header, body in browser.found)
                return next((letter for letter in letters if letter.id == id), None)

        return await self._exclusively(find)

    async def replay(self, group: str, ids: Collection[str] | None) -> int:
        """Put copies into the group's queue, then remove them here: a crash between doubles them and never loses them."""
        queue = self.topology.queue(group)

        async def replay() -> int:
            moved = 0
            async with self._browse(self.topology.dead(group)) as browser:
                chosen = [item for item in browser.found if ids is None or _wire.dead_letter(*item[1:]).id in ids]
                for start in range(0, len(chosen), _PAGE):
                    page = chosen[start : start + _PAGE]
                    outcomes = await self.move([_outgoing("", queue, header, body, 0) for _, header, body in page])
                    accepted = [tag for i, (tag, _, _) in enumerate(page) if not outcomes or outcomes[i] is None]
                    await browser.remove(accepted)
                    moved += len(accepted)
                    for error in outcomes:
                        if error is not None:
                            raise error
            return moved

        return await self._exclusively(replay)

    async def purge(self, group: str, ids: Collection[str] | None) -> int:
        """Remove them."""

        async def purge() -> int:
            async with self._browse(self.topology.dead(group)) as browser:
                tags = [
                    tag
                    for tag, header, body in browser.found
                    if ids is None or _wire.dead_letter(header, body).id in ids
                ]
                await browser.remove(tags)
                return len(tags)

        return await self._exclusively(purge)

    async def look_at_held(self, group: str) -> None:
        """Move held messages that the group wants: one that was on its way while the first group was made may have come late."""
        if await self._count(self.topology.held):
            await self.declare(group, None)

    async def retry(self, group: str, delay: float) -> tuple[str, str]:
        """Return the exchange and the routing key that bring a message back to its group after `delay` seconds."""
        level, digits = ladder(delay)
        await self._ensure_ladder(group, level)
        return self.topology.delay, f"0.{digits}.{group}"

    def forget_ladders(self) -> None:
        """Make ladders anew when they are needed next: one was deleted."""
        self._rungs = -1
        self._ladders.clear()

    async def _deliver(self, channel: Opened, messages: Sequence[Outgoing]) -> Sequence[AbeError | None]:
        if self.settings.max_backlog is None:
            return await channel.publish(messages)
        # A queue says that it is full after it took what fills it: only one at a time finds out.
        outcomes: list[AbeError | None] = []
        for message in messages:
            outcomes += await channel.publish([message]) or (None,)
        return outcomes if any(outcomes) else ()

    async def _send_some_later(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Publish when some have a delay: of those, a copy to each group that wants it, as the groups are now."""
        outcomes: list[AbeError | None] = [None] * len(envelopes)
        copies: dict[tuple[int, str], Outgoing] = {}
        for i, envelope in enumerate(envelopes):
            if not envelope.delay:
                copies[i, ""] = Outgoing(
                    self.topology.exchange, envelope.key, _wire.pack(envelope), envelope.body, envelope.id
                )
        waiting = {i for i, envelope in enumerate(envelopes) if envelope.delay}
        done: set[tuple[int, str]] = set()
        for _ in range(_STALE):
            registry = self._registry or await self._load_registry()
            for i in waiting:
                try:
                    copies |= {
                        (i, group): copy
                        for group, copy in await self._later(registry, envelopes[i])
                        if (i, group) not in done
                    }
                except UnroutableError as exc:
                    outcomes[i] = exc
            results = await self._deliver(await self._publish_channel(), list(copies.values())) if copies else ()
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
            copies, self._registry = {}, None
            self.forget_ladders()
        raise PublishUnknownError("the groups change faster than delayed messages can be published")

    async def _later(self, registry: Registry, envelope: Envelope) -> Sequence[tuple[str, Outgoing]]:
        id, key, body, _, _, delay = envelope
        later = self.topology.later
        if not registry.groups:
            due = int((time.time() + delay) * 1000) + 1
            properties = _wire.pack(envelope, ("abe-key", key), ("abe-due", due))
            return [("", Outgoing(later, f"{registry.version}.held", properties, body, id))]
        groups = registry.wanting(key)
        if not groups:
            raise UnroutableError(f"no group wants the key {key!r}")
        level, digits = ladder(delay)
        for group in groups:
            await self._ensure_ladder(group, level)
        properties = _wire.pack(envelope, ("abe-key", key))
        return [
            (group, Outgoing(later, f"{registry.version}.{digits}.{group}", properties, body, id)) for group in groups
        ]

    async def _load_registry(self) -> Registry:
        async def load() -> Registry:
            registry = await self._keeper.read()
            if registry.stale:  # somebody died in the middle of a change
                await self._bind_version(registry)
                await self._keeper.write(registry)
            return registry

        self._registry = await self._exclusively(load)
        return self._registry

    async def _declare(self, group: str, patterns: tuple[str, ...] | None) -> None:
        registry = await self._keeper.read()
        entry = registry.groups.get(group)
        wanted = list(patterns or (entry.patterns if entry is not None else EVERYTHING))
        complete = (
            entry is not None and not entry.changing and await self._count(self.topology.queue(group)) is not None
        )
        if not (complete and entry is not None and entry.patterns == wanted):
            before = entry.bound if entry is not None else []
            registry.groups[group] = Entry(wanted, sorted({*before, *wanted}), changing=True)
            registry.stale.append(registry.version)
            registry.version += 1
            await self._keeper.write(registry)
            await self._control.call(lambda channel: self._make_group(channel, group, wanted, before))
            await self._bind_version(registry)
            registry.groups[group] = Entry(wanted, wanted)
            await self._keeper.write(registry)
        elif not await self._count(self.topology.held):
            await self._control.call(lambda channel: self._make_queues(channel, group))
            return
        await self._take_held(group, wanted)

    async def _delete_group(self, group: str) -> None:
        names = self.topology
        registry = await self._keeper.read()
        if group in registry.groups:
            registry.groups[group].changing = True
        registry.stale.append(registry.version)
        registry.version += 1
        await self._keeper.write(registry)

        async def delete(channel: AbstractChannel) -> None:
            for level in range(LEVELS):
                await channel.queue_delete(names.waiting(group, level))
            await channel.queue_delete(names.queue(group))
            await channel.queue_delete(names.dead(group))
            await channel.exchange_unbind(destination=names.nowhere, source=names.unwanted, routing_key=group)

        await self._control.call(delete)
        self._ladders.pop(group, None)
        registry.groups.pop(group, None)
        await self._bind_version(registry)
        await self._keeper.write(registry)

    async def _make_queues(self, channel: AbstractChannel, group: str) -> None:
        names = self.topology
        await channel.queue_declare(names.dead(group), durable=True, arguments=dict(names.store_arguments))
        await channel.queue_declare(names.queue(group), durable=True, arguments=dict(names.queue_arguments(group)))

    async def _make_group(
        self, channel: AbstractChannel, group: str, wanted: Sequence[str], before: Sequence[str]
    ) -> None:
        names = self.topology
        queue = names.queue(group)
        await self._make_queues(channel, group)
        await channel.queue_bind(queue, names.due, names.arrive(group))
        for pattern in wanted:
            await channel.queue_bind(queue, names.exchange, pattern)
        for pattern in before:
            if pattern not in wanted:
                await channel.queue_unbind(queue, names.exchange, pattern)
        # Last: from now on nothing is held.
        await channel.exchange_bind(destination=names.nowhere, source=names.unwanted, routing_key=group)

    async def _bind_version(self, registry: Registry) -> None:
        names = self.topology

        async def bind(channel: AbstractChannel) -> None:
            for version in registry.stale:
                await channel.exchange_unbind(destination=names.delay, source=names.later, routing_key=f"{version}.#")
            await channel.exchange_bind(
                destination=names.delay, source=names.later, routing_key=f"{registry.version}.#"
            )

        await self._control.call(bind)
        registry.stale.clear()
        self._registry = registry

    async def _take_held(self, group: str, patterns: Sequence[str]) -> None:
        """Move the held messages that the group wants. The lock is held: nobody else has some of them in hand."""
        names = self.topology
        async with self._browse(names.held) as browser:
            page: list[tuple[int, Outgoing]] = []
            for tag, header, body in browser.found:
                key = _wire.routing_key(header)
                if not any(matches(pattern, key) for pattern in patterns):
                    continue
                delay = _wire.due(header) / 1000 - time.time()
                exchange, to = await self.retry(group, delay) if delay > 0 else ("", names.queue(group))
                page.append((tag, _outgoing(exchange, to, header, body, 0)))
                if len(page) == _PAGE:
                    await self._move_held(browser, page)
                    page = []
            await self._move_held(browser, page)

    async def _move_held(self, browser: Browser, page: Sequence[tuple[int, Outgoing]]) -> None:
        if page:
            outcomes = await self.move([copy for _, copy in page])
            await browser.remove([tag for i, (tag, _) in enumerate(page) if not outcomes or outcomes[i] is None])

    async def _ensure_ladder(self, group: str, level: int) -> None:
        if self._ladders.get(group, -1) >= level:
            return
        names = self.topology

        async def build(channel: AbstractChannel) -> None:
            for rung in range(self._rungs + 1, level + 1):
                await channel.exchange_declare(names.rung(rung), exchange_type="topic", durable=True)
                await channel.exchange_bind(
                    destination=names.rung(rung - 1), source=names.rung(rung), routing_key=names.climb(rung)
                )
                await channel.exchange_bind(
                    destination=names.rung(rung), source=names.delay, routing_key=names.leap(rung)
                )
                self._rungs = rung
            for rung in range(self._ladders.get(group, -1) + 1, level + 1):
                queue = names.waiting(group, rung)
                await channel.queue_declare(queue, durable=True, arguments=dict(names.waiting_arguments(rung)))
                await channel.queue_bind(queue, names.rung(rung), names.wait(group, rung))
                self._ladders[group] = rung

        await self._control.call(build)

    async def _prepare(self, connection: Connection) -> None:
        """Make what every namespace has. The exchange that is published to comes last: where it is, everything is."""
        names = self.topology
        arguments: dict[str, Any] = {"alternate-exchange": names.unwanted}

        async def check(channel: AbstractChannel) -> None:
            await channel.exchange_declare(names.exchange, passive=True)

        async def make(channel: AbstractChannel) -> None:
            for fanout in (names.nowhere, names.holding):
                await channel.exchange_declare(fanout, exchange_type="fanout", durable=True)
            await channel.exchange_declare(
                names.unwanted, exchange_type="fanout", durable=True, arguments={"alternate-exchange": names.holding}
            )
            for topic in (names.later, names.delay, names.due):
                await channel.exchange_declare(topic, exchange_type="topic", durable=True)
            await channel.queue_declare(names.held, durable=True, arguments=dict(names.store_arguments))
            await channel.queue_bind(names.held, names.holding)
            await channel.queue_bind(names.held, names.delay, "*.held")
            await self._keeper.seed(channel)
            await channel.exchange_bind(destination=names.delay, source=names.later, routing_key="0.#")

        async def publish_to(channel: AbstractChannel) -> None:
            await channel.exchange_declare(names.exchange, exchange_type="topic", durable=True, arguments=arguments)

        self.forget_ladders()
        self._registry = None
        try:
            await self._control.call(check, connection)
        except BackendConnectionError as exc:
            if not isinstance(exc.__cause__, ChannelNotFound):
                raise
            async with self._keeper.locked(connection):
                await self._control.call(make, connection)
                await self._control.call(publish_to, connection)
        else:
            await self._control.call(publish_to, connection)

    async def _publish_channel(self) -> Opened:
        if self._channel is not None and self._channel.closed is None:
            return self._channel
        async with self._opening:
            if self._channel is None or self._channel.closed is not None:
                connection = await self._publishing.get()
                if self._channel is not None:  # the broker closed it: what it published to may be gone
                    await self._prepare(connection)
                self._channel = await connection.channel()
            return self._channel

    async def _count(self, queue: str) -> int | None:
        """Return how many messages a queue has that nobody holds; None: there is no such queue."""
        try:
            declared = await self._control.call(lambda channel: channel.queue_declare(queue, passive=True))
        except BackendConnectionError as exc:
            if isinstance(exc.__cause__, ChannelNotFound):
                return None
            raise
        return declared.message_count or 0

    @asynccontextmanager
    async def _browse(self, queue: str, limit: int | None = None) -> AsyncGenerator[Browser, None]:
        """Hold the oldest messages of a queue; those that are not removed are put back in their places."""
        count = await self._count(queue)
        if not count:
            yield Browser(None, ())
            return
        wanted = count if limit is None else min(limit, count)
        connection = await self._publishing.get()
        channel = await connection.channel()
        removed = 0
        try:
            with translated(connection.address):
                browser = await Browser.open(channel, queue, wanted)
            yield browser
            removed = browser.removed
        finally:
            with translated(connection.address):
                await finished(channel.native.close())
            for _ in range(_TRIES):  # they are back before the lock is free
                if (await self._count(queue) or 0) >= count - removed:
                    break
                await asyncio.sleep(_PAUSE)

    async def _exclusively(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do something under the namespace's lock, to its end even if the caller is cancelled."""

        async def run() -> _T:
            await self.open()
            async with self._keeper.locked():
                return await work()

        task = asyncio.ensure_future(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await finished(_result(task))


def _outgoing(exchange: str, key: str, header: _wire.Header, body: bytes, attempt: int) -> Outgoing:
    properties = _wire.copy(header, body, attempt)
    return Outgoing(exchange, key, properties, body, _wire.message_id(properties))


async def _result(task: "asyncio.Task[_T]") -> _T:
    await asyncio.wait([task])
    if task.cancelled():
        raise BackendConnectionError("the connection to rabbitmq was closed")
    return task.result()


async def _nothing(_: Connection) -> None:
    """There is nothing to prepare."""


if TYPE_CHECKING:
    _: type[TransportProtocol] = RabbitMQTransport
