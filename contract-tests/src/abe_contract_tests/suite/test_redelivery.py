"""C-RED: what comes back, when, and to whom."""

import asyncio
import time
from contextlib import suppress

import pytest

from abe.backends.message_queue.base import ConstantBackoff, Message
from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.backends.message_queue.retry import RetryPolicy
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import (
    CLOCKS,
    LONG_LEASE,
    assert_silent,
    collect,
    expect_counts,
    hold,
    numbered,
    numbers,
    until_empty,
    until_in_flight,
)


@clause("C-RED-01", capability="redelivery_bound")
@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0])
async def test_a_failed_message_comes_back_after_its_delay_and_not_before(contract: Contract, delay: float) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(15), backend.consume(group="g") as subscription:
        await backend.publish("order.created", {"n": 1})
        message = await subscription.receive()
        failed_at = time.monotonic()
        await message.nack(delay=delay)
        async with contract.within(delay, "redelivery_bound"):
            again = await subscription.receive()
        assert time.monotonic() - failed_at >= delay - CLOCKS
        assert (again["n"], again.attempt, again.id) == (1, 2, message.id)
        await again.ack()
        await until_empty(oracle, "g")


@clause("C-RED-01", capability="redelivery_bound")
async def test_the_default_backoff_is_waited_out(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(15), backend.consume(group="g") as subscription:
        await backend.publish("order.created", {"n": 1})
        message = await subscription.receive()
        failed_at = time.monotonic()
        await message.nack()
        async with contract.within(1, "redelivery_bound"):
            await subscription.receive()
        # 1 s, of which the jitter takes at most half.
        assert time.monotonic() - failed_at >= 0.5 - CLOCKS


@clause("C-RED-01", capability="groups")
async def test_a_failure_in_one_group_is_no_business_of_another(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(), backend.consume(group="a") as ours, backend.consume(group="b") as theirs:
        await backend.publish("order.created", {"n": 1})
        await (await ours.receive()).nack(delay=0)
        await collect(theirs, 1)
        (again,) = await collect(ours, 1)
        assert again.attempt == 2
        await until_empty(oracle, "a")
        await until_empty(oracle, "b")
        assert theirs.take() is None


@clause("C-RED-01")
async def test_a_failing_handler_is_retried_after_its_policy_s_backoff(contract: Contract) -> None:
    backend = contract.backend()
    at: list[float] = []
    done = asyncio.Event()

    async def handler(message: Message) -> None:
        at.append(time.monotonic())
        assert message.attempt == len(at)
        if len(at) < 3:
            raise ValueError("not yet")
        done.set()

    async with contract.within():
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        consumer = AsyncLoopConsumer(backend, "g", retry=RetryPolicy(backoff=ConstantBackoff(0.2)))
        running = asyncio.create_task(consumer.run(handler))
        await done.wait()
        await consumer.shutdown()
        await running
    assert at[1] - at[0] >= 0.2 - CLOCKS
    assert at[2] - at[1] >= 0.2 - CLOCKS


@clause("C-RED-02")
async def test_what_a_killed_process_held_reaches_a_live_one(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    lease = contract.lease if contract.declares("lease") else 0.0
    async with contract.within(20):
        await backend.declare("g")
        await backend.publish_many(numbered(10))
        async with contract.worker(jobs.hold, group="g", prefetch=20) as worker:
            assert await worker.next_report() == "subscribed"
            handled = await worker.next_report()
            await until_in_flight(oracle, "g", 10)
            async with backend.consume(group="g") as subscription:
                await worker.kill()
                async with contract.within(lease, "redelivery_bound"):
                    messages = await collect(subscription, 10)
                await until_empty(oracle, "g")
                assert subscription.take() is None
    assert sorted(numbers(messages)) == list(range(10))
    assert all(message.attempt == 2 for message in messages if message["n"] == handled["n"])


@clause("C-RED-03", capability="lease")
async def test_a_live_consumer_keeps_what_it_buffers_and_handles_for_three_leases(contract: Contract) -> None:
    backend, rival = contract.backend(), contract.backend()
    oracle = await contract.oracle()
    async with contract.within(20):
        await backend.declare("g")
        await backend.publish_many(numbered(5))
        async with backend.consume(group="g", prefetch=10) as subscription:
            handled = await anext(subscription)
            await until_in_flight(oracle, "g", 5)
            async with rival.consume(group="g") as others:
                # That a lease is kept shows only after it would have run out.
                await assert_silent(others, 3 * contract.lease)
                assert not handled.lease_lost
                await handled.ack()
                buffered = await collect(subscription, 4)
                await until_empty(oracle, "g")
                assert others.take() is None
    assert sorted([handled["n"], *numbers(buffered)]) == list(range(5))
    assert {message.attempt for message in (handled, *buffered)} == {1}


@clause("C-RED-03", capability="lease")
async def test_a_handler_may_take_three_leases(contract: Contract) -> None:
    backend, rival = contract.backend(), contract.backend()
    oracle = await contract.oracle()
    started, finish = asyncio.Event(), asyncio.Event()
    handled: list[int] = []

    async def handler(message: Message) -> None:
        started.set()
        await finish.wait()
        handled.append(message.attempt)

    async with contract.within(20):
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        consumer = AsyncLoopConsumer(backend, "g")
        running = asyncio.create_task(consumer.run(handler))
        await started.wait()
        async with rival.consume(group="g") as others:
            await assert_silent(others, 3 * contract.lease)
            finish.set()
            await until_empty(oracle, "g")
            await consumer.shutdown()
            await running
            assert others.take() is None
    assert handled == [1]


@clause("C-RED-03", capability="lease")
async def test_a_consumer_that_stood_still_is_not_given_again_what_it_holds(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(20):
        await backend.declare("g")
        await backend.publish_many(contract.apart(numbered(3)))
        # It may have more than it has, so that it asks for more all the time.
        async with backend.consume(group="g", prefetch=10) as subscription:
            held = [await subscription.receive() for _ in range(3)]
            await backend.publish("numbered.last", {"n": 3})
            time.sleep(2 * contract.lease)  # noqa: ASYNC251 - the leases run out, as in a program that blocks its event loop
            last = await subscription.receive()
            with suppress(TimeoutError):
                async with asyncio.timeout(contract.lease):
                    while numbers([last]) == [3]:  # on its way for longer than its lease, it may come again
                        last = await subscription.receive()
            assert numbers([last]) == [3]
            assert sorted(numbers(held)) == list(range(3))
            for message in held:  # there was no other consumer to take them
                await message.ack()


@clause("C-RED-03", capability="lease")
async def test_the_late_ack_of_a_revived_consumer_leaves_the_new_owner_s_copy(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(15):
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        async with contract.worker(jobs.settle_on_request, group="g") as worker:
            assert await worker.next_report() == {"n": 1, "attempt": 1}
            await worker.pause()
            async with backend.consume(group="g") as subscription:
                mine = await subscription.receive()
                await worker.send("ack")
                await worker.resume()
                assert await worker.next_report() == "LeaseLostError"
                await expect_counts(contract, oracle, "g", in_flight=1)
                await worker.kill()
                # Our copy is a copy still: failing it brings it back once more.
                await mine.nack(delay=0)
                (again,) = await collect(subscription, 1)
                assert again["n"] == 1
                # The broker may have given it to the one that was killed, whose last request it had not seen the end of.
                assert again.attempt == 3 or (contract.harness.approximate and again.attempt == 4)
                await until_empty(oracle, "g")


@clause("C-RED-03", capability="lease")
async def test_the_heartbeat_of_a_revived_consumer_takes_nothing_back(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(15):
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        async with contract.worker(jobs.settle_on_request, group="g") as worker:
            await worker.next_report()
            await worker.pause()
            async with backend.consume(group="g") as subscription:
                mine = await subscription.receive()
                await worker.resume()
                # More than one heartbeat of the one that woke up.
                await assert_silent(subscription, contract.lease)
                assert not mine.lease_lost
                await mine.ack()
                await until_empty(oracle, "g")


@clause("C-RED-04", capability="lease")
async def test_attempts_count_deliveries_and_neither_releases_nor_heartbeats(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(20):
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        async with backend.consume(group="g") as subscription:
            assert (await subscription.receive()).attempt == 1
        async with backend.consume(group="g") as subscription:
            message = await subscription.receive()
            assert message.attempt == 1
            # A few heartbeats.
            await assert_silent(subscription, contract.lease)
            await message.nack(delay=0)
            message = await subscription.receive()
            assert message.attempt == 2
            await assert_silent(subscription, contract.lease / 2)
            await message.nack(delay=0.05)
            message = await subscription.receive()
            assert message.attempt == 3
        async with backend.consume(group="g") as subscription:
            message = await subscription.receive()
            assert message.attempt == 3
            await message.nack(delay=0)
            assert (await subscription.receive()).attempt == 4


@clause("C-RED-04")
async def test_attempts_grow_by_one_a_failure(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(), backend.consume(group="g", max_attempts=10) as subscription:
        await backend.publish("order.created", {"n": 1})
        for attempt in range(1, 11):
            message = await subscription.receive()
            assert message.attempt == attempt
            if attempt < 10:
                await message.nack(delay=0)
            else:
                await message.ack()
        await until_empty(oracle, "g")


@clause("C-RED-05")
async def test_what_was_fetched_and_not_yielded_is_released_at_close(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    other = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(contract.apart(numbered(10)))
        async with other.consume(group="g", prefetch=1) as others:
            first = await others.receive()
            async with backend.consume(group="g", prefetch=20) as subscription:
                await anext(subscription)
                await until_in_flight(oracle, "g", 10)
            async with contract.within(1):
                rest = [first]
                await first.ack()
                rest += await collect(others, 9)
            await until_empty(oracle, "g")
    assert sorted(numbers(rest)) == list(range(10))
    assert {message.attempt for message in rest} == {1}


@clause("C-RED-05")
async def test_a_stopped_subscription_gives_back_what_nobody_was_handed_and_keeps_the_rest(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    other = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(contract.apart(numbered(10)))
        async with backend.consume(group="g", prefetch=20) as subscription:
            held = await hold(subscription, 3)
            await until_in_flight(oracle, "g", 10)
            await subscription.stop()
            async with other.consume(group="g") as others:
                async with contract.within(1):
                    released = await collect(others, 7)
                await expect_counts(contract, oracle, "g", in_flight=3)
                for message in held:
                    await message.ack()
                await until_empty(oracle, "g")
    assert sorted(numbers([*held, *released])) == list(range(10))


@clause("C-RED-05")
async def test_closing_the_backend_releases_everything(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    other = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(10))
        subscription = backend.consume(group="g")
        await hold(subscription, 4)
        await until_in_flight(await contract.oracle(), "g", 10)
        await backend.disconnect()
        async with other.consume(group="g") as others, contract.within(1):
            assert sorted(numbers(await collect(others, 10))) == list(range(10))
