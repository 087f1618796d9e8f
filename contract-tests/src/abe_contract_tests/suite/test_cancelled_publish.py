"""C-CAN: publishes that are cancelled."""

import asyncio
from collections import Counter

import pytest

from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.steps import (
    CancelAt,
    collect_distinct,
    numbered,
)

POINTS = 60
"""More await points than any of these calls has; the tests end at the first that is not reached."""


@clause("C-CAN-02")
@pytest.mark.parametrize("warm", [False, True], ids=["connecting", "connected"])
async def test_cancelling_publish_at_any_await_point_leaves_at_most_one_copy(contract: Contract, warm: bool) -> None:
    checker = contract.backend()
    oracle = await contract.oracle()
    cancelled: set[int] = set()
    point = 0
    async with contract.within(30):
        await checker.declare("g")
        backend = contract.backend()
        for point in range(POINTS):
            if warm:
                await backend.publish("order.created", {"n": -1 - point})
            else:
                backend = contract.backend()
            cancel = CancelAt(point)
            try:
                await cancel.run(backend.publish("order.created", {"n": point}))
            except asyncio.CancelledError:
                assert cancel.reached
                cancelled.add(point)
            else:
                assert not cancel.reached, "a publish that was cancelled did not say so"
            # The backend still works.
            await backend.publish("order.created", {"n": 1_000 + point})
            if not warm:
                await backend.disconnect()
            if not cancel.reached:
                break
        confirmed = {
            point,
            *(1_000 + each for each in range(point + 1)),
            *((-1 - each for each in range(point + 1)) if warm else ()),
        }
        async with checker.consume(group="g") as subscription:
            seen = await collect_distinct(subscription, confirmed)
            while (await oracle.counts("g")).total:
                message = subscription.take()
                if message is not None:
                    seen[message["n"]] += 1
                    await message.ack()
                await asyncio.sleep(0)
    # A broker inside the process may take a lone message without ever suspending; another process cannot.
    assert (0 if contract.harness.networked else -1) < point < POINTS - 1
    assert set(seen) - confirmed <= cancelled
    assert set(seen.values()) == {1}


@clause("C-CAN-02")
async def test_cancelling_one_of_many_publishes_leaves_the_others_alone(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        for turns in range(20):
            tasks = [asyncio.create_task(backend.publish("order.created", {"n": turns * 100 + n})) for n in range(20)]
            for _ in range(turns % 5):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [result for result in results[1::2] if result is not None] == []
        wanted = {turns * 100 + n for turns in range(20) for n in range(1, 20, 2)}
        async with backend.consume(group="g") as subscription:
            seen = await collect_distinct(subscription, wanted)
            await backend.publish("order.created", {"n": -1})
            seen += await collect_distinct(subscription, [-1])
        assert (await oracle.counts("g")).total <= 200
    assert set(seen.values()) == {1}


@clause("C-CAN-02")
async def test_cancelling_publish_many_leaves_at_most_one_copy_of_each(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    seen: Counter[int] = Counter()
    point = 0
    async with contract.within(20):
        await backend.declare("g")
        for point in range(POINTS):
            cancel = CancelAt(point)
            try:
                await cancel.run(backend.publish_many(numbered(50, start=point * 100)))
            except asyncio.CancelledError:
                assert cancel.reached
            await backend.publish("order.created", {"n": point * 100 + 99})
            if not cancel.reached:
                break
        async with backend.consume(group="g", prefetch=100) as subscription:
            while (await oracle.counts("g")).total:
                if (message := subscription.take()) is not None:
                    seen[message["n"]] += 1
                    await message.ack()
                await asyncio.sleep(0)
    assert set(seen.values()) == {1}
    assert {*range(point * 100, point * 100 + 50)} <= set(seen)
    assert {each * 100 + 99 for each in range(point + 1)} <= set(seen)
