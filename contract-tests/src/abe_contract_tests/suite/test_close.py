"""C-CLS: how everything ends."""

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from abe.backends.message_queue.base import Message, Subscription
from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.errors import AbeError, BackendClosedError
from abe_contract_tests.contract import Contract
from abe_contract_tests.leaks import assert_no_leak
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.steps import (
    LONG_LEASE,
    assert_silent,
    collect,
    expect_counts,
    numbered,
    numbers,
    unreachable_backend,
    until,
    until_empty,
)

CYCLES = 100


@clause("C-CLS-01")
async def test_close_may_be_called_twice_and_before_anything_else(contract: Contract) -> None:
    unused, used = contract.backend(), contract.backend()
    async with contract.within():
        await unused.disconnect()
        await unused.disconnect()
        async with used:
            await used.declare("g")
            await used.publish("order.created", {"n": 1})
            await used.disconnect()
        await asyncio.gather(*(used.disconnect() for _ in range(5)))
        await used.connect()
        await used.publish("order.created", {"n": 2})
    await expect_counts(contract, await contract.oracle(), "g", waiting=2)


async def _publish_until_closed(backend: Any, start: int, confirmed: list[int], problems: list[BaseException]) -> None:
    for n in range(start, start + 10_000):
        try:
            await backend.publish("order.created", {"n": n})
        except BackendClosedError:
            return
        except AbeError as exc:
            if not exc.maybe_accepted:
                problems.append(exc)
            return
        confirmed.append(n)
        await asyncio.sleep(0)


@clause("C-CLS-01")
@pytest.mark.parametrize("consumed", [0, 10])
async def test_close_beside_publish_and_consume_loses_and_doubles_nothing(contract: Contract, consumed: int) -> None:
    """Whether its consumers have just begun, or are in the middle of it."""
    checker = contract.backend()
    oracle = await contract.oracle()
    confirmed: list[int] = []
    delivered: set[int] = set()
    done: Counter[int] = Counter()
    problems: list[BaseException] = []

    async def consume(backend: Any) -> None:
        try:
            async with backend.consume(group="g") as subscription:
                await finish(subscription)
        except AbeError:
            return

    async def finish(subscription: Subscription) -> None:
        while True:
            message = await subscription.receive()
            delivered.add(message["n"])
            await message.ack()
            done[message["n"]] += 1

    async with contract.within(20):
        await checker.declare("g")
        for turn in range(5):
            backend = contract.backend()
            tasks = [
                asyncio.create_task(_publish_until_closed(backend, (turn * 10 + part) * 10_000, confirmed, problems))
                for part in range(5)
            ]
            tasks += [asyncio.create_task(consume(backend)) for _ in range(2)]
            published, finished = len(confirmed) + 20, done.total() + consumed
            while len(confirmed) < published or done.total() < finished:  # noqa: ASYNC110 - an event would have to be set by each
                await asyncio.sleep(0)
            async with contract.within(5):
                await backend.disconnect()
                await asyncio.wait(tasks)
            problems += [error for task in tasks if (error := task.exception()) is not None]
        assert not problems
        async with checker.consume(group="g") as subscription:
            finishing = asyncio.ensure_future(finish(subscription))
            await until_empty(oracle, "g")
            finishing.cancel()
            await asyncio.wait([finishing])
    assert set(confirmed) <= delivered
    if not contract.capabilities.spurious_duplicates:
        assert done.total() == len(done), "nothing failed, and some came twice"


@clause("C-CLS-01")
async def test_close_is_bounded_when_the_broker_cannot_be_reached(contract: Contract) -> None:
    async with contract.within():
        backend = contract.backend()
        await backend.declare("g")
        waiting = asyncio.ensure_future(backend.consume(group="g").receive())
        await asyncio.sleep(0)
        async with contract.within(1):
            await backend.disconnect()
        with pytest.raises(BackendClosedError):
            await waiting
    if not contract.harness.networked:
        return
    lost = unreachable_backend(contract, QUEUE_CLOSE_TIMEOUT_SECONDS="0.5")
    async with contract.within():
        publishing = [asyncio.create_task(lost.publish("order.created", {"n": n})) for n in range(3)]
        consuming = asyncio.ensure_future(anext(lost.consume(group="g")))
        await asyncio.sleep(0.05)  # long enough for the first try to have failed
        started = time.monotonic()
        async with contract.within(3):
            await lost.disconnect()
        # The bound is one close timeout for each of the things that end one after the other.
        assert time.monotonic() - started < contract.bound(2)
        await asyncio.wait([*publishing, consuming])
        results = [task.exception() for task in (*publishing, consuming)]
        assert all(isinstance(result, AbeError | StopAsyncIteration) for result in results), results


@clause("C-CLS-02")
async def test_close_ends_everything_that_waits(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        subscriptions = [backend.consume(group=f"g{n % 3}") for n in range(6)]
        for subscription in subscriptions:
            await subscription.__aenter__()
        iterating = [asyncio.ensure_future(anext(subscription)) for subscription in subscriptions[:3]]
        receiving = [
            asyncio.ensure_future(subscription.receive()) for subscription in subscriptions[3:] for _ in range(2)
        ]
        await asyncio.sleep(0)
        async with contract.within(1):
            await backend.disconnect()
            await asyncio.wait([*iterating, *receiving])
        assert [type(task.exception()) for task in iterating] == [StopAsyncIteration] * 3
        assert [type(task.exception()) for task in receiving] == [BackendClosedError] * 6


@clause("C-CLS-02")
async def test_use_after_close_raises_backend_closed_error(contract: Contract) -> None:
    async with contract.within():
        for used in (False, True):
            backend = contract.backend()
            subscription = backend.consume(group="g")
            if used:
                await backend.declare("g")
                await subscription.__aenter__()
            await backend.disconnect()

            async def consume(backend: Any = backend) -> None:
                async with backend.consume(group="g"):
                    pass

            uses: list[Callable[[], Awaitable[object]]] = [
                lambda: backend.publish("order.created", {}),  # noqa: B023
                lambda: backend.publish_many(numbered(2)),  # noqa: B023
                consume,
                subscription.receive,
                lambda: backend.declare("g"),  # noqa: B023
                lambda: backend.delete_group("g"),  # noqa: B023
                lambda: backend.groups(),  # noqa: B023
                lambda: backend.stats("g"),  # noqa: B023
                lambda: backend.ping(),  # noqa: B023
            ]
            for use in uses:
                with pytest.raises(BackendClosedError) as caught:
                    await use()
                assert not caught.value.retryable
            with pytest.raises(StopAsyncIteration):
                await anext(subscription)


@clause("C-CLS-03")
async def test_shutdown_takes_nothing_new_and_lets_handlers_finish_under_their_lease(contract: Contract) -> None:
    backend, other = contract.backend(), contract.backend()
    oracle = await contract.oracle()
    started, finish = asyncio.Event(), asyncio.Event()
    handled: list[int] = []

    async def handler(message: Message) -> None:
        started.set()
        await finish.wait()
        handled.append(message["n"])

    async with contract.within(15):
        await backend.declare("g")
        await backend.publish_many(contract.apart(numbered(5)))
        consumer = AsyncLoopConsumer(backend, "g")
        running = asyncio.create_task(consumer.run(handler))
        await started.wait()
        stopping = [asyncio.create_task(consumer.shutdown()) for _ in range(2)]
        async with other.consume(group="g") as others:
            async with contract.within(1):
                released = await collect(others, 4)
            # Two leases: the handler that is finishing keeps its message.
            await assert_silent(others, 2 * contract.lease)
            assert not running.done()
            await expect_counts(contract, oracle, "g", in_flight=1)
            finish.set()
            async with contract.within(1):
                await asyncio.gather(*stopping)
                await running
            await expect_counts(contract, oracle, "g", total=0)
            assert others.take() is None
    assert len(handled) == 1
    assert sorted(handled + numbers(released)) == list(range(5))


@clause("C-CLS-03")
async def test_after_the_grace_period_handlers_are_cancelled_and_their_messages_released(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    other = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    cancelled: list[int] = []
    all_run = asyncio.Barrier(4)

    async def handler(message: Message) -> None:
        await all_run.wait()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(message["n"])
            raise

    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(contract.apart(numbered(3)))
        consumer = AsyncLoopConsumer(backend, "g", concurrency=3, grace=0.2)
        running = asyncio.create_task(consumer.run(handler))
        await all_run.wait()
        started = time.monotonic()
        await consumer.shutdown()
        assert time.monotonic() - started >= 0.2 - 0.02
        await running
        async with other.consume(group="g") as others, contract.within(1):
            messages = await collect(others, 3)
    assert sorted(cancelled) == sorted(numbers(messages)) == [0, 1, 2]
    # Stopping is not an attempt.
    assert {message.attempt for message in messages} == {1}


@clause("C-CLS-03")
async def test_a_consumer_that_was_stopped_can_be_started_again(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    seen: list[int] = []
    got = asyncio.Event()

    async def handler(message: Message) -> None:
        seen.append(message["n"])
        got.set()

    async with contract.within():
        await backend.declare("g")
        consumer = AsyncLoopConsumer(backend, "g")
        await consumer.shutdown()  # nothing runs: nothing happens
        for n in range(3):
            await backend.publish("order.created", {"n": n})
            running = asyncio.create_task(consumer.run(handler))
            await got.wait()
            got.clear()
            await consumer.shutdown()
            await running
            await expect_counts(contract, oracle, "g", total=0)
            await consumer.shutdown()
    assert seen == [0, 1, 2]


@clause("C-CLS-04")
async def test_100_cycles_leave_nothing_behind(contract: Contract) -> None:
    oracle = await contract.oracle()
    checker = contract.backend()

    async def cycle(n: int) -> None:
        with contract.environ():
            backend = contract.backend_class.from_env()
        async with backend, backend.consume(group="g") as subscription:
            await backend.publish("order.created", {"n": n})
            async for message in subscription:
                await message.ack()
                break
            waiting = asyncio.ensure_future(anext(subscription))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])

    async with contract.within(45):
        # Whatever is opened once in a process (an executor, a resolver) is open before the count begins.
        await cycle(-1)
        await checker.declare("g")
        assert await oracle.consumers("g") in (0, None)
        await assert_no_leak(cycle, oracle, cycles=CYCLES)
        assert await oracle.consumers("g") in (0, None)
        await expect_counts(contract, oracle, "g", total=0)


@clause("C-CLS-04")
async def test_subscriptions_that_come_and_go_leave_nothing_behind(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()

    async def come_and_go(n: int) -> None:
        async with backend.consume(group="g") as subscription:
            if n % 2:
                await backend.publish("order.created", {"n": n})
                await collect(subscription, 1)
        if n % 10 == 0:
            # Dropped without a word, while it waits.
            dropped = asyncio.ensure_future(anext(backend.consume(group="g")))
            await asyncio.sleep(0)
            dropped.cancel()
            await asyncio.wait([dropped])

    async def signed_out() -> bool:
        return await oracle.consumers("g") in (0, None)

    async with contract.within(30):
        for n in (1, 2):
            await come_and_go(n)
        await assert_no_leak(come_and_go, oracle, cycles=CYCLES)
        await until(signed_out)
        await expect_counts(contract, oracle, "g", total=0)


@clause("C-CLS-05")
@pytest.mark.parametrize("case", ["loop_closed", "second_loop", "another_loop_meanwhile", "fork", "dropped"])
async def test_another_end_than_close_is_a_clear_error_or_a_clean_end(contract: Contract, case: str) -> None:
    backend_class = contract.backend_class
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-W", "ignore::ResourceWarning", "-m", "abe_contract_tests.suite.lifetimes"),
        *(case, f"{backend_class.__module__}:{backend_class.__qualname__}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **contract.environment()},
    )
    try:
        async with contract.within(20):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    complaints = errors.decode()
    assert process.returncode == 0, complaints
    assert json.loads(output) == {"case": case, "ended": "as it should"}
    assert "was destroyed but it is pending" not in complaints
    assert "never retrieved" not in complaints
    assert "never awaited" not in complaints
    assert "Traceback" not in complaints, complaints
