"""`AsyncLoopConsumer`: when handlers run, and what becomes of their messages."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import pytest

from abe import (
    AsyncLoopConsumer,
    ConfigurationError,
    ConstantBackoff,
    EventConsumer,
    Message,
    Middleware,
    Reject,
    Retry,
    RetryPolicy,
)
from abe.backends.message_queue.base.middleware import HandleNext
from abe.backends.message_queue.engine import GroupSubscription
from abe.backends.message_queue.handler import Handle
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import BackendConnectionError, PermissionDeniedError, UnsupportedCapabilityError
from abe.settings import QueueSettings
from abe.testing import ManualClock, fresh_memory_backend
from abe_contract_tests import bounds

ONCE = RetryPolicy(max_attempts=1)
PATIENT = RetryPolicy(max_attempts=3, backoff=ConstantBackoff(100))


@asynccontextmanager
async def running(consumer: AsyncLoopConsumer, handler: Any) -> AsyncIterator[asyncio.Task[None]]:
    """Run a consumer in the background, shut it down at the end, and let its error out."""
    async with bounds.within(10):
        task = asyncio.create_task(consumer.run(handler))
        try:
            yield task
        finally:
            await consumer.shutdown()
            await asyncio.wait([task])
    task.result()


class Collector:
    """A handler that keeps what it got, and fails as often as it is told."""

    def __init__(self, *failures: Exception, wanted: int = 1) -> None:
        self.seen: list[Message] = []
        self.failures = list(failures)
        self.done = asyncio.Event()
        self.wanted = wanted

    async def __call__(self, message: Message) -> None:
        self.seen.append(message)
        if self.failures:
            raise self.failures.pop(0)
        if len(self.seen) >= self.wanted:
            self.done.set()

    @property
    def attempts(self) -> list[int]:
        return [message.attempt for message in self.seen]


async def publish(backend: MemoryBackend, count: int, key: str = "order.created") -> None:
    await backend.declare()
    await backend.publish_many([(key, {"n": number}) for number in range(count)])


async def drained(backend: MemoryBackend, group: str = "default") -> None:
    """Return when the acknowledgements have left."""
    async with bounds.within(5):
        while (stats := await backend.stats(group)).waiting + stats.in_flight + stats.delayed:  # noqa: ASYNC110
            await asyncio.sleep(0)


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


class TestFailures:
    async def test_a_failed_message_comes_back_after_the_policys_backoff_and_not_before(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        collector = Collector(ValueError("no"), ValueError("no"))
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), collector):
            await manual_clock.advance(99.9)
            assert collector.attempts == [1]
            await manual_clock.advance(0.1)
            assert collector.attempts == [1, 2]
            await manual_clock.advance(100)
            assert collector.attempts == [1, 2, 3]
            await drained(memory_backend)
        assert "of group 'default', attempt 1 of 3: ValueError: no (retrying in 100 s)" in caplog.text
        assert (await memory_backend.stats()).dead == 0

    async def test_others_are_handled_while_a_failed_one_waits(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        collector = Collector(ValueError("no"), wanted=3)
        await publish(memory_backend, 3)
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), collector):
            await collector.done.wait()
            assert [message["n"] for message in collector.seen] == [0, 1, 2]
            await manual_clock.advance(100)
            assert [message["n"] for message in collector.seen] == [0, 1, 2, 0]

    async def test_after_its_last_attempt_it_is_a_dead_letter_that_says_why(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        collector = Collector(*[ValueError("the bank is gone")] * 3)
        await memory_backend.publish("order.created", {"n": 1}, headers={"h": "v"}, id="seven")
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), collector):
            await manual_clock.advance(1000)
        assert collector.attempts == [1, 2, 3]
        (letter,) = await memory_backend.dead_letters().list()
        assert (letter.id, letter.key, letter.body, letter.headers) == (
            "seven",
            "order.created",
            b'{"n":1}',
            {"h": "v"},
        )
        assert (letter.attempts, letter.reason) == (3, "ValueError: the bank is gone")
        assert letter.error.startswith("Traceback")
        assert letter.error.endswith("ValueError: the bank is gone\n")

    async def test_a_handler_may_say_when_to_try_again(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        collector = Collector(Retry(after=7))
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), collector):
            await manual_clock.advance(6.9)
            assert collector.attempts == [1]
            await manual_clock.advance(0.2)
            assert collector.attempts == [1, 2]

    async def test_a_handler_may_reject(self, memory_backend: MemoryBackend, manual_clock: ManualClock) -> None:
        collector = Collector(Reject("no such customer"))
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), collector):
            await manual_clock.advance(1000)
        assert collector.attempts == [1]
        (letter,) = await memory_backend.dead_letters().list()
        assert letter.reason == "no such customer"

    async def test_a_function_may_decide_about_an_exception(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        def classify(exc: Exception) -> Retry | Reject | None:
            return Reject("malformed") if isinstance(exc, KeyError) else Retry(after=1)

        collector = Collector(OSError(), KeyError())
        await publish(memory_backend, 1)
        policy = RetryPolicy(classify=classify)
        async with running(AsyncLoopConsumer(memory_backend, retry=policy), collector):
            await manual_clock.advance(1)
        assert collector.attempts == [1, 2]
        (letter,) = await memory_backend.dead_letters().list()
        assert letter.reason == "malformed"

    async def test_a_replayed_dead_letter_starts_again_at_attempt_1(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        collector = Collector(ValueError("no"))
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=ONCE), collector):
            await manual_clock.advance(0)
            assert (await memory_backend.stats()).dead == 1
            assert await memory_backend.dead_letters().replay_all() == 1
            await collector.done.wait()
        assert collector.attempts == [1, 1]

    async def test_a_handler_that_settled_the_message_itself_has_the_last_word(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        async def handler(message: Message) -> None:
            await message.ack()
            raise ValueError("afterwards")

        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), handler):
            await manual_clock.advance(1000)
        stats = await memory_backend.stats()
        assert (stats.waiting, stats.in_flight, stats.delayed, stats.dead) == (0, 0, 0, 0)

    async def test_a_handler_that_awaits_something_cancelled_has_failed_and_the_consumer_lives(
        self, memory_backend: MemoryBackend
    ) -> None:
        done = asyncio.Event()

        async def handler(message: Message) -> None:
            if message["n"] == 1:
                done.set()
                return
            cancelled = asyncio.ensure_future(asyncio.Event().wait())
            cancelled.cancel()
            await cancelled

        await publish(memory_backend, 2)
        async with running(AsyncLoopConsumer(memory_backend, retry=ONCE), handler):
            await done.wait()
        (letter,) = await memory_backend.dead_letters().list()
        assert "cancelled" in letter.reason


class TestTimeout:
    async def test_a_handler_that_takes_too_long_is_cancelled_and_its_message_fails(
        self, memory_backend: MemoryBackend
    ) -> None:
        cancelled, done = asyncio.Event(), asyncio.Event()

        async def handler(message: Message) -> None:
            if message["n"] == 1:
                done.set()
                return
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        await publish(memory_backend, 2)
        async with running(AsyncLoopConsumer(memory_backend, retry=ONCE, timeout=0.05), handler):
            await done.wait()
            assert cancelled.is_set()
        (letter,) = await memory_backend.dead_letters().list()
        assert letter.reason == "TimeoutError: the handler took longer than 0.05 s"

    async def test_one_that_turned_a_cancellation_into_something_else_does_not_end_the_consumer_later(
        self, memory_backend: MemoryBackend
    ) -> None:
        handled = list[int]()

        async def handler(message: Message) -> None:
            handled.append(message["n"])
            task = asyncio.current_task()
            assert task is not None
            if message["n"] == 0:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
            elif message["n"] == 1:
                await asyncio.Event().wait()

        await publish(memory_backend, 3)
        async with running(AsyncLoopConsumer(memory_backend, retry=ONCE, timeout=0.05), handler):
            await drained(memory_backend)
        assert handled == [0, 1, 2]

    async def test_one_that_swallows_its_cancellation_has_failed_too(self, memory_backend: MemoryBackend) -> None:
        async def handler(message: Message) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return

        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=ONCE, timeout=0.05), handler):
            await drained(memory_backend)
        assert (await memory_backend.stats()).dead == 1

    async def test_one_that_goes_on_after_its_cancellation_is_cancelled_again(
        self, memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def handler(message: Message) -> None:
            for _ in range(3):
                with suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()

        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=ONCE, timeout=0.02), handler):
            await drained(memory_backend)
        (letter,) = await memory_backend.dead_letters().list()
        assert letter.reason == "TimeoutError: the handler took longer than 0.02 s"
        assert caplog.text.count("cancelling it again") == 1

    async def test_a_handlers_own_time_limits_work_inside_of_it(self, memory_backend: MemoryBackend) -> None:
        collector = Collector()

        async def handler(message: Message) -> None:
            try:
                async with asyncio.timeout(0.01):  # noqa: TID251 - as an application would
                    await asyncio.Event().wait()
            except TimeoutError:
                await collector(message)

        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, timeout=5), handler):
            await collector.done.wait()
            await drained(memory_backend)
        assert collector.attempts == [1]

    async def test_a_cancelled_run_is_no_timeout(self, memory_backend: MemoryBackend) -> None:
        at_work = asyncio.Event()

        async def handler(message: Message) -> None:
            at_work.set()
            await asyncio.Event().wait()

        await publish(memory_backend, 1)
        task = asyncio.create_task(AsyncLoopConsumer(memory_backend, timeout=5, retry=ONCE).run(handler))
        async with bounds.within(5):
            await at_work.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        stats = await memory_backend.stats()
        assert (stats.waiting, stats.dead) == (1, 0)


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


class TestShutdown:
    async def test_it_waits_for_the_handlers_that_run_and_acknowledges_and_takes_nothing_new(
        self, memory_backend: MemoryBackend
    ) -> None:
        at_work, finish = asyncio.Event(), asyncio.Event()
        handled: list[int] = []

        async def handler(message: Message) -> None:
            at_work.set()
            await finish.wait()
            handled.append(message["n"])

        await publish(memory_backend, 5)
        consumer = AsyncLoopConsumer(memory_backend)
        async with running(consumer, handler) as task:
            await at_work.wait()
            stopping = asyncio.create_task(consumer.shutdown())
            for _ in range(50):
                await asyncio.sleep(0)
            assert not stopping.done()
            assert not task.done()
            finish.set()
            await stopping
            assert task.done()
        assert handled == [0]
        stats = await memory_backend.stats()
        assert (stats.waiting, stats.in_flight) == (4, 0)

    async def test_after_the_grace_period_handlers_are_cancelled_and_their_messages_go_back_uncounted(
        self, memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        at_work = asyncio.Event()

        async def handler(message: Message) -> None:
            at_work.set()
            await asyncio.Event().wait()

        await publish(memory_backend, 1)
        consumer = AsyncLoopConsumer(memory_backend, grace=0.01)
        async with running(consumer, handler):
            await at_work.wait()
            await consumer.shutdown()
        assert "1 handlers did not finish within 0.01 s" in caplog.text
        async with bounds.within(5), memory_backend.consume() as messages:
            assert (await anext(messages)).attempt == 1

    async def test_it_may_be_called_repeatedly_at_once_and_before_any_run(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend)
        async with bounds.within(5):
            await consumer.shutdown()
            collector = Collector()
            await publish(memory_backend, 1)
            async with running(consumer, collector):
                await collector.done.wait()
                await asyncio.gather(*(consumer.shutdown() for _ in range(3)))
            await consumer.shutdown()

    async def test_a_handler_may_call_it(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend)

        async def handler(message: Message) -> None:
            await consumer.shutdown()

        await publish(memory_backend, 2)
        async with bounds.within(5):
            await consumer.run(handler)
        stats = await memory_backend.stats()
        assert (stats.waiting, stats.in_flight) == (1, 0)

    async def test_leaving_the_block_shuts_down_and_the_consumer_can_run_again(
        self, memory_backend: MemoryBackend
    ) -> None:
        consumer = AsyncLoopConsumer(memory_backend)
        for _ in range(3):
            collector = Collector()
            await publish(memory_backend, 1)
            async with bounds.within(5), consumer:
                task = asyncio.create_task(consumer.run(collector))
                await collector.done.wait()
            await task
        await drained(memory_backend)

    async def test_it_runs_once_at_a_time(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend)
        collector = Collector()
        await publish(memory_backend, 1)
        async with running(consumer, collector):
            await collector.done.wait()
            with pytest.raises(RuntimeError, match="already running"):
                await consumer.run(collector)

    async def test_a_cancelled_run_raises_and_gives_its_messages_back(self, memory_backend: MemoryBackend) -> None:
        at_work = asyncio.Event()

        async def handler(message: Message) -> None:
            at_work.set()
            await asyncio.Event().wait()

        await publish(memory_backend, 5)
        task = asyncio.create_task(AsyncLoopConsumer(memory_backend, concurrency=2).run(handler))
        async with bounds.within(5):
            await at_work.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with memory_backend.consume() as messages:
                again = [await anext(messages) for _ in range(5)]
        assert [(message["n"], message.attempt) for message in again] == [(n, 1) for n in range(5)]

    async def test_leaving_the_block_before_run_had_a_turn_ends_it(self, memory_backend: MemoryBackend) -> None:
        async with bounds.within(2):
            async with AsyncLoopConsumer(memory_backend) as consumer:
                task = asyncio.create_task(consumer.run(Collector()))
            await task

    async def test_nothing_it_started_is_left_behind(self, memory_backend: MemoryBackend) -> None:
        before = asyncio.all_tasks()
        collector = Collector()
        await publish(memory_backend, 1)
        consumer = AsyncLoopConsumer(memory_backend, concurrency=5, timeout=5)
        async with running(consumer, collector):
            await collector.done.wait()
        assert asyncio.all_tasks() == before


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


class Minimal:
    """A provider with the three methods of the protocol, and nothing else."""

    def __init__(self, *messages: dict[str, Any], ends: bool = False) -> None:
        self.messages = list(messages)
        self.ends = ends
        self.group: str | None = "not asked"
        self.acknowledged: list[dict[str, Any]] = []
        self.closed = False

    async def publish(self, key: str, payload: dict[str, Any]) -> None:
        self.messages.append(payload)

    async def consume(self, *, group: str | None = None) -> AsyncIterator[dict[str, Any]]:
        self.group = group
        try:
            while self.messages:
                yield self.messages[0]
                self.acknowledged.append(self.messages.pop(0))
            if not self.ends:
                await asyncio.Event().wait()
        finally:
            self.closed = True

    @classmethod
    def from_env(cls) -> Self:
        return cls()


class TestMinimalBackend:
    async def test_its_messages_are_handled_one_at_a_time_and_it_says_what_it_cannot_do(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        backend = Minimal({"n": 1}, {"n": 2}, ends=True)
        seen: list[dict[str, Any]] = []

        async def handler(message: dict[str, Any]) -> None:
            assert backend.acknowledged == seen, "acknowledged before it was handled"
            seen.append(message)

        async with bounds.within(5):
            await AsyncLoopConsumer(backend, "billing").run(handler)
        assert seen == [{"n": 1}, {"n": 2}]
        assert backend.group == "billing"
        assert "Minimal has only the three methods of the protocol" in caplog.text
        assert "not retried" in caplog.text

    async def test_a_failed_handler_is_logged_and_the_loop_lives(self, caplog: pytest.LogCaptureFixture) -> None:
        backend = Minimal({"n": 1}, {"n": 2}, ends=True)
        seen: list[int] = []

        async def handler(message: dict[str, Any]) -> None:
            seen.append(message["n"])
            if message["n"] == 1:
                raise ValueError("no")

        async with bounds.within(5):
            await AsyncLoopConsumer(backend).run(handler)
        assert seen == [1, 2]
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert [record.getMessage() for record in errors] == [
            "the handler failed, and the message is not retried: ValueError: no"
        ]
        assert errors[0].exc_info is not None

    async def test_a_handler_that_awaits_something_cancelled_does_not_end_the_loop(self) -> None:
        backend = Minimal({"n": 1}, {"n": 2}, ends=True)
        seen: list[int] = []

        async def handler(message: dict[str, Any]) -> None:
            seen.append(message["n"])
            if message["n"] == 1:
                cancelled = asyncio.ensure_future(asyncio.Event().wait())
                cancelled.cancel()
                await cancelled

        async with bounds.within(5):
            await AsyncLoopConsumer(backend).run(handler)
        assert seen == [1, 2]

    async def test_shutdown_ends_a_wait_for_the_next_message_and_closes_the_iterator(self) -> None:
        backend = Minimal({"n": 1})
        collector = asyncio.Event()

        async def handler(message: dict[str, Any]) -> None:
            collector.set()

        consumer = AsyncLoopConsumer(backend)
        async with running(consumer, handler) as task:
            await collector.wait()
            for _ in range(20):
                await asyncio.sleep(0)
            await consumer.shutdown()
            assert task.done()
        assert backend.closed
        assert backend.acknowledged == [{"n": 1}]

    async def test_shutdown_lets_the_handler_finish(self) -> None:
        backend = Minimal({"n": 1}, {"n": 2})
        at_work, finish = asyncio.Event(), asyncio.Event()

        async def handler(message: dict[str, Any]) -> None:
            at_work.set()
            await finish.wait()

        consumer = AsyncLoopConsumer(backend)
        async with running(consumer, handler):
            await at_work.wait()
            stopping = asyncio.create_task(consumer.shutdown())
            for _ in range(20):
                await asyncio.sleep(0)
            assert not stopping.done()
            finish.set()
            await stopping
        assert backend.closed

    async def test_shutdown_is_bounded_by_the_grace_period(self) -> None:
        at_work = asyncio.Event()

        async def handler(message: dict[str, Any]) -> None:
            at_work.set()
            await asyncio.Event().wait()

        consumer = AsyncLoopConsumer(Minimal({"n": 1}), grace=0.01)
        task = asyncio.create_task(consumer.run(handler))
        await at_work.wait()
        try:
            async with bounds.within(2):
                await consumer.shutdown()
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def test_a_handler_may_call_shutdown(self) -> None:
        backend = Minimal({"n": 1}, {"n": 2})
        consumer = AsyncLoopConsumer(backend)

        async def handler(message: dict[str, Any]) -> None:
            await consumer.shutdown()

        async with bounds.within(2):
            await consumer.run(handler)
        assert backend.closed

    async def test_a_cancelled_run_raises_and_closes_the_iterator(self) -> None:
        backend = Minimal()
        task = asyncio.create_task(AsyncLoopConsumer(backend).run(Collector()))
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        async with bounds.within(5):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert backend.closed

    async def test_a_time_limit_holds_there_too(self, caplog: pytest.LogCaptureFixture) -> None:
        backend = Minimal({"n": 1}, ends=True)

        async def handler(message: dict[str, Any]) -> None:
            await asyncio.Event().wait()

        async with bounds.within(5):
            await AsyncLoopConsumer(backend, timeout=0.05).run(handler)
        assert "took longer than 0.05 s" in caplog.text

    @pytest.mark.parametrize(
        "options",
        [
            {"retry": RetryPolicy()},
            {"concurrency": 2},
            {"ordered_by_key": True},
            {"keys": ["a"]},
            {"prefetch": 5},
        ],
        ids=str,
    )
    def test_what_it_cannot_do_is_refused_and_not_ignored(self, options: dict[str, Any]) -> None:
        with pytest.raises(UnsupportedCapabilityError, match="three methods"):
            AsyncLoopConsumer(Minimal(), **options)
