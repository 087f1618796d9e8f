"""A queue that is looked through rather than consumed: dead letters, and parked messages.

What is looked at is out of sight for as long as the look takes, since SQS has no other way to get at what is behind it. It is shown again
when the look ends, also where it ends early, and by itself after a minute.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

from abe.backends.message_queue.base.tasks import result_of
from abe.errors import BackendConnectionError
from abe_backend_sqs import _wire
from abe_backend_sqs._errors import QueueMissingError, ThrottledError, translated
from abe_backend_sqs._handles import Handles
from abe_backend_sqs._polls import POLLED
from abe_backend_sqs._wire import BATCH, Message

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_log: Final = logging.getLogger("abe.sqs")

_HIDING: Final = 60
"""Seconds for which what was looked at is out of sight at most."""
_PAGE: Final = 100
_BYTES: Final = 4 << 20
"""What a page holds at most, one message excepted."""
_SHARE: Final = 0.25
"""Of `publish_timeout`: what collecting a page may take, so that the rest of a step has its time."""
_MOST: Final = 100_000
"""Messages of a look. SQS lets 120,000 of a queue be out of sight at once."""
_AGAIN: Final = 3
"""Answers in a row that bring nothing new, after which there is no more."""
_SKEW: Final = 2.0
"""Seconds that our clock may be away from that of SQS, by the whole seconds that SQS tells, before it is taken for wrong."""


class Browser:
    """Takes everything out of a queue's sight, lets some of it be deleted, and shows the rest when it is closed.

    Args:
        transport: Asks SQS.
        name: The queue's name. There may be none: then it is empty.
        thorough: Ask all of SQS's servers that hold parts of the queue, which takes a second where it is empty.
        most: Messages that it takes.
    """

    def __init__(self, transport: "SqsTransport", name: str, *, thorough: bool = False, most: int = _MOST) -> None:
        self._transport = transport
        self._name = name
        self._thorough = thorough
        self._most = most
        self._taken: dict[str, str] = {}
        """The handles of what is out of sight, by message."""
        self._seen: set[str] = set()
        self._handles = Handles(transport, "")
        self._asking: asyncio.Task[Sequence[Message]] | None = None
        self._nothing_new = 0
        self._expected = 0
        self._ended = False
        self.started: float = time.time() * 1000
        """When it was begun, in milliseconds since the epoch, by the clock of SQS."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._taken or self._asking is not None:
            # Whoever is cancelled, or has no more time, does not keep it from being shown.
            await result_of(self._transport.in_background(self._show()))

    @property
    def complete(self) -> bool:
        """Whether it has seen all that it was to: others may have had some of it out of sight."""
        return len(self._seen) >= min(self._expected, self._most)

    async def pages(self, enough: int = _PAGE) -> AsyncGenerator[Sequence[Message]]:
        """Take out all there is, page by page: bounded in count, in bytes, and in the time that it takes to collect one.

        Args:
            enough: Messages that make a page. Of a FIFO queue's message group the next ones come when the last ones are deleted.
        """
        if not await self._begin():
            return
        page: list[Message] = []
        size, deadline = 0, self._deadline()
        while not self._ended and len(self._seen) < self._most:
            for message in await self._take():
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

    def _deadline(self) -> float:
        return time.monotonic() + self._transport.settings.publish_timeout * _SHARE

    async def delete(self, messages: Sequence[Message]) -> None:
        """Remove some of what was taken for good.

        Raises:
            BackendConnectionError: Some were not removed.
            PermissionDeniedError: They may not be.
        """
        failures = await self._handles.delete([message["ReceiptHandle"] for message in messages])
        for message in messages:
            if message["ReceiptHandle"] not in failures:
                self._taken.pop(message["MessageId"], None)
        for error in failures.values():
            if not error.retryable:
                raise error
            raise BackendConnectionError(
                f"{len(failures)} of {len(messages)} messages could not be deleted from {self._name}: {error}"
            ) from error

    async def _begin(self) -> bool:
        try:
            self._handles.url = await self._transport.queues.url(self._name)
            self._expected = sum((await self._transport.queues.counts(self._name))[:2])
        except QueueMissingError:
            self._ended = True
            return False
        self._ended = not (self._expected or self._thorough)
        return not self._ended

    async def _take(self) -> Sequence[Message]:
        """Take what the next request brings. The request is not cancelled with this: what it brings is to be shown again."""
        self._asking = self._transport.in_background(self._ask())
        brought = await result_of(self._asking)
        self._asking = None
        return brought

    async def _ask(self) -> Sequence[Message]:
        return self._new(await self._receive())

    async def _receive(self) -> Mapping[str, Any]:
        client = await self._transport.clients.calls()
        try:
            with translated(self._transport.settings.address):
                reply: Mapping[str, Any] = await client.receive_message(
                    QueueUrl=self._handles.url,
                    MaxNumberOfMessages=BATCH,
                    # A poll that waits asks every server; one that does not is enough where all that was counted has come.
                    WaitTimeSeconds=int(self._thorough or len(self._seen) < self._expected),
                    VisibilityTimeout=_HIDING,
                    MessageSystemAttributeNames=POLLED,
                    MessageAttributeNames=("All",),
                )
        except ThrottledError:
            if not self._seen:
                raise
            self._ended = True  # as many are out of sight as SQS allows: the rest is for the next time
            return {}
        return reply

    def _new(self, reply: Mapping[str, Any]) -> Sequence[Message]:
        """Note what an answer brings, and whether it is the last one; return what was not seen before."""
        if not self._seen:
            self.started = _by_their_clock(reply, self.started)
        found = cast("Sequence[Message]", reply.get("Messages") or ())
        batch = [message for message in found if message["MessageId"] not in self._seen]
        self._taken.update((message["MessageId"], message["ReceiptHandle"]) for message in found)
        self._seen.update(message["MessageId"] for message in batch)
        self._nothing_new = 0 if batch else self._nothing_new + 1
        # What came since is for the next time.
        enough = len(self._seen) >= self._expected and not self._thorough
        self._ended = self._ended or not found or enough or self._nothing_new >= _AGAIN
        return batch

    async def _show(self) -> None:
        if self._asking is not None:
            await asyncio.wait([self._asking])
        taken, self._taken = self._taken, {}
        shown = await self._handles.hide(dict.fromkeys(taken.values(), 0))
        if shown:
            some = next(iter(shown.values()))
            _log.debug("%d messages of %s stay out of sight for a minute: %s", len(shown), self._name, some)


def _by_their_clock(reply: Mapping[str, Any], ours: float) -> float:
    """Return a time of ours in milliseconds by the clock of SQS, as far as it differs by more than the way of its answer."""
    date = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return ours
    ahead = time.time() - theirs
    return ours if abs(ahead) <= _SKEW else ours - ahead * 1000
