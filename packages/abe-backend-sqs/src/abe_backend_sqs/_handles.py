"""Receipt handles: what SQS is told about messages that it gave us, ten in a request."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from abe.backends.message_queue.base import Receipt
from abe.errors import AbeError, BackendConnectionError, LeaseLostError
from abe_backend_sqs._errors import CLIENT_ERRORS, QueueMissingError, translate, translate_entry
from abe_backend_sqs._wire import BATCH

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_T = TypeVar("_T")


class Handles:
    """Deletes and hides messages of one queue.

    Args:
        transport: Asks SQS.
        url: The queue's address.
    """

    def __init__(self, transport: "SqsTransport", url: str) -> None:
        self._transport = transport
        self.url: str = url

    async def delete(self, receipts: Sequence[Receipt]) -> dict[Receipt, AbeError]:
        """Delete, and return what went wrong with which."""

        def entry(receipt: Receipt) -> dict[str, Any]:
            return {"ReceiptHandle": receipt}

        client = await self._transport.clients.calls()
        return await self._in_batches(receipts, entry, client.delete_message_batch)

    async def hide(self, seconds: Mapping[Receipt, int]) -> dict[Receipt, AbeError]:
        """Hide each for that many seconds from now, and return what went wrong with which."""

        def entry(receipt: Receipt) -> dict[str, Any]:
            return {"ReceiptHandle": receipt, "VisibilityTimeout": seconds[receipt]}

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
                    error = not_ours()
                failures.update(dict.fromkeys(some, error))
                return
            for failed in reply.get("Failed", ()):
                failures[some[int(failed["Id"])]] = translate_entry(failed, address)

        await beside(*(batch(receipts[start : start + BATCH]) for start in range(0, len(receipts), BATCH)))
        return failures


async def beside(*calls: Awaitable[_T]) -> Sequence[_T]:
    """Run them beside each other, or just run the only one."""
    return [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)


def not_ours() -> LeaseLostError:
    """Return what a verdict fails with that comes too late."""
    return LeaseLostError("the message is not ours any more: its lease had run out, or it was settled before")


def insist(failures: dict[Receipt, AbeError]) -> dict[Receipt, AbeError]:
    """Return the failures if they are for good.

    Raises:
        BackendConnectionError: Some may succeed later: the call is to be repeated, and leaves out what is done.
    """
    for error in failures.values():
        if error.retryable:
            raise BackendConnectionError(str(error)) from error
    return failures
