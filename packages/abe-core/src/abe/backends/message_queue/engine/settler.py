"""Settlement: the verdicts of one turn of the event loop leave together.

A verdict that cannot be carried out because the connection broke is tried again until the lease must have run out.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.clock import Clock, sleep
from abe.backends.message_queue.base.transport import Delivery, Failures, Receipt, Receiver, Settlement
from abe.errors import AbeError, ConfigurationError, LeaseLostError

_log: Final = logging.getLogger("abe.engine")
_BACKOFF: Final = ExponentialBackoff(initial=0.05, maximum=2.0)
_MOST: Final = 500
"""Verdicts a call: what keeps one call to the broker short."""

Waiter: TypeAlias = asyncio.Future[AbeError | None]
_Item = TypeVar("_Item")


class Settler:
    """Coalesces acknowledgements and other verdicts.

    Args:
        receiver: Carries them out.
        sure: Whether the leases of what we hold are certainly still ours.
        settled: Called when verdicts were carried out, so that more messages can be taken.
        refused: Called with a permanent error: the broker will carry out no settlement of ours.
        timeout: Seconds for which a settlement is worth trying.
        clock: What `timeout` is measured by.
    """

    def __init__(
        self,
        receiver: Receiver,
        sure: Callable[[], bool],
        settled: Callable[[], None],
        refused: Callable[[AbeError], None],
        timeout: float,
        clock: Clock,
    ) -> None:
        self._receiver = receiver
        self._sure = sure
        self._settled = settled
        self._refused = refused
        self._timeout = timeout
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._acks: list[Delivery] = []
        self._asked: list[tuple[Delivery, Waiter]] = []
        self._verdicts: list[tuple[Delivery, Waiter, Settlement]] = []
        self._scheduled = False
        self._abandoned = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: dict[Receipt, None] = {}
        self.outstanding: int = 0
        """Verdicts that the broker does not know yet: it still counts these messages as ours."""

    def ack(self, delivery: Delivery) -> None:
        """Acknowledge with the next batch. A failure is logged."""
        self._acks.append(delivery)
        self.outstanding += 1
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def submit(self, delivery: Delivery, settlement: Settlement | None) -> Waiter:
        """Carry out a verdict (None: acknowledge) with the next batch; the future's result is what went wrong, or None."""
        waiter: Waiter = self._loop.create_future()
        self.outstanding += 1
        if settlement is None:
            self._asked.append((delivery, waiter))
        else:
            self._verdicts.append((delivery, waiter, settlement))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)
        return waiter

    def receipts(self) -> list[Receipt]:
        """Return the messages whose verdict the broker does not know yet."""
        return [
            *self._leaving,
            *(delivery.receipt for delivery in self._acks),
            *(delivery.receipt for delivery, _ in self._asked),
            *(delivery.receipt for delivery, _, _ in self._verdicts),
        ]

    async def carried_out(self, receipt: Receipt) -> None:
        """Return when the broker knows the settlement of this delivery, or it was given up; at once, where none is on its way."""
        if receipt in self.receipts():
            self._flush()
        while receipt in self._leaving:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def drain(self) -> None:
        """Return when everything submitted so far has been carried out, or given up."""
        self._flush()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def abandon(self) -> None:
        """Give up what is not carried out yet, and try nothing twice from now on."""
        self._abandoned = True
        for task in self._tasks:
            task.cancel()

    def _flush(self) -> None:
        self._scheduled = False
        acks, self._acks = self._acks, []
        asked, self._asked = self._asked, []
        verdicts, self._verdicts = self._verdicts, []
        for start in range(0, len(acks), _MOST):
            part = acks[start : start + _MOST]
            receipts = [delivery.receipt for delivery in part]
            self._start(self._send_acks(part, receipts), receipts)
        for start in range(0, len(asked), _MOST):
            batch = asked[start : start + _MOST]
            receipts = [delivery.receipt for delivery, _ in batch]
            # Somebody waits for the answer, so each one is verified: a plain acknowledgement may not tell which of them was lost.
            self._start(self._answer(batch, partial(self._receiver.ack, verify=True), receipts), receipts)
        for start in range(0, len(verdicts), _MOST):
            some = verdicts[start : start + _MOST]
            settlements = [settlement for _, _, settlement in some]
            receipts = [settlement.receipt for settlement in settlements]
            self._start(self._answer([item[:2] for item in some], self._receiver.settle, settlements), receipts)

    def _start(self, coroutine: Coroutine[Any, Any, None], receipts: Sequence[Receipt]) -> None:
        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self.outstanding -= len(receipts)
            for receipt in receipts:
                self._leaving.pop(receipt, None)
            self._settled()

        self._leaving.update(dict.fromkeys(receipts))
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(done)

    async def _send_acks(self, deliveries: Sequence[Delivery], receipts: Sequence[Receipt]) -> None:
        verify = not self._sure()

        def ack(some: Sequence[Receipt]) -> Awaitable[Failures]:
            nonlocal verify
            now, verify = verify, True  # a retry may come when the leases are long over
            return self._receiver.ack(some, verify=now)

        failures: Failures = dict.fromkeys(receipts, _closed())
        try:
            failures = await self._carry_out(ack, receipts, receipts)
        finally:
            if failures:
                for delivery in deliveries:
                    delivery.lost = delivery.lost or delivery.receipt in failures
                _log.warning(
                    "%d of %d acknowledgements were not carried out, so these messages will be delivered again: %s",
                    len(failures),
                    len(deliveries),
                    next(iter(failures.values())),
                )

    async def _answer(
        self,
        batch: Sequence[tuple[Delivery, Waiter]],
        call: Callable[[Sequence[_Item]], Awaitable[Failures]],
        items: Sequence[_Item],
    ) -> None:
        failures: Failures = dict.fromkeys((delivery.receipt for delivery, _ in batch), _closed())
        try:
            failures = await self._carry_out(call, items, list(failures))
        finally:
            for delivery, waiter in batch:
                error = failures.get(delivery.receipt)
                delivery.lost = error is not None
                if not waiter.done():
                    waiter.set_result(error)

    async def _carry_out(
        self,
        call: Callable[[Sequence[_Item]], Awaitable[Failures]],
        items: Sequence[_Item],
        receipts: Sequence[Receipt],
    ) -> Failures:
        """Make the call, and return what went wrong with which delivery.

        A batch that fails as a whole and for good is halved until what it fails for stands alone: one settlement keeps no other from
        being carried out. What will always fail is told to `refused`.
        """
        if self._abandoned:
            return dict.fromkeys(receipts, _closed())
        failures: Failures
        error: AbeError | None
        try:
            failures = await self._persist(partial(call, items))
            error = next((error for error in failures.values() if isinstance(error, ConfigurationError)), None)
        except AbeError as exc:
            failures, error = dict.fromkeys(receipts, exc), exc
        except Exception as exc:  # noqa: BLE001 - a fault in a transport must not leave anybody waiting for ever
            _log.exception("unexpected exception from the transport (a bug of the provider)")
            error = LeaseLostError(f"the transport failed, so that the broker may not know the settlement: {exc!r}")
            error.__cause__ = exc
            failures = dict.fromkeys(receipts, error)
        if isinstance(error, ConfigurationError):
            self._refused(error)
        elif error is not None and not error.retryable and len(items) > 1:
            half = len(items) // 2
            first = await self._carry_out(call, items[:half], receipts[:half])
            return {**first, **await self._carry_out(call, items[half:], receipts[half:])}
        return failures

    async def _persist(self, call: Callable[[], Awaitable[Failures]]) -> Failures:
        deadline = self._clock.time() + self._timeout
        tries = 0
        while True:
            try:
                return await call()
            except AbeError as exc:
                tries += 1
                pause = _BACKOFF(tries)
                if not exc.retryable or self._abandoned or self._clock.time() + pause > deadline:
                    raise
                _log.debug("settlement failed, trying again: %s", exc)
                await sleep(self._clock, pause)


def _closed() -> LeaseLostError:
    return LeaseLostError("the subscription was closed before the broker could be told")
