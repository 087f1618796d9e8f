"""A connection to Redis that connects when it is needed, and again after it was lost."""

from collections.abc import Awaitable, Callable
from typing import Final

from abe.backends.message_queue.base.tasks import SharedTask
from abe.errors import BackendConnectionError
from abe_backend_redis._errors import translated
from abe_backend_redis._login import connect
from abe_backend_redis._protocol import Wire
from abe_backend_redis._settings import RedisSettings

REPLY_TIMEOUT: Final = 5.0
"""Seconds without a reply that is due after which a connection counts as lost. Well within the backend's `silence_bound`."""


class Link:
    """A connection that connects when it is needed, and again after it was lost.

    Args:
        settings: The address and the login.
        name: The connection's name in Redis's list of clients.
        timeout: Seconds without a reply that is due after which the connection counts as lost.
        prepare: Called with each new connection before it is used.
    """

    def __init__(
        self, settings: RedisSettings, name: str, timeout: float, prepare: Callable[[Wire], Awaitable[None]]
    ) -> None:
        self._settings = settings
        self._name = name
        self._timeout = timeout
        self._prepare = prepare
        self._wire: Wire | None = None
        self._connecting = SharedTask(self._connect, self._was_closed)

    async def get(self) -> Wire:
        """Return a live connection.

        Concurrent callers share one attempt; cancelling a caller does not cancel it.

        Raises:
            AbeError: Connecting failed; see `connect`.
        """
        if self._wire is not None and self._wire.alive:
            return self._wire
        return await self._connecting.join()

    def drop(self, silence: float = 0.0) -> None:
        """Disconnect, if the server has been silent for `silence` seconds; the next `get` connects again."""
        if self._wire is not None and self._wire.silence >= silence:
            self._wire.close()

    async def close(self) -> None:
        """Disconnect for good."""
        self.drop()
        await self._connecting.close()

    async def _connect(self) -> Wire:
        wire = await connect(self._settings, self._name, self._timeout)
        try:
            with translated(self._settings.address):
                await self._prepare(wire)
        except BaseException:
            wire.close()
            raise
        self._wire = wire
        return wire

    def _was_closed(self) -> BackendConnectionError:
        return BackendConnectionError(f"the connection to redis at {self._settings.address} was closed")
