"""A queue that is looked through rather than consumed: dead letters, and held messages."""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

from abe.errors import BackendConnectionError
from abe_backend_sqs._errors import QueueMissingError, translated
from abe_backend_sqs._handles import Handles
from abe_backend_sqs._polls import POLLED
from abe_backend_sqs._wire import BATCH, Message

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_log: Final = logging.getLogger("abe.sqs")

_HIDING: Final = 60
"""Seconds for which what was looked at is out of sight; it is put back as soon as everything was looked at."""


class Drawer:
    """Takes everything out of a queue, lets some of it be deleted, and puts the rest back when it is closed.

    Args:
        transport: Asks SQS.
        name: The queue's name. There may be none: then it is empty.
        thorough: Ask all of SQS's servers that hold parts of the queue, which takes a second where it is empty.
    """

    def __init__(self, transport: "SqsTransport", name: str, *, thorough: bool = False) -> None:
        self._transport = transport
        self._name = name
        self._thorough = thorough
        self._taken: dict[str, Message] = {}
        self._seen: set[str] = set()
        self._handles = Handles(transport, "")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shown = await self._handles.hide({message["ReceiptHandle"]: 0 for message in self._taken.values()})
        if shown:
            _log.debug("%d messages of %s stay hidden for a minute: %s", len(shown), self._name, *shown.values())

    async def take(self) -> AsyncIterator[Sequence[Message]]:
        """Take out all there is, in batches."""
        try:
            self._handles.url = await self._transport.queues.url(self._name)
            expected = sum((await self._transport.queues.counts(self._name))[:2])
        except QueueMissingError:
            return
        client = await self._transport.clients.calls()
        while expected or self._thorough:
            with translated(self._transport.settings.address):
                reply: Mapping[str, Any] = await client.receive_message(
                    QueueUrl=self._handles.url,
                    MaxNumberOfMessages=BATCH,
                    # A poll that waits asks every server; one that does not is enough where all that was counted has come.
                    WaitTimeSeconds=int(self._thorough or len(self._seen) < expected),
                    VisibilityTimeout=_HIDING,
                    MessageSystemAttributeNames=POLLED,
                    MessageAttributeNames=("All",),
                )
            found = cast("Sequence[Message]", reply.get("Messages") or ())
            batch = [message for message in found if message["MessageId"] not in self._seen]
            self._taken.update({message["MessageId"]: message for message in batch})
            self._seen.update(message["MessageId"] for message in batch)
            if not batch:
                return
            yield batch
            if len(self._seen) >= expected and not self._thorough:
                return  # what came since is for the next time

    async def delete(self, messages: Sequence[Message]) -> None:
        """Remove some of what was taken for good.

        Raises:
            BackendConnectionError: Some were not removed.
        """
        failures = await self._handles.delete([message["ReceiptHandle"] for message in messages])
        for message in messages:
            if message["ReceiptHandle"] not in failures:
                del self._taken[message["MessageId"]]
        for error in failures.values():
            raise BackendConnectionError(
                f"{len(failures)} of {len(messages)} messages could not be deleted from {self._name}: {error}"
            ) from error
