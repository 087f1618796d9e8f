"""C-ACK: when a message is done, and what its settlements do."""

import asyncio
from typing import Final

import pytest

from abe.backends.message_queue.base import ConstantBackoff, Message
from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.backends.message_queue.retry import RetryPolicy
from abe.errors import AlreadySettledError, LeaseLostError
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import (
    LONG_LEASE,
    collect,
    expect_counts,
    numbered,
    numbers,
    until,
    until_dead,
    until_empty,
    until_in_flight,
)

SETTLING_METHODS: Final = ("ack", "nack", "reject")


class HandlerError(Exception):
    """What a handler of these tests fails with."""


@clause("C-ACK-01")
async def test_a_message_whose_process_is_killed_in_the_loop_body_is_delivered_again(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(15):
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        async with contract.worker(jobs.hold, group="g") as worker:
            assert await worker.next_report() == "subscribed"
            assert (await worker.next_report())["n"] == 1
            await expect_counts(contract, oracle, "g", total=1)
            await worker.kill()
        await expect_counts(contract, oracle, "g", total=1)
        async with backend.consume(group="g") as subscription:
            (message,) = await collect(subscription, 1)
            assert (message["n"], message.attempt) == (1, 2)
            await until_empty(oracle, "g")


@clause("C-ACK-01")
async def test_the_broker_holds_a_message_for_as_long_as_the_loop_body_runs(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(3))
        async with backend.consume(group="g") as subscription:
            for left in (3, 2, 1):
                message = await anext(subscription)

                # The one before was acknowledged by asking for this one; this one must be there whatever happens now.
                async def settled(left: int = left) -> bool:
                    return (await oracle.counts("g")).total == left

                await until(settled)
                assert (await oracle.counts("g")).in_flight >= 1, message
        await expect_counts(contract, oracle, "g", total=1)


@clause("C-ACK-02")
async def test_asking_for_the_next_message_acknowledges_the_one_before(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(10))
        async with backend.consume(group="g") as subscription:
            for _ in range(10):
                await anext(subscription)
            waiting = asyncio.ensure_future(anext(subscription))
            await until_empty(oracle, "g")
            assert not waiting.done()
            await backend.publish("order.created", {"n": 10})
            assert (await waiting) == {"n": 10}
        await expect_counts(contract, oracle, "g", total=1)


@clause("C-ACK-02")
@pytest.mark.parametrize(
    "way", ["break", "break without async with", "aclose", "end of async with", "return from a task"]
)
async def test_leaving_the_loop_gives_the_message_back_at_once(contract: Contract, way: str) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    other = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        match way:
            case "break":
                async with backend.consume(group="g") as subscription:
                    async for _ in subscription:
                        break
            case "break without async with":
                async for _ in backend.consume(group="g"):
                    break
            case "aclose":
                subscription = backend.consume(group="g")
                await anext(subscription)
                await subscription.aclose()
                await subscription.aclose()
            case "end of async with":
                async with backend.consume(group="g") as subscription:
                    await anext(subscription)
            case _:

                async def consume() -> Message:
                    async for message in backend.consume(group="g"):
                        return message
                    raise AssertionError("the iteration ended by itself")

                await asyncio.create_task(consume())
        async with other.consume(group="g") as others:
            async with contract.within(1):
                message = await others.receive()
            assert (message["n"], message.attempt) == (1, 1)
            await message.ack()
            await until_empty(oracle, "g")


@clause("C-ACK-02")
async def test_leaving_the_loop_acknowledges_what_came_before(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    done: list[int] = []
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(10))
        async with backend.consume(group="g") as subscription:
            async for message in subscription:
                if len(done) == 6:
                    break
                done.append(message["n"])
        await expect_counts(contract, oracle, "g", total=4)
        async with backend.consume(group="g") as subscription:
            rest = numbers(await collect(subscription, 4))
    assert sorted(done + rest) == list(range(10))


@clause("C-ACK-03")
async def test_an_exception_out_of_the_block_fails_the_message_and_propagates(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    mine = HandlerError("mine")
    async with contract.within():
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        with pytest.raises(HandlerError) as caught:
            async with backend.consume(group="g") as subscription:
                async for _ in subscription:
                    raise mine
        assert caught.value is mine
        await expect_counts(contract, oracle, "g", total=1)
        async with backend.consume(group="g") as subscription:
            (message,) = await collect(subscription, 1)
            assert message.attempt == 2


@clause("C-ACK-03", capability="dead_letter")
async def test_an_exception_out_of_the_block_on_the_last_attempt_is_recorded_in_the_dead_letter(
    contract: Contract,
) -> None:
    backend = contract.backend()
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(2))
        with pytest.raises(HandlerError):
            async with backend.consume(group="g", max_attempts=1) as subscription:
                async for message in subscription:
                    if message["n"] == 1:
                        raise HandlerError("this one is bad")
        await until_dead(await contract.oracle(), "g", 1)
        (letter,) = await backend.dead_letters("g").list()
        assert letter.body == b'{"n":1}'
        assert "HandlerError" in letter.reason
        assert "this one is bad" in letter.error
        await expect_counts(contract, await contract.oracle(), "g", total=0)


@clause("C-ACK-03")
async def test_a_cancelled_block_fails_nothing(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    holding = asyncio.Event()

    async def consume() -> None:
        async with backend.consume(group="g") as subscription:
            async for _ in subscription:
                holding.set()
                await asyncio.Event().wait()

    async with contract.within():
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        task = asyncio.create_task(consume())
        await holding.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with backend.consume(group="g") as subscription, contract.within(1):
            (message,) = await collect(subscription, 1)
            assert message.attempt == 1


@clause("C-ACK-03")
async def test_an_exception_out_of_a_handler_fails_the_message_and_the_consumer_lives(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    handled: list[tuple[int, int]] = []
    done = asyncio.Event()

    async def handler(message: Message) -> None:
        handled.append((message["n"], message.attempt))
        if message["n"] == 1 and message.attempt == 1:
            raise HandlerError("the first time")
        if {(1, 2), (2, 1)} <= set(handled):
            done.set()

    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(2, start=1))
        consumer = AsyncLoopConsumer(backend, "g", retry=RetryPolicy(backoff=ConstantBackoff(0.05)))
        running = asyncio.create_task(consumer.run(handler))
        await done.wait()
        await until_empty(oracle, "g")
        await consumer.shutdown()
        await running
    assert sorted(handled) == [(1, 1), (1, 2), (2, 1)]


@clause("C-ACK-04")
@pytest.mark.parametrize("first", SETTLING_METHODS)
@pytest.mark.parametrize("second", SETTLING_METHODS)
async def test_the_first_settlement_wins(contract: Contract, first: str, second: str) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    arguments = {"ack": {}, "nack": {"delay": 0}, "reject": {}}
    async with contract.within():
        async with backend.consume(group="g") as subscription:
            await backend.publish("order.created", {"n": 1})
            message = await subscription.receive()
            await getattr(message, first)(**arguments[first])
            if first == second:
                await getattr(message, second)(**arguments[second])
            else:
                with pytest.raises(AlreadySettledError) as caught:
                    await getattr(message, second)(**arguments[second])
                assert not caught.value.retryable
            if first == "nack":
                (again,) = await collect(subscription, 1)
                assert (again["n"], again.attempt) == (1, 2)
            # The same subscription goes on as if nothing had happened.
            await backend.publish("order.created", {"n": 2})
            (after,) = await collect(subscription, 1)
            assert (after["n"], after.attempt) == (2, 1)
            await until_empty(oracle, "g")
        await expect_counts(contract, oracle, "g", dead=1 if first == "reject" else 0)


@clause("C-ACK-04")
async def test_settling_at_once_from_many_tasks_settles_once(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(), backend.consume(group="g") as subscription:
        await backend.publish("order.created", {"n": 1})
        message = await subscription.receive()
        await asyncio.gather(*(message.ack() for _ in range(10)))
        results = await asyncio.gather(message.nack(delay=0), message.reject(), return_exceptions=True)
        assert [type(result) for result in results] == [AlreadySettledError, AlreadySettledError]
        await until_empty(oracle, "g")
        await expect_counts(contract, oracle, "g", dead=0)


@clause("C-ACK-04")
async def test_a_message_settled_in_the_loop_body_is_not_settled_again_by_the_loop(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    attempts: list[tuple[int, int]] = []
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(3))
        async with backend.consume(group="g") as subscription:
            async for message in subscription:
                attempts.append((message["n"], message.attempt))
                if attempts[-1] == (1, 1):
                    await message.nack(delay=0)
                if message["n"] == 2:
                    await message.ack()
                if {(0, 1), (1, 2), (2, 1)} <= set(attempts):
                    break
        if attempts[-1] == (1, 2):
            # It was the last one, so that leaving gave it back.
            await expect_counts(contract, oracle, "g", total=1)
        else:
            await until_empty(oracle, "g")
    assert sorted(attempts) == [(0, 1), (1, 1), (1, 2), (2, 1)]


@clause("C-ACK-05", capability="lease")
@pytest.mark.parametrize("method", SETTLING_METHODS)
async def test_settling_after_the_lease_was_lost_says_so(contract: Contract, method: str) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(15):
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        async with contract.worker(jobs.settle_on_request, group="g") as worker:
            assert (await worker.next_report())["n"] == 1
            await worker.pause()
            async with backend.consume(group="g") as subscription:
                mine = await subscription.receive()
                assert (mine["n"], mine.attempt) == (1, 2)
                await worker.send(method)
                await worker.resume()
                assert await worker.next_report() == "LeaseLostError"
                assert await worker.next_report() is True
                # The settlement of the consumer that lost it changed nothing: it is still in flight here.
                counts = await oracle.counts("g")
                assert (counts.in_flight, counts.total, counts.dead) == (1, 1, 0)
                await mine.ack()
                await until_empty(oracle, "g")


@clause("C-ACK-05")
async def test_a_settlement_after_the_subscription_was_closed_says_so(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        async with backend.consume(group="g") as subscription:
            await backend.publish("order.created", {"n": 1})
            message = await subscription.receive()
        with pytest.raises(LeaseLostError, match="not ours"):
            await message.ack()
        await expect_counts(contract, oracle, "g", waiting=1)


@clause("C-ACK-05")
async def test_a_settlement_that_was_cancelled_is_carried_out(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    oracle = await contract.oracle()
    async with contract.within(), backend.consume(group="g") as subscription:
        for n in range(10):
            await backend.publish("order.created", {"n": n})
            message = await subscription.receive()
            await until_in_flight(oracle, "g", 1)
            settling = asyncio.create_task(message.ack())
            await asyncio.sleep(0)
            settling.cancel()
            await asyncio.wait([settling])
            await until_empty(oracle, "g")
