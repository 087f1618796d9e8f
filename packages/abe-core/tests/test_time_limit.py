"""The time limit of a handler."""

import asyncio
from contextlib import suppress

import pytest
from consumer_doubles import ONCE, Collector, drained, publish, running

from abe import AsyncLoopConsumer, Message
from abe.backends.message_queue.service.memory import MemoryBackend
from abe_contract_tests import bounds


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
