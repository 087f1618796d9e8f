"""Aborts a connection that went silent: without a close or reset of TCP, the loss would be noticed much later."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol

_BEAT: Final = 0.5
"""Seconds between two checks, at most."""

_MISSED: Final = 2.0
"""Heartbeat intervals of silence after which the connection is aborted. (RabbitMQ sends two heartbeats in each.)"""

_PROBES: Final = 0.5
"""Heartbeat intervals between two probes."""


class Heard(Protocol):
    """When data arrived last, by the event loop's clock."""

    heard: float
    """Any data."""
    answered: float
    """Data other than heartbeats."""


class Watch:
    """Watches one connection for silence, and probes it periodically.

    Time in which the event loop is busy does not count: data that arrived meanwhile is read first.

    Args:
        heard: When data arrived.
        heartbeat: The connection's heartbeat interval, in seconds.
        ask: The probe, a request that every broker answers at once.
        reading: Whether the broker reads: one that is short of memory does not, and still sends heartbeats.
        give_up: Called once, with the reason.
    """

    def __init__(
        self,
        heard: Heard,
        heartbeat: float,
        ask: Callable[[], Coroutine[Any, Any, object]],
        reading: Callable[[], bool],
        give_up: Callable[[str], object],
    ) -> None:
        self._heard = heard
        self._limit = heartbeat * _MISSED
        self._every = heartbeat * _PROBES
        self._beat = min(_BEAT, heartbeat / 8)
        self._ask = ask
        self._reading = reading
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._looked_at = self._loop.time()
        self._silent = 0.0
        self.waited = 0.0
        """Seconds for which a probe has been without an answer."""
        self._asked_at = self._looked_at
        self._question: asyncio.Task[object] | None = None
        self._timer = self._loop.call_later(self._beat, self._look)

    def stop(self) -> None:
        """Stop watching."""
        self._timer.cancel()
        if self._question is not None:
            self._question.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        passed, before = min(now - self._looked_at, 2 * self._beat), self._looked_at
        self._looked_at = now
        self._silent = 0.0 if self._heard.heard >= before else self._silent + passed
        pending = self._question is not None and not self._question.done()
        if not pending or not self._reading() or self._heard.answered >= before:
            self.waited = 0.0
        else:
            self.waited += passed
        if self._silent > self._limit:
            self._give_up(f"the broker has been silent for {self._silent:.0f} s")
            return
        if self.waited > self._limit:
            self._give_up(f"the broker has not answered for {self.waited:.0f} s")
            return
        if not pending and self._reading() and now - self._asked_at >= self._every:
            self._asked_at = now
            self._question = self._loop.create_task(_quietly(self._ask))
        self._timer = self._loop.call_later(self._beat, self._look)


async def _quietly(ask: Callable[[], Awaitable[object]]) -> object:
    try:
        return await ask()
    except Exception:  # noqa: BLE001 - the connection's users get the error of a lost connection themselves
        return None
