"""C-CON: many consumers at once."""

import asyncio
from collections import Counter

from abe.backends.message_queue.base import Message
from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.steps import LONG_LEASE, beside, numbered, until_empty

CONSUMERS = 50
MESSAGES = 5_000
LIMIT = 4


@clause("C-CON-01")
async def test_50_consumers_take_5000_messages_and_never_hold_more_than_their_limit(contract: Contract) -> None:
    backends = [contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE) for _ in range(5)]
    oracle = await contract.oracle()
    account = contract.accounting()
    most_in_flight = 0
    held: Counter[int] = Counter()
    most_held = 0

    async def member(index: int) -> None:
        nonlocal most_held
        async with backends[index % len(backends)].consume(group="g", prefetch=LIMIT) as subscription:

            async def handle() -> None:
                nonlocal most_held
                while True:
                    message = await subscription.receive()
                    held[index] += 1
                    most_held = max(most_held, held[index])
                    await asyncio.sleep(0)
                    account.delivered(message)
                    held[index] -= 1
                    await message.ack()

            # More tasks than may hold a message: only the limit keeps them from it.
            async with asyncio.TaskGroup() as tasks:
                for _ in range(LIMIT + 2):
                    tasks.create_task(handle())

    async with contract.within(45):
        await backends[0].declare("g")
        messages = contract.many(MESSAGES)
        async with beside(*(member(index) for index in range(CONSUMERS))):
            await backends[0].publish_many(contract.apart(numbered(messages)))
            while (counts := await oracle.counts("g")).total:
                most_in_flight = max(most_in_flight, counts.in_flight)
                await asyncio.sleep(0.005)
    assert len(account.deliveries) == messages
    assert contract.capabilities.spurious_duplicates or not account.duplicates
    assert 0 < most_held <= LIMIT
    assert most_in_flight <= CONSUMERS * LIMIT


@clause("C-CON-01")
async def test_a_consumer_runs_as_many_handlers_as_it_may_and_no_more(contract: Contract) -> None:
    backend = contract.backend()
    running = 0
    most = 0
    seen: set[int] = set()
    full = asyncio.Barrier(8)
    done = asyncio.Event()

    async def handler(message: Message) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if message["n"] < 8:
            # Passes only when eight run at once.
            await full.wait()
        await asyncio.sleep(0)
        running -= 1
        seen.add(message["n"])
        if len(seen) == 200:
            done.set()

    async with contract.within(15):
        await backend.declare("g")
        await backend.publish_many(numbered(200))
        consumer = AsyncLoopConsumer(backend, "g", concurrency=8)
        consuming = asyncio.create_task(consumer.run(handler))
        await done.wait()
        await until_empty(await contract.oracle(), "g")
        await consumer.shutdown()
        await consuming
    assert most == 8
