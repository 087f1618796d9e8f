"""C-DLV: key patterns."""

from collections.abc import Sequence

import pytest

from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import collect, collect_distinct, expect_counts


def _wants(pattern: Sequence[str], key: Sequence[str]) -> bool:
    """AMQP topic words from their definition, slow and plain: what the contract says, not what the library does."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return any(_wants(pattern[1:], key[skip:]) for skip in range(len(key) + 1))
    return bool(key) and pattern[0] in ("*", key[0]) and _wants(pattern[1:], key[1:])


TOPIC_KEYS = (
    *(
        "a",
        "b",
        "a.b",
        "b.a",
        "a.b.c",
        "a.c",
        "c.b.a",
        "a.a.a",
        "a..b",
        "ab",
        "a.bc",
        "order.created",
        "order.line.created",
        "order",
    ),
    *("order.created.eu", "*", "#", "a.*", "a.#.b", ".a", "a."),
)
TOPIC_PATTERNS = (
    *(
        ["#"],
        ["*"],
        ["a"],
        ["a.*"],
        ["*.a"],
        ["a.#"],
        ["#.a"],
        ["a.#.c"],
        ["*.*"],
        ["#.b.#"],
        ["*.#"],
        ["order.*"],
        ["order.#"],
    ),
    *(
        ["order.*.created", "a"],
        ["a.b", "b.a", "a.b"],
        ["*.*.*", "order.created"],
        ["#.#"],
        ["a..b"],
        ["nobody.publishes.this"],
    ),
)


@clause("C-DLV-07", capability="key_patterns")
async def test_patterns_deliver_exactly_the_matching_keys(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(20):
        for n, patterns in enumerate(TOPIC_PATTERNS):
            await backend.declare(f"g{n}", keys=patterns)
        for key in TOPIC_KEYS:
            await backend.publish(key, {})
        for n, patterns in enumerate(TOPIC_PATTERNS):
            wanted = [key for key in TOPIC_KEYS if any(_wants(one.split("."), key.split(".")) for one in patterns)]
            await expect_counts(contract, oracle, f"g{n}", total=len(wanted))
            async with backend.consume(group=f"g{n}") as subscription:
                assert sorted(message.key for message in await collect(subscription, len(wanted))) == sorted(wanted)


@clause("C-DLV-07", capability="key_patterns")
async def test_the_patterns_given_last_are_the_patterns_that_hold(contract: Contract) -> None:
    backend, publisher = contract.backend(), contract.backend()
    async with contract.within():
        async with backend.consume(group="g", keys=["a.*", "b"]) as subscription:
            for key in ("a.1", "b", "c"):
                await publisher.publish(key, {"n": key})
            assert sorted(message.key for message in await collect(subscription, 2)) == ["a.1", "b"]
        await backend.declare("g", keys=["b", "c"])
        async with backend.consume(group="g") as subscription:
            for key in ("a.2", "b", "c"):
                await publisher.publish(key, {"n": key})
            assert sorted(message.key for message in await collect(subscription, 2)) == ["b", "c"]
        await expect_counts(contract, await contract.oracle(), "g", total=0)
        assert set((await backend.groups())["g"]) == {"b", "c"}


@clause("C-DLV-07", capability="key_patterns")
async def test_a_publisher_learns_of_patterns_that_another_process_changed(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(), contract.worker(jobs.publish_on_request) as publisher:
        await backend.declare("g", keys=["a"])
        for key, wanted in (("a", ["a"]), ("b", ["b"])):
            await backend.declare("g", keys=wanted)
            for published in ("a", "b"):
                await publisher.send([published, {"key": published}])
                await publisher.next_report()
            async with backend.consume(group="g") as subscription:
                seen = await collect_distinct(subscription, [key], field="key")
            assert set(seen) == {key}
        await expect_counts(contract, await contract.oracle(), "g", total=0)


@clause("C-DLV-07", capability="key_patterns")
async def test_a_pattern_list_that_could_match_nothing_is_refused(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        for keys in ([], [""], "order.*", ["order*"], ["order.>"]):
            with pytest.raises(ValueError, match="key"):
                await backend.declare("g", keys=keys)
