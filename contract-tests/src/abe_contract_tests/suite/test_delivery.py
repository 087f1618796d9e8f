"""C-DLV: what is delivered, and what never is."""

import asyncio
import time

from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import LONG_LEASE, collect, expect_counts, numbered, numbers, until_empty

KEYS = (
    "a:b",
    "a.b",
    "a/b",
    "a-b",
    "a_b",
    "a b",
    "A.b",
    "*",
    "#",
    "..",
    ".",
    "a.*",
    "a.#",
    "é",
    "e\u0301",
    "k" * 200,
    "é" * 100,
    "%",
    "{a}",
    "\x01",
    "\0",
    "a\0b",
    "a\0c",
    "a.b\0",
)


@clause("C-DLV-01")
async def test_every_group_gets_every_message_from_every_publisher(contract: Contract) -> None:
    first, second = contract.backend(), contract.backend()
    third = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    accounts = {group: contract.accounting() for group in ("a", "b", "c")}
    count = contract.many(400)
    oracle = await contract.oracle()

    async def publish(account_id: int) -> None:
        backend = (first, second)[account_id % 2]
        for n in range(account_id, count, 8):
            await backend.publish("order.created", {"n": n}, id=f"id-{n}")
            for account in accounts.values():
                account.record(f"id-{n}", "ok")

    async def drain(group: str) -> None:
        async with third.consume(group=group) as subscription:
            missing = count
            while missing:
                message = await subscription.receive()
                accounts[group].delivered(message)
                missing -= accounts[group].deliveries[message.id] == 1
                await message.ack()
            await until_empty(oracle, group)
            assert contract.capabilities.spurious_duplicates or subscription.take() is None

    async with contract.within(20):
        for group in accounts:
            await first.declare(group)
        async with asyncio.TaskGroup() as tasks:
            for part in range(8):
                tasks.create_task(publish(part))
            for group in accounts:
                tasks.create_task(drain(group))
    for account in accounts.values():
        assert len(account.deliveries) == count
        account.check(duplicates_allowed=contract.capabilities.spurious_duplicates)


@clause("C-DLV-01", three_methods=True)
async def test_a_message_published_is_a_message_delivered(contract: Contract) -> None:
    backend = contract.backend()
    seen: list[int] = []
    async with contract.within():
        for n in range(10):
            await backend.publish("order.created", {"n": n, "text": "é"})
        async for message in backend.consume():
            assert message == {"n": message["n"], "text": "é"}
            seen.append(message["n"])
            if len(set(seen)) == 10:
                break
    assert sorted(set(seen)) == list(range(10))


@clause("C-DLV-02")
async def test_a_group_made_again_starts_empty(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(20))
        await backend.publish("later", {"n": 20}, delay=0.3 if contract.declares("max_delay") else None)
        async with backend.consume(group="g", prefetch=5) as subscription:
            first = await subscription.receive()
            await first.ack()
            if contract.declares("dead_letter"):
                await (await subscription.receive()).reject("left behind")
            await subscription.receive()
        await backend.delete_group("g")
        await backend.declare("g")
        counts = await oracle.counts("g")
        assert (counts.total, counts.dead) == (0, 0)
        async with backend.consume(group="g") as subscription:
            await backend.publish("order.created", {"n": 100})
            # After it the delayed one that was deleted would be due.
            await backend.publish("order.created", {"n": 101}, delay=0.4 if contract.declares("max_delay") else None)
            assert numbers(await collect(subscription, 2)) == [100, 101]
            await until_empty(oracle, "g")


@clause("C-DLV-02", capability="groups")
async def test_a_group_that_comes_later_gets_nothing_of_what_others_got(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("early")
        await backend.publish_many(numbered(10))
        await backend.declare("late")
        await expect_counts(contract, oracle, "late", total=0)
        await backend.publish("order.created", {"n": 10})
        async with backend.consume(group="late") as subscription:
            assert numbers(await collect(subscription, 1)) == [10]
        await expect_counts(contract, oracle, "early", total=11)


@clause("C-DLV-02", "C-ACK-02")
async def test_what_was_acknowledged_never_comes_again(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await backend.publish_many(numbered(50))
        async with backend.consume(group="g") as subscription:
            await collect(subscription, 50)
        await expect_counts(contract, oracle, "g", total=0)
        await backend.disconnect()
        later = contract.backend()
        await later.publish("order.created", {"n": 50})
        async with later.consume(group="g") as subscription:
            assert numbers(await collect(subscription, 1)) == [50]
        await expect_counts(contract, oracle, "g", total=0)


@clause("C-DLV-03")
async def test_messages_that_are_simply_done_come_once(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    seen: list[int] = []
    count = contract.many(1_000)
    async with contract.within(20):
        await backend.declare("g")
        await backend.publish_many(numbered(count))
        async with backend.consume(group="g") as subscription:
            async for message in subscription:
                seen.append(message["n"])
                assert message.attempt == 1
                if message["n"] == count - 1 or len(seen) >= count:
                    await message.ack()
                    break
            while len(seen) < count:
                seen.extend(numbers(await collect(subscription, 1)))
            await until_empty(oracle, "g")
            assert subscription.take() is None
    assert len(seen) == count
    assert set(seen) == set(range(count))


@clause("C-DLV-04")
async def test_namespaces_share_nothing(contract: Contract) -> None:
    here = contract.namespace
    others = [f"{here}.g", f"{here}-g", f"{here}_g", here[:-1], here.upper()]
    backend = contract.backend()
    neighbours = [contract.backend(QUEUE_NAMESPACE=name) for name in others]
    oracle = await contract.oracle()
    async with contract.within():
        try:
            for each in (backend, *neighbours):
                await each.declare("g")
                await each.declare("g.g")
            for n, each in enumerate((backend, *neighbours)):
                await each.publish("order.created", {"n": n})
            for group in ("g", "g.g"):
                await expect_counts(contract, oracle, group, total=1)
                for n, each in enumerate((backend, *neighbours)):
                    async with each.consume(group=group) as subscription:
                        assert numbers(await collect(subscription, 1)) == [n]
                        assert (await each.stats(group)).waiting == 0
        finally:
            for each in neighbours:
                for group in await each.groups():
                    await each.delete_group(group)


@clause("C-DLV-04", capability="groups")
async def test_groups_with_alike_names_are_different_groups(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    names = ("a.b", "a-b", "a_b", "A.b", "a", "a.b.c", "0")
    async with contract.within():
        for name in names:
            await backend.declare(name)
        assert set(await backend.groups()) == set(names)
        await backend.publish("order.created", {"n": 1})
        for left, name in enumerate(names, 1):
            async with backend.consume(group=name) as subscription:
                await collect(subscription, 1)
            totals = [(await oracle.counts(other)).total for other in names]
            assert totals == [0] * left + [1] * (len(names) - left)


@clause("C-DLV-04")
async def test_every_key_arrives_as_it_was(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(), backend.consume(group="g") as subscription:
        for n, key in enumerate(KEYS):
            await backend.publish(key, {"n": n})
        messages = await collect(subscription, len(KEYS))
    assert {message["n"]: message.key for message in messages} == dict(enumerate(KEYS))


@clause("C-DLV-04", capability="key_patterns")
async def test_no_key_reaches_the_groups_of_another_key(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    # Patterns in which nothing is a wildcard; each group wants one key and no other.
    literal = [key for key in KEYS if not {"*", "#"} & set(key.split("."))]
    async with contract.within():
        for n, key in enumerate(literal):
            await backend.declare(f"g{n}", keys=[key])
        for key in KEYS:
            await backend.publish(key, {"key": key})
        for n, key in enumerate(literal):
            await expect_counts(contract, oracle, f"g{n}", total=1)
            async with backend.consume(group=f"g{n}") as subscription:
                (message,) = await collect(subscription, 1)
                assert (message.key, message["key"]) == (key, key)


@clause("C-DLV-05")
async def test_a_consumer_that_is_there_first_gets_keys_that_come_into_use_later(contract: Contract) -> None:
    backend, publisher = contract.backend(), contract.backend()
    async with contract.within(), backend.consume(group="g") as subscription:
        for n in range(20):
            await publisher.publish(f"new.key.{n}", {"n": n})
            (message,) = await collect(subscription, 1)
            assert (message["n"], message.key) == (n, f"new.key.{n}")


@clause("C-DLV-06")
async def test_waiting_on_nothing_neither_spins_nor_ends(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        await backend.declare("g")
        async with contract.worker(jobs.wait_for_nothing, group="g") as worker:
            assert await worker.next_report() == "subscribed"
            await worker.send("how much?")
            before = await worker.next_report()
            started = time.monotonic()
            # The processor time of a wait can only be measured by waiting.
            await asyncio.sleep(1.0)
            await worker.send("how much?")
            used = await worker.next_report() - before
            assert used < (time.monotonic() - started) / 2, f"{used:.2f} s of processor time for waiting"
            async with contract.within(1):
                await backend.publish("order.created", {"n": 1})
                assert await worker.next_report() == {"n": 1}


@clause("C-DLV-06")
async def test_a_publish_wakes_a_waiting_consumer_at_once(contract: Contract) -> None:
    backend, publisher = contract.backend(), contract.backend()
    async with contract.within(), backend.consume(group="g") as subscription:
        for n in range(10):
            waiting = asyncio.ensure_future(anext(subscription))
            await asyncio.sleep(0)
            assert not waiting.done()
            async with contract.within(1):
                await publisher.publish("order.created", {"n": n})
                assert (await waiting) == {"n": n}
