"""Renews leases, every third of a lease, while a message is buffered, in a handler, or being settled."""

import asyncio
from collections.abc import Callable, Collection
from typing import Final

from abe.backends.message_queue.base.clock import Clock, sleep
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.transport import Delivery, Receiver
from abe.errors import AbeError

_log: Final = Log("abe.engine")


class LeaseKeeper:
    """Renews the leases of a receiver's deliveries, and reports those that were lost.

    Args:
        receiver: Renews them.
        held: Returns the deliveries in flight: buffered, in handlers, or with a settlement that is not confirmed.
        lost: Called with those that are lost.
        lease: Seconds; None where the broker has no leases.
        clock: Measures the lease.
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
        """Return whether no lease of a delivery in flight can have run out.

        Each delivery was received, or renewed, after `_renewed`. Half a lease is left for a request to the broker.
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
            except Exception:  # noqa: BLE001 - the other leases must be renewed all the same
                _log.exception("unexpected exception from the transport (a bug of the provider)")
                pause = self._lease / 10
            else:
                self._renewed = started
                pause = self._lease / 3
