"""The groups: making them, changing their patterns, deleting them, and handing over what was held before there was one."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiormq.abc import AbstractChannel

from abe.backends.message_queue.base.names import EVERYTHING
from abe.errors import BackendConnectionError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Outgoing
from abe_backend_rabbitmq._connection import Connection
from abe_backend_rabbitmq._errors import ChannelNotFound
from abe_backend_rabbitmq._ladder import Ladder
from abe_backend_rabbitmq._outlet import Outlet, moved
from abe_backend_rabbitmq._registry import Entry, Registry, RegistryKeeper
from abe_backend_rabbitmq._topology import LEVELS, Topology
from abe_backend_rabbitmq._wire import Header

_log: Final = logging.getLogger("abe.rabbitmq")


class Groups:
    """What exists in the broker, as the registry says.

    Args:
        outlet: Carries the requests.
        keeper: Has the registry.
        ladder: For held messages with a delay.
        topology: The names.
    """

    def __init__(self, outlet: Outlet, keeper: RegistryKeeper, ladder: Ladder, topology: Topology) -> None:
        self._outlet = outlet
        self._control = outlet.control
        self._keeper = keeper
        self._ladder = ladder
        self._names = topology
        self._known: Registry | None = None

    async def prepare(self, connection: Connection) -> None:
        """Make what every namespace has. The exchange that is published to comes last: where it is, everything is.

        Args:
            connection: A new one, or the one that the broker closed a channel of.
        """
        names = self._names
        self.forget()
        try:
            await self._control.call(lambda channel: channel.exchange_declare(names.exchange, passive=True), connection)
        except BackendConnectionError as exc:
            if not isinstance(exc.__cause__, ChannelNotFound):
                raise
            async with self._keeper.locked(connection):
                await self._control.call(self._make_namespace, connection)
                await self._restore(connection)
        else:
            await self._control.call(self._make_exchange, connection)

    def forget(self) -> None:
        """Read the registry again when it is needed next: the groups may have changed."""
        self._known = None
        self._ladder.forget()

    async def known(self) -> Registry:
        """Return the registry as it was when somebody looked last: who publishes by an old one is told so by the broker."""
        known = self._known
        return known if known is not None else await self._keeper.exclusively(self._look)

    async def all(self) -> Mapping[str, tuple[str, ...]]:
        """Return the groups and their patterns."""
        registry = await self._keeper.exclusively(self._keeper.read)
        return {group: tuple(entry.patterns) for group, entry in sorted(registry.groups.items())}

    async def declare(self, group: str, patterns: Sequence[str] | None) -> None:
        """Register a group, make its queues and bindings, and hand it the held messages that it wants. The lock must be held.

        Args:
            group: The group.
            patterns: All that it wants; None: what it has, or everything.
        """
        names = self._names
        registry = await self._keeper.read()
        entry = registry.groups.get(group)
        wanted = list(patterns or (entry.patterns if entry is not None else EVERYTHING))
        complete = entry is not None and not entry.changing and await self._outlet.count(names.queue(group)) is not None
        if not (complete and entry is not None and entry.patterns == wanted):
            before = entry.bound if entry is not None else []
            registry.groups[group] = Entry(wanted, sorted({*before, *wanted}), changing=True)
            await self._begin(registry)

            async def make(channel: AbstractChannel) -> None:
                await self._make_group(channel, group, wanted, before)
                await self._stop_holding(channel, group)

            await self._control.call(make)
            await self._bind_version(registry)
            registry.groups[group] = Entry(wanted, wanted)
            await self._keeper.write(registry)
        elif not await self._outlet.count(names.held):
            await self._control.call(lambda channel: self._make_queues(channel, group))
            return
        await self._hand_over(registry)

    async def delete(self, group: str) -> None:
        """Delete what a group has. The lock must be held."""
        names = self._names
        registry = await self._keeper.read()
        if group in registry.groups:
            registry.groups[group].changing = True
        await self._begin(registry)

        async def delete(channel: AbstractChannel) -> None:
            for level in range(LEVELS):
                await channel.queue_delete(names.waiting(group, level))
            await channel.queue_delete(names.queue(group))
            await channel.queue_delete(names.dead(group))
            await channel.exchange_unbind(destination=names.nowhere, source=names.unwanted, routing_key=group)

        await self._control.call(delete)
        self._ladder.forget(group)
        registry.groups.pop(group, None)
        await self._bind_version(registry)
        await self._keeper.write(registry)

    async def _look(self) -> Registry:
        registry = await self._keeper.read()
        if registry.stale:  # somebody died in the middle of a change
            await self._bind_version(registry)
            await self._keeper.write(registry)
        self._known = registry
        return registry

    async def _begin(self, registry: Registry) -> None:
        """Note that a change begins: who dies in its middle leaves it to the next one."""
        registry.stale.append(registry.version)
        registry.version += 1
        await self._keeper.write(registry)

    async def _make_namespace(self, channel: AbstractChannel) -> None:
        names = self._names
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

    async def _make_exchange(self, channel: AbstractChannel) -> None:
        names = self._names
        arguments: dict[str, Any] = {"alternate-exchange": names.unwanted}
        await channel.exchange_declare(names.exchange, exchange_type="topic", durable=True, arguments=arguments)

    async def _restore(self, connection: Connection) -> None:
        """Make the exchange that is published to, with the bindings of the groups there are: it was deleted underneath them.

        Until all are bound, everything is held, so that nobody who publishes meanwhile is told that no group wants it.
        """
        names = self._names
        registry = await self._keeper.read(connection)

        async def restore(channel: AbstractChannel) -> None:
            for group in registry.groups:
                await channel.exchange_unbind(destination=names.nowhere, source=names.unwanted, routing_key=group)
            await self._make_exchange(channel)
            for group, entry in registry.groups.items():
                await self._make_group(channel, group, entry.patterns, entry.bound)
            for group in registry.groups:
                await self._stop_holding(channel, group)
            await self._bind(channel, registry)

        await self._control.call(restore, connection)
        if registry.groups:
            _log.warning("the exchange %r was deleted underneath its groups: it is made again", names.exchange)
            self._keeper.begin(lambda: self._hand_over(registry))

    async def _make_queues(self, channel: AbstractChannel, group: str) -> None:
        names = self._names
        await channel.queue_declare(names.dead(group), durable=True, arguments=dict(names.store_arguments))
        await channel.queue_declare(names.queue(group), durable=True, arguments=dict(names.queue_arguments(group)))

    async def _make_group(
        self, channel: AbstractChannel, group: str, wanted: Sequence[str], before: Sequence[str]
    ) -> None:
        names = self._names
        queue = names.queue(group)
        await self._make_queues(channel, group)
        await channel.queue_bind(queue, names.due, names.arrive(group))
        for pattern in wanted:
            await channel.queue_bind(queue, names.exchange, pattern)
        for pattern in before:
            if pattern not in wanted:
                await channel.queue_unbind(queue, names.exchange, pattern)

    async def _stop_holding(self, channel: AbstractChannel, group: str) -> None:
        """From now on a message that no group wants is returned. This comes last: what was published before is held."""
        names = self._names
        await channel.exchange_bind(destination=names.nowhere, source=names.unwanted, routing_key=group)

    async def _bind_version(self, registry: Registry) -> None:
        """Accept delayed messages of those who know the newest version, and of nobody else."""
        await self._control.call(lambda channel: self._bind(channel, registry))
        registry.stale.clear()
        self._known = registry

    async def _bind(self, channel: AbstractChannel, registry: Registry) -> None:
        names = self._names
        for version in registry.stale:
            await channel.exchange_unbind(destination=names.delay, source=names.later, routing_key=f"{version}.#")
        await channel.exchange_bind(destination=names.delay, source=names.later, routing_key=f"{registry.version}.#")

    async def _hand_over(self, registry: Registry) -> None:
        """Move held messages to the groups that want them. The lock is held: nobody else has some of them in hand."""

        def wanted(header: Header, body: bytes) -> bool:
            return bool(registry.wanting(_wire.routing_key(header)))

        async with self._outlet.browse(self._names.held, wanted) as browser:
            if browser is not None:
                async for page in browser.pages():
                    copies = [
                        (tag, copy) for tag, header, body in page for copy in await self._copies(registry, header, body)
                    ]
                    outcomes = await self._outlet.move([copy for _, copy in copies])
                    refused = {copies[i][0] for i, error in enumerate(outcomes) if error is not None}
                    await browser.remove([tag for tag, _, _ in page if tag not in refused])

    async def _copies(self, registry: Registry, header: Header, body: bytes) -> Sequence[Outgoing]:
        copies: list[Outgoing] = []
        delay = _wire.due(header) / 1000 - time.time()
        for group in registry.wanting(_wire.routing_key(header)):
            to = await self._ladder.retry(group, delay) if delay > 0 else ("", self._names.queue(group))
            copies.append(moved(*to, header, body))
        return copies
