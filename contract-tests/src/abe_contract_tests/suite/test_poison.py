"""C-PSN-01 and C-PSN-02: messages that no handler succeeds on."""

import asyncio
import time
from collections import Counter

import pytest

from abe.backends.message_queue.base import ConstantBackoff, Message
from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.backends.message_queue.retry import Reject, RetryPolicy
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import (
    collect,
    collect_distinct,
    expect_counts,
    numbered,
    numbers,
    until_dead,
    until_empty,
    until_in_flight,
)

GARBAGE = (
    b"\xff\xfe not text",
    b"not json",
    b"[1, 2]",
    b'"a string"',
    b"{",
    b'{"a": }',
    b"\x00",
    b"null",
    b'{"\xff": 1}',
)


@clause("C-PSN-01", capability="dead_letter")
async def test_undecodable_messages_are_dead_lettered_raw_and_delay_nobody(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(15):
        await backend.declare("g")
        await backend.publish("order.created", {"n": 0})
        for n, body in enumerate(GARBAGE, 1):
            await oracle.inject("g", body, key="bad")
            await backend.publish("order.created", {"n": n})
        async with backend.consume(group="g", prefetch=1) as subscription:
            async with contract.within(2):
                good = await collect(subscription, len(GARBAGE) + 1)
            await until_dead(oracle, "g", len(GARBAGE))
            await until_empty(oracle, "g")
        letters = await backend.dead_letters("g").list()
    assert sorted(numbers(good)) == list(range(len(GARBAGE) + 1))
    assert sorted(letter.body for letter in letters) == sorted(GARBAGE)
    for letter in letters:
        assert letter.reason
        assert letter.id
        assert letter.attempts >= 1
        assert letter.dead_at > 0


@clause("C-PSN-01", capability="dead_letter")
async def test_undecodable_messages_do_not_end_an_iteration_or_a_consumer(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    seen: list[int] = []
    done = asyncio.Event()

    async def handler(message: Message) -> None:
        seen.append(message["n"])
        if len(seen) == 6:
            done.set()

    async with contract.within(15):
        await backend.declare("g")
        await oracle.inject("g", GARBAGE[0])
        await backend.publish("order.created", {"n": 0})
        async with backend.consume(group="g") as subscription:
            async for message in subscription:
                assert message == {"n": 0}
                await message.ack()
                break
        consumer = AsyncLoopConsumer(backend, "g", concurrency=2)
        running = asyncio.create_task(consumer.run(handler))
        for n in range(6):
            await oracle.inject("g", GARBAGE[n])
            await backend.publish("order.created", {"n": n})
        await done.wait()
        await until_dead(oracle, "g", 7)
        await until_empty(oracle, "g")
        await consumer.shutdown()
        await running


@clause("C-PSN-02", capability="dead_letter")
async def test_after_its_last_attempt_a_message_is_a_dead_letter_that_tells_everything(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    before = time.time()
    async with contract.within():
        async with backend.consume(group="g", max_attempts=3) as subscription:
            await backend.publish(
                "order.created", {"n": 1, "text": "é"}, headers={"trace": "abc", "ü": "ö"}, id="order-1"
            )
            for attempt in (1, 2, 3):
                message = await subscription.receive()
                assert message.attempt == attempt
                await message.nack(delay=0, reason="the shop is closed", error=f"Traceback of attempt {attempt}")
            await until_dead(oracle, "g", 1)
            await expect_counts(contract, oracle, "g", total=0)
            assert subscription.take() is None
        (letter,) = await backend.dead_letters("g").list()
        assert await backend.dead_letters("g").get("order-1") == letter
    assert letter.id == "order-1"
    assert letter.key == "order.created"
    assert letter.body == '{"n":1,"text":"é"}'.encode()
    assert letter.headers == {"trace": "abc", "ü": "ö"}
    assert letter.attempts == 3
    assert letter.reason == "the shop is closed"
    assert letter.error == "Traceback of attempt 3"
    # The broker's clock may be another machine's; on a test's it is not minutes off.
    assert before - 1 <= letter.published_at <= letter.dead_at + 1
    assert letter.dead_at <= time.time() + 60


@clause("C-PSN-02", capability="dead_letter")
async def test_whatever_a_handler_does_is_the_failure_of_its_one_message(contract: Contract) -> None:
    backend = contract.backend()
    handled: set[int] = set()

    async def handler(message: Message) -> None:
        if message.key == "exits":
            raise SystemExit(1)
        if message.key == "cancels":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        if message.key == "in a group":
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_rejecting())
        handled.add(message["n"])

    async with contract.within(15):
        oracle = await contract.oracle()
        await backend.declare("g")
        for n, key in enumerate(("exits", "cancels", "in a group", "good", "good", "good")):
            await backend.publish(key, {"n": n})
        retry = RetryPolicy(max_attempts=2, backoff=ConstantBackoff(0))
        consumer = AsyncLoopConsumer(backend, "g", concurrency=2, retry=retry)
        running = asyncio.create_task(consumer.run(handler))
        await until_dead(oracle, "g", 3)
        await until_empty(oracle, "g")
        await consumer.shutdown()
        await running
        letters = {letter.key: letter for letter in await backend.dead_letters("g").list()}
    assert handled == {3, 4, 5}
    assert {key: letter.attempts for key, letter in letters.items()} == {"exits": 2, "cancels": 2, "in a group": 1}
    assert letters["exits"].reason == "SystemExit: 1"
    assert letters["in a group"].reason == "no such customer"


async def _rejecting() -> None:
    raise Reject("no such customer")


@clause("C-PSN-02", capability="dead_letter")
@pytest.mark.parametrize("settlement", ["exception", "reject"])
async def test_a_handler_that_fails_for_good_fills_the_dead_letter(contract: Contract, settlement: str) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    attempts: Counter[int] = Counter()

    async def handler(message: Message) -> None:
        attempts[message["n"]] += 1
        if message["n"] == 0:
            raise Reject("never") if settlement == "reject" else ValueError("always")

    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(50))
        consumer = AsyncLoopConsumer(backend, "g", retry=RetryPolicy(max_attempts=3, backoff=ConstantBackoff(0.05)))
        running = asyncio.create_task(consumer.run(handler))
        await until_dead(oracle, "g", 1)
        await until_empty(oracle, "g")
        await consumer.shutdown()
        await running
        (letter,) = await backend.dead_letters("g").list()
    assert attempts.pop(0) == letter.attempts == (1 if settlement == "reject" else 3)
    assert ("never" if settlement == "reject" else "always") in letter.reason
    assert settlement == "reject" or "ValueError" in letter.error
    # The others were neither delayed nor repeated.
    assert attempts == dict.fromkeys(range(1, 50), 1)


@clause("C-PSN-02", capability="dead_letter")
async def test_others_keep_flowing_while_a_message_fails_and_waits(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(101))
        async with backend.consume(group="g", prefetch=1) as subscription, contract.within(5):
            seen: set[int] = set()
            while len(seen) < 100:
                message = await subscription.receive()
                if message["n"] == 0:
                    await message.nack(delay=30)
                else:
                    seen.add(message["n"])
                    await message.ack()
        counts = await (await contract.oracle()).counts("g")
        postponed = counts.in_flight if contract.harness.retries_in_flight else counts.delayed
        assert (postponed, counts.total) == (1, 1)


@clause("C-PSN-02", capability="dead_letter")
async def test_a_message_that_kills_its_process_ends_in_the_dead_letters(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(25):
        await backend.declare("g")
        await backend.publish("order.created", {"poison": True, "n": 0}, id="killer")
        for attempt in (1, 2, 3):  # the third with nothing beside it
            async with contract.worker(jobs.hold, group="g", max_attempts=2, poison=True) as worker:
                assert await worker.next_report() == "subscribed"
                assert await worker.next_report() == {"n": 0, "id": "killer", "attempt": attempt}
                await worker.kill()
        await backend.publish_many(numbered(2, start=1))
        async with backend.consume(group="g", max_attempts=2) as subscription:
            # Never yielded again: the next consumer makes it a dead letter before the handler runs.
            assert sorted(numbers(await collect(subscription, 2))) == [1, 2]
            waiting = asyncio.ensure_future(subscription.receive())
            await until_dead(oracle, "g", 1)
            await until_empty(oracle, "g")
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait([waiting])
        (letter,) = await backend.dead_letters("g").list()
    assert letter.id == "killer"
    assert letter.reason
    assert letter.attempts >= 2


@clause("C-PSN-04", capability="dead_letter")
async def test_what_was_beside_a_message_that_kills_its_process_is_tried_with_nothing_beside_it(
    contract: Contract,
) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(40):
        await backend.declare("g")
        await backend.publish_many(contract.apart(numbered(6)))
        for attempt in (1, 2):
            async with contract.worker(jobs.hold_all, group="g", count=6, max_attempts=2) as worker:
                assert [await worker.next_report() for _ in range(6)] == [attempt] * 6
                await worker.kill()
        seen: set[int] = set()
        async with backend.consume(group="g", max_attempts=2) as subscription:
            while len(seen) < 6:
                message = await subscription.receive()
                if message.attempt > 2:
                    await until_in_flight(oracle, "g", 1)
                seen.add(message["n"])
                await message.ack()
            await until_empty(oracle, "g")
        counts = await oracle.counts("g")
    assert counts.dead == 0


@clause("C-PSN-02", capability="dead_letter")
async def test_a_process_killed_in_the_middle_of_the_move_loses_no_message(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(25):
        await backend.declare("g")
        await backend.publish_many(contract.apart(numbered(60)))
        async with contract.worker(jobs.reject_all, group="g", count=60) as worker:
            reported = [await worker.next_report() for _ in range(3)]
            await worker.kill()
        counts = await oracle.counts("g")
        assert counts.dead >= len(reported)
        assert counts.dead + counts.total >= 60
        async with backend.consume(group="g") as subscription:
            while (await oracle.counts("g")).total:
                if (message := subscription.take()) is not None:
                    await message.reject("rejected by the survivor")
                await asyncio.sleep(0)
        letters = await backend.dead_letters("g").list(limit=200)
    moved = Counter(letter.body for letter in letters)
    assert set(moved) == {b'{"n":%d}' % n for n in range(60)}


@clause("C-PSN-02", capability="dead_letter")
async def test_the_setting_protects_a_plain_loop_too(contract: Contract) -> None:
    backend = contract.backend(QUEUE_MAX_ATTEMPTS="2")
    oracle = await contract.oracle()
    async with contract.within(), backend.consume(group="g") as subscription:
        await backend.publish("order.created", {"n": 1})
        for _ in range(2):
            await (await subscription.receive()).nack(delay=0)
        await backend.publish("order.created", {"n": 2})
        assert set(await collect_distinct(subscription, [2])) == {2}
        await until_dead(oracle, "g", 1)
        await until_empty(oracle, "g")
