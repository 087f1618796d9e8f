"""A consumer on a provider with the protocol's three methods."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Self

import pytest
from consumer_doubles import Collector, running

from abe import AsyncLoopConsumer, RetryPolicy
from abe.errors import BackendConnectionError, UnsupportedCapabilityError
from abe_contract_tests import bounds


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
    async def test_a_provider_whose_own_wait_is_cancelled_ends_it_with_an_error(self) -> None:
        class Cancelled(Minimal):
            async def consume(self, *, group: str | None = None) -> AsyncIterator[dict[str, Any]]:
                yield {"n": 1}
                reader = asyncio.create_task(asyncio.Event().wait())
                asyncio.get_running_loop().call_soon(reader.cancel)
                await reader

        async with bounds.within(5):
            with pytest.raises(BackendConnectionError, match="cancelled"):
                await AsyncLoopConsumer(Cancelled(), "billing").run(Collector())

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
