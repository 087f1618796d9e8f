"""A channel as the provider uses it, and how it is on plain aiormq."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import aiormq
from aiormq.abc import AbstractChannel, DeliveredMessage

from abe.backends.message_queue.base import Delivery
from abe.errors import AbeError, BackendConnectionError, BackpressureError, UnroutableError
from abe_backend_rabbitmq._errors import unconfirmed
from abe_backend_rabbitmq._properties import Raw, unparse
from abe_backend_rabbitmq._wire import Header

_log: Final = logging.getLogger("abe.rabbitmq")


class Outgoing(NamedTuple):
    """A message on its way: to which exchange, by which routing key, its properties, its body, its id."""

    exchange: str
    key: str
    properties: bytes
    body: bytes
    id: str


Pushed: TypeAlias = Callable[[int, Header, bytes, bool], None]
"""Called for each message that the broker pushes: its tag, what came with it, its body, whether it was delivered before. It puts the
message into `Opened.held`. If it raises, the message goes back to its queue."""


class Flight:
    """Messages that were published together. The future's result is each one's outcome, or nothing when all were accepted."""

    __slots__ = ("_failed", "_future", "_left", "first", "messages")

    def __init__(
        self, first: int, messages: Sequence[Outgoing], future: "asyncio.Future[Sequence[AbeError | None]]"
    ) -> None:
        self.first = first
        self.messages = messages
        self._left = len(messages)
        self._future = future
        self._failed: dict[int, AbeError] = {}

    def settle(self, tag: int, error: AbeError | None) -> None:
        """Note a message's outcome. (Whoever waited may be gone.)"""
        if error is not None:
            self._failed[tag - self.first] = error
        self._left -= 1
        if not self._left and not self._future.done():
            failed = self._failed
            self._future.set_result([failed.get(i) for i in range(len(self.messages))] if failed else ())


class Opened(ABC):
    """An open channel that publishes with confirms, or consumes. It ends with its connection and is never opened again.

    Args:
        native: aiormq's.
    """

    def __init__(self, native: AbstractChannel) -> None:
        self.native = native
        self.closed: str | None = None
        """Why the channel is gone."""
        self.held: dict[int, tuple[Delivery, Header]] = {}
        """What was delivered and is not settled, by tag, the oldest first."""
        self.ended: Callable[[], object] | None = None
        """Called when the channel is gone. Must not raise."""
        self._deliver: Pushed | None = None
        self._oldest, self._newest = 1, 0

    @abstractmethod
    def publish(self, messages: Sequence[Outgoing]) -> "asyncio.Future[Sequence[AbeError | None]]":
        """Publish messages, in this order. The future's result is as of `Flight`; who is cancelled leaves alone.

        An outcome is `PublishUnknownError` if the channel went before that message's confirm came.

        Raises:
            BackendConnectionError: The channel is gone; nothing was sent.
        """

    @abstractmethod
    async def consume(self, queue: str, prefetch: int, deliver: Pushed) -> str:
        """Have the queue's messages pushed, so many unsettled ones at most (0: all). Return the consumer's tag."""

    @abstractmethod
    async def ack(self, tags: Sequence[int]) -> None:
        """Acknowledge; tags that are not held are left out, as a tag that is settled twice costs the channel."""

    @abstractmethod
    async def requeue(self, tag: int) -> None:
        """Give a message back, to be delivered again at once; the broker counts it."""

    async def close(self) -> None:
        """Close the channel. What is held goes back to its queue; what is settled from now on comes too late.

        (An acknowledgement that followed the broker's sight of the close would cost the connection.)
        """
        self.lose("the channel was closed")
        await self.native.close()

    def lose(self, reason: str) -> None:
        """Tell everybody that the channel is gone, and with it every delivery."""
        if self.closed is None:
            self.closed = reason
            for delivery, _ in self.held.values():
                delivery.lost = True
            self.held.clear()
            if self.ended is not None:
                self.ended()

    def _pushed(self, tag: int, header: Header, body: bytes, redelivered: bool) -> bool:
        """Hand a delivery over; return whether it was taken."""
        self._newest = tag
        try:
            assert self._deliver is not None
            self._deliver(tag, header, body, redelivered)
        except Exception:  # noqa: BLE001 - in the middle of what arrived: it would end the connection
            _log.exception("a delivery could not be taken in: it goes back to its queue")
            self.held.pop(tag, None)
            return False
        return True

    def _settled(self, tags: Sequence[int]) -> tuple[list[int], int]:
        """Take tags out of what is held. Return those to acknowledge singly, and the one to acknowledge with all below it, or 0."""
        held, newest, oldest = self.held, self._newest, self._oldest
        done = [tag for tag in tags if held.pop(tag, None) is not None]
        # Tags come in order, one by one. (Asking the dict for its first would walk over all that were taken from its head.)
        while oldest <= newest and oldest not in held:
            oldest += 1
        self._oldest = oldest
        singly: list[int] = []
        through = 0
        for tag in done:
            if tag > oldest:  # behind one that is still being handled
                singly.append(tag)
            elif tag > through:  # all below it is settled, or among these
                through = tag
        return singly, through


class PlainChannel(Opened):
    """A channel on aiormq alone: several times slower, and without any assumption about its insides."""

    def __init__(self, native: AbstractChannel) -> None:
        super().__init__(native)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._settling = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        declared: Any = native
        self._closing: asyncio.Future[Any] = declared.closing
        self._closing.add_done_callback(self._on_closing)

    def publish(self, messages: Sequence[Outgoing]) -> "asyncio.Future[Sequence[AbeError | None]]":
        """See `Opened.publish`."""
        if self.closed is not None:
            raise BackendConnectionError(self.closed)
        task = asyncio.get_running_loop().create_task(self._publish(messages))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_retrieved)
        return task

    async def consume(self, queue: str, prefetch: int, deliver: Pushed) -> str:
        """See `Opened.consume`."""

        async def pushed(message: DeliveredMessage) -> None:
            method: Any = message.delivery
            header = Header(unparse(message.header.properties), method.exchange, method.routing_key)
            tag = method.delivery_tag
            if self.closed is None and not self._pushed(tag, header, message.body, bool(method.redelivered)):
                async with self._settling:
                    await self._send(self.native.basic_reject(tag, requeue=True, wait=False))

        self._deliver = deliver
        await self.native.basic_qos(prefetch_count=prefetch)
        reply = await self.native.basic_consume(queue, pushed)
        assert reply.consumer_tag is not None
        return reply.consumer_tag

    async def ack(self, tags: Sequence[int]) -> None:
        """See `Opened.ack`."""
        async with self._settling:
            singly, through = self._settled(tags)
            for tag in singly:
                await self._send(self.native.basic_ack(tag, wait=False))
            if through:
                await self._send(self.native.basic_ack(through, multiple=True, wait=False))

    async def requeue(self, tag: int) -> None:
        """See `Opened.requeue`."""
        async with self._settling:
            if self.held.pop(tag, None) is not None:
                await self._send(self.native.basic_reject(tag, requeue=True, wait=False))

    async def close(self) -> None:
        """See `Opened.close`."""
        async with self._settling:  # what waits for a place in aiormq's queue of frames goes first
            self.lose("the channel was closed")
        await self.native.close()

    async def _send(self, settlement: Awaitable[None]) -> None:
        """Settle, unless the channel is gone: then aiormq takes no frame, and who waits for a place in its queue waits for ever."""
        sending = asyncio.ensure_future(settlement)
        sending.add_done_callback(_retrieved)
        try:
            await asyncio.wait([sending, self._closing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not sending.done():
                sending.cancel()
        if self.closed is None:
            sending.result()

    async def _publish(self, messages: Sequence[Outgoing]) -> Sequence[AbeError | None]:
        outcomes = await asyncio.gather(*(self._publish_one(message) for message in messages))
        return outcomes if any(outcomes) else ()

    async def _publish_one(self, message: Outgoing) -> AbeError | None:
        exchange, key, properties, body, id = message
        turn = self._turns.get(id) or asyncio.Lock()
        self._turns[id] = turn
        async with turn:  # aiormq tells returned messages apart by their ids alone
            try:
                native: Any = self.native  # its declaration lacks `wait`
                await native.basic_publish(
                    body,
                    exchange=exchange,
                    routing_key=key,
                    properties=Raw(properties, id),
                    mandatory=True,
                    wait=False,
                )
            except aiormq.PublishError:
                return unroutable(key)
            except aiormq.DeliveryError:
                return nacked()
            except (asyncio.CancelledError, Exception) as exc:
                task = asyncio.current_task()
                if not self.native.is_closed or (task is not None and task.cancelling()):
                    raise
                # aiormq ends what waits for a confirm with whatever ended the channel: any exception, or a cancellation that is none.
                unknown = unconfirmed(self.closed or f"the channel was closed: {exc}")
                unknown.__cause__ = exc
                return unknown
        return None

    def _on_closing(self, closing: "asyncio.Future[Any]") -> None:
        reason = "" if closing.cancelled() else str(closing.exception() or "")
        self.lose(f"the channel was closed{reason and f': {reason}'}")


def unroutable(key: str) -> UnroutableError:
    """Return the outcome of a message that the broker returned."""
    return UnroutableError(f"no group wants the key {key!r}")


def nacked() -> BackpressureError:
    """Return the outcome of a message that a queue refused."""
    return BackpressureError(
        "a group that wants the message takes no more: max_backlog messages wait, or its queue is short of resources"
    )


def _retrieved(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()
