"""Browses a queue: dead letters, and parked messages.

Messages that were received stay invisible while it is browsed, since SQS gives no other access to those behind them. They are made
visible when browsing ends, also early, and become visible by themselves after a minute.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Final, Self, cast

from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.tasks import result_of
from abe.errors import BackendConnectionError
from abe_backend_sqs import _wire
from abe_backend_sqs._broker import Broker
from abe_backend_sqs._errors import QueueMissingError, ThrottledError
from abe_backend_sqs._queue import Queue
from abe_backend_sqs._wire import Message

_log: Final = Log("abe.sqs")

_VISIBILITY: Final = 60
"""Seconds for which received messages are invisible at most."""
_PAGE: Final = 100
_BYTES: Final = 4 << 20
"""Bytes of a page at most, unless it is a single message."""
_SHARE: Final = 0.25
"""The share of `publish_timeout` that collecting a page may take, so that there is time for the rest of a step."""
_MOST: Final = 100_000
"""Messages that are browsed. SQS lets 120,000 of a queue be invisible at once."""
_AGAIN: Final = 3
"""Answers in a row without a new message, after which browsing ends."""
_CLOCKS: Final = 5_000
"""Milliseconds that the clocks of SQS's servers may be apart."""
_SKEW: Final = 2.0
"""Seconds that our clock may differ from that of SQS, which is known in whole seconds, before it counts as wrong."""


class Browser:
    """Makes everything in a queue invisible, lets some of it be deleted, and makes the rest visible when it is closed.

    Args:
        broker: Has the queues.
        name: The queue's name. One that does not exist counts as empty.
        most: Messages that it takes.
        thorough: Ask all of SQS's servers that hold parts of the queue, which takes a second where it is empty. None: as the broker
            does.
    """

    def __init__(self, broker: Broker, name: str, most: int = _MOST, *, thorough: bool | None = None) -> None:
        self._broker = broker
        self._name = name
        self._thorough = broker.thorough if thorough is None else thorough
        self._most = most
        self._queue: Queue | None = None
        self._taken: dict[str, str] = {}
        """The receipt handles of invisible messages, by message id."""
        self._seen: set[str] = set()
        self._asking: asyncio.Task[Sequence[Message]] | None = None
        self._nothing_new = 0
        self._expected = 0
        self._ended = False
        self._started: float = time.time() * 1000
        """When it was begun, in milliseconds since the epoch, by the clock of SQS."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._taken or self._asking is not None:
            # A cancellation or a timeout must not keep messages from being made visible.
            await result_of(self._broker.background.start(self._make_visible()))

    @property
    def complete(self) -> bool:
        """Whether it has seen as many messages as were counted: some may have been invisible."""
        return len(self._seen) >= min(self._expected, self._most)

    async def pages(self, enough: int = _PAGE) -> AsyncGenerator[Sequence[Message]]:
        """Receive all messages in pages, each bounded in count, in bytes, and in the time that it takes to collect it.

        Args:
            enough: Messages that complete a page. A FIFO queue delivers further ones of a message group when these are deleted.
        """
        if (queue := await self._begin()) is None:
            return
        page: list[Message] = []
        size, deadline = 0, self._deadline()
        while not self._ended and len(self._seen) < self._most:
            for message in await self._take(queue):
                more = _wire.size(message)
                if page and size + more > _BYTES:
                    yield page
                    page, size, deadline = [], 0, self._deadline()
                page.append(message)
                size += more
            if page and (len(page) >= enough or time.monotonic() > deadline):
                yield page
                page, size, deadline = [], 0, self._deadline()
        if page:
            yield page

    async def chosen(self, ids: Collection[str] | None) -> AsyncGenerator[Sequence[Message]]:
        """Yield the dead letters with these ids (None: all) in pages, as of when browsing began.

        One that is replayed, and becomes dead again meanwhile, is left out: it was sent to this queue after browsing began. As clocks may
        differ, a letter with an id that was chosen before is left out unless it was sent long before that.
        """
        done: set[str] = set()
        async with aclosing(self.pages()) as pages:
            async for page in pages:
                chosen: list[Message] = []
                for message in page:
                    letter, sent = _wire.dead_letter(message), _wire.sent(message)
                    same = _wire.identity(message) or letter.id
                    new = sent > self._started or (same in done and sent > self._started - _CLOCKS)
                    if not new and (ids is None or letter.id in ids):
                        chosen.append(message)
                        done.add(same)
                yield chosen

    async def delete(self, messages: Sequence[Message]) -> None:
        """Delete some of the received messages.

        Raises:
            BackendConnectionError: Some were not deleted.
            PermissionDeniedError: The user may not delete.
        """
        if self._queue is None or not messages:
            return
        outcomes = await self._queue.delete([message["ReceiptHandle"] for message in messages])
        for message, error in zip(messages, outcomes, strict=True):
            if error is None:
                self._taken.pop(message["MessageId"], None)
        failures = [error for error in outcomes if error is not None]
        if failures and not failures[0].retryable:
            raise failures[0]
        if failures:
            raise BackendConnectionError(
                f"{len(failures)} of {len(messages)} messages could not be deleted from {self._name}: {failures[0]}"
            ) from failures[0]

    def _deadline(self) -> float:
        return time.monotonic() + self._broker.settings.publish_timeout * _SHARE

    async def _begin(self) -> Queue | None:
        try:
            self._queue = await self._broker.groups.find(self._name)
            counts = await self._broker.groups.counts(self._name)
        except QueueMissingError:
            return None
        self._expected = counts.visible + counts.in_flight
        return self._queue if self._expected or self._thorough else None

    async def _take(self, queue: Queue) -> Sequence[Message]:
        """Return the new messages of the next request, which is not cancelled with this: its messages are to be made visible again."""
        self._asking = self._broker.background.start(self._ask(queue))
        brought = await result_of(self._asking)
        self._asking = None
        return brought

    async def _ask(self, queue: Queue) -> Sequence[Message]:
        # A poll that waits asks every server; one that does not is enough when all that were counted were seen.
        wait = int(self._thorough or len(self._seen) < self._expected)
        try:
            return self._new(await queue.look(wait, _VISIBILITY))
        except ThrottledError:
            if not self._seen:
                raise
            self._ended = True  # as many are invisible as SQS allows: the rest is left for the next time
            return ()

    def _new(self, reply: Mapping[str, Any]) -> Sequence[Message]:
        """Record an answer's messages, and whether it is the last one; return those that are new."""
        if not self._seen:
            self._started = _by_their_clock(reply, self._started)
        found = cast("Sequence[Message]", reply.get("Messages") or ())
        batch = [message for message in found if message["MessageId"] not in self._seen]
        self._taken.update((message["MessageId"], message["ReceiptHandle"]) for message in found)
        self._seen.update(message["MessageId"] for message in batch)
        self._nothing_new = 0 if batch else self._nothing_new + 1
        # Messages that were sent since are left for the next time.
        enough = len(self._seen) >= self._expected and not self._thorough
        self._ended = self._ended or not found or enough or self._nothing_new >= _AGAIN
        return batch

    async def _make_visible(self) -> None:
        if self._asking is not None:
            await asyncio.wait([self._asking])
        taken, self._taken = self._taken, {}
        if self._queue is None:
            return
        outcomes = await self._queue.change_visibility((handle, 0) for handle in taken.values())
        failures = [error for error in outcomes if error is not None]
        if failures:
            _log.debug("%d messages of %s stay invisible for a minute: %s", len(failures), self._name, failures[0])


def _by_their_clock(reply: Mapping[str, Any], ours: float) -> float:
    """Convert a time of ours, in milliseconds, to the clock of SQS, if that differs by more than `_SKEW`."""
    date = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return ours
    ahead = time.time() - theirs
    return ours if abs(ahead) <= _SKEW else ours - ahead * 1000
