"""C-GRP-08 and C-GRP-09: who owns a group's patterns, and what there is of a group that does not exist."""

import asyncio

import pytest

from abe.errors import ConfigurationError, GroupMissingError
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.steps import collect_distinct, numbered


@clause("C-GRP-08", capability="key_patterns")
async def test_a_consumer_that_asks_for_other_patterns_is_refused_and_changes_nothing(contract: Contract) -> None:
    backend, other = contract.backend(), contract.backend()
    async with contract.within():
        async with backend.consume(group="g", keys=["order.*"]):
            with pytest.raises(ConfigurationError) as caught:
                await other.consume(group="g", keys=["user.*"]).__aenter__()
        for named in ("'g'", "order.*", "user.*", "declare"):
            assert named in str(caught.value)
        assert await backend.groups() == {"g": ("order.*",)}


@clause("C-GRP-08", capability="key_patterns")
async def test_a_consumer_that_asks_for_the_same_patterns_or_for_none_joins(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        await backend.declare("g", keys=["a.*", "b.#"])
        async with backend.consume(group="g", keys=["b.#", "a.*"]), backend.consume(group="g"):
            assert await backend.groups() == {"g": ("a.*", "b.#")}


@clause("C-GRP-08", capability="key_patterns")
async def test_of_two_first_consumers_with_different_patterns_one_makes_the_group(contract: Contract) -> None:
    wanted = [["a.*"], ["b.*"]]
    subscriptions = [contract.backend().consume(group="g", keys=keys) for keys in wanted]
    async with contract.within():
        outcomes = await asyncio.gather(*(each.__aenter__() for each in subscriptions), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert [type(outcome) for outcome in refused] == [ConfigurationError]
        (joined,) = [keys for keys, outcome in zip(wanted, outcomes, strict=True) if outcome not in refused]
        assert await contract.backend().groups() == {"g": tuple(joined)}
        await asyncio.gather(*(each.aclose() for each in subscriptions))


@clause("C-GRP-08", capability="key_patterns")
async def test_the_setting_declares_groups_with_their_patterns_and_changes_none(contract: Contract) -> None:
    async with contract.within():
        await contract.backend(QUEUE_GROUPS="a=order.*|user.#,b").connect()
        assert await contract.backend().groups() == {"a": ("order.*", "user.#"), "b": ("#",)}
        with pytest.raises(ConfigurationError, match="'a'"):
            await contract.backend(QUEUE_GROUPS="a=order.*").connect()
        assert await contract.backend(QUEUE_GROUPS="a").groups() == {"a": ("order.*", "user.#"), "b": ("#",)}


@clause("C-GRP-09")
async def test_a_group_that_does_not_exist_is_reported_as_missing(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        await backend.declare("there")
        for call in (
            lambda: backend.stats("missing"),
            lambda: backend.dead_letters("missing").list(),
            lambda: backend.dead_letters("missing").get("id"),
            lambda: backend.dead_letters("missing").replay("id"),
            lambda: backend.dead_letters("missing").replay_all(),
            lambda: backend.dead_letters("missing").purge("id"),
            lambda: backend.dead_letters("missing").purge_all(),
        ):
            with pytest.raises(GroupMissingError, match="missing"):
                await call()
        assert set(await backend.groups()) == {"there"}
        await backend.delete_group("missing")


@clause("C-GRP-09")
async def test_a_namespace_that_was_deleted_has_nothing_and_can_be_used_again(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(30):
        await backend.publish("order.created", {"n": 100})  # parked: there is no group yet
        await contract.backend().delete_namespace()
        for group in ("a", "b"):
            await backend.declare(group)
        await backend.publish_many(numbered(3))
        await contract.backend().delete_namespace()
        assert await contract.backend().groups() == {}
        await contract.backend().delete_namespace()
        fresh = contract.backend()
        async with fresh.consume(group="a") as subscription:
            await fresh.publish_many(numbered(2, start=10))
            assert set(await collect_distinct(subscription, [10, 11])) == {10, 11}
