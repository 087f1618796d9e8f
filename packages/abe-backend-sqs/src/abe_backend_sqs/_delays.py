"""Delays beside a FIFO queue, which can delay no single message, and where an invisible one holds up those behind it."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from abe.backends.message_queue.base import ExponentialBackoff
from abe.backends.message_queue.base.clock import pause
from abe.errors import AbeError, BackendConnectionError, LeaseLostError
from abe_backend_sqs import _wire
from abe_backend_sqs._copies import Copies
from abe_backend_sqs._errors import EntryRefusedError, QueueMissingError
from abe_backend_sqs._publisher import Publisher
from abe_backend_sqs._queue import LONGEST_VISIBILITY
from abe_backend_sqs._wire import BATCH, Message

_log: Final = logging.getLogger("abe.sqs")
_BACKOFF: Final = ExponentialBackoff(initial=0.1, maximum=30.0)


class Delays:
    """Moves messages from a group's standard queue, where they waited for their time, to the end of its FIFO queue.

    It runs as long as anybody in this process consumes the group. Its polls are not cancelled either: the last one ends by itself,
    and what it brings is moved.

    Args:
        publisher: Stores what enters the FIFO queue.
        copies: Makes it.
        run: Runs what must not be cancelled with the one who asked for it.
        group: The group.
    """

    def __init__(
        self, publisher: Publisher, copies: Copies, run: Callable[[Coroutine[Any, Any, None]], object], group: str
    ) -> None:
        self._publisher = publisher
        self._copies = copies
        self._start = run
        self._group = group
        self._consumers = 0
        self._running = False
        self._unused = asyncio.Event()

    def register(self) -> None:
        """Count a consumer in."""
        self._consumers += 1
        self._unused.clear()
        if not self._running:
            self._running = True
            self._start(self._run())

    def unregister(self) -> None:
        """Count a consumer out."""
        self._consumers -= 1
        if not self._consumers:
            self._unused.set()

    async def _run(self) -> None:
        failures = 0
        logged = -1
        try:
            while self._consumers:
                try:
                    await self._move_due()
                except AbeError as exc:
                    failures += 1
                    # One that trying again cannot mend is worth an error, once, and no more than the rarest tries.
                    level = logging.WARNING if exc.retryable else logging.ERROR
                    if level <= logged:
                        level = logging.DEBUG
                    logged = max(logged, level)
                    _log.log(level, "delayed messages of group %r do not move, trying again: %s", self._group, exc)
                    await pause(self._unused, _BACKOFF(failures) if exc.retryable else _BACKOFF.maximum)
                except Exception:  # noqa: BLE001 - or what waits would never move
                    _log.exception("unexpected exception where delayed messages are moved (a bug of the provider)")
                    await pause(self._unused, _BACKOFF.maximum)
                else:
                    failures, logged = 0, -1
        finally:
            self._running = False

    async def _move_due(self) -> None:
        groups = self._publisher.groups
        name = groups.names.delayed(self._group)
        try:
            queue, deletions = await groups.find(name), groups.deletions[self._group]
            found = await queue.poll(BATCH)
        except QueueMissingError:
            groups.forget(name)
            # The consumers find their own queue missing, and make both again; a queue that others make is only missing here.
            await groups.ensure(name)
            return
        if groups.deletions[self._group] != deletions:
            return  # a group of this name was deleted meanwhile, and with it what this poll may bring
        messages = {message["MessageId"]: message for message in found}.values()
        # What was delayed for as long as SQS can, and has to wait for longer.
        early = {message["ReceiptHandle"]: left for message in messages if (left := _left(message)) > 0}
        due = [message for message in messages if message["ReceiptHandle"] not in early]
        problems = list(await queue.change_visibility(early.items()))
        entries = [self._copies.due(self._group, message).entry for message in due]
        results = await self._publisher.post(groups.names.queue(self._group), entries)
        stored = [message["ReceiptHandle"] for message, result in zip(due, results, strict=True) if result is None]
        problems += [*await queue.delete(stored), *results]
        failed = [error for error in problems if error is not None]
        for error in failed:
            if not error.retryable and not isinstance(error, (EntryRefusedError, LeaseLostError)):
                raise error  # not about one message
        if failed:
            raise BackendConnectionError(f"some of {len(found)} could not be moved: {failed[0]}") from failed[0]


def _left(message: Message) -> int:
    due, now = _wire.parse(message).due, time.time()
    left = due / 1000 - now if due <= now * 1000 + _wire.LONGEST_WAIT else 0.0  # else it is for the consumer to see
    return min(LONGEST_VISIBILITY, -int(-left // 1)) if left > 0 else 0
