"""Moves parked messages to the groups that want them."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final

from abe.backends.message_queue.base.log import Log
from abe.errors import AbeError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._browser import Browser, Found
from abe_backend_rabbitmq._channel import Outgoing
from abe_backend_rabbitmq._control import Control, Lock
from abe_backend_rabbitmq._delays import Delays
from abe_backend_rabbitmq._publisher import Publisher, moved
from abe_backend_rabbitmq._registry import Registry, RegistryKeeper
from abe_backend_rabbitmq._topology import Topology
from abe_backend_rabbitmq._wire import Header

_log: Final = Log("abe.rabbitmq")

_RARELY: Final = 600.0
"""Seconds after which messages that no group wanted are browsed again although their number is the same."""


class Parked:
    """Moves parked messages, under a lock of its own: declaring and subscribing need the registry's lock only.

    Args:
        control: Carries the requests.
        publisher: Publishes the copies.
        registry: Reads the groups.
        delays: Chooses the levels of delayed messages.
        topology: The names.
        timeout: Seconds to wait for another process that moves them.
    """

    def __init__(
        self,
        control: Control,
        publisher: Publisher,
        registry: RegistryKeeper,
        delays: Delays,
        topology: Topology,
        timeout: float,
    ) -> None:
        self._control = control
        self._publisher = publisher
        self._registry = registry
        self._delays = delays
        self._names = topology
        self._lock = Lock(control, topology.parked_lock, timeout)
        self._begun: asyncio.Task[None] | None = None
        self._unwanted = 0
        self._full = False
        self._look_at = 0.0

    def look(self) -> None:
        """Start moving messages that were parked late, unless that is in progress. A failure is logged; the next call retries."""
        if self._begun is None or self._begun.done():
            self._begun = self._registry.start(self._look())
            self._begun.add_done_callback(_report)

    def start(self) -> "asyncio.Task[None]":
        """Start moving messages. Cancelling a caller does not cancel it."""
        return self._registry.start(self.hand_over())

    async def hand_over(self) -> None:
        """Move parked messages to the groups that want them, until none is left or a group is full."""
        self._full = False
        if not await self._control.count(self._names.parked):
            return
        async with self._lock.held() as connection:
            registry = await self._registry.peek()
            queue = self._names.parked
            browser = Browser(self._control, connection, queue, await self._control.count(queue, connection) or 0)
            try:
                while page := await browser.page():
                    if not await self._hand_over(browser, page, registry):
                        self._full = True
                        break
            finally:
                await browser.close()

    async def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        count = await self._control.count(self._names.parked)
        if not count or (count == self._unwanted and now < self._look_at):
            return
        await self.hand_over()
        if not self._full:
            self._unwanted, self._look_at = await self._control.count(self._names.parked) or 0, now + _RARELY

    async def _hand_over(self, browser: Browser, page: Sequence[Found], registry: Registry) -> bool:
        """Move the wanted messages of a page; return whether every group accepted its copies."""
        copies: list[Outgoing] = []
        places: list[tuple[int, str]] = []
        done: list[int] = []
        for place, (_, header, body) in enumerate(page):
            groups = self._recipients(registry, header)
            if groups is None:
                done.append(place)
            for group in groups or ():
                delay = _wire.due(header) / 1000 - time.time()
                if delay > 0:
                    here = await self._delays.place(group, delay, _wire.due(header))
                    copies.append(moved(self._names.delay, f"0.{here.key}", header, body, here.headers))
                else:
                    copies.append(moved("", self._names.queue(group), header, body))
                places.append((place, group))
        outcomes = await self._publisher.move(copies, bounded=True)
        left: dict[int, list[str]] = {}
        taken: set[int] = set()
        for i, (place, group) in enumerate(places):
            if not outcomes or outcomes[i] is None:
                taken.add(place)
            else:
                left.setdefault(place, []).append(group)
        await self._keep_for({place: left[place] for place in left if place in taken}, page)
        done += taken
        await browser.remove([page[place][0] for place in sorted(done)])
        return not left

    def _recipients(self, registry: Registry, header: Header) -> Sequence[str] | None:
        """Return the groups that are to get a message; empty: no group yet. None: the groups that it is kept for were deleted."""
        named = _wire.left_to(header)
        if named:
            return [group for group in named if group in registry.groups] or None
        return registry.wanting(_wire.routing_key(header))

    async def _keep_for(self, left: Mapping[int, Sequence[str]], page: Sequence[Found]) -> None:
        """Park messages again that only some of their groups accepted, with the names of the others."""
        named: list[Outgoing] = []
        for place, groups in left.items():
            _, header, body = page[place]
            properties = _wire.copy(header, body, 0, ("abe-due", _wire.due(header)), ("abe-for", " ".join(groups)))
            named.append(Outgoing("", self._names.parked, properties, body, _wire.message_id(properties)))
        for error in await self._publisher.move(named):
            if error is not None:
                raise error


def _report(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and isinstance(error := task.exception(), AbeError):
        _log.warning("parked messages could not be moved, and stay parked until the next try: %s", error)
