"""The server as transport and receivers share it: its connections, its scripts, and what it is."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from abe.errors import ConfigurationError
from abe_backend_redis._connection import REPLY_TIMEOUT, Link
from abe_backend_redis._errors import ReplyError, code, translate
from abe_backend_redis._protocol import Reply, Wire
from abe_backend_redis._scripts import SCRIPTS
from abe_backend_redis._settings import RedisSettings
from abe_backend_redis._topology import Topology

_log: Final = logging.getLogger("abe.redis")
_FLOOR: Final = (6, 2)


class Broker:
    """One Redis server.

    It has a connection to publish, one to look through dead letters, which is made when somebody does, and one for everything else;
    each receiver has its own to read.

    Args:
        settings: Where it is, and as whom to log in.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self.settings = settings
        self.topology = Topology(settings.namespace)
        self.has_xackdel = False
        timeout = min(REPLY_TIMEOUT, settings.publish_timeout / 2)  # what is left is for another try
        self.publishing = Link(settings, "abe-publish", timeout, self._prepare)
        self.controlling = Link(settings, "abe-control", timeout, self._prepare)
        self.browsing = Link(settings, "abe-browse", timeout, self._prepare)
        self._checked = False

    async def close(self) -> None:
        """Disconnect."""
        await asyncio.gather(self.publishing.close(), self.controlling.close(), self.browsing.close())

    async def control(self) -> Wire:
        """Return the connection for everything but publishing, reading and dead letters."""
        return await self.controlling.get()

    def drop(self, silence: float) -> None:
        """Give up connections that have been silent for so many seconds: there is no time to be patient."""
        for link in (self.publishing, self.controlling):
            link.drop(silence)

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
