"""A connection that went silent is given up: without an end that TCP tells of, nobody else would notice for long."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol

_BEAT: Final = 0.5
"""Seconds between two looks at the least."""

_MISSED: Final = 2.0
"""Heartbeats without a sign of life. (RabbitMQ sends one each half of it.)"""

_PROBES: Final = 0.5
"""Heartbeats between two questions."""


class Heard(Protocol):
    """When something came, by the event loop's clock."""

    heard: float
    """Anything."""
    answered: float
    """More than a heartbeat."""


class Watch:
    """Listens to one connection, and asks it now and then.

    Only time counts in which the event loop runs: what came while it was busy is read first.

    Args:
        heard: When something came.
        heartbeat: The connection's, in seconds.
        ask: A request that every broker answers at once.
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
        """Seconds for which a question has been without an answer."""
        self._asked_at = self._looked_at
        self._question: asyncio.Task[object] | None = None
        self._timer = self._loop.call_later(self._beat, self._look)

    def stop(self) -> None:
        """Look no more."""
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
            self._give_up(f"nothing was heard of it for {self._silent:.0f} s")
            return
        if self.waited > self._limit:
            self._give_up(f"it has not answered for {self.waited:.0f} s")
            return
        if not pending and self._reading() and now - self._asked_at >= self._every:
            self._asked_at = now
            self._question = self._loop.create_task(_quietly(self._ask))
        self._timer = self._loop.call_later(self._beat, self._look)


async def _quietly(ask: Callable[[], Awaitable[object]]) -> object:
    try:
        return await ask()
    except Exception:  # noqa: BLE001 - what ends the connection is told to those who use it
        return None
