"""Taking messages from the broker: as many as there is room for, and on after whatever breaks."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.clock import Clock, sleep
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.transport import Delivery, Receiver, Receiving
from abe.errors import AbeError, BackendConnectionError, GroupMissingError

_log: Final = Log("abe.engine")
_RECONNECT: Final = ExponentialBackoff(initial=0.05, maximum=5.0)


class Fetcher:
    """Calls `Receiver.receive` in tasks of its own: one, which begins at once, and more beside it while messages flow.

    A full answer adds a task, up to `Receiving.max_concurrent`. A partial one, as brokers of many servers like to give even if there is
    more, removes one, and an empty one leaves one. Together they ask for no more than there is room for.

    Args:
        receiver: The broker's side.
        receiving: How it is asked.
        group: The group's name.
        room: Returns how many messages are wanted now.
        held: Returns what the broker counts as ours, as far as we know.
        arrived: Gets what was received; returns whether more is to be taken.
        lost: Gets those that are not ours any more.
        restore: Makes the group again, when it was deleted underneath.
        ended: Gets each task that has ended: with an error, when nothing will ever be taken again.
        clock: What pauses are measured by.
    """

    def __init__(
        self,
        receiver: Receiver,
        receiving: Receiving,
        *,
        group: str,
        room: Callable[[], int],
        held: Callable[[], Collection[Delivery]],
        arrived: Callable[[Sequence[Delivery]], bool],
        lost: Callable[[Collection[Delivery]], None],
        restore: Callable[[], Awaitable[object]],
        ended: Callable[[asyncio.Task[None]], object],
        clock: Clock,
    ) -> None:
        self._receiver = receiver
        self._most = receiving.messages or sys.maxsize
        self._max_concurrent = receiving.max_concurrent
        self._group = group
        self._room = room
        self._held = held
        self._arrived = arrived
        self._lost = lost
        self._restore = restore
        self._ended = ended
        self._clock = clock
        self._stopping = False
        self._concurrent = 1  # how many tasks there may be, and how many there are
        self._running = 0
        self._asked_for = 0  # messages that the calls in progress may bring
        self._failures = 0  # rounds of mending since messages were last received
        self._broken = False  # whether a call has failed that no `recover` has followed
        self._stranded = False
        self._mending: asyncio.Task[None] | None = None
        self._space: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.tasks: dict[asyncio.Task[None], None] = {}
        """What is in progress; none, when nothing is taken any more."""
        self._begin()

    def look(self) -> None:
        """Look whether there is room again."""
        if self._space is not None and not self._space.done():
            self._space.set_result(None)
        elif self._mending is None and not self._stopping:
            self._begin_another()  # those in progress may have to wait for their answers

    def recover_soon(self) -> None:
        """Have the receiver recover before it is asked again: the broker may count as ours what we do not have any more."""
        self._stranded = True

    async def stop(self) -> Sequence[Delivery]:
        """Take nothing new; return what was taken and never `arrived`, in the broker's order."""
        self._stopping = True
        rest: Sequence[Delivery] | None = None
        try:
            rest = await self._receiver.stop()
        except Exception as exc:  # noqa: BLE001 - whatever it is, what we hold must go back
            _log.warning("the receiver of group %r could not be told to stop: %r", self._group, exc)
            self.cancel()
        self.look()
        if self._mending is not None:
            self._mending.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)
        return rest or ()

    def cancel(self) -> None:
        """Cancel what is in progress."""
        for task in self.tasks:
            task.cancel()

    def _begin(self) -> None:
        self._running += 1
        task = self._loop.create_task(self._run())
        self.tasks[task] = None
        task.add_done_callback(self.tasks.pop)
        task.add_done_callback(self._ended)

    def _begin_another(self) -> None:
        """Begin one more, if there may be one, and there is room for what it would ask for."""
        if self._running < self._concurrent and self._room() > self._asked_for:
            self._begin()

    async def _run(self) -> None:
        while not self._stopping:
            limit = min(self._room() - self._asked_for, self._most)
            asking = self._running - (self._mending is not None)
            if asking > (self._concurrent if limit > 0 else 1):
                break  # the others look again when they have their answers
            if limit <= 0:
                self._space = self._loop.create_future()
                await self._space
                continue
            self._asked_for += limit
            self._begin_another()
            try:
                deliveries = await self._receive(limit)
            except Exception as exc:  # noqa: BLE001 - a provider's fault must not end the consumer
                self._asked_for -= limit
                self._broken = True
                if self._mending is not None or self._stopping:
                    # Closing gives back what its answer held, or the one that mends recovers it.
                    if isinstance(exc, AbeError):
                        _log.debug("another receive of group %r failed: %s", self._group, exc)
                    else:
                        _log.error("unexpected exception from the transport (a bug of the provider)", exc_info=exc)
                    break
                await self._mend(exc)
            else:
                self._asked_for -= limit
                if self._mending is None:
                    self._failures = 0
                if self._max_concurrent > 1:
                    self._adapt(len(deliveries), limit)
                if deliveries and not self._arrived(deliveries):
                    self._stopping = True
        self._running -= 1

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        if self._stranded and self._mending is None:
            self._stranded = False
            raise BackendConnectionError("settlements have failed for their whole time")
        return await self._receiver.receive(limit)

    def _adapt(self, count: int, limit: int) -> None:
        if not count:
            self._concurrent = 1
        elif count < limit:
            self._concurrent = max(1, self._concurrent - 1)
        else:
            self._concurrent = min(self._max_concurrent, self._concurrent + 1)

    async def _mend(self, error: Exception) -> None:
        """See to it that taking messages can go on. A task that fails meanwhile ends, and has this begin anew.

        Raises:
            AbeError: It cannot go on: what is wrong does not pass.
        """
        self._mending = asyncio.current_task()
        while self._broken:
            self._failures += 1
            await self._repair(error, self._failures)
            self._broken = False  # what has failed until now is recovered by this
            try:
                self._lost(await self._receiver.recover(self._held()))
            except Exception as exc:  # noqa: BLE001 - as above
                error, self._broken = exc, True
        self._mending = None
        _log.info("group %r is being consumed again", self._group)

    async def _repair(self, error: Exception, failures: int) -> None:
        """Make the group again if it was deleted, and wait, unless that was all.

        Raises:
            AbeError: What is wrong does not pass.
        """
        if isinstance(error, GroupMissingError):
            _log.warning("group %r was deleted underneath its consumers: it is made again", self._group)
            try:
                await self._restore()
            except Exception as exc:  # noqa: BLE001 - seen to below
                error = exc
            else:
                if failures == 1:
                    return
        if not isinstance(error, AbeError):
            _log.error("unexpected exception from the transport (a bug of the provider), trying again", exc_info=error)
        elif error.retryable or isinstance(error, GroupMissingError):
            _log.warning("group %r cannot be consumed, trying again: %s", self._group, error)
        else:
            self._stopping = True
            raise error
        await sleep(self._clock, _RECONNECT(failures))
