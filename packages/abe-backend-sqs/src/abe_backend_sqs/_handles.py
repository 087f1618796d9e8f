"""Receipt handles: what SQS is told about messages that it gave us, ten in a request."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from abe.backends.message_queue.base.routing import lease_lost
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import AbeError, BackendConnectionError, ConfigurationError
from abe_backend_sqs._errors import CLIENT_ERRORS, EntryRefusedError, QueueMissingError, translate, translate_entry
from abe_backend_sqs._wire import BATCH

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_log: Final = logging.getLogger("abe.sqs")

LONGEST_HIDING: Final = 43_200 - 60
"""Seconds, from its receipt, that a message is hidden for at most: SQS's 12 hours, without what requests may take on their way."""

Receipt: TypeAlias = str
"""The handle by which a delivery was known first."""

Failures: TypeAlias = Mapping[Receipt, AbeError]
"""What went wrong with which delivery."""

_T = TypeVar("_T")


class Handles:
    """Deletes and hides messages of one queue.

    Args:
        transport: Asks SQS.
        url: The queue's address.
        current: Returns the newest handle of a delivery.
    """

    def __init__(self, transport: "SqsTransport", url: str, current: Callable[[Receipt], str] = str) -> None:
        self._transport = transport
        self._current = current
        self.url: str = url

    async def delete(self, receipts: Sequence[Receipt]) -> dict[Receipt, AbeError]:
        """Delete, and return what went wrong with which."""

        def entry(receipt: Receipt) -> dict[str, Any]:
            return {"ReceiptHandle": self._current(receipt)}

        client = await self._transport.clients.calls()
        return await self._in_batches(receipts, entry, client.delete_message_batch)

    async def hide(self, seconds: Mapping[Receipt, int]) -> dict[Receipt, AbeError]:
        """Hide each for that many seconds from now, and return what went wrong with which."""

        def entry(receipt: Receipt) -> dict[str, Any]:
            return {"ReceiptHandle": self._current(receipt), "VisibilityTimeout": seconds[receipt]}

        client = await self._transport.clients.calls()
        return await self._in_batches(list(seconds), entry, client.change_message_visibility_batch)

    async def _in_batches(
        self,
        receipts: Sequence[Receipt],
        entry: Callable[[Receipt], dict[str, Any]],
        call: Callable[..., Awaitable[Any]],
    ) -> dict[Receipt, AbeError]:
        failures: dict[Receipt, AbeError] = {}
        address = self._transport.settings.address

        async def batch(some: Sequence[Receipt]) -> None:
            try:
                reply = await call(
                    QueueUrl=self.url,
                    Entries=[{"Id": str(index), **entry(receipt)} for index, receipt in enumerate(some)],
                )
            except CLIENT_ERRORS as exc:
                error = translate(exc, address)
                error.__cause__ = exc
                if isinstance(error, QueueMissingError):
                    error = lease_lost()
                failures.update(dict.fromkeys(some, error))
                return
            refused = {each["Id"]: each for each in reply.get("Failed") or ()}
            done = {each["Id"] for each in reply.get("Successful") or ()}
            for index, receipt in enumerate(some):
                id = str(index)
                if id in refused:
                    error = translate_entry(refused[id], address)
                    # All that an entry says is the handle: one that SQS does not take, under whatever name, is none any more.
                    failures[receipt] = lease_lost() if isinstance(error, EntryRefusedError) else error
                elif id not in done:
                    text = f"SQS at {address}: the answer leaves out whether it was done"
                    failures[receipt] = BackendConnectionError(text)

        await gather_all(*(batch(receipts[start : start + BATCH]) for start in range(0, len(receipts), BATCH)))
        return failures


def insist(failures: Failures) -> Failures:
    """Return the failures if they are for good.

    Raises:
        BackendConnectionError: Some may succeed later: the call is to be repeated, and leaves out what is done.
    """
    if any(isinstance(error, ConfigurationError) for error in failures.values()):
        return failures  # that will not pass, and is to be known at once
    for error in failures.values():
        if error.retryable:
            raise BackendConnectionError(str(error)) from error
    return failures
