"""RabbitMQ's receiver: one consumer of one group."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import Delivery, Disposition, Metadata, Outcomes, Settlement
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.backends.message_queue.base.log import Log
from abe.errors import AbeError, BackendConnectionError, GroupMissingError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._broker import Broker
from abe_backend_rabbitmq._channel import Channel
from abe_backend_rabbitmq._connection import run_to_completion
from abe_backend_rabbitmq._consuming import Consuming
from abe_backend_rabbitmq._errors import ChannelNotFound, consumer_timeout, lost, translated
from abe_backend_rabbitmq._pace import LONG
from abe_backend_rabbitmq._settlements import Settlements
from abe_backend_rabbitmq._tried import name_of
from abe_backend_rabbitmq._wire import Header

_log: Final = Log("abe.rabbitmq")

TICK: Final = 1.0
"""Seconds after which a `receive` without a delivery returns."""

_UNSURE: Final = 1.0
"""Seconds after which an acknowledgement has surely arrived."""

_CLOSE_TIMEOUT: Final = 1.0
"""Seconds that closing a channel waits for the broker's answer."""

_LOOK_AGAIN: Final = 10.0
"""Seconds after which an idle consumer looks again for parked messages."""

_TAG_BITS: Final = 48
_TAG: Final = (1 << _TAG_BITS) - 1
_MOST_PREFETCHED: Final = 65_535


class RabbitMQReceiver:
    """Consumes a group's queue on a channel, and on another one after a loss.

    `Delivery.native` holds the channel's generation, and below `_TAG_BITS` the delivery tag.

    Args:
        broker: Publishes copies, and opens channels.
        group: The group.
        prefetch: How many messages may be in flight.
        leave: Called when it closes.
    """

    def __init__(
        self, broker: Broker, group: str, prefetch: int, leave: Callable[["RabbitMQReceiver"], Awaitable[object]]
    ) -> None:
        self.group = group
        self._broker = broker
        self._leave = leave
        self._queue = broker.topology.queue(group)
        self._prefetch = min(prefetch, _MOST_PREFETCHED)
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._settlements: Settlements | None = None
        self._consuming: Consuming | None = None
        self._generation = 0
        self._ready: deque[Delivery] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._stopping = False
        self._version = 0
        self._look_at = 0.0
        self._acked_at = -_UNSURE
        self._recorded: tuple[Delivery, str] | None = None

    @property
    def in_flight(self) -> int:
        """Deliveries that are not settled."""
        return 0 if self._channel is None else len(self._channel.in_flight)

    async def start(self) -> None:
        """Begin to consume, on a new channel."""
        before, self._channel = self._channel, None
        if before is not None and before.closed is None:
            self._drop(before, "the consumer began again on another channel")
        if self._consuming is not None:
            self._consuming.end()
        self._generation += 1
        self._ready.clear()
        broker = self._broker
        self._version = broker.groups.version
        channel = await broker.consume_channel()
        self._settlements = Settlements(broker, self.group, channel, self._prefetch // 2)
        base, group, losses = self._generation << _TAG_BITS, self.group, broker.losses
        ready, held = self._ready, channel.in_flight

        def deliver(tag: int, header: Header, body: bytes, redelivered: bool) -> None:
            delivery = _wire.delivery(base | tag, header, body, redelivered)
            held[tag] = delivery, header
            if delivery.uncertain:
                losses.take_off(group, delivery, header)
                if losses.was_handled(group, delivery, header):
                    self._remove(channel, tag, delivery)
                    return
            ready.append(delivery)
            if self._waiter is not None:
                self._wake()

        consuming = Consuming(
            broker,
            group,
            channel,
            self._prefetch,
            deliver=deliver,
            taken_back=ready.clear,
            failed=partial(self._drop, channel),
        )
        channel.ended = partial(self._gone, channel, consuming)
        channel.native.on_consumer_cancel_callbacks.add(lambda _: self._cancelled(channel))
        self._channel, self._consuming = channel, consuming
        try:
            await consuming.begin()
        except BaseException:
            self._drop(channel, "the consumer did not begin")  # one that is registered meanwhile ends with its channel
            raise
        if self._stopping:  # meanwhile
            await self.stop()

    def made(self, version: int) -> None:
        """Consume again if the group's queue was declared in a version of the registry newer than the one consumed."""
        if self._channel is not None and self._version < version:
            self._version = version
            self._drop(self._channel, "its queue was deleted and declared again")

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Return what the broker has pushed; wait `TICK` seconds for the first delivery."""
        ready = self._ready
        if not ready and not self._stopping:
            self._waiter = self._loop.create_future()
            timer = self._loop.call_later(TICK, self._wake)
            try:
                if self._channel is not None and self._channel.closed is None:
                    await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        if self._stopping:
            return ()
        channel = self._channel
        if channel is None or channel.closed is not None:
            reason = "it was not opened" if channel is None else channel.closed
            raise BackendConnectionError(f"the channel that consumes group {self.group!r} is gone: {reason}")
        assert self._consuming is not None
        self._consuming.go_on()
        if not ready and self._loop.time() >= self._look_at:
            self._look_at = self._loop.time() + _LOOK_AGAIN
            self._broker.parked.look()
        if self._prefetch == 1:
            await self._record()
        return [ready.popleft() for _ in range(min(limit, len(ready)))]

    def metadata(self, delivery: Delivery) -> Metadata:
        """Parse the properties."""
        header = delivery.header
        assert isinstance(header, Header)
        return _wire.metadata(header, delivery.body)

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        """Acknowledge. AMQP has no reply to that; with `verify`, the reply to a later request proves that it arrived."""
        tags = [self._tag(delivery) for delivery in deliveries]
        known = [tag for tag in tags if tag is not None]
        channel = self._channel
        if channel is not None and known:
            self._acked_at = self._loop.time()
            with translated(self.group):
                await channel.ack(known)
                if verify:
                    try:
                        await run_to_completion(channel.native.basic_qos(prefetch_count=self._prefetch))
                    except (OSError, RuntimeError):
                        return [lost()] * len(deliveries)
        return () if len(known) == len(tags) else [lost() if tag is None else None for tag in tags]

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        """Carry out settlements: publish a copy, then acknowledge the message; or return it to its queue."""
        if self._settlements is None:
            return [lost()] * len(settlements)
        try:
            return await self._settlements.carry_out(settlements, self._tag)
        finally:
            self._acked_at = self._loop.time()

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Return those that are lost. Nothing is renewed: the connection is the lease."""
        return [delivery for delivery in deliveries if self._tag(delivery) is None]

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Consume on a new channel; the deliveries of the old one are lost."""
        try:
            await self._broker.groups.now()
            await self.start()
        except BackendConnectionError as exc:
            if isinstance(exc.__cause__, ChannelNotFound):
                raise GroupMissingError(f"group {self.group!r} was deleted underneath its consumers") from exc
            raise
        return await self.renew(deliveries)

    async def stop(self) -> Sequence[Delivery]:
        """Cancel the consumer, and return what `receive` has not returned: given back to the queue, it would go behind its successors."""
        self._stopping = True
        self._wake()
        if self._settlements is not None:
            self._settlements.hurry()
        if self._consuming is not None:
            await self._consuming.stop()
        unread = [delivery for delivery in self._ready if not delivery.lost]
        self._ready.clear()
        return unread

    async def close(self) -> None:
        """Release all deliveries, and close the channel."""
        await self._leave(self)
        try:
            await self.stop()
            channel = self._channel if (self._consuming is None or self._consuming.answered) else None
            if channel is not None and channel.in_flight and channel.closed is None:
                held = [delivery for delivery, _ in channel.in_flight.values()]
                await self.settle([Settlement(delivery, Disposition.RELEASE) for delivery in held])
            if channel is not None and channel.closed is None and self._loop.time() - self._acked_at < _UNSURE:
                await self._settle_down(channel)
        finally:
            channel, self._channel = self._channel, None
            if channel is not None and channel.closed is None:
                closing = self._drop(channel, "the channel was closed")
                if self._consuming is None or self._consuming.answered:  # a silent broker gets no wait
                    await asyncio.wait([closing], timeout=_CLOSE_TIMEOUT)

    async def _settle_down(self, channel: Channel) -> None:
        """Wait until every acknowledgement has reached the queue.

        RabbitMQ's channel sends 32 acknowledgements to a quorum queue at once; it buffers further ones, and drops them when it is
        closed. Once the queue has answered a later request, all of them have arrived: so a consumer is registered and cancelled here.
        What is delivered to it is released.
        """
        given: list[Delivery] = []
        base = self._generation << _TAG_BITS

        def deliver(tag: int, header: Header, body: bytes, redelivered: bool) -> None:
            delivery = _wire.delivery(base | tag, header, body, redelivered)
            self._broker.losses.take_off(self.group, delivery, header)
            channel.in_flight[tag] = delivery, header
            given.append(delivery)

        with translated(self.group):
            try:
                consumer = await run_to_completion(channel.consume(self._queue, 1, deliver))
                await run_to_completion(channel.native.basic_cancel(consumer))
            except ChannelNotFound:
                return  # the queue was deleted, and what was in it
        await self.settle([Settlement(delivery, Disposition.RELEASE) for delivery in given])

    async def _record(self) -> None:
        """Record that the handler of a message that is to be handled alone begins; or find that it has begun before.

        Without a record nothing is held against the message.
        """
        tried = self._broker.tried
        try:
            before = self._recorded
            if before is not None and self._tag(before[0]) is None:
                self._recorded = None
                if not before[0].lost:  # it is settled
                    await tried.forget(self.group, before[1])
            delivery = self._ready[0] if self._ready else None
            if delivery is None or not delivery.uncertain or (before is not None and delivery is before[0]):
                return
            assert isinstance(delivery.header, Header)
            if name := name_of(delivery, delivery.header):
                delivery.alone = 0
                delivery.alone = await tried.begin(self.group, name, delivery)
                self._recorded = delivery, name
        except AbeError as exc:
            _log.warning("it cannot be recorded that a message of group %r is handled alone: %s", self.group, exc)

    def _tag(self, delivery: Delivery) -> int | None:
        """Return the delivery's tag; None: its channel is closed, or it was settled."""
        number: int = delivery.native
        channel = self._channel
        if channel is None or channel.closed is not None or number >> _TAG_BITS != self._generation:
            return None
        tag = number & _TAG
        return tag if tag in channel.in_flight else None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _cancelled(self, channel: Channel) -> None:
        """Drop the channel of a consumer that the broker cancelled: its queue was deleted or moved."""
        self._drop(channel, "the broker cancelled the consumer")

    def _drop(self, channel: Channel, reason: str) -> "asyncio.Task[None]":
        channel.lose(reason)
        task = self._loop.create_task(_close(channel))
        _closing.add(task)
        task.add_done_callback(_closing.discard)
        return task

    def _remove(self, channel: Channel, tag: int, delivery: Delivery) -> None:
        """Acknowledge a redelivery of a message whose handler has ended: the channel was lost before the acknowledgement."""
        _log.info("a redelivered message of group %r is not handled again: its handler has ended", self.group)
        delivery.begun = delivery.handled = True  # in case it is lost again
        task = self._loop.create_task(channel.ack([tag]))
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    def _gone(self, channel: Channel, consuming: Consuming) -> None:
        """Record the lost deliveries of a closed channel: they are no attempts, unless a handler had them for too long."""
        limit = consumer_timeout(channel.closed or "")
        for delivery, header in channel.lost:
            long = consuming.pace.handled_for(_tag(delivery), LONG)
            self._broker.losses.note(self.group, header, delivery, counts=long)
        if limit is not None:
            self._broker.consumer_timeout = limit
        self._wake()


def _tag(delivery: Delivery) -> int:
    number: int = delivery.native
    return number & _TAG


_closing: Final[set[asyncio.Task[None]]] = set()


async def _close(channel: Channel) -> None:
    try:
        with translated("the broker"):
            await channel.close()
    except AbeError as exc:
        _log.debug("a channel whose consumer was cancelled could not be closed: %s", exc)


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = RabbitMQReceiver
