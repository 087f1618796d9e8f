"""A receiver for brokers that have to be polled: a file, a table in a database, a directory.

A broker that pushes messages, or keeps a request waiting until there is one, does not need it.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple
from uuid import uuid4

from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.base.transport import Delivery

_FIRST: Final = 1 / 16
"""The first pause of a `receive`, as a fraction of the interval. Each further one is twice as long."""

_SHORTEST: Final = 0.005
"""Seconds of the shortest pause: clocks differ, and a broker that names a time too early must not be polled without one."""


class Taken(NamedTuple):
    """What `PollingReceiver.take` found.

    Attributes:
        deliveries: What was taken.
        due_in: If nothing was taken: seconds until a delay passes or a lease runs out, so that a message can be taken. None: the broker
            cannot tell, or there is no message.
    """

    deliveries: Sequence[Delivery] = ()
    due_in: float | None = None


class PollingReceiver(ABC):
    """The part of a `Receiver` that waits. A subclass adds what speaks to the broker: the abstract methods, and `metadata`, `ack` and
    `settle` of `Receiver`.

    It polls the broker at once when it is rung, and at the time that the broker named; otherwise at an interval, at first more often.

    Args:
        interval: Seconds between two polls at most: the latency of messages for which `ring` is not called.

    Attributes:
        consumer: A unique name, by which the broker knows which consumer has a message.
    """

    def __init__(self, interval: float) -> None:
        self.consumer: str = uuid4().hex
        self._interval = interval
        self._rung = asyncio.Event()
        self._stopped = False

    @abstractmethod
    async def take(self, limit: int) -> Taken:
        """Take messages that can be delivered now for `consumer`, the oldest first, without waiting. Each one counts an attempt.

        That includes messages of other consumers whose leases ran out, and never those of `consumer` itself: their leases may have run
        out while the process was paused, and are about to be renewed. So the broker must keep a message's consumer until another one
        takes the message.

        It may be cancelled, or fail, after the broker has carried it out: `give_back` returns what it took.

        Args:
            limit: How many, at most.

        Raises:
            BackendConnectionError: The broker could not be reached, or did not answer.
            GroupMissingError: There is no such group.
        """

    @abstractmethod
    async def give_back(self, keep: Collection[Delivery]) -> None:
        """Release the messages of `consumer` except for `keep`: each is deliverable in its old place, and its attempt not counted.

        Messages of other consumers are left alone. A no-op if the group does not exist.

        Raises:
            BackendConnectionError: It was not carried out, or in part. It is called again, or the leases run out.
        """

    @abstractmethod
    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """See `Receiver.renew`."""

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Wait until something can be taken; see `Receiver.receive`. Empty only after `stop`."""
        wait = self._interval * _FIRST
        while not self._stopped:
            self._rung.clear()  # before the poll, so that a ring during it is not missed
            deliveries, due_in = await self.take(limit)
            if deliveries:
                return deliveries
            await pause(self._rung, wait if due_in is None else min(wait, max(_SHORTEST, due_in)))
            wait = min(2 * wait, self._interval)
        return ()

    def ring(self) -> None:
        """Make a waiting `receive` poll at once, or one that is polling poll once more.

        Call it in the event loop of the receiver: when this process has stored a message, and when the broker notifies of one. From other
        threads, ``loop.call_soon_threadsafe(receiver.ring)`` does.
        """
        self._rung.set()

    async def stop(self) -> None:
        """Make a waiting `receive` return; see `Receiver.stop`. A poll in progress is completed, and `receive` returns its messages."""
        self._stopped = True
        self.ring()

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Give back what a failed `take` may have taken, and renew these; see `Receiver.recover`."""
        await self.give_back(keep=deliveries)
        return await self.renew(deliveries)

    async def close(self) -> None:
        """Give back everything; see `Receiver.close`. A subclass that has something to close of its own does that after it."""
        await self.give_back(keep=())
