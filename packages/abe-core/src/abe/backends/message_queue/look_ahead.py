"""Messages of a group for `ordered_by_key`: the prefetch grows while successors of a busy key fill it, so that other keys are handled.

A broker delivers a queue in order, so a consumer has to take and buffer the messages that wait for a busy key to reach those behind them.
When every message within the prefetch is in flight and a worker is idle, another subscription with twice the prefetch takes over. Only the
newest subscription receives, which keeps the order; an older one is closed when its last message is settled.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.subscription import Subscription
from abe.backends.message_queue.base.tasks import SharedTask, gather_all
from abe.errors import AbeError, BackendClosedError

_log: Final = Log("abe.consumer")
_MAX_IN_FLIGHT: Final = 1000
"""Limit for the messages in flight in all, approximately: small enough for a process's memory whatever their size."""

_SETTLED: Final = 2.0
"""Seconds within which settlements have certainly arrived at any broker."""

_RECONNECT: Final = ExponentialBackoff(initial=0.1, maximum=1.0)


class _Source:
    """A subscription, its prefetch, and how many of its messages are in flight."""

    def __init__(self, subscription: Subscription, size: int) -> None:
        self.subscription = subscription
        self.size = size
        self.in_flight = 0
        self.halted = False
        self.empty = False
        """Whether it is halted and its buffer is empty."""


class LookAhead:
    """The messages of one subscription, and of the ones that replace it.

    Args:
        first: The first subscription, entered.
        size: Its prefetch.
        subscribe: Returns another, entered, with the given prefetch.
        group: The group's name, for the log.
    """

    def __init__(
        self, first: Subscription, size: int, subscribe: Callable[[int], Coroutine[Any, Any, Subscription]], group: str
    ) -> None:
        self._base = size
        self._subscribe = subscribe
        self._group = group
        self._sources = [_Source(first, size)]
        self._source_of: dict[int, _Source] = {}
        # Shared: a worker that is cancelled meanwhile does not interrupt it.
        self._replacing = SharedTask(self._replace, _stops)
        self._closing: set[asyncio.Task[None]] = set()
        self._ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopped = False
        self._warned = False

    async def receive(self) -> Message:
        """Wait for the next message; see `Subscription.receive`. Call `done` for each."""
        while True:
            if self._stopped:
                raise _stops()
            source, message = self._take()
            if message is None:
                if not self._replacing.running and self._size_after(source) is not None:
                    self._replacing.start()
                try:
                    message = await source.subscription.receive()
                except BackendClosedError:
                    if not source.halted:
                        raise
                    if source is self._sources[-1]:
                        await self._replacing.join()
                    continue
            source.in_flight += 1
            self._source_of[id(message)] = source
            return message

    def done(self, message: Message) -> None:
        """Record that a message is settled or given back."""
        source = self._source_of.pop(id(message), None)
        if source is None:
            return
        source.in_flight -= 1
        if not source.in_flight and source.empty and source in self._sources[:-1]:
            self._retire(source)

    def ack_soon(self, message: Message) -> None:
        """Acknowledge with the next batch; see `Subscription.ack_soon`."""
        self._subscription_of(message).ack_soon(message)

    async def release(self, message: Message) -> None:
        """Give a message back; see `Subscription.release`."""
        await self._subscription_of(message).release(message)

    async def stop(self) -> None:
        """Stop receiving; see `Subscription.stop`."""
        self._stopped = True
        try:
            await gather_all(self._replacing.close(), *(source.subscription.stop() for source in self._sources))
        finally:
            await self._sources[-1].subscription.stop()  # one that had just replaced another

    async def aclose(self) -> None:
        """Close all subscriptions."""
        self._stopped = True
        await self._replacing.close()
        if not self._ending.done():
            self._ending.set_result(None)
        await gather_all(*(source.subscription.aclose() for source in self._sources), *self._closing)

    def _take(self) -> tuple[_Source, Message | None]:
        """Return the next buffered message and its source. Halted subscriptions come first, as their messages are older."""
        for source in self._sources[:-1]:
            if not source.empty and (message := source.subscription.take()) is not None:
                return source, message
            source.empty = True
            if not source.in_flight:
                self._retire(source)
        return self._sources[-1], self._sources[-1].subscription.take()

    def _retire(self, source: _Source) -> None:
        self._sources.remove(source)
        task = asyncio.create_task(self._close_later(source.subscription))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_later(self, subscription: Subscription) -> None:
        # A provider that is closed just after acknowledgements may receive messages to verify them. Those would be the next ones of the
        # newest subscription, and would then come after their successors.
        await asyncio.wait([self._ending], timeout=_SETTLED)
        await subscription.aclose()

    def _subscription_of(self, message: Message) -> Subscription:
        return self._source_of.get(id(message), self._sources[-1]).subscription

    async def _replace(self) -> None:
        """Replace the newest subscription by another if its prefetch is too small or too large."""
        source = self._sources[-1]
        if (size := self._size_after(source)) is not None:
            # Halt the old one first: two subscriptions that receive concurrently would break the order.
            source.halted = True
            await source.subscription.halt()
            self._sources.append(_Source(await self._subscribed(size), size))

    async def _subscribed(self, size: int) -> Subscription:
        """Subscribe, retrying while the broker is unreachable."""
        tries = 0
        while True:
            try:
                return await self._subscribe(size)
            except AbeError as exc:
                if not exc.retryable:
                    raise
                tries += 1
                _log.warning("subscribing to group %r again failed, retrying: %s", self._group, exc)
                await asyncio.sleep(_RECONNECT(tries))

    def _size_after(self, source: _Source) -> int | None:
        """Return the prefetch of the subscription that has to replace this one; None if none has to."""
        if self._stopped:
            return None
        if source.halted and source is self._sources[-1]:
            return source.size  # the replacement failed
        if source.in_flight < source.size:
            return self._base if source.size > self._base and 2 * source.in_flight < self._base else None
        if sum(each.size for each in self._sources) < _MAX_IN_FLIGHT:
            self._warned = False
            return 2 * source.size
        if not self._warned:
            self._warned = True
            _log.warning(
                "%d messages of group %r wait for busy keys: messages of other keys behind them wait too",
                sum(each.in_flight for each in self._sources),
                self._group,
            )
        return None


def _stops() -> BackendClosedError:
    return BackendClosedError("the consumer stops")
