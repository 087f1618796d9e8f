"""C-DLY: messages that are published now and delivered later."""

import time

import pytest

from abe.backends.message_queue.base import Publication
from abe_contract_tests import bounds
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause, probe
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import CLOCKS, collect, expect_counts, until_empty


@clause("C-DLY-01", capability="max_delay")
@pytest.mark.parametrize("delay", [0.2, 1.0])
async def test_a_delayed_message_comes_within_the_bound_after_its_delay_and_not_before(
    contract: Contract, delay: float
) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(15), backend.consume(group="g") as subscription:
        published_at = time.monotonic()
        await backend.publish("order.created", {"n": 1}, delay=delay)
        counts = await oracle.counts("g")
        if time.monotonic() - published_at < delay:  # a busy machine may receive it later
            assert (counts.delayed, counts.waiting, counts.in_flight) == (1, 0, 0)
        async with contract.within(delay, "redelivery_bound"):
            message = await subscription.receive()
        assert time.monotonic() - published_at >= delay - CLOCKS
        assert message.attempt == 1
        await message.ack()
        await until_empty(oracle, "g")


@clause("C-DLY-01", capability="max_delay")
async def test_a_consumer_that_comes_after_the_delay_gets_the_message_at_once(contract: Contract) -> None:
    publisher, backend = contract.backend(), contract.backend()
    async with contract.within(15):
        await publisher.declare("g")
        await publisher.publish("order.created", {"n": 1}, delay=0.3)
        # Neither a publisher nor a consumer is left that could be keeping it.
        await publisher.disconnect()
        async with backend.consume(group="g") as subscription:
            await subscription.receive()
        async with backend.consume(group="g") as subscription, contract.within(1):
            await collect(subscription, 1)


@clause("C-DLY-01", capability="max_delay")
async def test_delayed_messages_wait_in_the_broker_and_not_in_a_consumer(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    delay = 0.6 * bounds.allowance()  # it is to last until the broker has been looked at
    async with contract.within(15):
        await backend.declare("g")
        async with contract.worker(jobs.consume_all, group="g") as worker:
            assert await worker.next_report() == "subscribed"
            await backend.publish("order.created", {"n": 1}, delay=delay)
            await backend.publish("order.created", {"n": 2})
            assert await worker.next_report() == 2
            counts = await oracle.counts("g")
            assert (counts.delayed, counts.in_flight) == (1, 0)
            await worker.kill()
        async with (
            backend.consume(group="g") as subscription,
            contract.within(delay, "redelivery_bound"),
        ):
            (message,) = await collect(subscription, 1)
            assert message["n"] == 1
            # The one that died had not had it; at most the broker was about to give it to a connection that was dead already.
            assert message.attempt == 1 or (contract.harness.approximate and message.attempt == 2)


@clause("C-DLY-01", capability="max_delay")
async def test_a_shorter_delay_overtakes_a_longer_one(contract: Contract) -> None:
    backend = contract.backend()
    late = contract.capabilities.redelivery_bound or 0.0
    # Where a delivery may be late by more than a second, only delays further apart than that are surely in order.
    short, middle, long = (0.1, 0.7, 1.5) if late <= 1 else (0.1, 0.1 + late, 0.1 + 2 * late)
    async with contract.within(15), backend.consume(group="g") as subscription:
        await backend.publish("order.created", {"n": 3}, delay=long)
        await backend.publish_many(
            [
                Publication("order.created", {"n": 2}, delay=middle),
                Publication("order.created", {"n": 0}),
                Publication("order.created", {"n": 1}, delay=short),
            ]
        )
        assert [message["n"] for message in await collect(subscription, 4)] == [0, 1, 2, 3]


@clause("C-DLY-01", capability="max_delay")
async def test_every_group_gets_a_delayed_message(contract: Contract) -> None:
    if not contract.declares("groups"):
        await probe(contract, "groups")
        return
    backend = contract.backend()
    async with contract.within(15):
        await backend.declare("a")
        await backend.declare("b")
        await backend.publish("order.created", {"n": 1}, delay=0.2, headers={"h": "1"}, id="later")
        for group in ("a", "b"):
            async with backend.consume(group=group) as subscription:
                (message,) = await collect(subscription, 1)
                assert (message["n"], message.id, message.headers, message.key) == (
                    1,
                    "later",
                    {"h": "1"},
                    "order.created",
                )


@clause("C-DLY-01", capability="max_delay")
async def test_a_delayed_message_from_before_any_group_reaches_the_first_one(contract: Contract) -> None:
    publisher, backend = contract.backend(), contract.backend()
    async with contract.within(15):
        published_at = time.monotonic()
        await publisher.publish("order.created", {"n": 1}, delay=0.4)
        async with backend.consume(group="g") as subscription:
            await collect(subscription, 1)
        assert time.monotonic() - published_at >= 0.4 - CLOCKS


@clause("C-DLY-01", capability="max_delay")
async def test_a_delay_that_is_no_delay_is_refused(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        await backend.declare("g")
        for delay in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="delay"):
                await backend.publish("order.created", {"n": 1}, delay=delay)
        await expect_counts(contract, await contract.oracle(), "g", total=0)
