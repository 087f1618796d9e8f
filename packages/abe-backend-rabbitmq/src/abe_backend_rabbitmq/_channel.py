"""A channel as the provider uses it, and how it is on plain aiormq."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import aiormq
from aiormq.abc import AbstractChannel, DeliveredMessage

from abe.backends.message_queue.base import Delivery
from abe.errors import AbeError, BackendConnectionError, BackpressureError, PublishUnknownError, UnroutableError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._wire import Header


class Outgoing(NamedTuple):
    """A message on its way: to which exchange, by which routing key, its properties, its body, its id."""

    exchange: str
    key: str
    properties: bytes
    body: bytes
    id: str


Pushed: TypeAlias = Callable[[int, Header, bytes, bool], None]
"""Called for each message that the broker pushes: its tag, what came with it, its body, whether it was delivered before. Must not raise."""


class Flight:
    """Messages that were published together. The future's result is each one's outcome, or nothing when all were accepted."""

    __slots__ = ("_failed", "_future", "first", "left", "messages")

    def __init__(
        self, first: int, messages: Sequence[Outgoing], future: "asyncio.Future[Sequence[AbeError | None]]"
    ) -> None:
        self.first = first
        self.messages = messages
        self.left = len(messages)
        self._future = future
        self._failed: dict[int, AbeError] = {}

    def fail(self, tag: int, error: AbeError) -> None:
        """Note that a message was refused."""
        self._failed[tag - self.first] = error

    def finish(self) -> None:
        """Every message has its outcome."""
        if not self._future.done():
            failed = self._failed
            self._future.set_result([failed.get(i) for i in range(len(self.messages))] if failed else ())

    def abandon(self, error: AbeError) -> None:
        """No confirm will come any more. (Which ones came already is not told: a repetition is harmless to nobody but them.)"""
        if not self._future.done():
            self._future.set_exception(error)


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
        """Called when the channel is gone."""

    @abstractmethod
    def publish(self, messages: Sequence[Outgoing]) -> "asyncio.Future[Sequence[AbeError | None]]":
        """Publish messages, in this order; the future's result is as of `Flight`.

        Raises:
            BackendConnectionError: The channel is gone; nothing was sent.
            PublishUnknownError: By the future: it went before the confirms came.
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

    def lose(self, reason: str) -> None:
        """Tell everybody that the channel is gone, and with it every delivery."""
        if self.closed is None:
            self.closed = reason
            for delivery, _ in self.held.values():
                delivery.lost = True
            self.held.clear()
            if self.ended is not None:
                self.ended()


class PlainChannel(Opened):
    """A channel on aiormq alone: several times slower, and without any assumption about its insides."""

    def __init__(self, native: AbstractChannel) -> None:
        super().__init__(native)
        self._tasks: set[asyncio.Task[Any]] = set()
        closing: Any = native.closing
        closing.add_done_callback(self._on_closing)

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
            header = Header(_wire.unparse(message.header.properties), method.exchange, method.routing_key)
            if self.closed is None:
                deliver(method.delivery_tag, header, message.body, bool(method.redelivered))

        await self.native.basic_qos(prefetch_count=prefetch)
        reply = await self.native.basic_consume(queue, pushed)
        assert reply.consumer_tag is not None
        return reply.consumer_tag

    async def ack(self, tags: Sequence[int]) -> None:
        """See `Opened.ack`."""
        for tag in tags:
            if self.held.pop(tag, None) is not None and self.closed is None:
                await self.native.basic_ack(tag, wait=False)

    async def requeue(self, tag: int) -> None:
        """See `Opened.requeue`."""
        if self.held.pop(tag, None) is not None and self.closed is None:
            await self.native.basic_reject(tag, requeue=True, wait=False)

    async def _publish(self, messages: Sequence[Outgoing]) -> Sequence[AbeError | None]:
        outcomes = await asyncio.gather(*(self._publish_one(message) for message in messages))
        return outcomes if any(outcomes) else ()

    async def _publish_one(self, message: Outgoing) -> AbeError | None:
        exchange, key, properties, body, _ = message
        try:
            native: Any = self.native  # its declaration lacks `wait`
            await native.basic_publish(
                body,
                exchange=exchange,
                routing_key=key,
                properties=_wire.parse(properties),
                mandatory=True,
                wait=False,
            )
        except aiormq.PublishError:
            return unroutable(key)
        except aiormq.DeliveryError:
            return nacked()
        except (aiormq.AMQPError, OSError, RuntimeError) as exc:
            unknown = PublishUnknownError("the channel was closed before the confirm came")
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
    return BackpressureError("a group that wants the message is full: it has max_backlog messages waiting")


def _retrieved(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()
