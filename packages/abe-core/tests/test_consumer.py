"""`AsyncLoopConsumer`: when handlers run, and what becomes of their messages."""

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import pytest
from consumer_doubles import ONCE, PATIENT, Collector, drained, publish, running

from abe import AsyncLoopConsumer, EventConsumer, Message, Middleware, Reject
from abe.backends.message_queue.base.middleware import HandleNext
from abe.backends.message_queue.engine import GroupSubscription
from abe.backends.message_queue.handler import Handle
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import BackendConnectionError, ConfigurationError, PermissionDeniedError
from abe.settings import QueueSettings
from abe.testing import ManualClock, fresh_memory_backend
from abe_contract_tests import bounds


class TestHandling:
    def test_it_is_an_event_consumer(self, memory_backend: MemoryBackend) -> None:
        assert isinstance(AsyncLoopConsumer(memory_backend), EventConsumer)

    async def test_a_message_is_acknowledged_after_its_handler_returned_and_not_before(
        self, memory_backend: MemoryBackend
    ) -> None:
        at_work, finish = asyncio.Event(), asyncio.Event()

        async def handler(message: Message) -> None:
            at_work.set()
            await finish.wait()

        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend), handler):
            await at_work.wait()
            assert (await memory_backend.stats()).in_flight == 1
            finish.set()
            await drained(memory_backend)

    async def test_no_more_handlers_run_at_once_than_the_concurrency(self, memory_backend: MemoryBackend) -> None:
        at_once, peak, done = 0, 0, 0
        finished = asyncio.Event()

        async def handler(message: Message) -> None:
            nonlocal at_once, peak, done
            at_once += 1
            peak = max(peak, at_once)
            for _ in range(5):
                await asyncio.sleep(0)
            at_once -= 1
            done += 1
            if done == 30:
                finished.set()

        await publish(memory_backend, 30)
        async with running(AsyncLoopConsumer(memory_backend, concurrency=3), handler):
            await finished.wait()
        assert peak == 3

    async def test_two_groups_each_get_every_message(self, memory_backend: MemoryBackend) -> None:
        await memory_backend.declare("billing")
        await memory_backend.declare("shipping")
        await publish(memory_backend, 5)
        for group in ("billing", "shipping"):
            collector = Collector(wanted=5)
            async with running(AsyncLoopConsumer(memory_backend, group), collector):
                await collector.done.wait()
            assert [message["n"] for message in collector.seen] == [0, 1, 2, 3, 4]
            assert {message.group for message in collector.seen} == {group}

    async def test_a_group_may_ask_for_some_keys(self, memory_backend: MemoryBackend) -> None:
        collector = Collector()
        async with running(AsyncLoopConsumer(memory_backend, "g", keys=["order.#"]), collector):
            await memory_backend.declare("g", ["order.#"])
            await memory_backend.publish("invoice.sent", {})
            await memory_backend.publish("order.created", {})
            await collector.done.wait()
        assert [message.key for message in collector.seen] == ["order.created"]

    async def test_a_synchronous_handler_runs_in_threads_up_to_the_concurrency(
        self, memory_backend: MemoryBackend
    ) -> None:
        both = threading.Barrier(2, timeout=5 * bounds.slowness())
        names: set[str] = set()

        def handler(message: dict[str, Any]) -> None:
            both.wait()
            names.add(threading.current_thread().name)

        await publish(memory_backend, 2)
        async with running(AsyncLoopConsumer(memory_backend, concurrency=2), handler):
            await drained(memory_backend)
        assert len(names) == 2
        assert all(name.startswith("abe-handler") for name in names)

    async def test_an_object_with_handle_event_is_a_handler(self, memory_backend: MemoryBackend) -> None:
        class Service:
            def __init__(self) -> None:
                self.event: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

            async def handle_event(self, event: dict[str, Any]) -> None:
                self.event.set_result(event)

        service = Service()
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend), service):
            assert await service.event == {"n": 0}

    async def test_a_handler_that_never_waits_leaves_the_event_loop_its_turns(
        self, memory_backend: MemoryBackend
    ) -> None:
        handled = 0
        seen_at_work: list[int] = []

        async def handler(message: Message) -> None:
            nonlocal handled
            handled += 1

        await publish(memory_backend, 1000)
        async with running(AsyncLoopConsumer(memory_backend, prefetch=1000), handler):
            while handled < 1000:
                seen_at_work.append(handled)
                await asyncio.sleep(0)
        assert len({count for count in seen_at_work if 0 < count < 1000}) >= 5

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"concurrency": 0}, "concurrency"),
            ({"concurrency": True}, "concurrency"),
            ({"timeout": 0}, "timeout"),
            ({"timeout": float("nan")}, "timeout"),
            ({"timeout": "soon"}, "timeout"),
            ({"grace": -1}, "grace"),
            ({"prefetch": 0}, "prefetch"),
            ({"retry": 3}, "retry must be a RetryPolicy"),
        ],
    )
    def test_an_argument_out_of_range_is_refused_by_name(
        self, memory_backend: MemoryBackend, options: dict[str, Any], text: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=text):
            AsyncLoopConsumer(memory_backend, **options)

    async def test_what_cannot_be_a_handler_ends_run_and_the_consumer_can_be_used_again(
        self, memory_backend: MemoryBackend
    ) -> None:
        async def wrong() -> None: ...

        consumer = AsyncLoopConsumer(memory_backend)
        with pytest.raises(ConfigurationError, match="one positional argument"):
            await consumer.run(wrong)  # type: ignore[arg-type]
        collector = Collector()
        await publish(memory_backend, 1)
        async with running(consumer, collector):
            await collector.done.wait()


class TestTypedPayloads:
    async def test_a_payload_becomes_what_the_annotation_says(self, memory_backend: MemoryBackend) -> None:
        @dataclass
        class Order:
            n: int

        got: asyncio.Future[object] = asyncio.get_running_loop().create_future()

        async def handler(order: Order) -> None:
            got.set_result(order)

        handler.__annotations__["order"] = Order
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend), handler):
            assert await got == Order(0)

    async def test_one_that_does_not_fit_is_dead_lettered_at_once_and_its_successors_pass(
        self, memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        got: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def handler(order: Numbered) -> None:
            got.set_result(order.n)

        await memory_backend.publish("order.created", {"n": "not a number"})
        await memory_backend.publish("order.created", {"n": 2})
        async with running(AsyncLoopConsumer(memory_backend), handler):
            assert await got == 2
            await drained(memory_backend)
        (letter,) = await memory_backend.dead_letters().list()
        assert letter.attempts == 1
        assert letter.reason == "the payload does not fit Numbered: Expected `int`, got `str` - at `$.n`"
        assert "does not fit Numbered" in letter.error
        assert "not a number" not in letter.error + caplog.text


@dataclass
class Numbered:
    n: int


class TestWrapping:
    async def test_handle_may_be_overridden_to_wrap_every_handler(self, memory_backend: MemoryBackend) -> None:
        class Wrapped(AsyncLoopConsumer):
            async def handle(self, message: Message, handler: Handle) -> None:
                try:
                    await handler(message)
                except ValueError as exc:
                    await message.reject(f"wrapped: {exc}")

        await publish(memory_backend, 1)
        async with running(Wrapped(memory_backend), Collector(ValueError("no"))):
            await drained(memory_backend)
        (letter,) = await memory_backend.dead_letters().list()
        assert letter.reason == "wrapped: no"

    async def test_middleware_wraps_the_handler_the_first_outermost(self, memory_backend: MemoryBackend) -> None:
        trail: list[str] = []

        class Tracing(Middleware):
            def __init__(self, name: str) -> None:
                self.name = name

            async def handle(self, message: Message, forward: HandleNext) -> None:
                trail.append(f"{self.name} in")
                await forward(message)
                trail.append(f"{self.name} out")

        async def handler(message: Message) -> None:
            trail.append("handler")

        await publish(memory_backend, 1)
        consumer = AsyncLoopConsumer(memory_backend, middleware=[Tracing("a"), Tracing("b")])
        async with running(consumer, handler):
            await drained(memory_backend)
        assert trail == ["a in", "b in", "handler", "b out", "a out"]

    async def test_what_middleware_raises_is_the_handlers_failure(self, memory_backend: MemoryBackend) -> None:
        class Strict(Middleware):
            async def handle(self, message: Message, forward: HandleNext) -> None:
                raise Reject("not on my watch")

        collector = Collector()
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, middleware=[Strict()]), collector):
            await drained(memory_backend)
        assert collector.seen == []
        assert (await memory_backend.stats()).dead == 1


class TestOrderedByKey:
    async def test_messages_of_one_key_run_one_after_the_other_while_other_keys_run_beside_them(
        self, memory_backend: MemoryBackend
    ) -> None:
        at_work: set[str] = set()
        order: dict[str, list[int]] = {"a": [], "b": [], "c": []}
        widest, finished = 0, asyncio.Event()

        async def handler(message: Message) -> None:
            nonlocal widest
            assert message.key not in at_work, "two of one key at once"
            at_work.add(message.key)
            widest = max(widest, len(at_work))
            for _ in range(1 + message["n"] % 4):
                await asyncio.sleep(0)
            order[message.key].append(message["n"])
            at_work.discard(message.key)
            if sum(map(len, order.values())) == 60:
                finished.set()

        await memory_backend.publish_many([("abc"[n % 3], {"n": n}) for n in range(60)])
        consumer = AsyncLoopConsumer(memory_backend, concurrency=8, prefetch=30, ordered_by_key=True, retry=ONCE)
        async with running(consumer, handler):
            await finished.wait()
        assert all(numbers == sorted(numbers) for numbers in order.values())
        assert widest == 3

    async def test_one_that_is_retried_lets_its_successors_pass(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        collector = Collector(ValueError("no"))
        await publish(memory_backend, 3)
        consumer = AsyncLoopConsumer(memory_backend, concurrency=4, ordered_by_key=True, retry=PATIENT)
        async with running(consumer, collector):
            await manual_clock.advance(100)
        assert [message["n"] for message in collector.seen] == [0, 1, 2, 0]

    async def test_an_empty_payload_is_a_message_like_others(self, memory_backend: MemoryBackend) -> None:
        collector = Collector(wanted=5)
        await memory_backend.declare()
        await memory_backend.publish_many([("k", {}) for _ in range(5)])
        async with running(AsyncLoopConsumer(memory_backend, concurrency=2, ordered_by_key=True), collector):
            await collector.done.wait()
            await drained(memory_backend)
        assert collector.attempts == [1] * 5

    async def test_at_shutdown_what_waits_behind_its_key_goes_back(self, memory_backend: MemoryBackend) -> None:
        at_work, finish = asyncio.Event(), asyncio.Event()
        seen: list[int] = []

        async def handler(message: Message) -> None:
            seen.append(message["n"])
            at_work.set()
            await finish.wait()

        await publish(memory_backend, 3)
        consumer = AsyncLoopConsumer(memory_backend, concurrency=4, ordered_by_key=True)
        async with running(consumer, handler):
            await at_work.wait()
            for _ in range(20):
                await asyncio.sleep(0)
            stopping = asyncio.create_task(consumer.shutdown())
            for _ in range(20):
                await asyncio.sleep(0)
            finish.set()
            await stopping
        assert seen == [0]
        async with bounds.within(5), memory_backend.consume() as messages:
            again = [await anext(messages) for _ in range(2)]
        assert [(message["n"], message.attempt) for message in again] == [(1, 1), (2, 1)]


class Unreachable(MemoryBackend):
    """Subscribing raises these, one each, and then works."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__(QueueSettings(namespace=fresh_memory_backend().settings.namespace))
        self.errors = list(errors)

    def consume(self, **options: Any) -> GroupSubscription:
        subscription = super().consume(**options)
        if self.errors:
            error = self.errors.pop(0)

            async def refuse() -> Any:
                raise error

            subscription.__aenter__ = refuse  # type: ignore[method-assign]
        return subscription


class TestBrokerTrouble:
    async def test_it_tries_again_while_the_broker_cannot_be_reached(self, caplog: pytest.LogCaptureFixture) -> None:
        backend = Unreachable(BackendConnectionError("no broker"), BackendConnectionError("no broker"))
        collector = Collector()
        await publish(backend, 1)
        async with running(AsyncLoopConsumer(backend), collector):
            await collector.done.wait()
        assert caplog.text.count("subscribing to group 'default' failed, retrying: no broker") == 2

    async def test_shutdown_ends_the_attempts_at_once(self) -> None:
        consumer = AsyncLoopConsumer(Unreachable(*[BackendConnectionError("no broker")] * 1000))
        async with running(consumer, Collector()):
            for _ in range(20):
                await asyncio.sleep(0)
            async with bounds.within(1):
                await consumer.shutdown()

    async def test_a_fatal_error_ends_run(self) -> None:
        error = PermissionDeniedError("wrong password")
        consumer = AsyncLoopConsumer(Unreachable(error))
        async with bounds.within(5):
            with pytest.raises(PermissionDeniedError) as caught:
                await consumer.run(Collector())
            assert caught.value is error
            await consumer.shutdown()
