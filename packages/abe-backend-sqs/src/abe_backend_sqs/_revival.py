"""What may not be ours any more, and is received again.

A lease that ran out while the process, its event loop or the connection stood still says nothing about whether another consumer has
the message. Nor does SQS: it may carry out what it is told with an old handle, or not, whichever consumer has the message by now. So an old
handle is not used. The message is received again: what SQS has delivered just once more than we know of was delivered to us, and to
no other consumer in between, so that it is ours as it was before. What does not come within a few seconds is taken for another consumer's.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Final

from abe.errors import AbeError
from abe_backend_sqs._inflight import InFlight, Receipt
from abe_backend_sqs._wire import BATCH

_LONGEST: Final = 3.0
"""Seconds after which it is given up. SQS may count a lease as not over yet that is over by our clock."""


class Revival:
    """Receives again what is in flight, and whose lease ran out.

    Args:
        in_flight: What the consumer has.
        again: Asks SQS for so many messages, and returns how many came.
        run: Runs what must not be cancelled with the one who asked for it.
    """

    def __init__(
        self,
        in_flight: InFlight,
        again: Callable[[int], Awaitable[int]],
        run: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"],
    ) -> None:
        self._in_flight = in_flight
        self._again = again
        self._run = run
        self._sought: dict[Receipt, float] = {}
        self._spare = 0
        """Messages that were not sought, and may come in their places: the places of what is not ours any more."""
        self._seeking: asyncio.Task[None] | None = None
        self._error: AbeError | None = None
        self._ended = False

    async def of(self, receipts: Iterable[Receipt]) -> list[Receipt]:
        """Return those that are ours again.

        Raises:
            BackendConnectionError: SQS cannot be asked.
        """
        receipts = list(receipts)
        new = [each for each in receipts if each not in self._sought]
        if not receipts or self._ended:
            return []
        self._sought.update(dict.fromkeys(new, time.monotonic() + _LONGEST))
        self._spare += len(new)
        if self._seeking is None or self._seeking.done():
            self._error = None
            self._seeking = self._run(self._seek())
        await asyncio.wait([self._seeking])
        now = time.monotonic()
        again = [each for each in receipts if each in self._in_flight and self._in_flight[each].deadline > now]
        if self._error is not None and len(again) < len(receipts):
            raise self._error
        return again

    def end(self) -> None:
        """Seek nothing more."""
        self._ended = True

    async def _seek(self) -> None:
        try:
            while (left := self._left()) and self._spare > 0 and not self._ended:
                brought = await self._again(min(BATCH, len(left), self._spare))
                self._spare -= brought - (len(left) - len(self._left()))
        except AbeError as exc:
            self._error = exc
        finally:
            self._sought.clear()
            self._spare = 0

    def _left(self) -> list[Receipt]:
        now = time.monotonic()
        return [
            receipt
            for receipt, until in self._sought.items()
            if receipt in self._in_flight and self._in_flight[receipt].deadline <= now < until
        ]
