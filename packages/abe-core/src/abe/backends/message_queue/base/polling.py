"""A receiver for brokers that have to be asked: a file, a table in a database, a directory.

A broker that pushes messages, or keeps a request waiting until there is one, needs no such thing.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple
from uuid import uuid4

from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.base.transport import Delivery

_FIRST: Final = 1 / 16
"""The first pause after a `receive` began, as a part of the interval. Each one is twice as long as the one before."""

_SHORTEST: Final = 0.005
"""Seconds. Clocks differ, and a broker that names a time too early must not be asked without a pause."""


class Taken(NamedTuple):
    """What `PollingReceiver.take` found.

    Attributes:
        deliveries: What was taken.
        due_in: Where that is nothing: seconds until something can be taken, as a delay has passed by then, or a lease run out. None: the
            broker cannot tell, or there is no message.
    """

    deliveries: Sequence[Delivery] = ()
    due_in: float | None = None


class PollingReceiver(ABC):
    """The part of a `Receiver` that waits. A subclass adds what speaks to the broker: the abstract methods, and `metadata`, `ack` and
    `settle` of `Receiver`.

    It asks the broker at once when it is rung, and when the time that the broker named has come; otherwise by an interval, at first
    more often.

    Args:
        interval: Seconds between two questions at most: how late it learns of what nobody rings for.

    Attributes:
        consumer: A name that no other receiver has or had, by which the broker knows whose a message is.
    """

    def __init__(self, interval: float) -> None:
        self.consumer: str = uuid4().hex
        self._interval = interval
        self._rung = asyncio.Event()
        self._stopped = False

    @abstractmethod
    async def take(self, limit: int) -> Taken:
        """Take what can be delivered now, the oldest first, in the name of `consumer`, and do not wait. Each taken one counts an attempt.

        That includes what another consumer holds whose lease ran out, and never what `consumer` holds: its lease may have run out as the
        program stood still, and it is about to be renewed. Who holds a message must therefore stay with it until somebody else takes it.

        It may be cancelled, or fail, when the broker has done it already: `give_back` returns what it took.

        Args:
            limit: How many, at most.

        Raises:
            BackendConnectionError: The broker could not be asked, or did not answer.
            GroupMissingError: There is no such group.
        """

    @abstractmethod
    async def give_back(self, keep: Collection[Delivery]) -> None:
        """Make deliverable again, in its old place and with its attempt not counted, whatever `consumer` holds but for these.

        Nothing happens to what others hold, or where the group is gone.

        Raises:
            BackendConnectionError: It certainly did not happen, or happened in part. It is called again, or the leases run out.
        """

    @abstractmethod
    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """See `Receiver.renew`."""

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Wait until something can be taken; see `Receiver.receive`. Empty only after `stop`."""
        wait = self._interval * _FIRST
        while not self._stopped:
            self._rung.clear()  # before the question: a ring that comes during it is heard after it
            deliveries, due_in = await self.take(limit)
            if deliveries:
                return deliveries
            await pause(self._rung, wait if due_in is None else min(wait, max(_SHORTEST, due_in)))
            wait = min(2 * wait, self._interval)
        return ()

    def ring(self) -> None:
        """Let a waiting `receive` ask at once, or the one that asks now ask once more.

        Call it in the event loop of the receiver: when this process has stored a message, and when the broker notifies of one. From other
        threads, ``loop.call_soon_threadsafe(receiver.ring)`` does.
        """
        self._rung.set()

    async def stop(self) -> None:
        """Let a waiting `receive` return; see `Receiver.stop`. An answer that is on its way is returned by `receive`."""
        self._stopped = True
        self.ring()

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Give back what a failed `take` may have taken, and renew these; see `Receiver.recover`."""
        await self.give_back(keep=deliveries)
        return await self.renew(deliveries)

    async def close(self) -> None:
        """Give back everything; see `Receiver.close`. A subclass that has something to close of its own does that after it."""
        await self.give_back(keep=())
