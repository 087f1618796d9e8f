"""Synchronous handlers that hang: their threads are counted, and nothing is begun or taken for a thread that is not there."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from abe import AsyncLoopConsumer, Message, Middleware, RetryPolicy
from abe.backends.message_queue.base.middleware import HandleNext
from abe.backends.message_queue.service.memory import MemoryBackend
from abe_contract_tests import bounds

ONCE = RetryPolicy(max_attempts=1)


@asynccontextmanager
async def running(consumer: AsyncLoopConsumer, handler: Any) -> AsyncIterator[asyncio.Task[None]]:
    async with bounds.within(20):
        task = asyncio.create_task(consumer.run(handler))
        try:
            yield task
        finally:
            await consumer.shutdown()
            await asyncio.wait([task])
    task.result()


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110 - what happens in a thread has no event here
        await asyncio.sleep(0.001)


def limit() -> float:
    """Return a time limit within which a thread certainly comes to its call, and ends one that does nothing."""
    return 0.2 * bounds.allowance()


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Set, it ends the hanging handlers."""
    event = threading.Event()
    yield event
    event.set()


class Hanging:
    """A synchronous handler that hangs on messages below `bad`, until released."""

    def __init__(self, release: threading.Event, bad: int) -> None:
        self.release = release
        self.bad = bad
        self.begun: list[int] = []
        self.done: list[int] = []

    def __call__(self, message: Message) -> None:
        self.begun.append(message["n"])
        if message["n"] < self.bad:
            self.release.wait()
        else:
            self.done.append(message["n"])


async def test_with_every_thread_stuck_nothing_is_taken_until_one_returns_and_it_is_said(
    memory_backend: MemoryBackend, release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Hanging(release, bad=2)
    await memory_backend.declare()
    await memory_backend.publish_many([("k", {"n": n}) for n in range(10)])
    async with running(AsyncLoopConsumer(memory_backend, concurrency=2, retry=ONCE, timeout=limit()), handler):
        await until(lambda: "2 of 2 threads of group 'default' are stuck" in caplog.text)
        stats = await memory_backend.stats()
        while stats.in_flight or stats.dead < 2:
            stats = await memory_backend.stats()
            await asyncio.sleep(0.001)
        assert (stats.waiting, stats.dead) == (8, 2), "what was buffered is given back, for others to take"
        assert sorted(handler.begun) == [0, 1]
        assert "1 of 2 threads" in caplog.text
        assert "since " in caplog.text
        assert "consuming pauses until one returns" in caplog.text
        release.set()
        await until(lambda: len(handler.done) == 8)
        await until(lambda: caplog.text.count("has returned after") == 2)
        while (await memory_backend.stats()).in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert sorted(handler.done) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert (await memory_backend.stats()).dead == 2, "no message that was not begun has timed out"
    assert caplog.text.count("consuming resumes") == 1


@pytest.mark.parametrize("ordered", [False, True])
async def test_the_threads_that_are_left_go_on_and_no_message_waits_for_one(
    memory_backend: MemoryBackend, release: threading.Event, ordered: bool
) -> None:
    handler = Hanging(release, bad=1)
    await memory_backend.declare()
    await memory_backend.publish_many([(f"k{n % 3}", {"n": n}) for n in range(20)])
    consumer = AsyncLoopConsumer(
        memory_backend, concurrency=2, retry=ONCE, timeout=limit(), prefetch=20, ordered_by_key=ordered
    )
    async with running(consumer, handler):
        await until(lambda: len(handler.done) == 19)
    assert (await memory_backend.stats()).dead == 1


async def test_with_every_thread_stuck_a_consumer_can_be_shut_down(
    memory_backend: MemoryBackend, release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Hanging(release, bad=5)
    await memory_backend.declare()
    await memory_backend.publish_many([("k", {"n": n}) for n in range(5)])
    consumer = AsyncLoopConsumer(memory_backend, retry=ONCE, timeout=limit(), grace=30)
    async with running(consumer, handler):
        await until(lambda: "consuming pauses" in caplog.text)
    assert handler.begun == [0]
    assert (await memory_backend.stats()).waiting == 4


async def test_the_limit_counts_from_the_start_of_the_call_in_its_thread(memory_backend: MemoryBackend) -> None:
    """A thread that comes to its call late, as a busy machine's does, has all of its time."""
    busy, seconds = threading.Event(), limit()
    finished: list[int] = []

    class Twice(Middleware):
        """Forwards a second time while the thread of the first still runs: there is no other."""

        async def handle(self, message: Message, forward: HandleNext) -> None:
            first = asyncio.create_task(asyncio.wait_for(forward(message), 0.05))
            with pytest.raises(TimeoutError):
                await first
            asyncio.get_running_loop().call_later(2 * seconds, busy.set)
            await forward(message)

    def handler(message: Message) -> None:
        busy.wait()
        finished.append(message["n"])

    await memory_backend.declare()
    await memory_backend.publish("k", {"n": 1})
    consumer = AsyncLoopConsumer(memory_backend, retry=ONCE, timeout=seconds, middleware=[Twice()])
    async with running(consumer, handler):
        await until(lambda: len(finished) == 2)
        while (await memory_backend.stats()).in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert (await memory_backend.stats()).dead == 0


async def test_a_thread_that_hangs_does_not_keep_the_process_alive(
    memory_backend: MemoryBackend, release: threading.Event
) -> None:
    threads: list[threading.Thread] = []

    def handler(message: Message) -> None:
        threads.append(threading.current_thread())

    await memory_backend.declare()
    await memory_backend.publish("k", {"n": 1})
    async with running(AsyncLoopConsumer(memory_backend), handler):
        await until(lambda: threads)
    assert threads[0].daemon
    await asyncio.to_thread(threads[0].join, 10)
    assert not threads[0].is_alive(), "it ends with its consumer"


async def test_a_thread_that_takes_its_time_within_the_limit_succeeds(memory_backend: MemoryBackend) -> None:
    def handler(message: Message) -> None:
        time.sleep(0.05)  # what it does takes time

    await memory_backend.declare()
    await memory_backend.publish("k", {"n": 1})
    async with running(AsyncLoopConsumer(memory_backend, timeout=30, retry=ONCE), handler):
        while (stats := await memory_backend.stats()).waiting + stats.in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert (await memory_backend.stats()).dead == 0


async def test_an_outcome_counts_that_comes_in_the_turn_of_the_cancellation(memory_backend: MemoryBackend) -> None:
    begun, handled = threading.Event(), threading.Event()

    def handler(message: Message) -> None:
        begun.set()
        handled.wait()

    await memory_backend.declare()
    await memory_backend.publish("k", {"n": 0})
    task = asyncio.create_task(AsyncLoopConsumer(memory_backend).run(handler))
    async with bounds.within(5):
        await until(begun.is_set)

        def turn() -> None:
            handled.set()
            deadline = bounds.Deadline(5)
            while not (_has_told(loop) or deadline.passed):
                time.sleep(0.001)  # until the thread's outcome is in the loop's queue, behind this
            task.cancel()

        loop = asyncio.get_running_loop()
        loop.call_soon(turn)
        await asyncio.wait([task])
    stats = await memory_backend.stats()
    assert (stats.waiting, stats.in_flight) == (0, 0)


def _has_told(loop: Any) -> bool:
    return any("_ended" in repr(handle) for handle in loop._ready)


async def test_no_task_is_left_when_a_consumer_is_cancelled_while_every_thread_is_stuck(
    memory_backend: MemoryBackend, release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    await memory_backend.declare()
    await memory_backend.publish("k", {"n": 0})
    before = asyncio.all_tasks()
    async with bounds.within(20):
        task = asyncio.create_task(
            AsyncLoopConsumer(memory_backend, retry=ONCE, timeout=limit()).run(Hanging(release, bad=1))
        )
        await until(lambda: "stopped consuming" in caplog.text or "consuming pauses" in caplog.text)
        await until(lambda: any("available" in repr(each.get_coro()) for each in asyncio.all_tasks()))
        task.cancel()
        await asyncio.wait([task])
        release.set()
        await until(lambda: not any("available" in repr(each.get_coro()) for each in asyncio.all_tasks()))
    assert task.cancelled()
    assert before <= asyncio.all_tasks()


async def test_a_logging_filter_that_raises_keeps_no_consumer_from_going_on(
    memory_backend: MemoryBackend, release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(record: logging.LogRecord) -> bool:
        if "an abandoned handler" in record.msg:
            raise RuntimeError("a filter fails")
        return True

    logger = logging.getLogger("abe.consumer")
    caplog.set_level(logging.INFO, logger.name)
    handler = Hanging(release, bad=1)
    await memory_backend.declare()
    await memory_backend.publish_many([("k", {"n": n}) for n in range(2)])
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the filter's failure is reported there
    logger.addFilter(failing)
    try:
        async with running(AsyncLoopConsumer(memory_backend, retry=ONCE, timeout=limit()), handler):
            await until(lambda: "stopped consuming" in caplog.text)  # until a thread is free
            release.set()
            await until(lambda: handler.done == [1])
    finally:
        logger.removeFilter(failing)


@pytest.mark.parametrize("stuck", [True, False])
async def test_a_change_of_the_groups_patterns_ends_no_consumer_that_subscribes_again(
    memory_backend: MemoryBackend, release: threading.Event, caplog: pytest.LogCaptureFixture, stuck: bool
) -> None:
    caplog.set_level(logging.INFO, "abe.consumer")
    handler = Hanging(release, bad=1)
    gate = asyncio.Event()

    async def waiting(message: Message) -> None:
        await gate.wait()
        handler.done.append(message["n"])

    options: dict[str, Any] = (
        {"timeout": limit()} if stuck else {"ordered_by_key": True, "prefetch": 2, "concurrency": 2}
    )
    consumer = AsyncLoopConsumer(memory_backend, "g", keys=["a.*"], retry=ONCE, **options)
    async with running(consumer, handler if stuck else waiting):
        await consumer.started
        await memory_backend.declare("g", ["a.*", "b.*"])
        await memory_backend.publish_many([("a.x", {"n": n}) for n in range(5)])
        if stuck:
            await until(lambda: "stopped consuming" in caplog.text)  # until a thread is free
        else:
            while (await memory_backend.stats("g")).in_flight <= 2:  # noqa: ASYNC110 - another subscription takes over
                await asyncio.sleep(0.001)
        release.set()
        gate.set()
        await until(lambda: len(handler.done) == (4 if stuck else 5))
    assert (await memory_backend.groups())["g"] == ("a.*", "b.*")
