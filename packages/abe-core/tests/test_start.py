"""How a consumer starts, fails to start, and is told to stop before it has started: never in silence, and nobody waits for ever."""

import asyncio
import gc
import logging
from typing import Any

import pytest

from abe import AsyncLoopConsumer, ConfigurationError, ConstantBackoff, Message, Middleware, RetryPolicy
from abe.backends.message_queue.engine import GroupSubscription
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import BackendClosedError, BackendConnectionError, InvalidNameError, PermissionDeniedError
from abe.settings import QueueSettings
from abe.testing import fresh_memory_backend
from abe_contract_tests.bounds import slowness, within


async def handler(message: Message) -> None: ...


async def takes_nothing() -> None: ...


class Troubled(MemoryBackend):
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


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


class TestStarted:
    async def test_it_says_when_the_group_is_subscribed_to(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend, "billing")
        assert not consumer.started.is_set()
        async with within(5), asyncio.TaskGroup() as group:
            group.create_task(consumer.run(handler))
            await consumer.started
            assert consumer.started.is_set()
            assert "billing" in await memory_backend.groups()
            await consumer.started.wait()
            await consumer.shutdown()
        assert consumer.started.is_set(), "it had subscribed"

    async def test_it_may_be_awaited_before_run_is_called(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend)
        async with within(5), asyncio.TaskGroup() as group:
            waiting = [group.create_task(consumer.started.wait()) for _ in range(2)]
            await asyncio.sleep(0)
            group.create_task(consumer.run(handler))
            await asyncio.wait(waiting)
            await consumer.shutdown()

    @pytest.mark.parametrize("first", ["run", "started"])
    async def test_it_raises_what_ended_run_before(self, caplog: pytest.LogCaptureFixture, first: str) -> None:
        error = PermissionDeniedError("wrong password")
        consumer = AsyncLoopConsumer(Troubled(error))
        async with within(5):
            tasks = [asyncio.create_task(consumer.run(handler)), asyncio.create_task(consumer.started.wait())]
            await asyncio.wait(tasks)
            assert [task.exception() for task in tasks] == [error, error]
            with pytest.raises(PermissionDeniedError):
                await consumer.started
        assert errors(caplog) == ["the consumer of group 'default' has ended: PermissionDeniedError: wrong password"]

    async def test_it_raises_when_the_consumer_is_shut_down_before(self) -> None:
        consumer = AsyncLoopConsumer(Troubled(*[BackendConnectionError("no broker")] * 1000))
        async with within(5):
            waiting = asyncio.create_task(consumer.started.wait())
            running = asyncio.create_task(consumer.run(handler))
            for _ in range(10):
                await asyncio.sleep(0)
            await consumer.shutdown()
            await running
            with pytest.raises(BackendClosedError):
                await waiting

    async def test_it_raises_when_run_is_cancelled_before(self) -> None:
        consumer = AsyncLoopConsumer(Troubled(*[BackendConnectionError("no broker")] * 1000))
        async with within(5):
            running = asyncio.create_task(consumer.run(handler))
            await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(BackendClosedError):
                await consumer.started

    async def test_each_run_has_its_own(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend)
        for _ in range(2):
            async with within(5):
                running = asyncio.create_task(consumer.run(handler))
                assert not consumer.started.is_set()
                await consumer.started
                await consumer.shutdown()
                await running


class TestWrongFromTheStart:
    async def test_a_handler_that_cannot_be_one_is_logged_at_the_call_and_raised_by_run_and_started(
        self, memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        consumer = AsyncLoopConsumer(memory_backend, "billing")
        async with within(5):
            running = asyncio.create_task(consumer.run(takes_nothing))  # type: ignore[arg-type]
            (line,) = errors(caplog)
            assert line.startswith("the consumer of group 'billing' cannot run: the handler takes_nothing must accept")
            with pytest.raises(ConfigurationError, match="takes_nothing"):
                await consumer.started
            with pytest.raises(ConfigurationError, match="takes_nothing"):
                await running
            await consumer.shutdown()

    async def test_the_constructor_may_be_given_the_handler_and_checks_it(self, memory_backend: MemoryBackend) -> None:
        with pytest.raises(ConfigurationError, match="takes_nothing"):
            AsyncLoopConsumer(memory_backend, handler=takes_nothing)  # type: ignore[arg-type]
        got = asyncio.Event()

        async def sets(message: Message) -> None:
            got.set()

        await memory_backend.publish("k", {})
        consumer = AsyncLoopConsumer(memory_backend, handler=sets)
        async with within(5), asyncio.TaskGroup() as group:
            group.create_task(consumer.run())
            await got.wait()
            await consumer.shutdown()

    async def test_without_any_handler_run_raises(self, memory_backend: MemoryBackend) -> None:
        with pytest.raises(ConfigurationError, match="there is no handler"):
            await AsyncLoopConsumer(memory_backend).run()

    async def test_patterns_that_are_not_the_groups_end_run_and_are_logged(
        self, memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        await memory_backend.declare("billing", ["order.*"])
        async with within(5):
            with pytest.raises(ConfigurationError, match=r"user\.created"):
                await AsyncLoopConsumer(memory_backend, "billing", keys=["user.created"]).run(handler)
        (line,) = errors(caplog)
        assert "order.*" in line
        assert "user.created" in line

    async def test_one_that_is_cancelled_as_subscribing_fails_leaves_no_failure_behind(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        for turn in range(10):
            consumer = AsyncLoopConsumer(Troubled(BackendConnectionError("no broker")))
            running = asyncio.create_task(consumer.run(handler))
            for _ in range(turn):
                await asyncio.sleep(0)
            running.cancel()
            async with within(5):
                await asyncio.wait([running])
        gc.collect()
        assert errors(caplog) == []

    async def test_an_unknown_fault_of_a_provider_ends_run_and_is_logged(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        consumer = AsyncLoopConsumer(Troubled(ZeroDivisionError("a bug")))
        async with within(5):
            with pytest.raises(ZeroDivisionError):
                await consumer.run(handler)
        assert errors(caplog) == ["the consumer of group 'default' has ended: ZeroDivisionError: a bug"]

    @pytest.mark.parametrize(
        ("backend", "text"),
        [
            ("redis://user:secret@host:6379/0", "a consumer needs a backend, as load_backend.. returns, not str"),
            (MemoryBackend, "MemoryBackend is a class: give an instance"),
            (None, "not NoneType"),
            ({}, "not dict"),
        ],
        ids=["address", "class", "None", "dict"],
    )
    def test_what_is_no_backend_is_refused_where_the_consumer_is_made(self, backend: Any, text: str) -> None:
        with pytest.raises(ConfigurationError, match=text) as caught:
            AsyncLoopConsumer(backend)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"middleware": Middleware()}, r"write \[Middleware\(...\)\], with brackets"),
            ({"middleware": [Middleware]}, r"write Middleware\(\), not Middleware"),
            ({"middleware": Middleware}, "must be a sequence of Middleware, not type"),
            ({"middleware": [handler]}, "must be instances of Middleware, not of function"),
            ({"middleware": "tracing"}, "must be a sequence of Middleware, not str"),
            ({"retry": RetryPolicy}, "retry must be a RetryPolicy"),
            ({"retry": ConstantBackoff(5)}, "retry must be a RetryPolicy"),
            ({"keys": "order.*"}, "keys must be a list"),
            ({"keys": []}, "keys is empty"),
            ({"group": "no group"}, "a group must be"),
        ],
        ids=range(10),
    )
    def test_other_arguments_are_refused_there_with_what_would_be_right(
        self, memory_backend: MemoryBackend, options: dict[str, Any], text: str
    ) -> None:
        with pytest.raises((ConfigurationError, InvalidNameError), match=text):
            AsyncLoopConsumer(memory_backend, **options)

    @pytest.mark.parametrize("wrong", [Middleware(), [Middleware], "tracing"], ids=range(3))
    def test_so_is_the_middleware_of_a_backend(self, wrong: Any) -> None:
        with pytest.raises(ConfigurationError, match="middleware must be"):
            MemoryBackend(middleware=wrong)


class TestShutdownBeforeTheFirstTurn:
    async def test_it_holds_for_a_run_that_was_called_before(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend)
        async with within(5):
            running = asyncio.create_task(consumer.run(handler))
            await consumer.shutdown()
            await running
        assert await memory_backend.groups() == {}, "it has not begun"

    async def test_a_task_that_comes_to_call_run_after_the_block_was_left_ends(
        self, memory_backend: MemoryBackend
    ) -> None:
        async def worker() -> None:
            await consumer.run(handler)

        async with within(5):
            async with AsyncLoopConsumer(memory_backend) as consumer:
                running = asyncio.create_task(worker())
            await running
            with pytest.raises(BackendClosedError):
                await consumer.started
            async with consumer:
                running = asyncio.create_task(worker())
                await asyncio.sleep(0)
                await consumer.started
            await running

    async def test_and_not_for_one_that_is_called_after(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend)
        async with within(5):
            await consumer.shutdown()
            running = asyncio.create_task(consumer.run(handler))
            await consumer.started
            await consumer.shutdown()
            await running

    def test_run_may_be_called_before_there_is_an_event_loop(self) -> None:
        consumer = AsyncLoopConsumer(fresh_memory_backend())

        async def stops(message: Message) -> None:
            await consumer.shutdown()

        async def main() -> None:
            async with within(5), asyncio.TaskGroup() as group:
                group.create_task(running)
                await consumer.started
                await consumer.shutdown()

        running = consumer.run(stops)
        asyncio.run(main())

    async def test_two_runs_at_once_are_refused_whichever_begins_first(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend)
        async with within(5):
            tasks = [asyncio.create_task(consumer.run(handler)) for _ in range(2)]
            await consumer.started
            await consumer.shutdown()
            await asyncio.wait(tasks)
        assert [type(task.exception()) for task in tasks] == [type(None), RuntimeError]

    async def test_called_by_a_task_of_the_handler_it_returns_at_once(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend)

        async def stops(message: Message) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(consumer.shutdown())

        await memory_backend.publish("k", {})
        async with within(5):
            await consumer.run(stops)
        assert (await memory_backend.stats()).waiting == 0

    async def test_called_by_a_handlers_thread_it_returns_at_once(self, memory_backend: MemoryBackend) -> None:
        consumer = AsyncLoopConsumer(memory_backend)
        loop = asyncio.get_running_loop()

        def stops(message: Message) -> None:
            asyncio.run_coroutine_threadsafe(consumer.shutdown(), loop).result(5 * slowness())

        await memory_backend.publish("k", {})
        async with within(5):
            await consumer.run(stops)
        assert (await memory_backend.stats()).waiting == 0


async def test_a_group_that_is_deleted_while_it_is_subscribed_to_is_made_again(
    memory_backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = MemoryBackend.make_transport

    def interfering(self: MemoryBackend) -> Any:
        made = transport(self)
        subscribe, times = made.subscribe, iter(range(100))

        async def deleting(group: str, prefetch: int) -> Any:
            if next(times) == 0:
                await made.delete_group(group)
            return await subscribe(group, prefetch)

        monkeypatch.setattr(made, "subscribe", deleting)
        return made

    monkeypatch.setattr(MemoryBackend, "make_transport", interfering)
    got = asyncio.Event()

    async def sets(message: Message) -> None:
        got.set()

    backend = MemoryBackend(memory_backend.settings)
    consumer = AsyncLoopConsumer(backend, "billing")
    async with within(5), asyncio.TaskGroup() as group:
        group.create_task(consumer.run(sets))
        await consumer.started
        await backend.publish("k", {})
        await got.wait()
        await consumer.shutdown()
