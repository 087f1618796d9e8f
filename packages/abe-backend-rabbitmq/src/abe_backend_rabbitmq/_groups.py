"""The groups: making them, changing their patterns, deleting them, and handing over what was held before there was one."""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from aiormq.abc import AbstractChannel

from abe.backends.message_queue.base.names import EVERYTHING
from abe.errors import BackendConnectionError, ConfigurationError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._browser import Found
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
        """Make what every namespace has. The exchange `nowhere` comes last: where it is, everything is.

        Args:
            connection: A new one, or the one that the broker closed a channel of.
        """
        names = self._names
        self.forget()

        async def present(channel: AbstractChannel) -> None:
            for exchange in (names.exchange, names.later, names.delay, names.due, names.nowhere):
                await channel.exchange_declare(exchange, passive=True)
            for queue in (names.held, names.registry):
                await channel.queue_declare(queue, passive=True)

        try:
            await self._control.call(present, connection)
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
        return known if known is not None else await self._keeper.exclusively(self._read)

    async def all(self) -> Mapping[str, tuple[str, ...]]:
        """Return the groups and their patterns."""
        registry = await self._keeper.exclusively(self._read)
        return {group: tuple(entry.patterns) for group, entry in sorted(registry.groups.items())}

    async def declare(
        self, group: str, patterns: Sequence[str] | None, otherwise: Sequence[str] = EVERYTHING
    ) -> tuple[str, ...]:
        """Register a group, make its queues and bindings, and hand out what was held. The lock must be held.

        Args:
            group: The group.
            patterns: All that it wants; None: what it has.
            otherwise: What it wants if nothing is said, and it has none.

        Returns:
            All that it wants.
        """
        registry = await self._read()
        entry = registry.groups.get(group)
        wanted = list(patterns or (entry.patterns if entry is not None else otherwise))
        if entry is None or entry.patterns != wanted:
            registry.groups[group] = Entry(wanted, sorted({*(entry.bound if entry else ()), *wanted}), changing=True)
            await self._change(registry, group)
        else:  # what somebody deleted is made again
            await self._control.call(lambda channel: self._make_group(channel, group, entry))
        await self._hand_over(registry)
        return tuple(wanted)

    async def delete(self, group: str) -> None:
        """Delete what a group has. The lock must be held."""
        registry = await self._read()
        entry = registry.groups.get(group)
        registry.groups[group] = Entry([], entry.bound if entry else [], changing=True)
        await self._change(registry, group)

    async def hand_over(self) -> None:
        """Hand out what is held: messages that were on their way while the first group was made may have come late."""
        if await self._outlet.count(self._names.held):
            await self._keeper.exclusively(self._hand_over_now)

    async def _read(self) -> Registry:
        """Return the registry, with every change that somebody died in the middle of carried out."""
        registry = await self._keeper.read()
        if registry.stale or any(entry.changing for entry in registry.groups.values()):
            await self._finish(registry)
        self._known = registry
        return registry

    async def _change(self, registry: Registry, group: str) -> None:
        """Carry out a change. The registry says before it what will be, so that who comes next can finish it."""
        registry.stale.append(registry.version)
        registry.version += 1
        await self._keeper.write(registry)
        await self._finish(registry, group)

    async def _finish(self, registry: Registry, ours: str | None = None) -> None:
        """Carry out what the registry says.

        Args:
            registry: The registry.
            ours: The group that this is about. What keeps another one from being made is not the caller's fault, and stops nobody.
        """
        # First: nobody publishes with a delay for groups that are being deleted.
        await self._control.call(lambda channel: self._bind(channel, registry))
        for group, entry in list(registry.groups.items()):
            if not entry.changing:
                continue
            if entry.patterns:
                try:
                    await self._control.call(partial(self._make_group, group=group, entry=entry))
                except ConfigurationError as exc:
                    if group == ours:
                        raise
                    _log.warning("group %r is half made, and stays so until somebody can finish it: %s", group, exc)
                else:
                    registry.groups[group] = Entry(entry.patterns, entry.patterns)
            else:
                await self._control.call(partial(self._delete_group, group=group))
                self._ladder.forget(group)
                del registry.groups[group]
        registry.stale.clear()
        self._known = registry
        await self._keeper.write(registry)

    async def _make_namespace(self, channel: AbstractChannel) -> None:
        names = self._names
        await channel.exchange_declare(names.holding, exchange_type="fanout", durable=True)
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
        """Make the exchange that is published to, with the bindings of the groups there are, if it was deleted underneath them.

        Until all are bound there is no `nowhere`, so that everything is held: nobody who publishes meanwhile is told that no group wants
        it.
        """
        names = self._names
        registry = await self._keeper.read(connection)

        async def restore(channel: AbstractChannel) -> None:
            await channel.exchange_delete(names.nowhere)
            await self._make_exchange(channel)
            for group, entry in registry.groups.items():
                await self._make_queues(channel, group, entry)
            await self._bind(channel, registry)
            await channel.exchange_declare(names.nowhere, exchange_type="fanout", durable=True)
            for group in registry.groups:
                await self._stop_holding(channel, group)

        await self._control.call(restore, connection)
        if registry.groups:
            _log.warning("exchanges of %r were deleted underneath the groups: they are made again", names.exchange)
            self._keeper.begin(self.hand_over)

    async def _make_group(self, channel: AbstractChannel, group: str, entry: Entry) -> None:
        await self._make_queues(channel, group, entry)
        await self._stop_holding(channel, group)

    async def _delete_group(self, channel: AbstractChannel, group: str) -> None:
        names = self._names
        for level in range(LEVELS):
            await channel.queue_delete(names.waiting(group, level))
        await channel.queue_delete(names.queue(group))
        await channel.queue_delete(names.dead(group))
        await channel.exchange_unbind(destination=names.nowhere, source=names.unwanted, routing_key=group)

    async def _make_queues(self, channel: AbstractChannel, group: str, entry: Entry) -> None:
        names = self._names
        queue = names.queue(group)
        await channel.queue_declare(names.dead(group), durable=True, arguments=dict(names.store_arguments))
        await channel.queue_declare(queue, durable=True, arguments=dict(names.queue_arguments(group)))
        await channel.queue_bind(queue, names.due, names.arrive(group))
        for pattern in entry.patterns:
            await channel.queue_bind(queue, names.exchange, pattern)
        for pattern in entry.bound:
            if pattern not in entry.patterns:
                await channel.queue_unbind(queue, names.exchange, pattern)

    async def _stop_holding(self, channel: AbstractChannel, group: str) -> None:
        """From now on a message that no group wants is returned. This comes last: what was published before is held."""
        names = self._names
        await channel.exchange_bind(destination=names.nowhere, source=names.unwanted, routing_key=group)

    async def _bind(self, channel: AbstractChannel, registry: Registry) -> None:
        """Accept delayed messages of those who know the newest version, and of nobody else."""
        names = self._names
        for version in registry.stale:
            await channel.exchange_unbind(destination=names.delay, source=names.later, routing_key=f"{version}.#")
        await channel.exchange_bind(destination=names.delay, source=names.later, routing_key=f"{registry.version}.#")

    async def _hand_over_now(self) -> None:
        await self._hand_over(await self._read())

    async def _hand_over(self, registry: Registry) -> None:
        """Move held messages to the groups that want them. The lock is held.

        One that a full group refuses goes back with the names of those that are to get it still.
        """

        def wanted(header: Header, body: bytes) -> bool:
            return bool(_wire.left_to(header) or registry.wanting(_wire.routing_key(header)))

        emptying = any(entry.patterns == ["#"] for entry in registry.groups.values())
        async with self._outlet.browse(self._names.held, wanted, emptying=emptying) as browser:
            if browser is None:
                return
            async for page in browser.pages():
                copies: list[Outgoing] = []
                places: list[tuple[int, str]] = []
                for place, (_, header, body) in enumerate(page):
                    for group in self._recipients(registry, header):
                        delay = _wire.due(header) / 1000 - time.time()
                        to = await self._ladder.retry(group, delay) if delay > 0 else ("", self._names.queue(group))
                        copies.append(moved(*to, header, body))
                        places.append((place, group))
                outcomes = await self._outlet.move(copies, bounded=True)
                left: dict[int, list[str]] = {}
                taken: set[int] = set()
                for i, (place, group) in enumerate(places):
                    if not outcomes or outcomes[i] is None:
                        taken.add(place)
                    else:
                        left.setdefault(place, []).append(group)
                await self._keep_for({place: left[place] for place in left if place in taken}, page)
                refused = left.keys() - taken
                await browser.remove([tag for place, (tag, _, _) in enumerate(page) if place not in refused])
                if left:
                    return  # a group is full, and the next page would only find it so

    def _recipients(self, registry: Registry, header: Header) -> Sequence[str]:
        named = _wire.left_to(header)
        groups = [group for group in named if group in registry.groups]
        return groups if named else registry.wanting(_wire.routing_key(header))

    async def _keep_for(self, left: Mapping[int, Sequence[str]], page: Sequence[Found]) -> None:
        """Put those back, named, that only some of their groups took."""
        named: list[Outgoing] = []
        for place, groups in left.items():
            _, header, body = page[place]
            properties = _wire.copy(header, body, 0, ("abe-due", _wire.due(header)), ("abe-for", " ".join(groups)))
            named.append(Outgoing("", self._names.held, properties, body, _wire.message_id(properties)))
        if named:
            for error in await self._outlet.move(named):
                if error is not None:
                    raise error
