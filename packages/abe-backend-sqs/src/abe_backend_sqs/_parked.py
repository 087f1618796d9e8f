"""Moves parked messages to the groups that want them."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Final

from abe.backends.message_queue.base import ExponentialBackoff
from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.base.log import Log
from abe.errors import AbeError, BackendConnectionError
from abe_backend_sqs import _wire
from abe_backend_sqs._broker import Broker
from abe_backend_sqs._browser import Browser
from abe_backend_sqs._wire import Entry, Message

_log: Final = Log("abe.sqs")
_BACKOFF: Final = ExponentialBackoff(initial=0.1, maximum=5.0)
_FULL_LOOK: Final = 100_000
"""Parked messages that are browsed. SQS lets 120,000 of a queue be invisible at once."""
_SHORT_LOOK: Final = 1_000
_LOOKS: Final = 5
"""Times that parked messages are browsed without a result while other processes have made some invisible."""


class Parked:
    """Browses the parked messages, once at a time, and moves them.

    Args:
        broker: Has the groups and the queues.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._looking: asyncio.Task[None] | None = None
        self._looks: set[bool] = set()
        """What was requested by `look`: thorough or not, or both."""
        self.new_groups: set[str] = set()
        """New groups, until the parked messages that they want have been moved."""

    async def hand_over(self) -> None:
        """Start moving all parked messages, and wait for a quarter of the publish timeout at most. It continues in the background."""
        looking = self.look(thorough=self._broker.thorough)
        await asyncio.wait([looking], timeout=self._broker.settings.publish_timeout / 4)

    def look(self, *, thorough: bool = False) -> "asyncio.Task[None]":
        """Move parked messages to the groups in the background, with retries until it succeeds."""
        self._looks.add(thorough)
        if self._looking is None or self._looking.done():
            self._looking = self._broker.background.start(self._hand_over())
        return self._looking

    async def _hand_over(self) -> None:
        failures = unfinished = 0
        while self._looks:
            thorough = max(self._looks)
            self._looks.clear()  # later requests may be for messages that are missed now
            try:
                complete, moved = await self._look(thorough=thorough)
            except AbeError as exc:
                if not exc.retryable:
                    _log.debug("this process cannot move parked messages: %s", exc)
                    return
                level = logging.DEBUG if failures else logging.WARNING
                _log.log(level, "parked messages could not be moved, retrying: %s", exc)
                failures += 1
                seconds = _BACKOFF(failures)
            else:
                # If other processes browse some of them, these may want other messages than ours.
                unfinished = 0 if complete else 1 if moved else unfinished + 1
                if not 0 < unfinished < _LOOKS:
                    continue
                seconds = _BACKOFF(unfinished)
            self._looks.add(thorough)
            if await pause(self._broker.closed, seconds):
                return

    async def _look(self, *, thorough: bool) -> tuple[bool, int]:
        """Browse once; return whether all were seen, and how many were moved."""
        registry = await self._broker.groups.keeper.registry(time.monotonic())
        oldest_first = sorted(registry.present, key=lambda name: registry.since.get(name, 0.0))
        groups = {name: registry.present[name] for name in oldest_first}
        found = await self._move(groups, thorough=thorough) if groups else (True, 0)
        self.new_groups.difference_update(groups)
        return found

    async def _move(self, groups: Mapping[str, tuple[str, ...]], *, thorough: bool) -> tuple[bool, int]:
        """Move each parked message to the first of the groups that wants it; return whether all were seen, and how many were moved.

        Raises:
            BackendConnectionError: Some could not be moved; a retry may succeed.
        """
        # Older groups want none of them, unless the process that created one ended before it had browsed them.
        most = _FULL_LOOK if thorough or not self.new_groups.isdisjoint(groups) else _SHORT_LOOK
        count = 0
        failed: list[AbeError] = []
        async with (
            Browser(self._broker, self._broker.groups.names.parked, most, thorough=thorough) as parked,
            aclosing(parked.pages(1)) as pages,
        ):
            async for page in pages:
                left: Sequence[Message] = page
                for group, patterns in groups.items():
                    wanted = [message for message in left if _wire.wants(patterns, message)]
                    moved = await self._store(group, wanted, failed)
                    await parked.delete(moved)
                    count += len(moved)
                    left = [message for message in left if message not in moved]
                if self._broker.closed.is_set():
                    break
        if failed:
            raise BackendConnectionError(f"parked messages could not be moved: {failed[0]}") from failed[0]
        return parked.complete, count

    async def _store(self, group: str, messages: Sequence[Message], failed: list[AbeError]) -> Sequence[Message]:
        """Store messages in the group's queue, with the rest of their delays, and return those that were stored."""
        entries: dict[str, list[tuple[Message, Entry]]] = {}
        for message in messages:
            name, entry = self._broker.copies.unparked(group, message)
            entries.setdefault(name, []).append((message, entry))
        stored: list[Message] = []
        for name, some in entries.items():
            results = await self._broker.publisher.post(name, [entry for _, entry in some])
            stored += [message for (message, _), result in zip(some, results, strict=True) if result is None]
            failed += [result for result in results if result is not None and result.retryable]
        return stored
