"""How much one channel prefetches: the whole prefetch, or, where handlers are slow, what they begin in time.

RabbitMQ closes the channel of a consumer that leaves a message unsettled for `consumer_timeout`, from the delivery on. So messages that
wait for a handler are returned to their queue long before, and consumed again in their order.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from abe.backends.message_queue.base.log import Log
from abe.errors import AbeError
from abe_backend_rabbitmq._broker import Broker
from abe_backend_rabbitmq._channel import Channel, Pushed
from abe_backend_rabbitmq._connection import run_to_completion
from abe_backend_rabbitmq._errors import translated
from abe_backend_rabbitmq._pace import OVERDUE, TICKS, WAITED, Pace

_log: Final = Log("abe.rabbitmq")

_SOME: Final = 4
"""Messages that a consumer settles in a tick at least if it is not slow."""

_PAUSE: Final = 0.05


class Consuming:
    """The consumers of one channel: one, or more after it was slow for a while.

    Args:
        broker: Has the node's `consumer_timeout`, and records lost deliveries.
        group: The group.
        channel: The channel.
        prefetch: How many messages may be in flight.
        deliver: Called for each message.
        taken_back: Called after messages whose handlers had not begun were returned.
        failed: Called with the reason when consuming cannot continue.
    """

    def __init__(
        self,
        broker: Broker,
        group: str,
        channel: Channel,
        prefetch: int,
        *,
        deliver: Pushed,
        taken_back: Callable[[], object],
        failed: Callable[[str], object],
    ) -> None:
        self.pace = Pace()
        self.answered = True
        """Whether the broker has answered every request."""
        self._broker = broker
        self._group = group
        self._channel = channel
        self._prefetch = prefetch
        self._deliver = deliver
        self._taken_back = taken_back
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._credit = 0
        self._consumers: list[str] = []
        self._stopping = False
        self._warned = -1
        self._adapting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def begin(self) -> None:
        """Begin to consume."""
        await self._consume(self._prefetch)
        self._tick_later()

    async def stop(self) -> None:
        """Cancel the consumers."""
        self.end()
        if self._adapting is not None and not self._adapting.done():
            await asyncio.wait([self._adapting])
        if self._channel.closed is None:
            await self._cancel()

    def end(self) -> None:
        """Change the consumers no more."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()

    def go_on(self) -> None:
        """Raise the prefetch again after the consumer was slow, once handlers begin messages in time."""
        if self._credit < self._prefetch:
            channel = self._channel
            room = self._prefetch - self._credit - len(channel.in_flight)
            settled = self.pace.settled_in(1, channel.delivered - len(channel.in_flight))
            if room >= max(1, self._prefetch // 4) and settled >= max(_SOME, self._prefetch / WAITED):
                self.adapt(self._consume(room))

    def adapt(self, change: Coroutine[Any, Any, None]) -> None:
        """Carry out a change, one at a time."""
        if self._stopping or (self._adapting is not None and not self._adapting.done()):
            change.close()
        else:
            self._adapting = self._loop.create_task(self._change(change))

    async def consume_anew(self, pace: int) -> None:
        """Return the messages that wait for a handler, and consume again with a prefetch that handlers begin in time.

        Args:
            pace: That prefetch: how many messages were settled in the last `WAITED` ticks.
        """
        await self._cancel()
        await self._take_back()
        while not self._stopping and self._channel.closed is None:
            room = self._prefetch - len(self._channel.in_flight)
            if room > 0:
                await self._consume(max(1, min(room, pace)))
                return
            await asyncio.sleep(_PAUSE)  # handlers have the whole prefetch

    async def _change(self, change: Coroutine[Any, Any, None]) -> None:
        try:
            await change
        except AbeError as exc:
            _log.debug("the prefetch of group %r could not be changed: %s", self._group, exc)
            self._failed("the consumer could not be changed")

    async def _take_back(self) -> None:
        """Return messages whose handlers have not begun, unless `stop` does. `Losses` subtracts what the broker counts for it."""
        if self._stopping:
            return
        held = self._channel.in_flight
        waiting = [(tag, *each) for tag, each in held.items() if not each[0].begun]
        _log.debug("%d messages of group %r waited for a handler: they are consumed again", len(waiting), self._group)
        for _, delivery, _ in waiting:
            delivery.lost = True  # first: none of them is handed out any more
        for tag, delivery, header in waiting:
            await self._broker.tried.withdraw(self._group, delivery, header)
            if tag in held:
                self._broker.losses.note(self._group, header, delivery)
                await self._channel.requeue(tag)
        self._taken_back()

    async def _consume(self, credit: int) -> None:
        queue = self._broker.topology.queue(self._group)
        self._credit += credit
        with translated(self._broker.settings.namespace):
            self._consumers.append(await run_to_completion(self._channel.consume(queue, credit, self._deliver)))

    async def _cancel(self) -> None:
        consumers, self._consumers, self._credit = self._consumers, [], 0
        for consumer in consumers:
            with translated(self._group):
                self.answered = False
                await run_to_completion(self._channel.native.basic_cancel(consumer))
                self.answered = True

    def _tick_later(self) -> None:
        if not self._stopping:
            self._timer = self._loop.call_later(self._broker.consumer_timeout / TICKS, self._tick)

    def _tick(self) -> None:
        """Return messages that wait for a handler for too long, and warn of handlers that take too long."""
        channel, pace = self._channel, self.pace
        if channel.closed is not None:
            return
        self._tick_later()
        settled = channel.delivered - len(channel.in_flight)
        waiting = next((tag for tag, (delivery, _) in channel.in_flight.items() if not delivery.begun), None)
        if waiting is not None and pace.held_for(waiting, WAITED):
            self.adapt(self.consume_anew(pace.settled_in(WAITED, settled)))
        self._warn()
        pace.tick(
            channel.delivered, settled, (tag for tag, (delivery, _) in channel.in_flight.items() if delivery.begun)
        )

    def _warn(self) -> None:
        """Warn before RabbitMQ's `consumer_timeout` ends for a message in its handler."""
        oldest = next(iter(self._channel.in_flight), -1)
        if oldest not in (-1, self._warned) and self.pace.held_for(oldest, OVERDUE):
            self._warned = oldest
            _log.warning(
                "a message of group %r has been in flight for %.0f %% of RabbitMQ's consumer_timeout (%g s), after which the broker "
                "closes the channel and redelivers it: raise consumer_timeout, or work in smaller steps",
                self._group,
                OVERDUE / TICKS * 100,
                self._broker.consumer_timeout,
            )
