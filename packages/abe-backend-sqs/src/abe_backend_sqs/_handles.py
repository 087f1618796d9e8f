"""Receipt handles: what SQS is told about messages that it gave us, ten in a request."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from abe.backends.message_queue.base import Failures, Receipt
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import AbeError, BackendConnectionError, ConfigurationError, LeaseLostError
from abe_backend_sqs._errors import CLIENT_ERRORS, EntryRefusedError, QueueMissingError, translate, translate_entry
from abe_backend_sqs._wire import BATCH

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_log: Final = logging.getLogger("abe.sqs")

LONGEST_HIDING: Final = 43_200 - 60
"""Seconds, from its receipt, that a message is hidden for at most: SQS's 12 hours, without what requests may take on their way."""

_LINGER: Final = 0.02
"""Seconds for which a deletion may wait for others to share its request."""

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
                    error = not_ours()
                failures.update(dict.fromkeys(some, error))
                return
            refused = {each["Id"]: each for each in reply.get("Failed") or ()}
            done = {each["Id"] for each in reply.get("Successful") or ()}
            for index, receipt in enumerate(some):
                id = str(index)
                if id in refused:
                    error = translate_entry(refused[id], address)
                    # All that an entry says is the handle: one that SQS does not take, under whatever name, is none any more.
                    failures[receipt] = not_ours() if isinstance(error, EntryRefusedError) else error
                elif id not in done:
                    text = f"SQS at {address}: the answer leaves out whether it was done"
                    failures[receipt] = BackendConnectionError(text)

        await beside(*(batch(receipts[start : start + BATCH]) for start in range(0, len(receipts), BATCH)))
        return failures


class _Batch:
    """Deletions that share a request."""

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []
        self.outcome: asyncio.Future[dict[Receipt, AbeError]] = asyncio.get_running_loop().create_future()


class Deletions:
    """Gathers what is to be deleted, as SQS bills requests: a full batch leaves at once, any other before long.

    The requests do not belong to those who ask: one who is cancelled takes nothing back.

    Args:
        transport: Runs them.
        carry_out: Makes a request, and returns what went wrong with which.
        more: Whether more is to be expected soon, so that waiting for it is worth it.
    """

    def __init__(
        self,
        transport: "SqsTransport",
        carry_out: Callable[[Sequence[Receipt]], Awaitable[dict[Receipt, AbeError]]],
        more: Callable[[], bool],
    ) -> None:
        self._transport = transport
        self._carry_out = carry_out
        self._more = more
        self._batch: _Batch | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._under_way: set[_Batch] = set()
        self._awaited = False

    async def delete(self, receipts: Sequence[Receipt], *, awaited: bool) -> dict[Receipt, AbeError]:
        """Delete, and return what went wrong with which.

        Args:
            receipts: Which.
            awaited: Somebody waits for the answer: wait for others at most while a request is under way.
        """
        batches: list[_Batch] = []
        for receipt in receipts:
            if self._batch is None:
                self._batch = _Batch()
            if not batches or batches[-1] is not self._batch:
                batches.append(self._batch)
            self._batch.receipts.append(receipt)
            if len(self._batch.receipts) == BATCH:
                self.leave()
        if self._batch is not None:
            self._awaited = self._awaited or awaited or not self._more()
            # A call that filled a request is not kept waiting for what is left over, which would hold up all of it.
            if len(batches) > 1 or (self._awaited and not self._under_way):
                self.leave()
            elif self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_LINGER, self.leave)
        failures: dict[Receipt, AbeError] = {}
        for batch in batches:
            failures.update(await asyncio.shield(batch.outcome))
        return {receipt: failures[receipt] for receipt in receipts if receipt in failures}

    async def drain(self) -> None:
        """Return when all has been carried out that was asked for so far."""
        self.leave()
        if self._under_way:
            await asyncio.wait([batch.outcome for batch in self._under_way])

    def leave(self) -> None:
        """Wait for nothing more to share the next request."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._awaited = False
        batch, self._batch = self._batch, None
        if batch is not None:
            self._under_way.add(batch)
            self._transport.in_background(self._request(batch))

    async def _request(self, batch: _Batch) -> None:
        try:
            batch.outcome.set_result(await self._carried_out(batch.receipts))
        finally:
            batch.outcome.cancel()  # nothing happens if it is known; else the event loop ends, and nobody is to wait for it
            self._under_way.discard(batch)
        if self._awaited:
            self.leave()

    async def _carried_out(self, receipts: Sequence[Receipt]) -> dict[Receipt, AbeError]:
        try:
            return await self._carry_out(receipts)
        except AbeError as exc:
            return dict.fromkeys(receipts, exc)
        except Exception as exc:  # noqa: BLE001 - those who wait for it are not cancelled by a fault here
            _log.exception("unexpected exception where messages were deleted (a bug of the provider)")
            return dict.fromkeys(receipts, BackendConnectionError(f"messages could not be deleted: {exc!r}"))


beside: Final = gather_all


def not_ours() -> LeaseLostError:
    """Return what a verdict fails with that comes too late."""
    return LeaseLostError("the message is not ours any more: its lease had run out, or it was settled before")


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


async def nothing() -> dict[Receipt, AbeError]:
    """Do nothing, which cannot fail."""
    return {}
