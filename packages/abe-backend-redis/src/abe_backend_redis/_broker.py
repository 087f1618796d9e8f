"""The server as the transport and the receivers share it: connections, scripts, version."""

import asyncio
from collections.abc import Sequence
from typing import Final

from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import ConfigurationError
from abe_backend_redis._connection import REPLY_TIMEOUT, Link
from abe_backend_redis._errors import ReplyError, code, translate
from abe_backend_redis._protocol import Reply, Wire
from abe_backend_redis._scripts import SCRIPTS
from abe_backend_redis._settings import RedisSettings
from abe_backend_redis._topology import Topology

_log: Final = Log("abe.redis")
_FLOOR: Final = (6, 2)
_XACKDEL: Final = (8, 2, 3)
"""From which version on XACKDEL is used. Redis 8.2.0 to 8.2.2, and 8.3 before its release, crash when it has many ids: CVE-2025-62507."""


class Broker:
    """One Redis server.

    It has one connection for publishing, one for browsing dead letters, and one for everything else, each made at its first use. Each
    receiver has a connection of its own for reading.

    Args:
        settings: The address and the login.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self.settings = settings
        self.topology = Topology(settings.namespace)
        self.has_xackdel = False
        timeout = min(REPLY_TIMEOUT, settings.publish_timeout / 2)  # the rest is for a retry
        self.publishing = Link(settings, "abe-publish", timeout, self._prepare)
        self.controlling = Link(settings, "abe-control", timeout, self._prepare)
        self.browsing = Link(settings, "abe-browse", timeout, self._prepare)
        self._checked = False

    async def close(self) -> None:
        """Disconnect."""
        await gather_all(self.publishing.close(), self.controlling.close(), self.browsing.close())

    async def control(self) -> Wire:
        """Return the connection for everything but publishing, reading and dead letters."""
        return await self.controlling.get()

    async def run(self, name: str, keys: Sequence[bytes], args: Sequence[object], *, wire: Wire | None = None) -> Reply:
        """Run a script, by default on the control connection.

        Raises:
            AbeError: The script failed, or the connection was lost; with `wire`, a `ReplyError`, not translated.
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

    async def _prepare(self, wire: Wire) -> None:
        await self._check(wire)
        await asyncio.gather(*wire.call_many(*((b"SCRIPT", b"LOAD", script.text) for script in SCRIPTS.values())))

    async def _check(self, wire: Wire) -> None:
        """Check the server: its version, and once whether it may evict keys, and whether it persists them."""
        try:
            text = await wire.call(b"INFO")
        except ReplyError as exc:
            _log.info(
                "redis at %s refuses INFO, so its configuration is not checked: %s",
                self.settings.address,
                exc,
            )
            return
        info = dict(line.split(":", 1) for line in text.decode(errors="replace").splitlines() if ":" in line)
        version = tuple(int(part) for part in info.get("redis_version", "0").split(".") if part.isdigit())
        if version < _FLOOR:
            raise ConfigurationError(
                f"redis at {self.settings.address} is version {info.get('redis_version')}: 6.2 is the oldest that has all commands"
            )
        self.has_xackdel = version >= _XACKDEL and version[:2] != (8, 3) and "valkey_version" not in info
        if self._checked:
            return
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and info.get("maxmemory", "0") != "0":
            raise ConfigurationError(
                f"redis at {self.settings.address} has maxmemory-policy {policy!r}: it may drop messages silently when memory runs out. "
                f"Set it to 'noeviction'"
            )
        if info.get("aof_enabled") != "1":
            _log.warning(
                "redis at %s has appendonly off: messages since its last snapshot are lost when it stops. Set 'appendonly yes'",
                self.settings.address,
            )
        self._checked = True
