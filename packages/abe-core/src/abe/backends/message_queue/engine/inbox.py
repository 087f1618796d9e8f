"""The inbox of one subscription: takes messages from the broker within a bound, and hands them out."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

from abe.backends.message_queue.base.clock import Clock, sleep
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.transport import Delivery, Receiver, Receiving, Settling
from abe.backends.message_queue.engine.fetcher import Fetcher
from abe.backends.message_queue.engine.in_flight import InFlight
from abe.backends.message_queue.engine.leases import LeaseKeeper
from abe.backends.message_queue.engine.settler import Settler
from abe.codec import Codec
from abe.errors import AbeError, BackendClosedError, DecodeError

_log: Final = Log("abe.engine")
_UNRENEWED_TIMEOUT: Final = 30.0
"""Seconds for which a settlement is tried, and others are waited for, where the broker has no lease that would run out."""

_SETTLING: Final = 0.7
"""The part of the time to close that is for settlements and what is given back; the rest is for leaving the group."""


class Inbox:
    """Deliveries between the broker and the tasks that handle them.

    At most `prefetch` of them are ours at any time: in the buffer, in a handler, or with a settlement that the broker has not confirmed.
    The next ones are asked for, half of the bound at a time, while the buffered ones are handled.

    A message whose attempts are used up without a settlement is a suspect: it may have killed its consumers, or have been beside one
    that did. An inbox that is given one gives it back at once, before something in hand can kill it, hands out what came before it, and
    ends (`changing`). It is followed by one that holds a single message at a time (`alone`), which tries the suspect once more with
    nothing beside it; what comes back even then is buried. Its first unsuspected message ends it too.

    Args:
        receiver: The broker's side.
        group: The group's name.
        prefetch: The bound.
        max_attempts: Deliveries of one message before it is dead.
        max_delay: The longest delay that the broker can hold, in seconds; None: no delay at all.
        lease: Seconds; None where the broker has no leases.
        receiving: How the receiver is asked.
        settling: How much it settles at a time.
        restore: Makes the group again, when it was deleted underneath.
        alone: Whether suspects are tried here. The bound must be 1 then.
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
        receiving: Receiving,
        settling: Settling,
        restore: Callable[[], Awaitable[object]],
        alone: bool = False,
        codec: Codec,
        clock: Clock,
        close_timeout: float,
        left: "Callable[[Inbox], object]",
    ) -> None:
        self.group = group
        self.alone = alone
        self.changing: bool = False
        """Whether another inbox must follow: one that is alone where this one is not, and the other way round."""
        self._receiver = receiver
        self._prefetch = prefetch
        self._max_attempts = max_attempts
        self._decode = codec.decode
        self._clock = clock
        self._close_timeout = close_timeout
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._timeout = _UNRENEWED_TIMEOUT if lease is None else lease
        self._keeper = LeaseKeeper(receiver, lambda: self._in_flight.deliveries(), self._lose, lease, clock)
        self._settler = Settler(
            receiver,
            settling,
            count=self._count,
            sure=self._keeper.sure,
            settled=self._make_space,
            refused=self._refused,
            timeout=self._timeout,
            stranded=lambda: self._fetcher.recover_soon(),
            leased=lease is not None,
            clock=clock,
        )
        self._in_flight = InFlight(
            receiver, self._settler, group=group, max_attempts=max_attempts, max_delay=max_delay, lease=lease
        )
        self._live = self._in_flight.live
        self._buffer: deque[Delivery] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._changed: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._wanted = not alone
        self._shut = False
        self._stopping = False
        self._halting: asyncio.Task[None] | None = None
        self._giving_back: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._fetcher = Fetcher(
            receiver,
            receiving,
            group=group,
            room=self._room,
            held=self._in_flight.deliveries,
            arrived=self._take_in,
            lost=self._lose,
            restore=restore,
            ended=self._ended,
            clock=clock,
        )
        self._keeping = self._loop.create_task(self._keeper.run())
        self._keeping.add_done_callback(self._ended)

    @property
    def closed(self) -> bool:
        """Whether it is closed, and everything in it settled or given back."""
        return self._closing is not None and self._closing.done()

    def take(self) -> Message | None:
        """Return the next message if one is at hand."""
        while self._buffer and not self._shut:
            delivery = self._buffer.popleft()
            if delivery.lost:
                self._in_flight.forget(delivery)  # the transport saw it go
                continue
            if delivery.fault is not None:
                self._in_flight.bury(delivery, "undecodable", delivery.fault)
                continue
            if delivery.attempt <= self._max_attempts:
                if self.alone:
                    self._change()
            elif not self._may_try(delivery):
                continue
            try:
                message = Message(self._decode(delivery.body))
            except Exception as exc:  # noqa: BLE001 - whatever a codec raises concerns this one message
                text = str(exc) if isinstance(exc, DecodeError) else f"the codec failed with {type(exc).__name__}"
                self._in_flight.bury(delivery, "undecodable", text)
            else:
                delivery.begun = True
                message._delivery = delivery  # pyright: ignore[reportPrivateUsage]
                message._source = self._in_flight  # pyright: ignore[reportPrivateUsage]
                message._settled = None  # pyright: ignore[reportPrivateUsage]
                return message
        if not self._wanted:
            self._wanted = True
            self._make_space()
        return None

    async def receive(self) -> Message:
        """Wait for the next message; see `Subscription.receive`.

        Raises:
            BackendClosedError: It was closed or stopped, or another inbox follows (`changing`).
        """
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
                    self._wake(1)  # woken and cancelled at once: another task takes the message
                elif future in self._waiters:
                    self._waiters.remove(future)
                raise
            if len(self._buffer) > 1:
                self._wake(2)  # each one that wakes wakes two: the waiters rise as a tree, not all for one message

    async def halt(self) -> None:
        """Take nothing new. What is here is still handed out by `take`."""
        await asyncio.wait([self._halt_once()])

    async def stop(self) -> None:
        """Take nothing new, and give back what was not handed out yet."""
        stopping = self._stop_once()
        await asyncio.wait([stopping])
        if not stopping.cancelled():  # closing ended it
            stopping.result()

    async def hand_over(self) -> None:
        """Stop, and close once everything that was handed out is settled. Return when another inbox may follow: where this one is alone,
        at once; else when it is closed, or has had a lease's time for that."""
        await self.stop()
        if self._retiring is None:
            self._retiring = self._loop.create_task(self._retire())
        if not self.alone:
            async with asyncio.TaskGroup() as group:
                late = group.create_task(sleep(self._clock, self._timeout))
                await asyncio.wait([self._retiring, late], return_when=asyncio.FIRST_COMPLETED)
                late.cancel()

    async def close(self, timeout: float | None = None) -> None:
        """Stop, carry out what was decided, give back the rest, and leave.

        Args:
            timeout: Seconds within which it is done, whatever the broker does; None: `close_timeout`.
        """
        await asyncio.shield(self._close_once(self._close_timeout if timeout is None else timeout))

    def close_soon(self) -> None:
        """Close without waiting, from any thread; nothing happens when the event loop is closed, or about to be."""

        def close() -> None:
            # Only an event loop that ends cancels this task before `close` does: a new task would never be run.
            if not self._keeping.cancelling():
                self._close_once(self._close_timeout)

        try:
            self._loop.call_soon_threadsafe(close)
        except RuntimeError:
            _log.debug("the event loop of group %r was closed before its subscription", self.group)

    def _may_try(self, suspect: Delivery) -> bool:
        """Whether a delivery whose attempts are used up without a settlement may be handed out; if not, see to it otherwise."""
        certain = suspect.attempt - 1 - suspect.uncertain
        if certain > self._max_attempts or suspect.alone:
            text = "its consumers died or let its lease run out, each time, the last time with nothing else in hand"
            self._in_flight.bury(suspect, "max_attempts", text)
            return False
        if self.alone and not (suspect.uncertain and suspect.alone is None):
            return True
        # It came with the receiver's last ones; or from now on its tries are recorded, as what is uncertain buries nothing.
        self._in_flight.give_back(suspect, alone=self.alone)
        return False

    def _change(self) -> None:
        """End this inbox, for another that is alone, or that is not."""
        if not self.changing:
            self.changing = True
            if not self.alone:
                _log.warning(
                    "a message of group %r has used up its attempts without a settlement: it is tried with nothing else in hand",
                    self.group,
                )
            self._halt_once()

    def _halt_once(self) -> asyncio.Task[None]:
        if self._halting is None:
            self._halting = self._loop.create_task(self._halt())
        return self._halting

    async def _halt(self) -> None:
        """Take nothing new from the broker."""
        self._stopping = True
        self._make_space()
        self._wake(len(self._waiters))
        rest = await self._fetcher.stop()
        if rest:
            self._live.update(dict.fromkeys(rest))
            self._buffer.extend(rest)
            self._wake(1)

    def _stop_once(self) -> asyncio.Task[None]:
        if self._giving_back is None:
            self._giving_back = self._loop.create_task(self._stop())
        return self._giving_back

    async def _stop(self) -> None:
        await asyncio.wait([self._halt_once()])
        unread = list(self._buffer)
        self._buffer.clear()
        await self._in_flight.give_back_all(unread)

    def _close_once(self, timeout: float) -> asyncio.Task[None]:
        if self._closing is None:
            self._in_flight.closing = True
            self._make_space()
            self._closing = self._loop.create_task(self._close(timeout))
        return self._closing

    async def _retire(self) -> None:
        while self._live and self._closing is None:
            self._changed = self._loop.create_future()  # set whenever a settlement was carried out, or a lease was lost
            await self._changed
        await self.close()

    async def _close(self, timeout: float) -> None:
        began = self._loop.time()
        try:
            async with asyncio.timeout_at(began + _SETTLING * timeout):
                await self.stop()
                await self._settler.drain()
                await self._in_flight.give_back_all(list(self._live))
                await self._settler.drain()
        except (AbeError, TimeoutError) as exc:
            _log.warning(
                "the broker did not take back the messages of group %r in time: their leases will run out (%r)",
                self.group,
                exc,
            )
        finally:
            self._settler.abandon()
            ending = [*self._fetcher.tasks, self._keeping, self._halt_once(), self._stop_once()]
            for task in ending:
                task.cancel()
            await asyncio.wait(ending, timeout=max(0.0, began + timeout - self._loop.time()))
            try:
                async with asyncio.timeout_at(began + timeout):
                    await self._receiver.close()
            except (AbeError, TimeoutError) as exc:
                _log.debug("the receiver could not unsubscribe: %r", exc)
            finally:
                self._left(self)

    def _take_in(self, deliveries: Sequence[Delivery]) -> bool:
        """Have what was received; return whether more is to be taken."""
        self._live.update(dict.fromkeys(deliveries))
        self._wanted = not self.alone  # the next one that is alone is asked for when it is handed out at once
        place = None if self.alone else self._suspect(deliveries)
        self._buffer.extend(deliveries[:place])
        self._wake(1)
        if place is None:
            return True
        self._change()
        for delivery in deliveries[place:]:
            self._in_flight.give_back(delivery)
        return False

    def _suspect(self, deliveries: Sequence[Delivery]) -> int | None:
        """Where the first is that is to be tried alone, if there is one."""
        most = self._max_attempts
        for place, delivery in enumerate(deliveries):
            if delivery.attempt > most >= delivery.attempt - 1 - delivery.uncertain and delivery.fault is None:
                return place
        return None

    def _count(self) -> int:
        return 0 if self._stopping else self._in_flight.count()

    def _room(self) -> int:
        """How many to ask for: at most half the bound, so that the next ones travel while these are handled.

        None, while hardly any fit and more room is to come: something is buffered, or a settlement is on its way.
        """
        if not self._wanted:
            return 0
        free = self._prefetch - self._in_flight.count()
        room = min(free, max(1, self._prefetch // 2))
        worth_it = max(1, self._prefetch // 4) if self._buffer or self._settler.outstanding else 1
        return room if room >= worth_it else 0

    def _make_space(self) -> None:
        self._fetcher.look()
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def _wake(self, count: int) -> None:
        while count and self._waiters:
            future = self._waiters.popleft()
            if not future.done():
                future.set_result(None)
                count -= 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Tell the tasks that wait for a message why there will be none."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)

    def _refused(self, error: AbeError) -> None:
        if self._error is None:
            _log.error(
                "group %r is not consumed any more: the broker refuses to settle its messages: %s", self.group, error
            )
            self._end(error)
            self._stop_once()

    def _end(self, error: BaseException) -> None:
        self._error = error
        self._shut = True
        self._wake(len(self._waiters))

    def _lose(self, deliveries: Collection[Delivery]) -> None:
        if deliveries:
            self._in_flight.lose(deliveries)
            self._make_space()
