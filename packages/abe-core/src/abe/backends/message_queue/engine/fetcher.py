"""Taking messages from the broker: as many as there is room for, and on after whatever breaks."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.clock import Clock, sleep
from abe.backends.message_queue.base.transport import Delivery, Receiver
from abe.errors import AbeError, GroupMissingError

_log: Final = logging.getLogger("abe.engine")
_RECONNECT: Final = ExponentialBackoff(initial=0.05, maximum=5.0)


class Fetcher:
    """Calls `Receiver.receive` in a task of its own, which begins at once.

    Args:
        receiver: The broker's side.
        group: The group's name.
        room: Returns how many messages are wanted now.
        held: Returns what the broker counts as ours, as far as we know.
        arrived: Gets what was received; returns whether more is to be taken.
        lost: Gets those that are not ours any more.
        restore: Makes the group again, when it was deleted underneath.
        clock: What pauses are measured by.
    """

    def __init__(
        self,
        receiver: Receiver,
        *,
        group: str,
        room: Callable[[], int],
        held: Callable[[], Collection[Delivery]],
        arrived: Callable[[Sequence[Delivery]], bool],
        lost: Callable[[Collection[Delivery]], None],
        restore: Callable[[], Awaitable[object]],
        clock: Clock,
    ) -> None:
        self._receiver = receiver
        self._group = group
        self._room = room
        self._held = held
        self._arrived = arrived
        self._lost = lost
        self._restore = restore
        self._clock = clock
        self._stopping = False
        self._receiving = False
        self._space: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.task: asyncio.Task[None] = self._loop.create_task(self._run())
        """Ends when nothing more is to be taken; with an error, when it never will be."""

    def look(self) -> None:
        """Look whether there is room again."""
        if self._space is not None and not self._space.done():
            self._space.set_result(None)

    async def stop(self) -> Sequence[Delivery]:
        """Take nothing new; return what was taken and never `arrived`, in the broker's order."""
        self._stopping = True
        rest: Sequence[Delivery] | None = None
        try:
            rest = await self._receiver.stop()
        except Exception as exc:  # noqa: BLE001 - whatever it is, what we hold must go back
            _log.warning("the receiver of group %r could not be told to stop: %r", self._group, exc)
            self.task.cancel()
        if not self._receiving:  # nothing can arrive: it waits for room, or to try again
            self.task.cancel()
        await asyncio.wait([self.task])
        return rest or ()

    async def _run(self) -> None:
        failures = 0
        broken = False
        while not self._stopping:
            try:
                if broken:
                    self._lost(await self._receiver.recover(self._held()))
                    _log.info("group %r is being consumed again", self._group)
                    broken = False
                room = self._room()
                if not room:
                    await self._wait_for_space()
                    continue
                self._receiving = True
                deliveries = await self._receiver.receive(room)
            except Exception as exc:  # noqa: BLE001 - a provider's fault must not end the consumer
                self._receiving = False
                failures += 1
                broken = True
                await self._mend(exc, failures)
            else:
                self._receiving = False
                failures = 0
                if deliveries and not self._arrived(deliveries):
                    return

    async def _mend(self, error: Exception, failures: int) -> None:
        """See to it that taking messages can be tried again.

        Raises:
            AbeError: It cannot: what is wrong does not pass.
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
            raise error
        await sleep(self._clock, _RECONNECT(failures))

    async def _wait_for_space(self) -> None:
        self._space = self._loop.create_future()
        if not self._room() and not self._stopping:
            await self._space
