"""C-PUB: many messages in one call."""

import pytest

from abe.backends.message_queue.base import Publication
from abe.errors import (
    BackpressureError,
    PartialPublishError,
    UnroutableError,
)
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.steps import (
    collect_distinct,
    expect_counts,
    numbered,
    until,
    until_empty,
)


@clause("C-PUB-01")
async def test_publish_many_returns_when_the_broker_holds_all_of_them(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        count = contract.many(1_000)
        await backend.publish_many(numbered(count))
        await expect_counts(contract, oracle, "g", waiting=count)


@clause("C-PUB-10")
async def test_publish_many_names_what_failed_and_delivers_the_rest(contract: Contract) -> None:
    backend = contract.backend(QUEUE_MAX_BACKLOG="3")
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await backend.publish("numbered", {"n": -1})
        with pytest.raises(PartialPublishError) as caught:
            await backend.publish_many(numbered(20))
        failed = [index for index, _ in caught.value.failures]
        assert all(isinstance(error, BackpressureError) for _, error in caught.value.failures)
        assert len(failed) == len(set(failed)) >= 17
        accepted = set(range(20)) - set(failed)
        async with backend.consume(group="g") as subscription:
            seen = await collect_distinct(subscription, {-1} | accepted)
            await until_empty(oracle, "g")
    assert set(seen) == {-1} | accepted


@clause("C-PUB-10", capability="key_patterns")
async def test_publish_many_gives_each_message_its_own_outcome(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g", keys=["order.#"])
        with pytest.raises(PartialPublishError) as caught:
            await backend.publish_many(
                [
                    Publication("order.created", {"n": 0}, mandatory=True),
                    Publication("invoice.sent", {"n": 1}, mandatory=True),
                    ("order.created", {"n": 2}),
                    ("invoice.sent", {"n": 3}),
                    Publication("invoice.paid", {"n": 4}, mandatory=True),
                ]
            )
        assert [(index, type(error)) for index, error in caught.value.failures] == [
            (1, UnroutableError),
            (4, UnroutableError),
        ]
        assert "#1" in str(caught.value)
        assert "#4" in str(caught.value)
        async with backend.consume(group="g") as subscription:
            seen = await collect_distinct(subscription, [0, 2])
            await until_empty(oracle, "g")
    assert seen == {0: 1, 2: 1}


@clause("C-PUB-10")
async def test_publish_many_of_nothing_does_nothing(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many([])
        await expect_counts(contract, oracle, "g", total=0)
        await backend.publish_many(numbered(1))

        async def one() -> bool:
            return (await oracle.counts("g")).total == 1

        await until(one)
