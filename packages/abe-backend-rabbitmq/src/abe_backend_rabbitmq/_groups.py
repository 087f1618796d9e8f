"""Declares groups, changes their patterns, deletes them."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from aiormq.abc import AbstractChannel

from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.names import EVERYTHING
from abe.backends.message_queue.base.routing import group_missing
from abe.errors import BackendConnectionError, ConfigurationError
from abe_backend_rabbitmq._connection import Connection
from abe_backend_rabbitmq._control import Control
from abe_backend_rabbitmq._delays import Delays
from abe_backend_rabbitmq._errors import ChannelNotFound
from abe_backend_rabbitmq._registry import Entry, Registry, RegistryKeeper
from abe_backend_rabbitmq._topology import LEVELS, Topology

_log: Final = Log("abe.rabbitmq")

_LATELY: Final = 1.0
"""Seconds for which a read of the registry is recent."""

_T = TypeVar("_T")


class Groups:
    """Makes the exchanges, queues and bindings in the broker what the registry says.

    Args:
        control: Carries the requests.
        registry: Reads and writes the groups.
        delays: Forgets the levels of deleted groups.
        topology: The names.
        tell: Announces news to all consumers.
    """

    def __init__(
        self,
        control: Control,
        registry: RegistryKeeper,
        delays: Delays,
        topology: Topology,
        tell: Callable[[str], Awaitable[None]],
    ) -> None:
        self._control = control
        self._registry = registry
        self._delays = delays
        self._names = topology
        self._tell = tell
        self._known: Registry | None = None
        self._version = 0
        self._seen_at = -_LATELY
        self._patterns: dict[str, tuple[str, ...]] = {}

    async def prepare(self, connection: Connection) -> None:
        """Declare what every namespace has. The exchange `nowhere` comes last: if it exists, everything does.

        Args:
            connection: Carries the requests; it may be one that is being prepared.
        """
        names = self._names
        self.forget()

        async def present(channel: AbstractChannel) -> None:
            for exchange in (names.exchange, names.later, names.delay, names.news, names.nowhere):
                await channel.exchange_declare(exchange, passive=True)
            for queue in (names.parked, names.registry):
                await channel.queue_declare(queue, passive=True)

        try:
            await self._control.call(present, connection)
        except BackendConnectionError as exc:
            if not isinstance(exc.__cause__, ChannelNotFound):
                raise
            async with self._registry.locked(connection):
                await self._control.call(self._make_namespace, connection)
                await self._registry.seed(connection)
                await self._restore(connection)
        else:
            await self._control.call(self._make_exchange, connection)

    def forget(self) -> None:
        """Forget the registry that was read last: the groups may have changed."""
        self._known = None
        self._delays.forget()

    async def known(self) -> Registry:
        """Return the registry that was read last. It may be stale: the broker returns copies that are published by a stale one."""
        known = self._known
        if known is None:
            known = self._known = await self._settled()
        return known

    async def all(self) -> Mapping[str, tuple[str, ...]]:
        """Return the groups and their patterns."""
        registry = await self._settled()
        return {group: tuple(entry.patterns) for group, entry in sorted(registry.groups.items())}

    async def declare(
        self, group: str, patterns: Sequence[str] | None, *, change: bool
    ) -> tuple[tuple[str, ...], bool]:
        """Register a group, and declare its queues and bindings; see `Transport.declare`. If all of it exists, no lock is taken.

        Returns:
            Its patterns, and whether anything was declared.
        """
        present = None if change else await self._present(group)
        if present is None:
            present = await self._there(
                lambda: self._registry.exclusively(partial(self._declare, group, patterns, EVERYTHING, change))
            )
        self._patterns[group] = present[0]
        return present

    async def build(self, group: str, level: int) -> int:
        """Declare the queues of a group's delayed messages up to a level; return how many levels the group has then.

        Raises:
            GroupMissingError: There is no such group.
        """
        return await self._there(lambda: self._registry.exclusively(partial(self._build, group, level)))

    @property
    def version(self) -> int:
        """The newest version of the registry that was read."""
        return self._version

    def _saw(self, registry: Registry) -> None:
        self._version = max(self._version, registry.version)
        self._seen_at = time.monotonic()

    async def lately(self) -> None:
        """Read the registry, unless it was read within the last `_LATELY` seconds."""
        if time.monotonic() - self._seen_at > _LATELY:
            await self._settled()

    async def now(self) -> Registry:
        """Read the registry, and return it."""
        return await self._settled()

    async def restore(self, group: str) -> None:
        """Declare a group again that was deleted underneath, with its last known patterns."""
        otherwise = self._patterns.get(group, EVERYTHING)
        await self._there(lambda: self._registry.exclusively(partial(self._declare, group, None, otherwise, False)))

    async def delete(self, group: str) -> None:
        """Delete a group with its queues and bindings."""
        await self._there(lambda: self._registry.exclusively(partial(self._delete, group)))

    async def delete_namespace(self) -> None:
        """Delete the namespace's queues and exchanges. A process that uses the namespace afterwards declares them again."""
        await self._there(lambda: self._registry.exclusively(self._delete_namespace))

    async def _present(self, group: str) -> tuple[tuple[str, ...], bool] | None:
        """Return a group's patterns, and that nothing was declared; None: the group or one of its queues does not exist."""
        entry = (await self._settled()).groups.get(group)
        if entry is None or entry.changing:
            return None
        names = self._names

        async def present(channel: AbstractChannel) -> None:
            for queue in (names.dead(group), names.queue(group)):
                await channel.queue_declare(queue, passive=True)
            # Once more, for the broker to compare its arguments with our settings.
            await channel.queue_declare(names.queue(group), durable=True, arguments=dict(names.queue_arguments(group)))

        try:
            await self._control.call(present)
        except BackendConnectionError as exc:
            if not isinstance(exc.__cause__, ChannelNotFound):
                raise
            return None  # a queue was deleted
        return tuple(entry.patterns), False

    async def _declare(
        self, group: str, patterns: Sequence[str] | None, otherwise: Sequence[str], change: bool
    ) -> tuple[tuple[str, ...], bool]:
        registry = await self._read()
        entry = registry.groups.get(group)
        given = patterns if change or entry is None else None
        wanted = list(given or (entry.patterns if entry is not None else otherwise))
        there = await self._control.count(self._names.queue(group)) is not None
        if entry is None or entry.patterns != wanted or not there:
            before = entry or Entry([], [])
            made = before.made if there and entry is not None else registry.version + 1
            bound = sorted({*before.bound, *wanted})
            registry.groups[group] = Entry(wanted, bound, changing=True, levels=before.levels, made=made)
            await self._change(registry, group)
            if made == registry.version:
                await self._tell(f"made {group} {made}")
        else:  # queues and bindings that were deleted are declared again
            await self._control.call(lambda channel: self._make_group(channel, group, entry))
        return tuple(wanted), True

    async def _build(self, group: str, level: int) -> int:
        registry = await self._read()
        entry = registry.groups.get(group)
        if entry is None:
            raise group_missing(group)
        count = max(entry.levels, level + 1)
        await self._control.call(lambda channel: self._make_levels(channel, group, count))
        if count > entry.levels:
            self._known = None
            entry.levels = count
            await self._registry.write(registry)
        await self._tell(f"levels {group} {count}")
        return count

    async def _delete(self, group: str) -> None:
        registry = await self._read()
        entry = registry.groups.get(group)
        registry.groups[group] = Entry([], entry.bound if entry else [], changing=True)
        await self._change(registry, group)

    async def _delete_namespace(self) -> None:
        registry = await self._read()
        names = self._names
        for group in registry.groups:
            await self._control.call(partial(self._delete_group, group=group))

        async def delete(channel: AbstractChannel) -> None:
            # `nowhere` first: a process that finds it missing declares everything again.
            exchanges = (names.exchange, names.unwanted, names.parking, names.later, names.delay, names.news)
            for exchange in (names.nowhere, *exchanges):
                await channel.exchange_delete(exchange)
            for queue in (names.parked, names.registry):
                await channel.queue_delete(queue)

        await self._control.call(delete)
        self.forget()

    async def _settled(self) -> Registry:
        """Read the registry. A change that another process left unfinished is completed first."""
        registry = await self._there(self._registry.peek)
        if registry.stale or any(entry.changing for entry in registry.groups.values()):
            registry = await self._registry.exclusively(self._read)
        self._saw(registry)
        return registry

    async def _there(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do something in the namespace; if a part of it was deleted, declare it again, and repeat."""
        try:
            return await work()
        except BackendConnectionError as exc:
            if not isinstance(exc.__cause__, ChannelNotFound):
                raise
        await self.prepare(await self._control.connection())
        return await work()

    async def _read(self) -> Registry:
        """Read the registry, under its lock. A change that another process left unfinished is completed first."""
        registry = await self._registry.read()
        if registry.stale or any(entry.changing for entry in registry.groups.values()):
            await self._finish(registry)
        self._known = registry
        self._saw(registry)
        return registry

    async def _change(self, registry: Registry, group: str) -> None:
        """Carry out a change, which the next holder of the lock completes if this process dies.

        1. Write the registry with a new version, the old version as stale, and the group's entry marked as `changing`.
        2. Accept delayed messages of the new version only; declare or delete what the entry says (`_finish`).
        3. Write the registry without the mark and the stale version.
        """
        self._known = None  # unless all of it succeeds, what exists is unknown
        registry.stale.append(registry.version)
        registry.version += 1
        await self._registry.write(registry)
        await self._finish(registry, group)

    async def _finish(self, registry: Registry, ours: str | None = None) -> None:
        """Carry out what the registry says.

        Args:
            registry: The registry.
            ours: The group that the caller changes. If another one cannot be declared, that is logged and not raised.
        """
        # First: from now on no delayed message is accepted for a group that is being deleted.
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
                    _log.warning("group %r is half made, and stays so until a process can complete it: %s", group, exc)
                else:
                    registry.groups[group] = Entry(entry.patterns, entry.patterns, levels=entry.levels, made=entry.made)
            else:
                await self._control.call(partial(self._delete_group, group=group))
                self._delays.forget(group)
                del registry.groups[group]
        registry.stale.clear()
        self._known = registry
        self._saw(registry)
        await self._registry.write(registry)

    async def _make_namespace(self, channel: AbstractChannel) -> None:
        names = self._names
        await channel.exchange_declare(names.parking, exchange_type="fanout", durable=True)
        await channel.exchange_declare(
            names.unwanted, exchange_type="fanout", durable=True, arguments={"alternate-exchange": names.parking}
        )
        for topic in (names.later, names.delay):
            await channel.exchange_declare(topic, exchange_type="topic", durable=True)
        await channel.exchange_declare(names.news, exchange_type="fanout", durable=True)
        await channel.queue_declare(names.parked, durable=True, arguments=dict(names.store_arguments))
        await channel.queue_bind(names.parked, names.parking)
        await channel.queue_bind(names.parked, names.delay, "*.parked")

    async def _make_exchange(self, channel: AbstractChannel) -> None:
        names = self._names
        arguments: dict[str, Any] = {"alternate-exchange": names.unwanted}
        await channel.exchange_declare(names.exchange, exchange_type="topic", durable=True, arguments=arguments)

    async def _restore(self, connection: Connection) -> None:
        """Declare the namespace's exchange again with the bindings of all groups, after it was deleted underneath them.

        Until all are bound, `nowhere` does not exist: what is published meanwhile is parked, and not returned as unroutable.
        """
        names = self._names
        registry = await self._registry.read(connection)

        async def restore(channel: AbstractChannel) -> None:
            await channel.exchange_delete(names.nowhere)
            await self._make_exchange(channel)
            for group, entry in registry.groups.items():
                await self._make_queues(channel, group, entry)
            await self._bind(channel, registry)
            await channel.exchange_declare(names.nowhere, exchange_type="fanout", durable=True)
            for group in registry.groups:
                await self._stop_parking(channel, group)

        await self._control.call(restore, connection)
        if registry.groups:
            _log.warning("exchanges of %r were deleted underneath the groups: they are declared again", names.exchange)

    async def _make_group(self, channel: AbstractChannel, group: str, entry: Entry) -> None:
        await self._make_queues(channel, group, entry)
        await self._stop_parking(channel, group)

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
        await channel.queue_bind(queue, names.delay, names.straight(group))
        await self._make_levels(channel, group, entry.levels)
        for pattern in entry.patterns:
            await channel.queue_bind(queue, names.exchange, pattern)
        for pattern in entry.bound:
            if pattern not in entry.patterns:
                await channel.queue_unbind(queue, names.exchange, pattern)

    async def _make_levels(self, channel: AbstractChannel, group: str, count: int) -> None:
        names = self._names
        for level in range(count):
            queue = names.waiting(group, level)
            await channel.queue_declare(queue, durable=True, arguments=dict(names.level_arguments))
            await channel.queue_bind(queue, names.delay, names.wait(group, level))

    async def _stop_parking(self, channel: AbstractChannel, group: str) -> None:
        """Have messages that no group wants returned. This comes last: those that were published before are parked."""
        names = self._names
        await channel.exchange_bind(destination=names.nowhere, source=names.unwanted, routing_key=group)

    async def _bind(self, channel: AbstractChannel, registry: Registry) -> None:
        """Accept copies and delayed messages that are published by the newest version of the registry, and no others."""
        names = self._names
        for version in registry.stale:
            await channel.exchange_unbind(destination=names.delay, source=names.later, routing_key=f"{version}.#")
        await channel.exchange_bind(destination=names.delay, source=names.later, routing_key=f"{registry.version}.#")
