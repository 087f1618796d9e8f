"""The inbox of one subscription: takes messages from the broker within a bound, hands them out, and carries their verdicts back."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection
from typing import Final

from abe.backends.message_queue.base.backoff import Backoff, ExponentialBackoff
from abe.backends.message_queue.base.clock import Clock, sleep
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.names import check_seconds
from abe.backends.message_queue.base.transport import Delivery, Metadata, Receipt, Receiver, Settlement, Verb
from abe.backends.message_queue.engine.leases import LeaseKeeper
from abe.backends.message_queue.engine.settler import Settler
from abe.codec import Codec
from abe.errors import (
    AbeError,
    AlreadySettledError,
    BackendClosedError,
    DecodeError,
    LeaseLostError,
    UnsupportedCapabilityError,
)

_log: Final = logging.getLogger("abe.engine")
_RECONNECT: Final = ExponentialBackoff(initial=0.05, maximum=5.0)
_RETRY: Final[Backoff] = ExponentialBackoff()
_UNRENEWED_PATIENCE: Final = 30.0
"""Seconds for which a verdict is tried where the broker has no lease that would run out."""


class Inbox:
    """Deliveries between the broker and whoever handles them.

    At most `prefetch` of them are ours at any time: in the buffer, in a handler, or with a verdict that the broker has not confirmed. The
    next ones are asked for, half of the bound at a time, while the buffered ones are handled.

    Args:
        receiver: The broker's side.
        group: The group's name.
        prefetch: The bound.
        max_attempts: Deliveries of one message before it is dead.
        max_delay: The longest delay that the broker can hold, in seconds; None: no delay at all.
        lease: Seconds; None where the broker has no leases.
        codec: Decodes bodies.
        clock: What leases and pauses are measured by.
        close_timeout: Seconds for which closing waits for a broker that does not answer.
        left: Called when the inbox is closed.
    """

    def __init__(
        self,
        receiver: Receiver,
        *,
        group: str,
        prefetch: int,
        max_attempts: int,
        max_delay: float | None,
        lease: float | None,
        codec: Codec,
        clock: Clock,
        close_timeout: float,
        left: "Callable[[Inbox], object]",
    ) -> None:
        self.group = group
        self._receiver = receiver
        self._prefetch = prefetch
        self._max_attempts = max_attempts
        self._max_delay = max_delay
        self._lease = lease
        self._decode = codec.decode
        self._clock = clock
        self._close_timeout = close_timeout
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._live: dict[Receipt, Delivery] = {}
        self._buffer: deque[Delivery] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._space: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self._closing: asyncio.Task[None] | None = None
        self._keeper = LeaseKeeper(receiver, self._held, self._lose, lease, clock)
        patience = _UNRENEWED_PATIENCE if lease is None else lease
        self._settler = Settler(receiver, self._keeper.sure, self._make_space, patience, clock)
        self._keeping = self._loop.create_task(self._keeper.run())
        self._fetching = self._loop.create_task(self._fetch())
        for task in (self._keeping, self._fetching):
            task.add_done_callback(self._ended)
        self._stopped: asyncio.Task[None] | None = None

    def take(self) -> Message | None:
        """Return the next message if one is at hand."""
        while self._buffer:
            delivery = self._buffer.popleft()
            if delivery.lost:
                if self._live.get(delivery.receipt) is delivery:  # the transport saw it go: it takes no place any more
                    del self._live[delivery.receipt]
                continue
            if delivery.fault is None and delivery.attempt <= self._max_attempts:
                try:
                    message = Message(self._decode(delivery.body))
                except DecodeError as exc:
                    self._bury(delivery, "undecodable", str(exc))
                else:
                    message._delivery = delivery  # pyright: ignore[reportPrivateUsage]
                    message._source = self  # pyright: ignore[reportPrivateUsage]
                    message._verdict = None  # pyright: ignore[reportPrivateUsage]
                    return message
            elif delivery.fault is not None:
                self._bury(delivery, "undecodable", delivery.fault)
            else:
                self._bury(delivery, "max_attempts", "its consumers died or let its lease run out, each time")
        return None

    async def receive(self) -> Message:
        """Wait for the next message; see `Subscription.receive`."""
        while True:
            message = self.take()
            if message is not None:
                return message
            if self._error is not None:
                raise self._error
            if self._stopping:
                raise BackendClosedError("the subscription was closed")
            self._make_space()  # nothing is buffered: what little room there is will do
            future = self._loop.create_future()
            self._waiters.append(future)
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self._wake(1)  # woken and cancelled at once: somebody else takes the message
                elif future in self._waiters:
                    self._waiters.remove(future)
                raise
            if len(self._buffer) > 1:
                self._wake(2)  # each one that wakes wakes two: the waiters rise as a tree, not all for one message

    def metadata(self, message: Message) -> Metadata:
        """Return what travelled beside the body."""
        delivery = _delivery(message)
        if not isinstance(delivery.header, Metadata):
            delivery.header = self._receiver.metadata(delivery)
        return delivery.header

    def lease_lost(self, message: Message) -> bool:
        """Whether the message is known not to be ours any more."""
        return _delivery(message).lost

    def ack_soon(self, message: Message) -> None:
        """Acknowledge with the next batch; a failure is logged."""
        if message._verdict is None:  # pyright: ignore[reportPrivateUsage]
            message._verdict = "ack"  # pyright: ignore[reportPrivateUsage]
            delivery = _delivery(message)
            if self._live.get(delivery.receipt) is delivery:
                del self._live[delivery.receipt]
                self._settler.ack(delivery)
            else:
                _log.warning(
                    "a message of group %r was handled, but its lease was lost: it will be handled again", self.group
                )

    async def ack(self, message: Message) -> None:
        """Acknowledge; see `Message.ack`."""
        await self._settle(message, "ack", None)

    async def nack(self, message: Message, delay: float | None, reason: str, error: str) -> None:
        """Have it delivered again, or bury it; see `Message.nack`."""
        delivery, reason, error = _delivery(message), _text(reason), _text(error)
        if delay is None:
            delay = _RETRY(delivery.attempt)
        check_seconds("nack: delay", delay, zero=True)
        if delay and (self._max_delay is None or delay > self._max_delay):
            raise UnsupportedCapabilityError(
                f"nack(delay={delay:g}): this backend can delay by at most {self._max_delay or 0:g} s"
            )
        if delivery.attempt >= self._max_attempts:
            settlement = Settlement(delivery.receipt, Verb.DEAD, reason=reason or "max_attempts", error=error)
        else:
            settlement = Settlement(delivery.receipt, Verb.RETRY, delay=delay, reason=reason, error=error)
        await self._settle(message, "nack", settlement)

    async def reject(self, message: Message, reason: str, error: str) -> None:
        """Bury it; see `Message.reject`."""
        settlement = Settlement(_delivery(message).receipt, Verb.DEAD, reason=_text(reason), error=_text(error))
        await self._settle(message, "reject", settlement)

    async def release(self, message: Message) -> None:
        """Give a message back as if it had never been taken. Nothing happens when it is settled already."""
        if message._verdict is None:  # pyright: ignore[reportPrivateUsage]
            await self._settle(message, "release", Settlement(_delivery(message).receipt, Verb.RELEASE))

    async def extend(self, message: Message, seconds: float) -> None:
        """Start the lease anew; see `Message.extend`."""
        delivery = _delivery(message)
        check_seconds("extend: seconds", seconds)
        if self._lease is None:
            return
        if seconds > self._lease:
            raise UnsupportedCapabilityError(
                f"extend({seconds:g}): the lease is {self._lease:g} s. It is renewed by itself as long as the event loop runs; "
                f"set QUEUE_LEASE_SECONDS higher if the loop must be kept busy for longer"
            )
        if delivery.lost or self._live.get(delivery.receipt) is not delivery:
            raise LeaseLostError("the message is not ours any more")
        self._lose(await self._receiver.renew([delivery.receipt]))
        if delivery.lost:
            raise LeaseLostError("the message is not ours any more: its lease had run out")

    async def stop(self) -> None:
        """Take nothing new, and give back what nobody was handed yet."""
        if self._stopped is None:
            self._stopped = self._loop.create_task(self._stop())
        await asyncio.shield(self._stopped)

    async def close(self) -> None:
        """Stop, carry out what was decided, give back the rest, and leave."""
        await asyncio.shield(self._close_once())

    def close_soon(self) -> None:
        """Close without waiting, from any thread; nothing happens when the event loop is closed, or about to be."""

        def close() -> None:
            # Nobody but an event loop that ends cancels this task before `close` does: a new task would never be run.
            if not self._keeping.cancelling():
                self._close_once()

        try:
            self._loop.call_soon_threadsafe(close)
        except RuntimeError:
            _log.debug("the event loop of group %r was closed before its subscription", self.group)

    async def _stop(self) -> None:
        self._stopping = True
        self._make_space()
        self._wake(len(self._waiters))
        try:
            await self._receiver.stop()
        except AbeError as exc:
            _log.debug("the receiver could not be told to stop: %s", exc)
            self._fetching.cancel()
        await asyncio.wait([self._fetching])
        unread = [delivery for delivery in self._buffer if not delivery.lost]
        self._buffer.clear()
        await self._give_back(unread)

    def _close_once(self) -> asyncio.Task[None]:
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        return self._closing

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(self._close_timeout):
                await self.stop()
                await self._settler.drain()
                await self._give_back(list(self._live.values()))
                await self._settler.drain()
        except (AbeError, TimeoutError) as exc:
            _log.warning(
                "the broker did not take back the messages of group %r in time: their leases will run out (%r)",
                self.group,
                exc,
            )
        finally:
            self._fetching.cancel()
            self._keeping.cancel()
            self._settler.abandon()
            await asyncio.wait([self._fetching, self._keeping])
            try:
                async with asyncio.timeout(self._close_timeout):
                    await self._receiver.close()
            except (AbeError, TimeoutError) as exc:
                _log.debug("the receiver could not say goodbye: %r", exc)
            self._left(self)

    async def _give_back(self, deliveries: Collection[Delivery]) -> None:
        waiters = [
            self._settler.submit(delivery, Settlement(delivery.receipt, Verb.RELEASE))
            for delivery in deliveries
            if self._live.pop(delivery.receipt, None) is delivery
        ]
        if waiters:
            await asyncio.wait(waiters)

    async def _fetch(self) -> None:
        failures = 0
        broken = False
        while not self._stopping:
            try:
                if broken:
                    self._lose(await self._receiver.recover(self._held()))
                    _log.info("group %r is being consumed again", self.group)
                    broken = False
                room = self._room()
                if not room:
                    await self._wait_for_space()
                    continue
                deliveries = await self._receiver.receive(room)
            except AbeError as exc:
                if not exc.retryable:
                    raise
                failures += 1
                broken = True
                _log.warning("group %r cannot be consumed, trying again: %s", self.group, exc)
                await sleep(self._clock, _RECONNECT(failures))
            else:
                failures = 0
                if deliveries:
                    self._live.update({delivery.receipt: delivery for delivery in deliveries})
                    self._buffer.extend(deliveries)
                    self._wake(1)

    def _held(self) -> list[Receipt]:
        """What the broker counts as ours, as far as we know."""
        return [*self._live, *self._settler.receipts()]

    def _room(self) -> int:
        """How many to ask for: at most half the bound, so that the next ones travel while these are handled.

        None, while hardly any fit and more room is to come: something is buffered, or a verdict is on its way.
        """
        free = self._prefetch - len(self._live) - self._settler.outstanding
        room = min(free, max(1, self._prefetch // 2))
        worth_it = max(1, self._prefetch // 4) if self._buffer or self._settler.outstanding else 1
        return room if room >= worth_it else 0

    async def _wait_for_space(self) -> None:
        self._space = self._loop.create_future()
        if not self._room() and not self._stopping:
            await self._space

    def _make_space(self) -> None:
        if self._space is not None and not self._space.done():
            self._space.set_result(None)

    def _wake(self, count: int) -> None:
        while count and self._waiters:
            future = self._waiters.popleft()
            if not future.done():
                future.set_result(None)
                count -= 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Whoever waits for a message is told why there will be none: something permanent, or a fault in a transport."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = error
            self._wake(len(self._waiters))

    def _lose(self, receipts: Collection[Receipt]) -> None:
        for receipt in receipts:
            delivery = self._live.pop(receipt, None)
            if delivery is not None:
                delivery.lost = True
        if receipts:
            _log.warning(
                "%d leases of group %r were lost: these messages will be delivered again", len(receipts), self.group
            )
            self._make_space()

    def _bury(self, delivery: Delivery, reason: str, error: str) -> None:
        if self._live.pop(delivery.receipt, None) is delivery:
            _log.error("a message of group %r goes to its dead letters (%s): %s", self.group, reason, error)
            self._settler.submit(delivery, Settlement(delivery.receipt, Verb.DEAD, reason=reason, error=error))

    async def _settle(self, message: Message, verdict: str, settlement: Settlement | None) -> None:
        if not _decide(message, verdict):
            return
        delivery = _delivery(message)
        if self._live.get(delivery.receipt) is not delivery:
            delivery.lost = True
            raise LeaseLostError(
                f"{verdict}: the message is not ours any more: its lease was lost, or its subscription was closed"
            )
        del self._live[delivery.receipt]
        error = await self._settler.submit(delivery, settlement)
        if error is not None:
            raise error


def _delivery(message: Message) -> Delivery:
    return message._delivery  # pyright: ignore[reportPrivateUsage]


def _text(text: str) -> str:
    """Return what every broker can carry: an exception's text may hold lone surrogates, from file names for one."""
    return text.encode("utf-8", "backslashreplace").decode()


def _decide(message: Message, verdict: str) -> bool:
    """Whether this is the first settlement.

    Raises:
        AlreadySettledError: It was settled otherwise.
    """
    before = message._verdict  # pyright: ignore[reportPrivateUsage]
    if before is None:
        message._verdict = verdict  # pyright: ignore[reportPrivateUsage]
        return True
    if before != verdict:
        raise AlreadySettledError(f"{verdict}: the message was settled before, with {before}")
    return False
