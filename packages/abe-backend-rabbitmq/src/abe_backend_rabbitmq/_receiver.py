"""One consumer of one group."""

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import Delivery, Failures, Metadata, Receipt, Settlement, Verb
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.errors import AbeError, BackendConnectionError, UnroutableError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import finished
from abe_backend_rabbitmq._errors import ChannelNotFound, RabbitMQError, lost, translated
from abe_backend_rabbitmq._wire import Header

if TYPE_CHECKING:
    from abe_backend_rabbitmq._transport import RabbitMQTransport

_log: Final = logging.getLogger("abe.rabbitmq")

TICK: Final = 1.0
"""Seconds after which a `receive` that got nothing returns."""

CONSUMER_TIMEOUT: Final = 1800.0
"""Seconds for which RabbitMQ by default lets a consumer hold a message: then it closes the channel."""

_UNSURE: Final = 1.0
"""Seconds after which an acknowledgement has surely arrived."""

_GOODBYE: Final = 1.0
"""Seconds for which closing a channel waits for the broker's answer."""

_LOOK_AGAIN: Final = 10.0
"""Seconds after which a consumer that has nothing to do looks again for held messages."""

_PATIENCE: Final = 25.0
"""Seconds for which a verdict is tried by way of a copy. The engine gives up after 30, and nobody would give the message back then."""

_WARN_AT: Final = 0.8
_SAMPLES: Final = 24
_TAG_BITS: Final = 48
_MOST_PREFETCHED: Final = 65_535


class RabbitMQReceiver:
    """A channel that consumes, and the ones after it when it is lost. A receipt names the channel, by its number in that row, and the tag.

    Args:
        transport: Publishes copies, and opens channels.
        group: The group.
        prefetch: How many messages it holds at most.
        consumer_timeout: The broker's, in seconds.
    """

    def __init__(
        self, transport: "RabbitMQTransport", group: str, prefetch: int, consumer_timeout: float = CONSUMER_TIMEOUT
    ) -> None:
        self.group = group
        self._transport = transport
        self._queue = transport.topology.queue(group)
        self._prefetch = min(prefetch, _MOST_PREFETCHED)
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._generation = 0
        self._consumer = ""
        self._ready: deque[Delivery] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._stopping = False
        self._answered = True
        self._look_at = 0.0
        self._sample_every = consumer_timeout * _WARN_AT / _SAMPLES
        self._samples: deque[int] = deque(maxlen=_SAMPLES)
        self._warned = -1
        self._timer: asyncio.TimerHandle | None = None
        self._acked_at = -_UNSURE
        self._failing: dict[int, float] = {}
        self._requeued: set[Receipt] = set()

    @property
    def holding(self) -> int:
        """Messages that are not settled."""
        return 0 if self._channel is None else len(self._channel.held)

    async def start(self) -> None:
        """Begin to consume, on a new channel."""
        before, self._channel, self._consumer = self._channel, None, ""
        if before is not None and before.closed is None:
            self._drop(before, "the consumer began anew")
        self._generation += 1
        self._ready.clear()
        self._samples.clear()
        self._failing.clear()
        self._requeued.clear()
        transport = self._transport
        channel = await transport.consume_channel()
        base = self._generation << _TAG_BITS
        ready, held = self._ready, channel.held

        def deliver(tag: int, header: Header, body: bytes, redelivered: bool) -> None:
            delivery = _wire.delivery(base | tag, header, body, redelivered)
            held[tag] = delivery, header
            ready.append(delivery)
            if self._waiter is not None:
                self._wake()

        channel.ended = self._wake
        channel.native.on_consumer_cancel_callbacks.add(lambda _: self._cancelled(channel))
        self._channel = channel
        with translated(transport.settings.namespace):
            self._consumer = await finished(channel.consume(self._queue, self._prefetch, deliver))
        if self._stopping:  # meanwhile
            await self.stop()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._sample_every, self._watch)

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Return what was pushed."""
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
        if not ready and self._loop.time() >= self._look_at:
            self._look_at = self._loop.time() + _LOOK_AGAIN
            self._transport.look_at_held()
        return [ready.popleft() for _ in range(min(limit, len(ready)))]

    def metadata(self, delivery: Delivery) -> Metadata:
        """Parse the properties."""
        header = delivery.header
        assert isinstance(header, Header)
        return _wire.metadata(header, delivery.body)

    async def ack(self, receipts: Sequence[Receipt], *, verify: bool) -> Failures:
        """Acknowledge. AMQP does not answer that; a request that it answers, sent after it, shows that it arrived."""
        tags = [tag for receipt in receipts if (tag := self._tag(receipt)) is not None]
        failures = (
            {receipt: lost() for receipt in receipts if self._tag(receipt) is None} if len(tags) < len(receipts) else {}
        )
        channel = self._channel
        if channel is not None and tags:
            self._acked_at = self._loop.time()
            with translated(self.group):
                await channel.ack(tags)
                if verify:
                    try:
                        await finished(channel.native.basic_qos(prefetch_count=self._prefetch))
                    except (OSError, RuntimeError):
                        return {receipt: lost() for receipt in receipts}
        return failures

    async def settle(self, settlements: Sequence[Settlement]) -> Failures:
        """Carry out verdicts: a copy is published and confirmed, then the message acknowledged; or the broker takes it back."""
        failures: dict[Receipt, AbeError] = {}
        copied: list[tuple[Settlement, int]] = []
        channel = self._channel
        for settlement in settlements:
            tag = self._tag(settlement.receipt)
            if settlement.receipt in self._requeued:
                self._requeued.discard(settlement.receipt)
            elif channel is None or tag is None:
                failures[settlement.receipt] = lost()
            elif settlement.verb is Verb.RETRY and settlement.delay <= 0:
                await channel.requeue(tag)
            else:
                copied.append((settlement, tag))
        if copied and channel is not None:
            try:
                outcomes = await self._move(copied, channel)
            except AbeError as exc:
                if exc.retryable and not self._too_late([tag for _, tag in copied]):
                    again = {settlement.receipt for settlement, _ in copied}
                    self._requeued |= {each.receipt for each in settlements} - again - failures.keys()
                    raise
                outcomes = [exc] * len(copied)
            done: list[int] = []
            for i, (settlement, tag) in enumerate(copied):
                error = outcomes[i] if outcomes else None
                self._failing.pop(tag, None)
                if channel.closed is not None or tag not in channel.held:
                    failures[settlement.receipt] = lost()
                elif error is None:
                    done.append(tag)
                else:
                    await channel.requeue(tag)
                    if settlement.verb is not Verb.RELEASE:
                        failures[settlement.receipt] = error
            self._acked_at = self._loop.time()
            with translated(self.group):
                await channel.ack(done)
        return failures

    async def renew(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Tell which are lost: the connection is the lease."""
        return [receipt for receipt in receipts if self._tag(receipt) is None]

    async def recover(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Consume on a new channel; what the old one held is lost."""
        try:
            await self.start()
        except BackendConnectionError as exc:
            if not isinstance(exc.__cause__, ChannelNotFound):
                raise
            _log.warning("group %r was deleted underneath its consumers: it is made again", self.group)
            await self._transport.restore(self.group)
            await self.start()
        return [receipt for receipt in receipts if self._tag(receipt) is None]

    async def stop(self) -> None:
        """Have nothing more pushed, and give back what nobody was handed yet."""
        self._stopping = True
        self._wake()
        channel = self._channel
        if channel is None or channel.closed is not None or not self._consumer:
            return
        consumer, self._consumer = self._consumer, ""
        with translated(self.group):
            self._answered = False
            await finished(channel.native.basic_cancel(consumer))
            self._answered = True
        unread = [Settlement(delivery.receipt, Verb.RELEASE) for delivery in self._ready if not delivery.lost]
        self._ready.clear()
        if unread:
            await self.settle(unread)

    async def close(self) -> None:
        """Give back everything, and close the channel."""
        self._transport.receivers.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self.stop()
            channel = self._channel if self._answered else None
            if channel is not None and channel.held and channel.closed is None:
                base = self._generation << _TAG_BITS
                await self.settle([Settlement(base | tag, Verb.RELEASE) for tag in channel.held])
            if channel is not None and channel.closed is None and self._loop.time() - self._acked_at < _UNSURE:
                await self._settle_down(channel)
        finally:
            channel, self._channel = self._channel, None
            if channel is not None and channel.closed is None:
                channel.ended = None
                closing = self._drop(channel, "the channel was closed")
                if self._answered:  # a broker that is silent is left to its connection
                    await asyncio.wait([closing], timeout=_GOODBYE)

    async def _settle_down(self, channel: Channel) -> None:
        """Have every acknowledgement arrive.

        A quorum queue takes in 32 of them; RabbitMQ's channel keeps those that come faster to itself for a while, and forgets them when
        it is closed. It has passed on all of them when the queue answered something: here, that a consumer comes and goes. What that
        one is given meanwhile is given back.
        """
        given: list[int] = []

        def deliver(tag: int, header: Header, body: bytes, redelivered: bool) -> None:
            channel.held[tag] = _wire.delivery(tag, header, body, redelivered), header
            given.append(tag)

        with translated(self.group):
            try:
                consumer = await finished(channel.consume(self._queue, 1, deliver))
                await finished(channel.native.basic_cancel(consumer))
            except ChannelNotFound:
                return  # the queue was deleted, and what was in it
        base = self._generation << _TAG_BITS
        await self.settle([Settlement(base | tag, Verb.RELEASE) for tag in given])

    def _tag(self, receipt: Receipt) -> int | None:
        """Return the tag in a receipt; None: its channel is gone, or it was settled."""
        assert isinstance(receipt, int)
        channel = self._channel
        if channel is None or channel.closed is not None or receipt >> _TAG_BITS != self._generation:
            return None
        tag = receipt & ((1 << _TAG_BITS) - 1)
        return tag if tag in channel.held else None

    async def _move(self, copied: Sequence[tuple[Settlement, int]], channel: Channel) -> Sequence[AbeError | None]:
        """Publish what takes the messages' places. Queues that it goes to and that were deleted are made again, once."""
        outcomes: list[AbeError | None] = [lost()] * len(copied)
        places: Sequence[int] = range(len(copied))
        for last in (False, True):
            copies: list[Outgoing] = []
            sent: list[int] = []
            for place in places:
                settlement, tag = copied[place]
                held = channel.held.get(tag)
                if held is None:
                    continue
                try:
                    copies.append(await self._copy(settlement, *held))
                except AbeError:
                    raise
                except Exception as exc:  # noqa: BLE001 - it concerns this message, and no other of the batch
                    _log.exception("a message of group %r cannot be copied: it goes back to its queue", self.group)
                    outcomes[place] = RabbitMQError(f"the message cannot be copied: {exc!r}")
                else:
                    sent.append(place)
            found = await self._transport.outlet.move(copies)
            for i, place in enumerate(sent):
                outcomes[place] = found[i] if found else None
            missing = [place for place in sent if isinstance(outcomes[place], UnroutableError)]
            if last or not missing:
                break
            self._transport.ladder.forget()
            await self._transport.restore(self.group)
            places = missing
        return outcomes if any(outcomes) else ()

    def _too_late(self, tags: Sequence[int]) -> bool:
        now = self._loop.time()
        return any(now - self._failing.setdefault(tag, now) > _PATIENCE for tag in tags)

    async def _copy(self, settlement: Settlement, delivery: Delivery, header: Header) -> Outgoing:
        body, attempt = delivery.body, delivery.attempt
        if settlement.verb is Verb.RETRY:
            exchange, key = await self._transport.ladder.retry(self.group, settlement.delay)
            properties = _wire.copy(header, body, attempt)
        elif settlement.verb is Verb.RELEASE:
            exchange, key = "", self._queue
            if settlement.attempts is not None:
                properties = _wire.copy(header, body, settlement.attempts)
            else:
                uncertain = [("abe-uncertain", delivery.uncertain)] if delivery.uncertain else []
                properties = _wire.copy(header, body, attempt - 1, *uncertain)
        else:
            exchange, key = "", self._transport.topology.dead(self.group)
            properties = _wire.buried(header, body, attempt, settlement.reason, settlement.error)
        return Outgoing(exchange, key, properties, body, _wire.message_id(properties))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _cancelled(self, channel: Channel) -> None:
        """The broker ended the consumer: its queue was deleted or moved. Everything begins anew."""
        self._drop(channel, "the broker cancelled the consumer")

    def _drop(self, channel: Channel, reason: str) -> "asyncio.Task[None]":
        channel.lose(reason)
        task = self._loop.create_task(_close(channel))
        _closing.add(task)
        task.add_done_callback(_closing.discard)
        return task

    def _watch(self) -> None:
        """Warn before RabbitMQ loses patience with somebody who holds a message for long."""
        self._timer = self._loop.call_later(self._sample_every, self._watch)
        channel = self._channel
        if channel is None or not channel.held:
            self._samples.clear()
            return
        oldest = next(iter(channel.held))
        if len(self._samples) == _SAMPLES and oldest <= self._samples[0] and oldest != self._warned:
            self._warned = oldest
            _log.warning(
                "a message of group %r has been held for %.0f %% of RabbitMQ's default consumer_timeout: soon the broker closes the "
                "channel, and delivers it again. Raise consumer_timeout, or work in smaller steps",
                self.group,
                _WARN_AT * 100,
            )
        self._samples.append(next(reversed(channel.held)))


_closing: Final[set[asyncio.Task[None]]] = set()


async def _close(channel: Channel) -> None:
    try:
        with translated("the broker"):
            await channel.close()
    except AbeError as exc:
        _log.debug("a channel whose consumer was cancelled could not be closed: %s", exc)


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = RabbitMQReceiver
