"""How a consumer is shut down, and what it leaves."""

import asyncio

import pytest
from consumer_doubles import Collector, drained, publish, running

from abe import AsyncLoopConsumer, Message
from abe.backends.message_queue.service.memory import MemoryBackend
from abe_contract_tests import bounds


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
