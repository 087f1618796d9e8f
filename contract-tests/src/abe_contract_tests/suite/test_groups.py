"""C-GRP: groups, their members, and when they exist."""

import asyncio
import math
from collections import Counter

import pytest

from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.errors import UnsupportedCapabilityError
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause, probe
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import (
    LONG_LEASE,
    beside,
    collect,
    collect_distinct,
    expect_counts,
    numbered,
    numbers,
    until,
    until_empty,
    until_in_flight,
)


@clause("C-GRP-01", capability="groups")
async def test_each_group_gets_every_message_and_its_members_share_them(contract: Contract) -> None:
    backends = [contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE) for _ in range(3)]
    oracle = await contract.oracle()
    seen: dict[str, Counter[int]] = {"a": Counter(), "b": Counter()}
    owned: dict[str, set[int]] = {"a": set(), "b": set()}
    overlaps: list[tuple[str, int]] = []

    async def member(index: int, group: str) -> None:
        async with backends[index].consume(group=group, prefetch=5) as subscription:
            async for message in subscription:
                n = message["n"]
                if n in owned[group]:
                    overlaps.append((group, n))
                owned[group].add(n)
                await asyncio.sleep(0)
                owned[group].discard(n)
                seen[group][n] += 1
                await message.ack()

    async with contract.within(20):
        for group in seen:
            await backends[0].declare(group)
        async with beside(*(member(index, group) for index in range(3) for group in seen)):
            await backends[0].publish_many(numbered(300))
            for group in seen:
                await until_empty(oracle, group)
    for counts in seen.values():
        assert set(counts) == set(range(300))
        assert contract.capabilities.spurious_duplicates or set(counts.values()) == {1}
    assert not overlaps


@clause("C-GRP-01", capability="groups")
async def test_a_held_message_is_nobody_else_s(contract: Contract) -> None:
    backend, other = contract.backend(), contract.backend()
    oracle = await contract.oracle()
    async with (
        contract.within(),
        backend.consume(group="g", prefetch=1) as ours,
        other.consume(group="g", prefetch=1) as theirs,
    ):
        await backend.publish_many(contract.apart(numbered(2)))
        first, second = await ours.receive(), await theirs.receive()
        assert {first["n"], second["n"]} == {0, 1}
        await second.ack()
        await until_in_flight(oracle, "g", 1)
        await expect_counts(contract, oracle, "g", waiting=0)
        await backend.publish("order.created", {"n": 2})
        assert numbers(await collect(theirs, 1)) == [2]
        await first.ack()
        await until_empty(oracle, "g")


@clause("C-GRP-02")
async def test_no_group_means_the_shared_group_default(contract: Contract) -> None:
    backend, other = contract.backend(), contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        async with backend.consume(prefetch=1) as unnamed, other.consume(group="default", prefetch=1) as named:
            assert list(await backend.groups()) == ["default"]
            await backend.publish_many(contract.apart(numbered(2)))
            # Each holds one, so between them there is one copy of each message.
            first, second = await unnamed.receive(), await named.receive()
            assert {first["n"], second["n"]} == {0, 1}
            assert (first.group, second.group) == ("default", "default")
            await first.ack()
            await second.ack()
            await until_empty(oracle, "default")
        await backend.publish("order.created", {"n": 2})

        async def waits() -> bool:
            return (await backend.stats()).waiting == (await backend.stats("default")).waiting == 1

        if contract.harness.approximate:
            await until(waits)
        else:
            assert await waits()
        await backend.delete_group()
        assert not await backend.groups()


@clause("C-GRP-02", three_methods=True)
async def test_consumers_without_a_group_share_the_messages(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    seen: Counter[int] = Counter()

    async def member() -> None:
        async for message in backend.consume():
            seen[message["n"]] += 1

    async with contract.within():
        for n in range(20):
            await backend.publish("order.created", {"n": n})

        async def all_seen() -> bool:
            return len(seen) == 20

        async with beside(member(), member()):
            await until(all_seen)
    assert contract.capabilities.spurious_duplicates or set(seen.values()) == {1}


@clause("C-GRP-03")
async def test_a_publish_that_starts_after_entering_is_delivered(contract: Contract) -> None:
    backend, publisher = contract.backend(), contract.backend()
    async with contract.within(15):
        await publisher.declare("before")
        for n in range(20):
            async with backend.consume(group=f"g{n}") as subscription:
                await publisher.publish("order.created", {"n": n})
                assert numbers(await collect(subscription, 1)) == [n]


@clause("C-GRP-03")
async def test_a_publish_in_another_process_that_starts_after_entering_is_delivered(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(15), contract.worker(jobs.publish_on_request) as publisher:
        # It has published before, so that it knows which groups there were.
        await backend.declare("before")
        await publisher.send(["order.created", {"n": -1}])
        await publisher.next_report()
        for n in range(5):
            async with backend.consume(group=f"g{n}") as subscription:
                await publisher.send(["order.created", {"n": n}])
                await publisher.next_report()
                assert numbers(await collect(subscription, 1)) == [n]


@clause("C-GRP-03")
async def test_a_process_that_has_subscribed_gets_what_is_published_from_then_on(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(15):
        await backend.declare("before")
        await backend.publish("order.created", {"n": -1})
        async with contract.worker(jobs.receive_one, group="g") as worker:
            assert await worker.next_report() == "subscribed"
            await backend.publish("order.created", {"n": 1})
            assert await worker.next_report() == {"n": 1}


@clause("C-GRP-04")
async def test_an_absent_capability_is_refused_at_the_call(contract: Contract) -> None:
    backend = contract.backend()
    capabilities = contract.capabilities
    # What is within a capability's numbers works, what is beyond raises: no backend has all of everything.
    async with contract.within():
        for name in ("groups", "key_patterns", "dead_letter", "max_delay"):
            if not contract.declares(name):
                await probe(contract, name)
        async with backend.consume() as subscription:
            await backend.publish("order.created", {"n": 1})
            message = await subscription.receive()
            if capabilities.lease is not None:
                await message.extend(contract.lease)
                with pytest.raises(UnsupportedCapabilityError) as caught:
                    await message.extend(contract.lease + 1)
                assert not caught.value.retryable
            if capabilities.max_delay is not None and capabilities.max_delay < math.inf:
                with pytest.raises(UnsupportedCapabilityError):
                    await backend.publish("order.created", {"n": 2}, delay=capabilities.max_delay + 1)
                with pytest.raises(UnsupportedCapabilityError):
                    await message.nack(delay=capabilities.max_delay + 1)
            # A refused call changed nothing.
            await message.ack()
            await until_empty(await contract.oracle(), "default")


@clause("C-GRP-04")
async def test_what_is_declared_can_be_called(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        if contract.declares("groups"):
            await backend.declare("g")
        if contract.declares("key_patterns"):
            await backend.declare(keys=["order.#"])
        if contract.declares("dead_letter"):
            await backend.declare()
            assert list(await backend.dead_letters().list()) == []
        if contract.declares("max_delay"):
            assert contract.capabilities.max_delay is not None
            await backend.publish("order.created", {}, delay=min(contract.capabilities.max_delay, 86_400))
        assert contract.capabilities.max_payload_bytes > 0


@clause("C-GRP-05")
async def test_a_stalled_member_holds_its_limit_and_the_others_drain_the_rest(contract: Contract) -> None:
    backend, other = contract.backend(), contract.backend()
    oracle = await contract.oracle()
    async with contract.within(15):
        await backend.declare("g")
        await backend.publish_many(contract.apart(numbered(20)))
        stalled = backend.consume(group="g", prefetch=5)
        held = [await stalled.receive()]
        await backend.publish_many(contract.apart(numbered(80, start=20)))
        async with other.consume(group="g") as others:
            drained = await collect(others, 95)
            assert (await oracle.counts("g")).total <= 5
            while (message := stalled.take()) is not None:
                held.append(message)
            assert 1 <= len(held) <= 5
            # What it held comes back when it leaves.
            await stalled.aclose()
            rest = await collect(others, 100 - len(drained))
            await until_empty(oracle, "g")
    assert sorted(numbers([*drained, *rest])) == list(range(100))


@clause("C-GRP-05")
async def test_a_stalled_consumer_of_the_application_holds_its_limit(contract: Contract) -> None:
    backend, other = contract.backend(), contract.backend()
    oracle = await contract.oracle()
    stalled, go_on = asyncio.Event(), asyncio.Event()

    async def handler(message: object) -> None:
        stalled.set()
        await go_on.wait()

    async with contract.within(15):
        await backend.declare("g")
        await backend.publish_many(contract.apart(numbered(10)))
        consumer = AsyncLoopConsumer(backend, "g", concurrency=2, prefetch=4)
        running = asyncio.create_task(consumer.run(handler))
        await stalled.wait()
        await backend.publish_many(contract.apart(numbered(190, start=10)))
        async with other.consume(group="g") as others:
            await collect(others, 196)
        counts = await oracle.counts("g")
        assert counts.in_flight <= counts.total <= 4
        go_on.set()
        await until_empty(oracle, "g")
        await consumer.shutdown()
        await running


@clause("C-GRP-07")
async def test_the_first_group_gets_what_was_published_before_any_group_existed(contract: Contract) -> None:
    publisher, backend = contract.backend(), contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        assert not await backend.groups()
        await publisher.publish("order.created", {"n": 0}, headers={"h": "1"}, id="first")
        await publisher.publish_many(numbered(20, start=1))
        async with backend.consume(group="first") as subscription:
            messages = await collect(subscription, 21)
            assert sorted(numbers(messages)) == list(range(21))
            (named,) = (message for message in messages if message["n"] == 0)
            assert (named.id, named.key, named.headers, named.attempt) == ("first", "order.created", {"h": "1"}, 1)
            await until_empty(oracle, "first")
        if contract.declares("groups"):
            await backend.declare("second")
            await expect_counts(contract, oracle, "second", total=0)


@clause("C-GRP-07")
async def test_a_publisher_that_is_gone_before_the_first_group_comes_loses_nothing(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(15):
        async with contract.worker(jobs.publish_on_request) as publisher:
            await publisher.send(["order.created", {"n": 1}])
            await publisher.next_report()
            await publisher.kill()
        if not contract.harness.networked:
            await contract.backend().publish("order.created", {"n": 2})
        async with backend.consume(group="first") as subscription:
            assert numbers(await collect(subscription, 1)) == [1]


@clause("C-GRP-07", capability="key_patterns")
async def test_parked_messages_go_to_the_first_group_that_wants_their_key(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.publish("order.created", {"n": 1})
        await backend.publish("invoice.sent", {"n": 2})
        await backend.declare("orders", keys=["order.#"])
        await expect_counts(contract, oracle, "orders", total=1)
        await backend.declare("all")
        await expect_counts(contract, oracle, "all", total=1)
        async with backend.consume(group="orders") as subscription:
            assert numbers(await collect(subscription, 1)) == [1]
        async with backend.consume(group="all") as subscription:
            assert numbers(await collect(subscription, 1)) == [2]


@clause("C-GRP-07")
async def test_a_declared_group_keeps_everything_until_its_consumers_come(contract: Contract) -> None:
    backend, other = contract.backend(), contract.backend()
    async with contract.within():
        await backend.declare("g")
        await backend.declare("g")
        assert set(await other.groups()) == {"g"}
        await other.publish_many(numbered(10))
        assert (await backend.stats("g")).waiting == 10
        await backend.declare("g")
        async with other.consume(group="g") as subscription:
            assert sorted(numbers(await collect(subscription, 10))) == list(range(10))


@clause("C-GRP-07")
async def test_groups_named_in_the_environment_exist_from_the_first_use_on(contract: Contract) -> None:
    if not contract.declares("groups"):
        await probe(contract, "groups")
        return
    backend = contract.backend(QUEUE_GROUPS="a,b")
    oracle = await contract.oracle()
    async with contract.within():
        await backend.publish("order.created", {"n": 1})
        await expect_counts(contract, oracle, "a", total=1)
        await expect_counts(contract, oracle, "b", total=1)


@clause("C-GRP-07")
async def test_groups_that_start_at_the_same_time_lose_nothing_that_was_parked(contract: Contract) -> None:
    backend = contract.backend()
    others = [contract.backend() for _ in range(3)]
    oracle = await contract.oracle()
    async with contract.within():
        await backend.publish_many(numbered(100))
        await asyncio.gather(*(each.declare("g") for each in others))
        if not contract.capabilities.spurious_duplicates:  # else several may find the same message
            await expect_counts(contract, oracle, "g", total=100)
        async with backend.consume(group="g") as subscription:
            await collect_distinct(subscription, range(100))
