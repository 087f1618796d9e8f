"""Leases: while a message is ours, buffered or in a handler, the broker hears so every third of the lease."""

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Final

from abe.backends.message_queue.base.clock import Clock, sleep
from abe.backends.message_queue.base.transport import Delivery, Receiver
from abe.errors import AbeError

_log: Final = logging.getLogger("abe.engine")


class LeaseKeeper:
    """Renews the leases of what we hold, and tells which were lost.

    Args:
        receiver: Whose deliveries they are.
        held: Returns what we hold: buffered, in handlers, or with a settlement that the broker does not know yet.
        lost: Called with those that are not ours any more.
        lease: Seconds; None where the broker has no leases.
        clock: What the lease is measured by.
    """

    def __init__(
        self,
        receiver: Receiver,
        held: Callable[[], Collection[Delivery]],
        lost: Callable[[Collection[Delivery]], None],
        lease: float | None,
        clock: Clock,
    ) -> None:
        self._receiver = receiver
        self._held = held
        self._lost = lost
        self._lease = lease
        self._clock = clock
        self._renewed = clock.time()

    def sure(self) -> bool:
        """Whether all that we hold is certainly still ours.

        Each delivery was received, or renewed, after `_renewed`. Half a lease is left for the way to the broker.
        """
        return self._lease is None or self._clock.time() - self._renewed < self._lease / 2

    async def run(self) -> None:
        """Renew until cancelled."""
        if self._lease is None:
            await asyncio.Event().wait()  # the connection is the lease: there is nothing to do
            return
        pause = self._lease / 3
        while True:
            await sleep(self._clock, pause)
            started = self._clock.time()
            try:
                if held := self._held():
                    self._lost(await self._receiver.renew(held))
            except AbeError as exc:
                _log.debug("leases could not be renewed, trying again: %s", exc)
                pause = self._lease / 10
            except Exception:  # noqa: BLE001 - or nothing would be renewed any more
                _log.exception("unexpected exception from the transport (a bug of the provider)")
                pause = self._lease / 10
            else:
                self._renewed = started
                pause = self._lease / 3
