"""C-PSN-03: what can be done with dead letters, while consumers run."""

import asyncio
from collections import Counter

from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause, probe
from abe_contract_tests.suite.steps import (
    LONG_LEASE,
    beside,
    collect,
    expect_counts,
    numbered,
    numbers,
    until_dead,
    until_empty,
)


async def bury(contract: Contract, count: int, group: str = "g") -> None:
    """Publish that many messages with the ids ``id-0`` and so on, and reject them in that order."""
    backend = contract.backend()
    async with backend.consume(group=group) as subscription:
        for n in range(count):
            await backend.publish("order.created", {"n": n}, id=f"id-{n}", headers={"n": str(n)})
            await (await subscription.receive()).reject(f"reason {n}")
    await until_dead(await contract.oracle(), group, count)


@clause("C-PSN-03", capability="dead_letter")
async def test_dead_letters_are_listed_oldest_first_and_stay_where_they_are(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        await backend.declare("g")
        assert list(await backend.dead_letters("g").list()) == []
        await bury(contract, 12)
        letters = await backend.dead_letters("g").list()
        assert [letter.id for letter in letters] == [f"id-{n}" for n in range(12)]
        assert [letter.reason for letter in letters] == [f"reason {n}" for n in range(12)]
        assert [letter.id for letter in await backend.dead_letters("g").list(limit=5)] == [f"id-{n}" for n in range(5)]
        assert (await backend.stats("g")).dead == (await (await contract.oracle()).counts("g")).dead == 12


@clause("C-PSN-03", capability="dead_letter")
async def test_a_dead_letter_is_shown_by_its_id(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        await bury(contract, 3)
        letter = await backend.dead_letters("g").get("id-1")
        assert letter is not None
        assert (letter.id, letter.body, letter.headers, letter.reason) == ("id-1", b'{"n":1}', {"n": "1"}, "reason 1")
        assert await backend.dead_letters("g").get("no-such-id") is None


@clause("C-PSN-03", capability="dead_letter")
async def test_replayed_messages_go_to_their_group_and_start_again_at_attempt_1(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        if contract.declares("groups"):
            await backend.declare("other")
        async with backend.consume(group="g", max_attempts=2) as subscription:
            await backend.publish("order.created", {"n": 0}, id="id-0", headers={"h": "1"})
            for _ in range(2):
                await (await subscription.receive()).nack(delay=0)
            await until_dead(oracle, "g", 1)
            # The consumer is there all the time.
            assert await backend.dead_letters("g").replay("id-0") == 1
            message = await subscription.receive()
            assert (message["n"], message.id, message.key) == (0, "id-0", "order.created")
            assert (message.headers, message.attempt) == ({"h": "1"}, 1)
            await message.nack(delay=0)
            assert (await subscription.receive()).attempt == 2
        if contract.declares("groups"):
            await expect_counts(contract, oracle, "other", total=1)
        await expect_counts(contract, oracle, "g", dead=0)


@clause("C-PSN-03", capability="dead_letter")
async def test_some_or_all_dead_letters_are_replayed(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await bury(contract, 10)
        async with backend.consume(group="g") as subscription:
            assert await backend.dead_letters("g").replay("id-3", "id-7", "no-such-id") == 2
            assert sorted(numbers(await collect(subscription, 2))) == [3, 7]
            await expect_counts(contract, oracle, "g", dead=8)
            assert await backend.dead_letters("g").replay_all() == 8
            assert sorted(numbers(await collect(subscription, 8))) == [0, 1, 2, 4, 5, 6, 8, 9]
            await until_empty(oracle, "g")
        await expect_counts(contract, oracle, "g", dead=0)
        assert await backend.dead_letters("g").replay_all() == 0


@clause("C-PSN-03", capability="dead_letter")
async def test_some_or_all_dead_letters_are_purged(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await bury(contract, 10)
        assert await backend.dead_letters("g").purge("id-3", "id-7", "no-such-id") == 2
        left = [letter.id for letter in await backend.dead_letters("g").list()]
        assert left == [f"id-{n}" for n in range(10) if n not in (3, 7)]
        assert await backend.dead_letters("g").purge_all() == 8
        await expect_counts(contract, oracle, "g", dead=0)
        assert list(await backend.dead_letters("g").list()) == []
        # What waits in the group is no dead letter.
        await backend.publish("order.created", {"n": 1})
        assert await backend.dead_letters("g").purge_all() == 0
        await expect_counts(contract, oracle, "g", total=1)


@clause("C-PSN-03", capability="dead_letter")
async def test_one_group_s_dead_letters_are_no_business_of_another(contract: Contract) -> None:
    if not contract.declares("groups"):
        await probe(contract, "groups")
        return
    backend = contract.backend()
    async with contract.within():
        await backend.declare("b")
        await bury(contract, 3, "a")
        async with backend.consume(group="b") as subscription:
            for _ in range(3):
                await (await subscription.receive()).reject("by b")
        await until_dead(await contract.oracle(), "b", 3)
        assert await backend.dead_letters("a").purge_all() == 3
        letters = await backend.dead_letters("b").list()
        assert [(letter.id, letter.reason) for letter in letters] == [(f"id-{n}", "by b") for n in range(3)]


@clause("C-PSN-03", capability="dead_letter")
async def test_a_message_that_nobody_can_read_can_be_replayed_and_purged(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        async with backend.consume(group="g") as subscription:
            waiting = asyncio.ensure_future(subscription.receive())
            await oracle.inject("g", b"\xff garbage")
            await until_dead(oracle, "g", 1)
            (letter,) = await backend.dead_letters("g").list()
            assert await backend.dead_letters("g").get(letter.id) == letter
            assert await backend.dead_letters("g").replay(letter.id) == 1
            await until_empty(oracle, "g")
            await until_dead(oracle, "g", 1)
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait([waiting])
        (again,) = await backend.dead_letters("g").list()
        assert again.body == b"\xff garbage"
        assert await backend.dead_letters("g").purge(again.id) == 1


@clause("C-PSN-03", capability="dead_letter")
async def test_dead_letters_can_be_replayed_while_consumers_work(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    oracle = await contract.oracle()
    handled: Counter[int] = Counter()

    async def work() -> None:
        async with backend.consume(group="g") as subscription:
            async for message in subscription:
                handled[message["n"]] += 1
                if handled[message["n"]] == 1 and message["n"] % 2:
                    await message.reject("odd")

    async with contract.within():
        await backend.declare("g")
        async with beside(*(work() for _ in range(3))):
            await backend.publish_many(numbered(100))
            while any(handled[n] < 2 for n in range(1, 100, 2)) or (await oracle.counts("g")).dead:
                await backend.dead_letters("g").replay_all()
                await asyncio.sleep(0)
            await until_empty(oracle, "g")
    await expect_counts(contract, oracle, "g", dead=0)
    expected = {n: 2 if n % 2 else 1 for n in range(100)}
    assert handled.keys() == expected.keys()
    assert all(handled[n] >= times for n, times in expected.items())
    assert handled == expected or contract.capabilities.spurious_duplicates
