"""Delays of FIFO groups: a FIFO queue can delay no single message, and an invisible one blocks those behind it."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from abe.backends.message_queue.base import ExponentialBackoff
from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.base.log import Log
from abe.errors import AbeError, BackendConnectionError, LeaseLostError
from abe_backend_sqs import _wire
from abe_backend_sqs._copies import Copies
from abe_backend_sqs._errors import EntryRefusedError, QueueMissingError
from abe_backend_sqs._publisher import Publisher
from abe_backend_sqs._queue import LONGEST_VISIBILITY
from abe_backend_sqs._wire import BATCH, Message

_log: Final = Log("abe.sqs")
_BACKOFF: Final = ExponentialBackoff(initial=0.1, maximum=30.0)


class Delays:
    """Moves due messages from a group's standard queue, in which they waited, to the end of its FIFO queue.

    It runs as long as this process has a consumer of the group. Its polls are not cancelled either: the last one ends by itself, and
    its messages are moved.

    Args:
        publisher: Stores the copies.
        copies: Makes the copies.
        run: Runs a task that must not be cancelled with its caller.
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
        """Register a consumer; the first one starts the mover."""
        self._consumers += 1
        self._unused.clear()
        if not self._running:
            self._running = True
            self._start(self._run())

    def unregister(self) -> None:
        """Remove a consumer; the last one ends the mover."""
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
                    # A failure that no retry helps is logged as an error, once, and retried at the longest interval.
                    level = logging.WARNING if exc.retryable else logging.ERROR
                    if level <= logged:
                        level = logging.DEBUG
                    logged = max(logged, level)
                    _log.log(level, "delayed messages of group %r do not move, trying again: %s", self._group, exc)
                    await pause(self._unused, _BACKOFF(failures) if exc.retryable else _BACKOFF.maximum)
                except Exception:  # noqa: BLE001 - a retry may succeed
                    _log.exception("unexpected exception while delayed messages were moved (a bug of the provider)")
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
            # If the group was deleted, its consumers declare both queues again. One that may not be created raises an error here.
            await groups.ensure(name)
            return
        if groups.deletions[self._group] != deletions:
            return  # the group was deleted meanwhile, with the messages of this poll
        messages = {message["MessageId"]: message for message in found}.values()
        # Messages with a delay that is longer than SQS's: they have to wait on.
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
                raise error  # it affects all messages
        if failed:
            raise BackendConnectionError(f"some of {len(found)} messages could not be moved: {failed[0]}") from failed[
                0
            ]


def _left(message: Message) -> int:
    due, now = _wire.parse(message).due, time.time()
    left = (
        due / 1000 - now if due <= now * 1000 + _wire.LONGEST_WAIT else 0.0
    )  # else it is malformed, and the consumer gets it
    return min(LONGEST_VISIBILITY, -int(-left // 1)) if left > 0 else 0
