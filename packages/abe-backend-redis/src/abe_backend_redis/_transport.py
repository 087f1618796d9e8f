"""Redis's transport: the primitives that the engine calls."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from abe.backends.message_queue.base import Batching, DeadLetter, Envelope, GroupStats, Outcomes, Receiving, Settling
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.names import EVERYTHING
from abe.errors import AbeError, BackendConnectionError, PublishUnknownError
from abe_backend_redis._broker import Broker
from abe_backend_redis._dead_letters import DeadLetters
from abe_backend_redis._errors import ReplyError, code, translate, translated
from abe_backend_redis._protocol import Reply, Wire
from abe_backend_redis._receiver import RedisReceiver
from abe_backend_redis._registry import Registry, patterns_of
from abe_backend_redis._scripts import SCRIPTS
from abe_backend_redis._settings import RedisSettings

_log: Final = Log("abe.redis")
_EVERYTHING: Final = msgspec.json.encode(EVERYTHING)
_STALE: Final = 20
"""How often the groups may change during one publish before it fails."""


class RedisTransport:
    """Streams and scripts on one Redis server."""

    batching = Batching(messages=250, bytes=256 * 1024, max_concurrent=2)
    receiving = Receiving()
    settling = Settling()

    def __init__(self, settings: RedisSettings) -> None:
        self._broker = Broker(settings)
        self._names = self._broker.topology
        self._registry: Registry | None = None

    async def open(self) -> None:
        """Connect to publish; check the server once."""
        await self._broker.publishing.get()

    async def close(self) -> None:
        """Disconnect."""
        await self._broker.close()

    async def ping(self) -> None:
        """Send PING."""
        wire = await self._broker.control()
        with translated(self._broker.settings.address):
            await wire.call(b"PING")

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        """Publish with one script call, and again if the groups have changed meanwhile."""
        wire = await self._broker.publishing.get()
        for _ in range(_STALE):
            registry = self._registry or await self._load_registry(wire)
            reply = await self._publish(wire, registry.pack(envelopes))
            if reply is not None:
                full = [position for position in reply if isinstance(position, int)]
                return registry.outcomes(envelopes, full, self._failed(reply) if len(full) < len(reply) else {})
            self._registry = None
        raise BackendConnectionError("the groups change faster than messages can be published")

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Register the group, and move the parked messages that it wants to it."""
        wanted = b"" if patterns is None else msgspec.json.encode(patterns)
        while True:
            joining, present = await self._join(group, wanted, change)
            if not joining:
                return patterns_of(group, present)
            if joining == group.encode():
                change = False  # the change is recorded, and another client may replace it from now on
            else:
                await self._join(joining.decode(), b"", change=False)

    async def delete_group(self, group: str) -> None:
        """Delete the group's keys."""
        names = self._names
        await self._broker.run("delete", [names.groups, names.version, names.joining, *names.all_of(group)], [group])

    async def delete_namespace(self) -> None:
        """Delete the groups, the parked messages, the registry, and any other key of the namespace."""
        names = self._names
        for group in await self._every_group():
            await self.delete_group(group)
        wire = await self._broker.control()
        with translated(self._broker.settings.address):
            await _unlink(
                wire,
                [names.groups, names.joining, names.parked, names.parked_delayed, names.parked_passed, names.version],
            )
            await self._sweep(wire)

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Read the registry."""
        return (await self._load_registry(await self._broker.control())).groups

    async def subscribe(self, group: str, prefetch: int) -> RedisReceiver:
        """Register a consumer with a unique name."""
        receiver = RedisReceiver(self._broker, group, self._broker.settings.lease)
        await receiver.join()
        return receiver

    async def stats(self, group: str) -> GroupStats:
        """Count the group's messages with one script."""
        names = self._names
        keys = [names.groups, names.queue(group), names.delayed(group), names.dead(group)]
        waiting, in_flight, delayed, dead, age = await self._broker.run("stats", keys, [group])
        oldest = None if age < 0 else age / 1000
        return GroupStats(waiting=waiting, in_flight=in_flight, delayed=delayed, dead=dead, oldest=oldest)

    def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        """Read the dead letters page by page."""
        return self._dead_letters(group).browse()

    def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Move dead letters page by page."""
        return self._dead_letters(group).replay(ids)

    def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Delete dead letters page by page."""
        return self._dead_letters(group).purge(ids)

    async def _browse(self, name: str, keys: Sequence[bytes], args: Sequence[object]) -> Reply:
        with translated(self._broker.settings.address):
            return await self._broker.run(name, keys, args, wire=await self._broker.browsing.get())

    def _dead_letters(self, group: str) -> DeadLetters:
        return DeadLetters(self._browse, self._names, group, self._broker.settings.address)

    async def _join(self, group: str, wanted: bytes, change: bool) -> tuple[bytes, bytes]:
        names = self._names
        keys = [names.groups, names.version, names.joining, names.parked, names.parked_delayed, names.parked_passed]
        keys += [names.queue(group), names.delayed(group)]
        joining, present = await self._broker.run("declare", keys, [group, wanted, int(change), _EVERYTHING])
        return joining, present

    async def _every_group(self) -> Sequence[str]:
        """Return the groups that exist, and the one that is joining. Does not parse their patterns."""
        wire = await self._broker.control()
        with translated(self._broker.settings.address):
            known, joining = await asyncio.gather(
                *wire.call_many((b"HGETALL", self._names.groups), (b"HGET", self._names.joining, b"group"))
            )
        return [group.decode(errors="replace") for group in (*known[::2], *filter(None, [joining]))]

    async def _sweep(self, wire: Wire) -> None:
        """Delete keys of the namespace that belong to no registered group, if the user may SCAN."""
        cursor: Reply = b"0"
        while True:
            try:
                cursor, keys = await wire.call(b"SCAN", cursor, b"MATCH", self._names.pattern, b"COUNT", 5000)
            except ReplyError as exc:
                _log.debug(
                    "redis at %s refuses SCAN, so unregistered keys are not deleted: %s",
                    self._broker.settings.address,
                    exc,
                )
                return
            if keys:
                await _unlink(wire, keys)
            if cursor == b"0":
                return

    async def _publish(self, wire: Wire, data: bytes) -> Reply:
        """Send a packed publish; None when the groups have changed."""
        if not wire.alive:
            raise BackendConnectionError(f"the connection to redis at {self._broker.settings.address} was lost")
        try:
            return await wire.send(data, 1)[0]
        except BackendConnectionError as exc:
            raise PublishUnknownError(f"{exc}, before the confirm came") from exc
        except ReplyError as exc:
            if code(exc) == "STALE":
                return None
            if code(exc) == "NOSCRIPT":
                await wire.call(b"SCRIPT", b"LOAD", SCRIPTS["publish"].text)
                return None
            raise translate(exc, self._broker.settings.address) from exc

    def _failed(self, reply: Reply) -> Mapping[int, AbeError]:
        """Return the errors of single messages of a publish, by position."""
        errors: dict[int, AbeError] = {}
        for position, copies, text in (item for item in reply if not isinstance(item, int)):
            cause = ReplyError(text.decode(errors="replace"))
            errors[position] = error = translate(cause, self._broker.settings.address)
            error.__cause__ = cause
            error.maybe_accepted = copies > 0  # some groups have it
        return errors

    async def _load_registry(self, wire: Wire) -> Registry:
        keys = [self._names.version, self._names.groups]
        with translated(self._broker.settings.address):
            version, flat = await self._broker.run("registry", keys, [], wire=wire)
        named = ((group.decode(errors="replace"), text) for group, text in zip(flat[::2], flat[1::2], strict=True))
        groups = {group: patterns_of(group, text) for group, text in sorted(named)}
        self._registry = Registry(self._names, version, groups, self._broker.settings.max_backlog or 0)
        return self._registry


async def _unlink(wire: Wire, keys: Sequence[bytes]) -> None:
    """Delete keys; in the background if the user may UNLINK."""
    try:
        await wire.call(b"UNLINK", *keys)
    except ReplyError:
        await wire.call(b"DEL", *keys)


if TYPE_CHECKING:
    _: type[TransportProtocol] = RedisTransport
