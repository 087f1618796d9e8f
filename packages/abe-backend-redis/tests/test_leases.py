"""Whose messages they are: each consumer's lease is its own setting."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import AsyncMock

import pytest

from abe import AsyncLoopConsumer
from abe.backends.message_queue.base import Delivery
from abe.errors import BackendConnectionError
from abe_backend_redis._receiver import GROUP, RedisReceiver
from abe_contract_tests import bounds

Collect = Callable[..., Awaitable[list[Delivery]]]
Until = Callable[..., Awaitable[None]]


async def claims(receiver: RedisReceiver, seconds: float) -> list[Delivery]:
    """What the receiver gets within that time."""
    found: list[Delivery] = []
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        receiver._next_tick = 0.0
        found += await receiver.receive(10)
    return found


class TestOwners:
    async def test_a_shorter_lease_takes_nothing_from_a_longer_one(self, lab: Any, collect: Collect) -> None:
        """As in a rolling change of QUEUE_LEASE_SECONDS."""
        long, short = await lab.transport(lease=30.0), await lab.transport(lease=0.2)
        await long.declare("g", None, change=False)
        owner, rival = await lab.receiver(long), await lab.receiver(short)
        await long.send(lab.envelopes(3))
        held = await collect(owner, 3)
        assert await claims(rival, 1.0) == []
        assert not any(await owner.ack(held, verify=True))

    async def test_a_longer_lease_waits_for_no_shorter_one(self, lab: Any, collect: Collect) -> None:
        long, short = await lab.transport(lease=30.0), await lab.transport(lease=0.3)
        await long.declare("g", None, change=False)
        heir, dead = await lab.receiver(long), await lab.receiver(short)
        await long.send(lab.envelopes(3))
        held = await collect(dead, 3)
        found = await collect(heir, 3, within=2.0)
        assert {delivery.native for delivery in found} == {delivery.native for delivery in held}
        assert {delivery.attempt for delivery in found} == {2}

    async def test_a_lease_that_is_renewed_outlasts_its_consumer_s_silence(self, lab: Any, collect: Collect) -> None:
        """A consumer whose room is full reads nothing, and is alive all the same."""
        transport = await lab.transport(lease=0.4)
        await transport.declare("g", None, change=False)
        owner, rival = await lab.receiver(transport), await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        [held] = await collect(owner, 1)
        for _ in range(8):
            assert list(await owner.renew([held])) == []
            assert await claims(rival, 0.15) == []

    @pytest.mark.parametrize("renewing", ["is repeated by who recovers", "fails", "has yet to begin"])
    async def test_what_is_in_hand_after_an_outage_is_not_handed_out_again(
        self, lab: Any, collect: Collect, monkeypatch: pytest.MonkeyPatch, renewing: str
    ) -> None:
        transport = await lab.transport(lease=30.0)
        await transport.declare("g", None, change=False)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        [held] = await collect(receiver, 1)
        wire = await transport._broker.control()
        idle = b"IDLE", 60_000, b"JUSTID"  # as if Redis had been away for two leases
        await wire.call(b"XCLAIM", receiver._stream, GROUP, receiver._consumer, 0, held.native, *idle)
        if renewing == "fails":
            with monkeypatch.context() as patched:
                patched.setattr(receiver, "_run", AsyncMock(side_effect=BackendConnectionError("no connection")))
                with pytest.raises(BackendConnectionError):
                    await receiver.renew([held])
        elif renewing == "has yet to begin":  # as after the machine was suspended, in which time its clock stood still
            await wire.call(b"ZADD", receiver._alive, 1, receiver._consumer)
            receiver._next_tick = 0.0
        else:
            assert list(await receiver.recover([held])) == []
        for _ in range(3):
            assert list(await receiver.receive(10)) == []
        assert list(await receiver.renew([held])) == []
        assert not any(await receiver.ack([held], verify=True))

    async def test_what_the_consumer_itself_lost_sight_of_comes_back_to_it(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport(lease=0.3)
        await transport.declare("g", None, change=False)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        [first] = await collect(receiver, 1)
        [again] = await collect(receiver, 1, within=2.0)
        assert (again.native, again.attempt) == (first.native, 2)


async def test_a_consumer_that_waits_writes_no_more_than_three_times_a_lease(one_lab: Any) -> None:
    """Each write goes to the append-only file and to replicas."""
    transport = await one_lab.transport(lease=300.0)
    await transport.declare("g", None, change=False)
    receiver = await one_lab.receiver(transport)
    await receiver.receive(1)

    async def changes() -> int:
        return int((await one_lab.redis.info("persistence"))["rdb_changes_since_last_save"])

    before = await changes()
    for _ in range(10):
        receiver._next_tick = 0.0
        await receiver._tick(await receiver._link.get(), 10)
    assert await changes() == before


class TestUnknownConsumers:
    async def test_one_that_is_on_no_record_is_found(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport(lease=0.3)
        await transport.declare("g", None, change=False)
        await transport.send(lab.envelopes(3))
        await lab.redis.xreadgroup("group", "foreign", {lab.names.queue("g"): ">"}, count=3)
        assert len(await collect(await lab.receiver(transport), 3, within=3.0)) == 3

    async def test_one_that_had_nothing_in_hand_for_a_while_is_found(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport(lease=0.3)
        await transport.declare("g", None, change=False)
        receiver, queue = await lab.receiver(transport), lab.names.queue("g")

        async def look() -> None:
            receiver._next_registration = 0.0
            await receiver._tick(await receiver._link.get(), 10)

        for handled in (True, False):
            await transport.send(lab.envelopes(1))
            [[_, [[entry, _]]]] = await lab.redis.xreadgroup("group", "foreign", {queue: ">"}, count=1)
            await look()
            if handled:
                await lab.redis.xack(queue, "group", entry)
                await lab.redis.zadd(lab.names.alive("g"), {"foreign": 1})  # as it has been for two leases
                await receiver._tick(await receiver._link.get(), 10)
                assert await lab.redis.zscore(lab.names.alive("g"), "foreign") is None
        assert len(await collect(receiver, 1, within=3.0)) == 1

    async def test_none_is_made_up_of_many(self, lab: Any, until: Until) -> None:
        """Thousands of names, as a deployment that crashes in a loop leaves them, go by and by, none of them at once."""
        transport = await lab.transport(lease=0.1)
        await transport.declare("g", None, change=False)
        for number in range(450):
            await lab.redis.xgroup_createconsumer(lab.names.queue("g"), "group", f"dead-{number}@100")
            await lab.redis.zadd(lab.names.alive("g"), {f"dead-{number}@100": 1})
        receiver = await lab.receiver(transport)

        async def names() -> int:
            return len(await lab.redis.xinfo_consumers(lab.names.queue("g"), "group"))

        await receiver.receive(1)
        assert 451 - await names() == 100

        async def forgotten() -> bool:
            receiver._next_tick = 0.0
            await receiver.receive(1)
            return await names() == 1

        await until(forgotten)

    async def test_the_living_keep_their_messages_and_the_dead_do_not_while_memory_is_full(
        self, launch: Any, lab_at: Any, collect: Collect
    ) -> None:
        """Nobody can be put on record then: idle times tell who is dead."""
        lab = lab_at(launch("--maxmemory", "100mb", "--maxmemory-policy", "noeviction").url)
        transport = await lab.transport(lease=0.6)
        await transport.declare("g", None, change=False)
        await transport.send(lab.envelopes(2))
        await lab.redis.config_set("maxmemory", "1mb")
        living, dead, heir = [await lab.receiver(transport) for _ in range(3)]
        [kept] = await collect(living, 1)
        [left] = await collect(dead, 1)
        found: list[Delivery] = []
        async with bounds.within(5):
            while not found:
                assert list(await living.renew([kept])) == []
                found = await claims(heir, 0.1)
        assert [delivery.native for delivery in found] == [left.native]
        for _ in range(6):
            await living.renew([kept])
            assert [delivery.native for delivery in await claims(heir, 0.15)] in ([], [left.native])
        assert not any(await living.ack([kept], verify=True))


async def test_a_clean_run_with_many_renewals_warns_of_nothing(one_lab: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    backend = await one_lab.backend(lease=bounds.allowance(), groups={"g": ()})
    count, handled = 4_000, 0

    async def handle(_: dict[str, Any]) -> None:
        nonlocal handled
        handled += 1
        if handled % 7 == 0:
            await asyncio.sleep(0.001)
        if handled == count:
            await consumer.shutdown()

    async with bounds.within(30), AsyncLoopConsumer(backend, "g", concurrency=100) as consumer:
        running = asyncio.create_task(consumer.run(handle))
        for _ in range(count // 100):
            await asyncio.gather(*(backend.publish("k", {"n": n}) for n in range(100)))
            await asyncio.sleep(0.02)
        await running
    assert handled == count
    assert caplog.messages == []
