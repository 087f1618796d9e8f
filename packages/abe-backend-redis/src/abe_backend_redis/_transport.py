"""The primitives: what the engine asks of Redis."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from abe.backends.message_queue.base import Batching, DeadLetter, Envelope, GroupStats
from abe.backends.message_queue.base import Transport as TransportProtocol
from abe.backends.message_queue.base.names import EVERYTHING, matches
from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    ConfigurationError,
    PublishUnknownError,
    UnroutableError,
)
from abe_backend_redis import _wire
from abe_backend_redis._connection import Link, Reply, Wire, pack
from abe_backend_redis._errors import ReplyError, code, translate, translated
from abe_backend_redis._receiver import RedisReceiver
from abe_backend_redis._scripts import SCRIPTS
from abe_backend_redis._settings import RedisSettings
from abe_backend_redis._topology import Topology

_log: Final = logging.getLogger("abe.redis")
_FLOOR: Final = (6, 2)
_PAGE: Final = 500
_MOST_ROUTES: Final = 10_000
_STALE: Final = 20
"""Times that the groups may change under one batch before it counts as failed."""


class _Registry:
    """The groups as they were at one version, and which of them wants which key."""

    def __init__(
        self, topology: Topology, version: bytes, groups: Mapping[str, tuple[str, ...]], max_backlog: int
    ) -> None:
        self.groups = groups
        self._patterns = list(groups.values())
        keys = [topology.version]
        for group in groups:
            keys += [topology.queue(group), topology.delayed(group)]
        if not groups:
            keys += [topology.held, topology.held_delayed]
        self._head = (b"EVALSHA", SCRIPTS["publish"].sha, len(keys), *keys, version, max_backlog)
        self._routes: dict[str, bytes] = {}
        self.all_routed = True
        """Whether every key seen so far is wanted by some group."""

    def pack(self, envelopes: Sequence[Envelope]) -> bytes:
        """Return the call that publishes: messages for the same groups, with the same delay, make a run."""
        args: list[object] = [*self._head]
        routes = self._routes
        run_mask, run_delay, place, count = b"", -1.0, 0, 0
        for envelope in envelopes:
            mask = routes.get(envelope.key) or self.route(envelope.key)
            if mask != run_mask or envelope.delay != run_delay:
                if count:
                    args[place] = count
                run_mask, run_delay, count = mask, envelope.delay, 0
                args += (mask, -int(-run_delay * 1000 // 1), 0)
                place = len(args) - 1
            args += (_wire.pack(envelope), envelope.body)
            count += 1
        args[place] = count
        return pack(tuple(args))

    def route(self, key: str) -> bytes:
        """Return a digit for each group: 1 for those that want the key."""
        if len(self._routes) >= _MOST_ROUTES:
            self._routes.clear()
        wanted = [any(matches(pattern, key) for pattern in patterns) for patterns in self._patterns]
        mask = b"".join(b"1" if want else b"0" for want in wanted) or b"1"  # no group: the held messages
        self.all_routed = self.all_routed and b"1" in mask
        self._routes[key] = mask
        return mask

    def unroutable(self, envelopes: Sequence[Envelope]) -> list[int]:
        """Return the positions of messages that no group wants."""
        return [i for i, envelope in enumerate(envelopes) if b"1" not in self.route(envelope.key)]


class RedisTransport:
    """Streams and scripts on one Redis server.

    It has two connections, one to publish and one for everything else, and each receiver has its own to read.
    """

    batching = Batching(messages=250, bytes=256 * 1024, flights=2)

    def __init__(self, settings: RedisSettings) -> None:
        self.settings = settings
        self.topology = Topology(settings.namespace)
        self.has_xackdel = False
        self._publishing = Link(settings, "abe-publish", settings.publish_timeout, self._prepare)
        self._controlling = Link(settings, "abe-control", settings.publish_timeout, self._prepare)
        self._registry: _Registry | None = None
        self._patterns: dict[str, tuple[str, ...]] = {}
        self._checked = False

    async def open(self) -> None:
        """Connect to publish; check the server once."""
        await self._publishing.get()

    async def close(self) -> None:
        """Disconnect."""
        await self._publishing.close()
        await self._controlling.close()

    async def ping(self) -> None:
        """PING."""
        wire = await self.control()
        with translated(self.settings.address):
            await wire.call(b"PING")

    async def control(self) -> Wire:
        """Return the connection for everything but publishing and reading."""
        return await self._controlling.get()

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Publish by one script call, again if the groups changed meanwhile."""
        wire = await self._publishing.get()
        for _ in range(_STALE):
            registry = self._registry or await self._load_registry(wire)
            reply = await self._publish(wire, registry.pack(envelopes))
            if reply is not None:
                return _outcomes(registry, envelopes, reply)
            self._registry = None
        raise BackendConnectionError("the groups change faster than messages can be published")

    async def declare(self, group: str, patterns: tuple[str, ...] | None) -> None:
        """Register the group and move the held messages that it wants."""
        await self._declare(group, patterns, EVERYTHING)
        if patterns is not None:
            self._patterns[group] = patterns

    async def restore(self, group: str) -> None:
        """Make a group again that was deleted underneath its consumers, with the patterns that it had when we last knew."""
        await self._declare(group, None, self._patterns.get(group, EVERYTHING))

    async def delete_group(self, group: str) -> None:
        """Delete what the group has."""
        names = self.topology
        keys = [
            names.groups,
            names.version,
            names.queue(group),
            names.delayed(group),
            names.dead(group),
            names.alive(group),
        ]
        await self.run("delete", keys, [group])

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Read the registry."""
        return (await self._load_registry(await self.control())).groups

    async def subscribe(self, group: str, prefetch: int) -> RedisReceiver:
        """Make a consumer with a name of its own."""
        receiver = RedisReceiver(self, group, self.settings.lease)
        await receiver.beat()
        return receiver

    async def stats(self, group: str) -> GroupStats:
        """Count."""
        names = self.topology
        keys = [names.queue(group), names.delayed(group), names.dead(group)]
        waiting, in_flight, delayed, dead, age = await self.run("stats", keys, [])
        oldest = None if age < 0 else age / 1000
        return GroupStats(waiting=waiting, in_flight=in_flight, delayed=delayed, dead=dead, oldest=oldest)

    async def dead_letters(self, group: str, limit: int) -> Sequence[DeadLetter]:
        """Read from the old end."""
        return [_wire.dead_letter(*entry) for entry in await self._page(group, b"-", limit)]

    async def find_dead_letter(self, group: str, id: str) -> DeadLetter | None:
        """Look through all of them."""
        async for page in self._pages(group, {id}):
            return page[0][0]
        return None

    async def replay(self, group: str, ids: Collection[str] | None) -> int:
        """Move them in steps; each is in one place at any time."""
        keys, moved = [self.topology.dead(group), self.topology.queue(group)], 0
        async for page in self._pages(group, ids):
            moved += await self.run("replay", keys, [entry for _, entry in page])
        return moved

    async def purge(self, group: str, ids: Collection[str] | None) -> int:
        """Delete them."""
        removed = 0
        async for page in self._pages(group, ids):
            wire = await self.control()
            with translated(self.settings.address):
                removed += await wire.call(b"XDEL", self.topology.dead(group), *(entry for _, entry in page))
        return removed

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

    async def _declare(self, group: str, patterns: tuple[str, ...] | None, otherwise: tuple[str, ...]) -> None:
        names = self.topology
        keys = [names.groups, names.version, names.queue(group), names.delayed(group), names.held, names.held_delayed]
        wanted = b"" if patterns is None else msgspec.json.encode(patterns)
        position: Reply = b"-"
        while position:
            position = await self.run("declare", keys, [group, wanted, position, msgspec.json.encode(otherwise)])

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

    async def _load_registry(self, wire: Wire) -> _Registry:
        keys = [self.topology.version, self.topology.groups]
        with translated(self.settings.address):
            version, flat = await self.run("registry", keys, [], wire=wire)
        groups = {
            group.decode(): tuple(msgspec.json.decode(patterns, type=list[str]))
            for group, patterns in sorted(zip(flat[::2], flat[1::2], strict=True))
        }
        self._patterns.update(groups)
        self._registry = _Registry(self.topology, version, groups, self.settings.max_backlog or 0)
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

    async def _page(
        self, group: str, start: bytes, count: int, end: bytes = b"+"
    ) -> Sequence[tuple[bytes, list[bytes]]]:
        wire = await self.control()
        with translated(self.settings.address):
            return await wire.call(b"XRANGE", self.topology.dead(group), start, end, b"COUNT", count)  # type: ignore[no-any-return]

    async def _pages(
        self, group: str, ids: Collection[str] | None
    ) -> AsyncGenerator[Sequence[tuple[DeadLetter, bytes]]]:
        """Go through the dead letters that are there now: those with these ids (None: all), and where each is."""
        wire = await self.control()
        with translated(self.settings.address):
            newest = await wire.call(b"XREVRANGE", self.topology.dead(group), b"+", b"-", b"COUNT", 1)
        start = b"-"
        while newest and (page := await self._page(group, start, _PAGE, newest[0][0])):
            letters = ((_wire.dead_letter(entry, fields), entry) for entry, fields in page)
            if chosen := [(letter, entry) for letter, entry in letters if ids is None or letter.id in ids]:
                yield chosen
            start = b"(" + page[-1][0]


def _outcomes(registry: _Registry, envelopes: Sequence[Envelope], rejected: Sequence[int]) -> Sequence[AbeError | None]:
    if not rejected and registry.all_routed:
        return ()
    outcomes: list[AbeError | None] = [None] * len(envelopes)
    for position in registry.unroutable(envelopes):
        outcomes[position] = UnroutableError(f"no group wants the key {envelopes[position].key!r}")
    for position in rejected:
        outcomes[position] = BackpressureError("a group that wants the message has max_backlog messages waiting")
    return outcomes


if TYPE_CHECKING:
    _: type[TransportProtocol] = RedisTransport
