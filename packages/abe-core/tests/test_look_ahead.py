"""`ordered_by_key` with a busy key: its messages wait for one another, and the other keys' do not wait for them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from abe import AsyncLoopConsumer, Message, RetryPolicy
from abe.backends.message_queue import look_ahead
from abe.backends.message_queue.base.subscription import Subscription
from abe.backends.message_queue.engine import GroupSubscription
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import BackendClosedError, BackendConnectionError, PermissionDeniedError
from abe_contract_tests.bounds import within

ONCE = RetryPolicy(max_attempts=1)


@asynccontextmanager
async def running(consumer: AsyncLoopConsumer, handler: Any) -> AsyncIterator[asyncio.Task[None]]:
    async with within(20):
        task = asyncio.create_task(consumer.run(handler))
        try:
            yield task
        finally:
            await consumer.shutdown()
            await asyncio.wait([task])
    task.result()


class Keyed:
    """A handler that lets the messages of the hot key wait until it is told."""

    def __init__(self, others: int) -> None:
        self.cold: list[int] = []
        self.hot: list[int] = []
        self.go = asyncio.Event()
        self.others = others
        self.all_cold = asyncio.Event()

    async def __call__(self, message: Message) -> None:
        if message.key == "hot":
            await self.go.wait()
            self.hot.append(message["n"])
        else:
            self.cold.append(message["n"])
            if len(self.cold) == self.others:
                self.all_cold.set()


async def publish(backend: MemoryBackend, hot: int, cold: int) -> None:
    await backend.declare()
    await backend.publish_many([("hot", {"n": n}) for n in range(hot)])
    await backend.publish_many([(f"cold.{n % 5}", {"n": n}) for n in range(cold)])


async def empty(backend: MemoryBackend) -> None:
    while (stats := await backend.stats()).waiting + stats.in_flight:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("options", [{}, {"prefetch": 1}, {"prefetch": 2}, {"prefetch": 5, "concurrency": 2}], ids=str)
async def test_other_keys_go_on_while_the_successors_of_a_busy_key_fill_the_bound(
    memory_backend: MemoryBackend, options: dict[str, Any]
) -> None:
    handler = Keyed(others=50)
    await publish(memory_backend, hot=300, cold=50)
    consumer = AsyncLoopConsumer(memory_backend, ordered_by_key=True, **{"concurrency": 4, **options})
    async with running(consumer, handler):
        await handler.all_cold.wait()
        assert handler.hot == []
        handler.go.set()
        await empty(memory_backend)
    assert handler.hot == list(range(300)), "the busy key's messages are in order"
    assert sorted(handler.cold) == list(range(50))
    assert (await memory_backend.stats()).dead == 0


async def test_it_holds_no_more_than_its_prefetch_when_the_busy_key_is_done(
    memory_backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    consume = MemoryBackend.consume

    def recording(self: MemoryBackend, **options: Any) -> GroupSubscription:
        asked.append(options["prefetch"])
        return consume(self, **options)

    monkeypatch.setattr(MemoryBackend, "consume", recording)
    handler = Keyed(others=20)
    await publish(memory_backend, hot=30, cold=20)
    async with running(AsyncLoopConsumer(memory_backend, ordered_by_key=True, concurrency=2, retry=ONCE), handler):
        await handler.all_cold.wait()
        handler.go.set()
        await empty(memory_backend)
        assert asked[:3] == [8, 16, 32]
        while asked[-1] != 8:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert handler.hot == list(range(30))


async def test_what_it_holds_is_bounded_and_it_says_when_that_is_reached(
    memory_backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(look_ahead, "_MAX_IN_FLIGHT", 20)
    handler = Keyed(others=1)
    await publish(memory_backend, hot=100, cold=1)
    async with running(AsyncLoopConsumer(memory_backend, ordered_by_key=True, concurrency=2, prefetch=4), handler):
        while "wait for busy keys" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert (await memory_backend.stats()).in_flight == 28
        assert not handler.all_cold.is_set()
        handler.go.set()
        await empty(memory_backend)
    assert handler.hot == list(range(100))
    assert caplog.text.count("wait for busy keys") == 1


async def test_at_shutdown_everything_that_waits_goes_back_in_its_order(memory_backend: MemoryBackend) -> None:
    handler = Keyed(others=1)
    await publish(memory_backend, hot=100, cold=1)
    consumer = AsyncLoopConsumer(memory_backend, ordered_by_key=True, concurrency=2, prefetch=4, grace=0.01)
    async with running(consumer, handler):
        await handler.all_cold.wait()
    async with within(5), memory_backend.consume(prefetch=200) as messages:
        again = [await anext(messages) for _ in range(100)]
    assert [(message["n"], message.attempt) for message in again] == [(n, 1) for n in range(100)]


class Troubled(MemoryBackend):
    """Every subscription but the first raises these errors, one each, and then works."""

    errors: list[Exception]
    subscribed = 0

    def consume(self, **options: Any) -> GroupSubscription:
        subscription = super().consume(**options)
        self.subscribed += 1
        if self.subscribed > 1 and self.errors:
            error = self.errors.pop(0)

            async def refuse() -> Any:
                raise error

            subscription.__aenter__ = refuse  # type: ignore[method-assign]
        return subscription


async def test_a_broker_that_is_away_for_a_moment_delays_that_and_ends_nothing(
    memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Troubled(memory_backend.settings)
    backend.errors = [BackendConnectionError("no broker")] * 2
    handler = Keyed(others=5)
    await publish(backend, hot=20, cold=5)
    async with running(AsyncLoopConsumer(backend, ordered_by_key=True, concurrency=2), handler):
        await handler.all_cold.wait()
        handler.go.set()
        await empty(backend)
    assert caplog.text.count("again failed, retrying: no broker") == 2
    await backend.disconnect()


async def test_one_that_refuses_it_for_good_ends_run(memory_backend: MemoryBackend) -> None:
    backend = Troubled(memory_backend.settings)
    backend.errors = [PermissionDeniedError("no more")]
    handler = Keyed(others=5)
    await publish(backend, hot=20, cold=5)
    async with within(5):
        with pytest.raises(PermissionDeniedError):
            await AsyncLoopConsumer(backend, ordered_by_key=True, concurrency=2).run(handler)
    await backend.disconnect()


class Slow(MemoryBackend):
    """Every subscription but the first waits before it is entered."""

    subscribed = 0

    def consume(self, **options: Any) -> GroupSubscription:
        subscription = super().consume(**options)
        self.subscribed += 1
        if self.subscribed == 2:
            enter = subscription.__aenter__

            async def wait() -> Any:
                self.waits.set()
                await self.go.wait()
                return await enter()

            subscription.__aenter__ = wait  # type: ignore[method-assign]
        return subscription

    waits: asyncio.Event
    go: asyncio.Event


@pytest.fixture
async def slow(memory_backend: MemoryBackend) -> AsyncIterator[Slow]:
    async with Slow(memory_backend.settings) as backend:
        backend.waits, backend.go = asyncio.Event(), asyncio.Event()
        await publish(backend, hot=20, cold=5)
        yield backend


async def entered(backend: Slow, size: int) -> Subscription:
    subscription = backend.consume(prefetch=size)
    try:
        await subscription.__aenter__()
    except BaseException:
        await subscription.aclose()
        raise
    return subscription


def looking_ahead(first: Subscription, backend: Slow) -> look_ahead.LookAhead:
    return look_ahead.LookAhead(first, 2, lambda size: entered(backend, size), "default")


async def replacing(slow: Slow, turns: int) -> tuple[look_ahead.LookAhead, asyncio.Task[Message]]:
    """Return one whose subscription is being replaced since so many turns, and the worker that waits for that."""
    ahead = looking_ahead(await entered(slow, 2), slow)
    for _ in range(2):
        await ahead.receive()
    worker = asyncio.create_task(ahead.receive())
    await slow.waits.wait()
    slow.go.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    return ahead, worker


async def test_a_worker_that_is_cancelled_meanwhile_does_not_keep_the_others_from_the_replacement(slow: Slow) -> None:
    ahead = looking_ahead(await entered(slow, 2), slow)
    async with within(10):
        held = [await ahead.receive() for _ in range(2)]
        worker = asyncio.create_task(ahead.receive())
        await slow.waits.wait()
        worker.cancel()
        await asyncio.wait([worker])
        slow.go.set()
        assert (await ahead.receive())["n"] == 2
        assert [message["n"] for message in held] == [0, 1]
        await ahead.aclose()


@pytest.mark.parametrize("turns", range(12))
async def test_nothing_is_received_after_a_stop_during_a_replacement(slow: Slow, turns: int) -> None:
    async with within(10):
        ahead, worker = await replacing(slow, turns)
        had = worker.done()
        await ahead.stop()
        await asyncio.wait([worker])
        assert had or isinstance(worker.exception(), BackendClosedError)
        while (await slow.stats()).in_flight != 2 + had:  # noqa: ASYNC110 - what was being subscribed is completed, and closed
            await asyncio.sleep(0)
        await ahead.aclose()


@pytest.mark.parametrize("turns", range(12))
async def test_no_subscription_is_left_when_it_is_closed_during_a_replacement(slow: Slow, turns: int) -> None:
    async with within(10):
        ahead, worker = await replacing(slow, turns)
        worker.cancel()
        await ahead.aclose()
        await asyncio.wait([worker])
        await slow.publish("hot", {"n": 20})
        assert (await slow.stats()).in_flight == 0
