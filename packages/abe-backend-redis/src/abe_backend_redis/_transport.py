"""The primitives: what the engine asks of Redis."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from abe.backends.message_queue.base import Batching, DeadLetter, Envelope, GroupStats, Outcomes, Settling
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.backends.message_queue.base.names import EVERYTHING
from abe.errors import AbeError, BackendConnectionError, ConfigurationError, PublishUnknownError
from abe_backend_redis._connection import REPLY_TIMEOUT, Link
from abe_backend_redis._dead_letters import DeadLetters
from abe_backend_redis._errors import ReplyError, code, translate, translated
from abe_backend_redis._protocol import Reply, Wire
from abe_backend_redis._receiver import RedisReceiver
from abe_backend_redis._registry import Registry, patterns_of
from abe_backend_redis._scripts import SCRIPTS
from abe_backend_redis._settings import RedisSettings
from abe_backend_redis._topology import Topology

_log: Final = logging.getLogger("abe.redis")
_FLOOR: Final = (6, 2)
_EVERYTHING: Final = msgspec.json.encode(EVERYTHING)
_STALE: Final = 20
"""Times that the groups may change under one batch before it counts as failed."""


class RedisTransport:
    """Streams and scripts on one Redis server.

    It has a connection to publish, one to look through dead letters, which is made when somebody does, and one for everything else;
    each receiver has its own to read.
    """

    batching = Batching(messages=250, bytes=256 * 1024, max_concurrent=2)
    settling = Settling()

    def __init__(self, settings: RedisSettings) -> None:
        self.settings = settings
        self.topology = Topology(settings.namespace)
        self.has_xackdel = False
        timeout = min(REPLY_TIMEOUT, settings.publish_timeout / 2)  # what is left is for another try
        self._publishing = Link(settings, "abe-publish", timeout, self._prepare)
        self._controlling = Link(settings, "abe-control", timeout, self._prepare)
        self._browsing = Link(settings, "abe-browse", timeout, self._prepare)
        self._registry: Registry | None = None
        self._checked = False

    async def open(self) -> None:
        """Connect to publish; check the server once."""
        await self._publishing.get()

    async def close(self) -> None:
        """Disconnect."""
        await asyncio.gather(self._publishing.close(), self._controlling.close(), self._browsing.close())

    async def ping(self) -> None:
        """PING."""
        wire = await self.control()
        with translated(self.settings.address):
            await wire.call(b"PING")

    async def control(self) -> Wire:
        """Return the connection for everything but publishing, reading and dead letters."""
        return await self._controlling.get()

    def drop(self, silence: float) -> None:
        """Give up connections that have been silent for so many seconds: there is no time to be patient."""
        for link in (self._publishing, self._controlling):
            link.drop(silence)

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        """Publish by one script call, again if the groups changed meanwhile."""
        wire = await self._publishing.get()
        for _ in range(_STALE):
            registry = self._registry or await self._load_registry(wire)
            reply = await self._publish(wire, registry.pack(envelopes))
            if reply is not None:
                full = [position for position in reply if isinstance(position, int)]
                return registry.outcomes(envelopes, full, self._failed(reply) if len(full) < len(reply) else {})
            self._registry = None
        raise BackendConnectionError("the groups change faster than messages can be published")

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Register the group, and move the parked messages that it wants."""
        wanted = b"" if patterns is None else msgspec.json.encode(patterns)
        while True:
            joining, present = await self._join(group, wanted, change)
            if not joining:
                return patterns_of(group, present)
            if joining == group.encode():
                change = False  # it is on record, and somebody else may change it from now on
            else:
                await self._join(joining.decode(), b"", change=False)

    async def delete_group(self, group: str) -> None:
        """Delete what the group has."""
        names = self.topology
        await self.run("delete", [names.groups, names.version, names.joining, *names.all_of(group)], [group])

    async def delete_namespace(self) -> None:
        """Delete the groups, what is parked, the registry, and whatever else is found under the namespace."""
        names = self.topology
        for group in await self._every_group():
            await self.delete_group(group)
        wire = await self.control()
        with translated(self.settings.address):
            await _unlink(
                wire, [names.groups, names.joining, names.held, names.held_delayed, names.held_passed, names.version]
            )
            await self._sweep(wire)

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Read the registry."""
        return (await self._load_registry(await self.control())).groups

    async def subscribe(self, group: str, prefetch: int) -> RedisReceiver:
        """Make a consumer with a name of its own."""
        receiver = RedisReceiver(self, group, self.settings.lease)
        await receiver.join()
        return receiver

    async def stats(self, group: str) -> GroupStats:
        """Count."""
        names = self.topology
        keys = [names.groups, names.queue(group), names.delayed(group), names.dead(group)]
        waiting, in_flight, delayed, dead, age = await self.run("stats", keys, [group])
        oldest = None if age < 0 else age / 1000
        return GroupStats(waiting=waiting, in_flight=in_flight, delayed=delayed, dead=dead, oldest=oldest)

    def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        """Read them page by page."""
        return self._dead_letters(group).browse()

    def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Move them page by page."""
        return self._dead_letters(group).replay(ids)

    def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Delete them page by page."""
        return self._dead_letters(group).purge(ids)

    async def run(self, name: str, keys: Sequence[bytes], args: Sequence[object], *, wire: Wire | None = None) -> Reply:
        """Run a script, by default on the control connection.

        Raises:
            AbeError: The script failed, or the connection broke; with `wire`, a `ReplyError` as it is.
        """
        own = wire is None
        wire = wire or await self.control()
        script = SCRIPTS[name]
        call = (b"EVALSHA", script.sha, len(keys), *keys, *args)
        try:
            try:
                return await wire.call(*call)
            except ReplyError as exc:
                if code(exc) != "NOSCRIPT":
                    raise
                await wire.call(b"SCRIPT", b"LOAD", script.text)
                return await wire.call(*call)
        except ReplyError as exc:
            if own:
                raise translate(exc, self.settings.address) from exc
            raise

    async def _browse(self, name: str, keys: Sequence[bytes], args: Sequence[object]) -> Reply:
        with translated(self.settings.address):
            return await self.run(name, keys, args, wire=await self._browsing.get())

    def _dead_letters(self, group: str) -> DeadLetters:
        return DeadLetters(self._browse, self.topology, group, self.settings.address)

    async def _join(self, group: str, wanted: bytes, change: bool) -> tuple[bytes, bytes]:
        names = self.topology
        keys = [names.groups, names.version, names.joining, names.held, names.held_delayed, names.held_passed]
        keys += [names.queue(group), names.delayed(group)]
        joining, present = await self.run("declare", keys, [group, wanted, int(change), _EVERYTHING])
        return joining, present

    async def _every_group(self) -> Sequence[str]:
        """The groups that exist, whatever their patterns are, and the one that is being made."""
        wire = await self.control()
        with translated(self.settings.address):
            known, joining = await asyncio.gather(
                *wire.call_many((b"HGETALL", self.topology.groups), (b"HGET", self.topology.joining, b"group"))
            )
        return [group.decode(errors="replace") for group in (*known[::2], *filter(None, [joining]))]

    async def _sweep(self, wire: Wire) -> None:
        """Delete what is under the namespace and known to no registry, as after a deletion underneath; where the user may look."""
        cursor: Reply = b"0"
        while True:
            try:
                cursor, keys = await wire.call(b"SCAN", cursor, b"MATCH", self.topology.pattern, b"COUNT", 5000)
            except ReplyError as exc:
                _log.debug("redis at %s does not let us look for more keys: %s", self.settings.address, exc)
                return
            if keys:
                await _unlink(wire, keys)
            if cursor == b"0":
                return

    async def _publish(self, wire: Wire, data: bytes) -> Reply:
        """Send a packed publish; None when the groups have changed."""
        if not wire.alive:
            raise BackendConnectionError(f"the connection to redis at {self.settings.address} was lost")
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
            raise translate(exc, self.settings.address) from exc

    def _failed(self, reply: Reply) -> Mapping[int, AbeError]:
        """Return what went wrong with messages of a publish of which others are stored."""
        errors: dict[int, AbeError] = {}
        for position, copies, text in (item for item in reply if not isinstance(item, int)):
            cause = ReplyError(text.decode(errors="replace"))
            errors[position] = error = translate(cause, self.settings.address)
            error.__cause__ = cause
            error.maybe_accepted = copies > 0  # some groups have it, others not
        return errors

    async def _load_registry(self, wire: Wire) -> Registry:
        keys = [self.topology.version, self.topology.groups]
        with translated(self.settings.address):
            version, flat = await self.run("registry", keys, [], wire=wire)
        named = ((group.decode(errors="replace"), text) for group, text in zip(flat[::2], flat[1::2], strict=True))
        groups = {group: patterns_of(group, text) for group, text in sorted(named)}
        self._registry = Registry(self.topology, version, groups, self.settings.max_backlog or 0)
        return self._registry

    async def _prepare(self, wire: Wire) -> None:
        if not self._checked:
            await self._check(wire)
            self._checked = True
        await asyncio.gather(*wire.call_many(*((b"SCRIPT", b"LOAD", script.text) for script in SCRIPTS.values())))

    async def _check(self, wire: Wire) -> None:
        """Look at the server: how old it is, whether it may drop our keys, whether it keeps them."""
        try:
            text = await wire.call(b"INFO")
        except ReplyError as exc:
            _log.info(
                "redis at %s does not let us look at its configuration, which is not checked: %s",
                self.settings.address,
                exc,
            )
            return
        info = dict(line.split(":", 1) for line in text.decode(errors="replace").splitlines() if ":" in line)
        version = tuple(int(part) for part in info.get("redis_version", "0").split(".")[:2] if part.isdigit())
        if version < _FLOOR:
            raise ConfigurationError(
                f"redis at {self.settings.address} is version {info.get('redis_version')}: 6.2 is the oldest that has the commands needed"
            )
        self.has_xackdel = version >= (8, 2) and "valkey_version" not in info
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and info.get("maxmemory", "0") != "0":
            raise ConfigurationError(
                f"redis at {self.settings.address} has maxmemory-policy {policy!r}: it may drop messages silently when memory runs out. "
                f"Set it to 'noeviction'"
            )
        if info.get("aof_enabled") != "1":
            _log.warning(
                "redis at %s has appendonly off: what came since its last snapshot is lost when it stops. Set 'appendonly yes' to keep it",
                self.settings.address,
            )


async def _unlink(wire: Wire, keys: Sequence[bytes]) -> None:
    """Delete keys; in the background, where the user may."""
    try:
        await wire.call(b"UNLINK", *keys)
    except ReplyError:
        await wire.call(b"DEL", *keys)


if TYPE_CHECKING:
    _: type[TransportProtocol] = RedisTransport
