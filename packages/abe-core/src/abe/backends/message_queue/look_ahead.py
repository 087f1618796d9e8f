"""Messages of a group for `ordered_by_key`: while the successors of a busy key fill the bound, it is widened, so that other keys go on.

A broker hands out a queue in its order: what waits behind a busy key has to be taken, and kept, to come to what is behind it. When
everything that a subscription may hold has been handed out and there is a worker with nothing to do, another subscription, of twice the
size, takes over. Only the latest takes messages, so that the order holds; the others end when their last message is settled.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.subscription import Subscription
from abe.backends.message_queue.base.tasks import result_of
from abe.errors import AbeError, BackendClosedError

_log: Final = logging.getLogger("abe.consumer")
_MOST: Final = 1000
"""Messages held in all, about: as many as a process can hold without that being noticed, whatever their size."""

_SETTLED: Final = 2.0
"""Seconds after which what was settled has surely arrived at any broker."""

_RECONNECT: Final = ExponentialBackoff(initial=0.1, maximum=1.0)


class _Room:
    """A subscription, how much it may hold, and how much of that was handed out and is not done."""

    def __init__(self, subscription: Subscription, size: int) -> None:
        self.subscription = subscription
        self.size = size
        self.held = 0
        self.empty = False
        """Whether it was halted, and has handed out everything."""


class LookAhead:
    """The messages of one subscription, and of those that follow it.

    Args:
        first: The subscription, entered.
        size: Its prefetch.
        subscribe: Enters another, with the prefetch that it is called with.
        group: The group's name, for the log.
    """

    def __init__(
        self, first: Subscription, size: int, subscribe: Callable[[int], Coroutine[Any, Any, Subscription]], group: str
    ) -> None:
        self._base = size
        self._subscribe = subscribe
        self._group = group
        self._rooms = [_Room(first, size)]
        self._homes: dict[int, _Room] = {}
        self._changing = asyncio.Lock()
        self._subscribing: asyncio.Task[Subscription] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopped = False
        self._told = False

    async def receive(self) -> Message:
        """Wait for the next message; see `Subscription.receive`. Each is to be followed by a `done`."""
        while True:
            room, message = self._take()
            if message is None:
                if await self._changed(room):
                    continue
                try:
                    message = await room.subscription.receive()
                except BackendClosedError:
                    if room is self._rooms[-1] and not self._changing.locked():
                        raise
                    async with self._changing:
                        continue  # another takes over
            room.held += 1
            self._homes[id(message)] = room
            return message

    def done(self, message: Message) -> None:
        """The message is settled, or given back."""
        room = self._homes.pop(id(message), None)
        if room is None:
            return
        room.held -= 1
        if not room.held and room.empty and room in self._rooms[:-1]:
            self._leave(room)

    def ack_soon(self, message: Message) -> None:
        """Acknowledge with the next batch; see `Subscription.ack_soon`."""
        self._home(message).ack_soon(message)

    async def release(self, message: Message) -> None:
        """Give a message back; see `Subscription.release`."""
        await self._home(message).release(message)

    async def stop(self) -> None:
        """Take nothing new; see `Subscription.stop`."""
        self._stop()
        await asyncio.gather(*(room.subscription.stop() for room in self._rooms))

    async def aclose(self) -> None:
        """Close all of the subscriptions."""
        self._stop()
        if not self._ending.done():
            self._ending.set_result(None)
        await asyncio.gather(*(room.subscription.aclose() for room in self._rooms), *self._closing)

    def _take(self) -> tuple[_Room, Message | None]:
        """Return the next message that is at hand, and where it is from: what came while a subscription was halted is the oldest."""
        for room in self._rooms[:-1]:
            if not room.empty and (message := room.subscription.take()) is not None:
                return room, message
            room.empty = True
            if not room.held:
                self._leave(room)
        return self._rooms[-1], self._rooms[-1].subscription.take()

    def _leave(self, room: _Room) -> None:
        self._rooms.remove(room)
        task = asyncio.create_task(self._close_later(room.subscription))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_later(self, subscription: Subscription) -> None:
        # Closing just after acknowledgements a provider may look whether they arrived, and take messages for that: the next ones of the
        # subscription that goes on, which would come behind their successors.
        await asyncio.wait([self._ending], timeout=_SETTLED)
        await subscription.aclose()

    def _stop(self) -> None:
        self._stopped = True
        if self._subscribing is not None:
            self._subscribing.cancel()

    def _home(self, message: Message) -> Subscription:
        return self._homes.get(id(message), self._rooms[-1]).subscription

    async def _changed(self, room: _Room) -> bool:
        """Let another subscription take over from `room`, if it is full or larger than it need be; return whether one has."""
        size = self._size_after(room)
        if size is None:
            return False
        async with self._changing:
            if room is not self._rooms[-1]:
                return True
            if (size := self._size_after(room)) is None:
                return False
            # First of all it takes nothing more, as two that take beside each other would mix the order up.
            await room.subscription.halt()
            following = await self._following(size)
            self._rooms.append(_Room(following, size))
        if self._stopped:
            await following.stop()
        return True

    async def _following(self, size: int) -> Subscription:
        """Subscribe again, however long the broker is away."""
        tries = 0
        while not self._stopped:
            self._subscribing = asyncio.create_task(self._subscribe(size))
            try:
                return await result_of(self._subscribing, lambda: BackendClosedError("the consumer stops"))
            except AbeError as exc:
                if not exc.retryable:
                    raise
                tries += 1
                _log.warning("group %r cannot be subscribed to again, trying again: %s", self._group, exc)
                await asyncio.sleep(_RECONNECT(tries))
        raise BackendClosedError("the consumer stops")

    def _size_after(self, room: _Room) -> int | None:
        if self._stopped:
            return None
        if room.held < room.size:
            return self._base if room.size > self._base and 2 * room.held < self._base else None
        if sum(room.size for room in self._rooms) < _MOST:
            self._told = False
            return 2 * room.size
        if not self._told:
            self._told = True
            _log.warning(
                "%d messages of group %r wait behind keys that are being handled: other keys wait too, until those are done",
                sum(room.held for room in self._rooms),
                self._group,
            )
        return None
