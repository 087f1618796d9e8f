"""The public signatures as an application uses them. Only type-checked, never run: a change here is a change for users."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypedDict, assert_type

import msgspec
import pydantic

from abe import (
    AbeError,
    AsyncLoopConsumer,
    ConstantBackoff,
    EventConsumer,
    ExponentialBackoff,
    FullBackend,
    Message,
    MessageQueueBackend,
    Middleware,
    Publication,
    Reject,
    Retry,
    RetryPolicy,
    __version__,
    get_message_queue_backend,
    load_backend,
)
from abe.backends.message_queue.base import Capabilities, DeadLetter, GroupStats, QueueBackend
from abe.backends.message_queue.base.middleware import HandleNext, PublishNext
from abe.backends.message_queue.engine import DeadLetters, GroupSubscription
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.codec import Codec, JSONCodec
from abe.settings import QueueSettings
from abe.testing import ManualClock, RecordingBackend, fresh_memory_backend, registered_backend
from abe.types import EventHandlerFunc, EventHandlerProtocol, JSONValue

assert_type(__version__, str)
assert_type(load_backend(), FullBackend)
assert_type(load_backend("redis"), FullBackend)
assert_type(
    load_backend(middleware=[Middleware()], codec=JSONCodec(types=True), environ={"QUEUE_BACKEND": "memory"}),
    FullBackend,
)
assert_type(get_message_queue_backend(), FullBackend)


class Stranger:
    """The three methods are all that a provider must have."""

    async def publish(self, key: str, payload: dict[str, Any]) -> None: ...

    async def consume(self, *, group: str | None = None) -> AsyncIterator[dict[str, Any]]:
        yield {}

    @classmethod
    def from_env(cls) -> Self:
        return cls()


stranger: MessageQueueBackend = Stranger()
same: QueueBackend = stranger
memory: MessageQueueBackend = MemoryBackend()
recording: MessageQueueBackend = RecordingBackend()


async def three_methods(backend: MessageQueueBackend) -> None:
    await backend.publish("order.created", {"order_id": 17, "lines": [{"sku": "tea"}]})
    async for message in backend.consume(group="billing"):
        assert_type(message, dict[str, Any])
        value: JSONValue = message["order_id"]
        print(value)


async def the_rest(backend: MemoryBackend) -> None:
    assert_type(backend.capabilities, Capabilities)
    await backend.publish("a", {}, headers={"h": "v"}, id="seven", delay=1.5, mandatory=True)
    await backend.publish("a", {}, group="billing", timeout=2.5)
    await backend.publish_many([("a", {}), Publication("b", {}, headers={"h": "v"})])
    await backend.delete_namespace()
    subscription = backend.consume(group="billing", keys=["order.#"], prefetch=10, max_attempts=3)
    assert_type(subscription, GroupSubscription)
    async with subscription as messages:
        async for message in messages:
            assert_type(message, Message)
            assert_type(message.id, str)
            assert_type(message.key, str)
            assert_type(message.headers, Mapping[str, str])
            assert_type(message.published_at, float)
            assert_type(message.attempt, int)
            assert_type(message.group, str)
            assert_type(message.lease_lost, bool)
            await message.ack()
            await message.nack(delay=1.0, reason="no", error="")
            await message.reject("no")
            await message.extend(10)
    await backend.declare("billing", ["order.#"])
    await backend.delete_group("billing")
    assert_type(await backend.groups(), Mapping[str, tuple[str, ...]])
    assert_type(await backend.stats("billing"), GroupStats)
    letters = backend.dead_letters("billing")
    assert_type(letters, DeadLetters)
    assert_type(await letters.list(limit=10), Sequence[DeadLetter])
    assert_type(await letters.get("seven"), DeadLetter | None)
    assert_type(await letters.replay("seven"), int)
    assert_type(await letters.purge_all(), int)
    await backend.ping()
    await backend.connect()
    await backend.disconnect()
    async with backend as entered:
        assert_type(entered, MemoryBackend)


@dataclass
class Order:
    order_id: int


class OrderDict(TypedDict):
    order_id: int


class OrderStruct(msgspec.Struct):
    order_id: int


class OrderModel(pydantic.BaseModel):
    order_id: int


@pydantic.dataclasses.dataclass
class OrderModelDataclass:
    order_id: int


async def typed(backend: MemoryBackend, full: FullBackend, order_dict: OrderDict) -> None:
    order = Order(1)
    await backend.publish("a", order)
    await backend.publish("a", order_dict)
    await backend.publish("a", OrderStruct(order_id=1))
    await backend.publish("a", OrderModel(order_id=1))
    await backend.publish("a", OrderModelDataclass(order_id=1))
    await backend.publish_many([("a", order), ("a", OrderModel(order_id=1)), ("a", {}), Publication("a", {})])
    await full.publish("a", order)
    await full.publish_many([("a", order)])


class Msgpack:
    """A codec of the application's own."""

    def encode(self, payload: dict[str, Any]) -> bytes:
        return msgspec.msgpack.encode(payload)

    def decode(self, body: bytes) -> dict[str, Any]:
        return msgspec.msgpack.decode(body, type=dict[str, Any])


codecs: list[Codec] = [Msgpack(), JSONCodec(), JSONCodec(types=True)]
MemoryBackend(codec=Msgpack())
MemoryBackend.from_env(codec=Msgpack(), middleware=[], environ={})
RecordingBackend(codec=Msgpack(), middleware=[])


async def takes_a_dict(message: dict[str, Any]) -> None: ...
async def takes_a_message(message: Message) -> None: ...
async def takes_an_order(order: Order) -> None: ...
async def takes_a_typed_dict(order: OrderDict) -> object: ...
async def takes_both(order: Order, message: Message) -> None: ...
def is_synchronous(message: dict[str, Any]) -> None: ...


class Service:
    async def handle_event(self, event: Order) -> None: ...


service: EventHandlerProtocol = Service()
functions: list[EventHandlerFunc] = [takes_a_dict, takes_a_message, takes_an_order, takes_a_typed_dict, is_synchronous]


class Timing(Middleware):
    async def publish(self, publication: Publication, forward: PublishNext) -> None:
        await forward(publication)

    async def handle(self, message: Message, forward: HandleNext) -> None:
        await forward(message)


def classify(exc: Exception) -> Retry | Reject | None:
    return Reject("malformed") if isinstance(exc, KeyError) else Retry(after=5)


async def consuming(backend: MessageQueueBackend) -> None:
    consumer = AsyncLoopConsumer(
        backend,
        "billing",
        concurrency=10,
        retry=RetryPolicy(max_attempts=3, backoff=ExponentialBackoff(initial=0.5), classify=classify),
        timeout=30,
        grace=10.0,
        ordered_by_key=True,
        middleware=[Timing()],
        keys=["order.#"],
        prefetch=100,
    )
    contract: EventConsumer = consumer
    async with consumer as entered:
        assert_type(entered, AsyncLoopConsumer)
    assert_type(await contract.run(takes_a_dict), None)
    await consumer.run(takes_a_message)
    await consumer.run(takes_an_order)
    await consumer.run(takes_a_typed_dict)
    await consumer.run(is_synchronous)
    await consumer.run(service)
    await consumer.run(lambda message: message)
    await consumer.run(takes_both)
    running = asyncio.create_task(AsyncLoopConsumer(backend, handler=takes_both).run())
    assert_type(running, asyncio.Task[None])
    assert_type(await consumer.started, None)
    assert_type(await consumer.started.wait(), None)
    assert_type(consumer.started.is_set(), bool)
    assert_type(await consumer.shutdown(), None)


RetryPolicy(backoff=ConstantBackoff(2))
RetryPolicy(backoff=lambda attempt: attempt * 2.0)


async def testing(backend: RecordingBackend, clock: ManualClock) -> None:
    assert_type(backend.published, list[Publication])
    assert_type(backend.assert_published("a", {"n": 1}, headers={"h": "v"}, times=1), Publication)
    assert_type(backend.assert_published("a", Order(1)), Publication)
    assert_type(backend.payloads("order.#"), list[dict[str, Any]])
    backend.assert_not_published()
    backend.fail_next(AbeError("no"))
    await backend.feed("a", {}, headers={"h": "v"}, id="seven")
    await clock.advance(5)
    assert_type(clock.time(), float)
    MemoryBackend(QueueSettings(lease=5.0), clock=clock)
    assert_type(fresh_memory_backend(clock), MemoryBackend)
    with registered_backend("mine", Stranger), registered_backend("other", backend):
        assert_type(load_backend("mine"), FullBackend)
