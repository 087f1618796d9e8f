"""C-ORD: first in, first out; and order by key."""

import asyncio
from collections import defaultdict

from abe.backends.message_queue.base import Message
from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.steps import collect, numbered, numbers, until_empty


@clause("C-ORD-01", capability="ordered")
async def test_one_producer_and_one_consumer_are_first_in_first_out(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(20):
        await backend.declare("g")
        for n in range(200):
            await backend.publish(f"key.{n % 7}", {"n": n})
        await backend.publish_many(numbered(1_000, start=200))
        for n in range(1_200, 1_300):
            await backend.publish("order.created", {"n": n})
        async with backend.consume(group="g") as subscription:
            assert numbers(await collect(subscription, 1_300)) == list(range(1_300))


@clause("C-ORD-01", capability="ordered")
async def test_order_holds_while_publishing_and_consuming_overlap(contract: Contract) -> None:
    backend, publisher = contract.backend(), contract.backend()
    seen: list[int] = []

    async def publish() -> None:
        for n in range(500):
            await publisher.publish("order.created", {"n": n})

    async with contract.within(20), backend.consume(group="g") as subscription:
        publishing = asyncio.create_task(publish())
        async for message in subscription:
            seen.append(message["n"])
            if len(seen) == 500:
                break
        await publishing
    assert seen == list(range(500))


@clause("C-ORD-02")
async def test_messages_of_one_key_run_one_after_the_other_and_other_keys_beside_them(contract: Contract) -> None:
    backend = contract.backend()
    running: defaultdict[str, int] = defaultdict(int)
    seen: defaultdict[str, list[int]] = defaultdict(list)
    overlaps: list[str] = []
    most_at_once = 0
    all_keys_at_once = asyncio.Barrier(4)
    done = asyncio.Event()

    async def handler(message: Message) -> None:
        nonlocal most_at_once
        key = message.key
        running[key] += 1
        if running[key] > 1:
            overlaps.append(key)
        most_at_once = max(most_at_once, sum(running.values()))
        try:
            if not seen[key]:
                # Passes only if the first messages of all four keys are handled at the same time.
                await all_keys_at_once.wait()
            else:
                await asyncio.sleep(0)
        finally:
            running[key] -= 1
        seen[key].append(message["n"])
        if sum(map(len, seen.values())) == 80:
            done.set()

    async with contract.within():
        await backend.declare("g")
        # Two of a key side by side, so that workers are tempted to take both at once.
        await backend.publish_many([(f"key.{k}", {"n": n}) for k in range(4) for n in range(2)])
        await backend.publish_many([(f"key.{k}", {"n": n}) for n in range(2, 20) for k in range(4)])
        consumer = AsyncLoopConsumer(backend, "g", concurrency=8, ordered_by_key=True)
        consuming = asyncio.create_task(consumer.run(handler))
        await done.wait()
        await until_empty(await contract.oracle(), "g")
        await consumer.shutdown()
        await consuming
    assert not overlaps
    assert most_at_once >= 4
    assert {key: sorted(ns) for key, ns in seen.items()} == {f"key.{k}": list(range(20)) for k in range(4)}
    if contract.capabilities.ordered:
        assert all(ns == sorted(ns) for ns in seen.values()), dict(seen)


@clause("C-ORD-02")
async def test_other_keys_run_while_the_successors_of_a_busy_key_fill_the_bound(contract: Contract) -> None:
    backend = contract.backend()
    hot: list[int] = []
    cold: list[int] = []
    go, all_cold = asyncio.Event(), asyncio.Event()

    async def handler(message: Message) -> None:
        if message.key == "hot":
            await go.wait()
            hot.append(message["n"])
        else:
            cold.append(message["n"])
            if len(cold) == 20:
                all_cold.set()

    async with contract.within(20):
        await backend.declare("g")
        await backend.publish_many([("hot", {"n": n}) for n in range(60)])
        await backend.publish_many([(f"cold.{n % 3}", {"n": n}) for n in range(20)])
        consumer = AsyncLoopConsumer(backend, "g", concurrency=2, prefetch=8, ordered_by_key=True)
        consuming = asyncio.create_task(consumer.run(handler))
        await all_cold.wait()
        assert not hot
        go.set()
        await until_empty(await contract.oracle(), "g")
        await consumer.shutdown()
        await consuming
    assert set(hot) == set(range(60))
    if contract.capabilities.ordered:
        assert hot == list(range(60))
