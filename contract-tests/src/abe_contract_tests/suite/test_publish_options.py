"""C-PUB-11 and C-PUB-12: publishing to one group, and within a time of one's own."""

import pytest

from abe.errors import ConfigurationError, PublishRejectedError, PublishUnknownError, UnroutableError
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.steps import expect_counts, unreachable_backend


@clause("C-PUB-11", capability="groups")
async def test_a_message_for_one_group_reaches_no_other(contract: Contract) -> None:
    await _publish_to_one(contract, None)


@clause("C-PUB-11", capability="max_delay")
async def test_a_delayed_message_for_one_group_reaches_no_other(contract: Contract) -> None:
    await _publish_to_one(contract, 0.2)


async def _publish_to_one(contract: Contract, delay: float | None) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        for group in ("a", "b"):
            await backend.declare(group)
        async with backend.consume(group="a") as subscription:
            await backend.publish("order.created", {"n": 1}, group="a", headers={"h": "1"}, delay=delay)
            message = await subscription.receive()
            assert (message, message.key, message.headers) == ({"n": 1}, "order.created", {"h": "1"})
            await message.ack()
        await expect_counts(contract, oracle, "b", total=0)


@clause("C-PUB-11", capability="key_patterns")
async def test_a_message_for_one_group_needs_none_of_its_patterns(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(), backend.consume(group="g", keys=["order.*"]) as subscription:
        await backend.publish("user.created", {"n": 1}, group="g")
        message = await subscription.receive()
        assert message.key == "user.created"
        await message.ack()
    assert backend.unroutable == 0


@clause("C-PUB-11", capability="groups")
async def test_a_message_for_a_group_that_does_not_exist_is_refused_and_absent(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        for _ in range(2):  # while no group exists, and when one does
            with pytest.raises(UnroutableError, match="missing") as caught:
                await backend.publish("order.created", {}, group="missing")
            assert not caught.value.maybe_accepted
            await backend.declare("g")
        await backend.declare("missing")
        await expect_counts(contract, oracle, "missing", total=0)
        await expect_counts(contract, oracle, "g", total=0)


@clause("C-PUB-12")
async def test_a_publish_has_the_time_that_it_was_given_and_not_that_of_the_setting(contract: Contract) -> None:
    hasty = contract.backend(QUEUE_PUBLISH_TIMEOUT_SECONDS="0.000001")
    async with contract.within(), contract.backend().consume(group="g") as subscription:
        await hasty.publish("order.created", {"n": 1}, timeout=30)
        assert await subscription.receive() == {"n": 1}
        if contract.harness.networked:
            patient = unreachable_backend(contract, QUEUE_PUBLISH_TIMEOUT_SECONDS="600")
            with pytest.raises((PublishRejectedError, PublishUnknownError)):
                await patient.publish("order.created", {}, timeout=0.3)
        with pytest.raises(ConfigurationError, match="timeout"):
            await hasty.publish("order.created", {}, timeout=0)
