"""Delays beside a FIFO queue, which can delay no single message, and where a hidden one holds up those behind it."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import ExponentialBackoff
from abe.backends.message_queue.base.clock import pause
from abe.errors import AbeError, BackendConnectionError, LeaseLostError
from abe_backend_sqs import _wire
from abe_backend_sqs._errors import EntryRefusedError, QueueMissingError
from abe_backend_sqs._handles import LONGEST_HIDING, Handles
from abe_backend_sqs._polls import poll
from abe_backend_sqs._wire import BATCH, Message

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_log: Final = logging.getLogger("abe.sqs")
_BACKOFF: Final = ExponentialBackoff(initial=0.1, maximum=30.0)


class Later:
    """Moves messages from a group's standard queue, where they waited for their time, to the end of its FIFO queue.

    It runs as long as anybody in this process consumes the group. Its polls are not cancelled either: the last one ends by itself,
    and what it brings is moved.

    Args:
        transport: Asks SQS.
        group: The group.
    """

    def __init__(self, transport: "SqsTransport", group: str) -> None:
        self._transport = transport
        self._group = group
        self._consumers = 0
        self._running = False
        self._left = asyncio.Event()

    def join(self) -> None:
        """Know of one consumer more."""
        self._consumers += 1
        self._left.clear()
        if not self._running:
            self._running = True
            self._transport.in_background(self._run())

    def leave(self) -> None:
        """Know of one less."""
        self._consumers -= 1
        if not self._consumers:
            self._left.set()

    async def _run(self) -> None:
        failures = 0
        told = -1
        try:
            while self._consumers:
                try:
                    await self._move_due()
                except AbeError as exc:
                    failures += 1
                    # One that trying again cannot mend is worth an error, once, and no more than the rarest tries.
                    level = logging.WARNING if exc.retryable else logging.ERROR
                    if level <= told:
                        level = logging.DEBUG
                    told = max(told, level)
                    _log.log(level, "delayed messages of group %r do not move, trying again: %s", self._group, exc)
                    await pause(self._left, _BACKOFF(failures) if exc.retryable else _BACKOFF.maximum)
                except Exception:  # noqa: BLE001 - or what waits would never move
                    _log.exception("unexpected exception where delayed messages are moved (a bug of the provider)")
                    await pause(self._left, _BACKOFF.maximum)
                else:
                    failures, told = 0, -1
        finally:
            self._running = False

    async def _move_due(self) -> None:
        queues = self._transport.queues
        name = queues.names.later(self._group)
        try:
            url, deletions = await queues.url(name), queues.deletions[self._group]
            found = await poll(self._transport, url, BATCH)
        except QueueMissingError:
            queues.forget(name)
            # The consumers find their own queue missing, and make both again; a queue that others make is only missing here.
            await queues.ensure(name)
            return
        if queues.deletions[self._group] != deletions:
            return  # a group of this name was deleted meanwhile, and with it what this poll may bring
        handles = Handles(self._transport, url)
        messages = {message["MessageId"]: message for message in found}.values()
        early = {
            message["ReceiptHandle"]: left for message in messages if (left := _left(message)) > 0
        }  # it was delayed for as long as SQS can, and has to wait for longer
        due = [message for message in messages if message["ReceiptHandle"] not in early]
        failures = await handles.hide(early) if early else {}
        entries = [self._transport.copies.due(self._group, message).entry for message in due]
        results = await self._transport.sender.post(queues.names.queue(self._group), entries)
        stored = [message["ReceiptHandle"] for message, result in zip(due, results, strict=True) if result is None]
        failures.update(await handles.delete(stored))
        problems: Sequence[AbeError] = [*failures.values(), *filter(None, results)]
        for error in problems:
            if not error.retryable and not isinstance(error, (EntryRefusedError, LeaseLostError)):
                raise error  # not about one message
        if problems:
            raise BackendConnectionError(f"some of {len(found)} could not be moved: {problems[0]}") from problems[0]


def _left(message: Message) -> int:
    due, now = _wire.parse(message).due, time.time()
    left = due / 1000 - now if due <= now * 1000 + _wire.LONGEST_WAIT else 0.0  # else it is for the consumer to see
    return min(LONGEST_HIDING, -int(-left // 1)) if left > 0 else 0
