"""The primitives of consuming, on each make of server."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis_primitives import dead, letters_of, release, retry

from abe.backends.message_queue.base import Delivery
from abe.errors import BackendConnectionError, LeaseLostError
from abe_backend_redis import _receiver
from abe_backend_redis._receiver import RedisReceiver
from abe_contract_tests import bounds

Collect = Callable[..., Awaitable[list[Delivery]]]
Until = Callable[..., Awaitable[None]]


async def commands_called(lab: Any, name: str) -> int:
    found = await lab.redis.info("commandstats")
    return int(found.get(f"cmdstat_{name}", {}).get("calls", 0))


class TestSettling:
    async def test_an_acknowledged_message_is_gone(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(3))
        receipts = await collect(receiver, 3)
        assert not any(await receiver.ack(receipts[:2], verify=False))
        assert not any(await receiver.ack(receipts[2:], verify=True))
        assert await lab.redis.xlen(lab.names.queue("g")) == 0
        assert await lab.pending() == 0

    async def test_xackdel_is_used_where_there_is_one(self, lab: Any, server: Any, collect: Collect) -> None:
        transport = await lab.transport()
        assert transport._broker.has_xackdel is server.version.startswith("Redis 8")
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        before = {name: await commands_called(lab, name) for name in ("xackdel", "xack")}
        await receiver.ack(await collect(receiver, 1), verify=False)
        used = [name for name in before if await commands_called(lab, name) > before[name]]
        assert used == (["xackdel"] if transport._broker.has_xackdel else ["xack"])

    async def test_attempts_are_counted_and_releases_are_not(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport(lease=0.3)
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        [delivery] = await collect(receiver, 1)
        assert delivery.attempt == 1
        await receiver.settle([release(delivery)])
        [delivery] = await collect(receiver, 1)
        assert delivery.attempt == 1
        await receiver.settle([retry(delivery)])
        [delivery] = await collect(receiver, 1)
        assert delivery.attempt == 2
        [delivery] = await collect(await lab.receiver(transport), 1)  # its lease ran out
        assert delivery.attempt == 3

    async def test_a_dead_letter_keeps_everything(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        sent = lab.envelope("a.b", headers={"h": "v"}, body=b"\x00\xff")
        await transport.send([sent])
        [delivery] = await collect(receiver, 1)
        before = time.time()
        assert not any(await receiver.settle([dead(delivery, "why", "trace")]))
        [letter] = await letters_of(transport)
        assert (letter.id, letter.key, letter.body, letter.headers) == (sent.id, "a.b", sent.body, {"h": "v"})
        assert (letter.attempts, letter.reason, letter.error) == (1, "why", "trace")
        assert before - 1 < letter.dead_at < time.time() + 1

    @pytest.mark.parametrize("verify", [True, False])
    async def test_a_late_acknowledgement_leaves_the_new_owners_copy(
        self, lab: Any, collect: Collect, verify: bool
    ) -> None:
        transport = await lab.transport(lease=0.2)
        await transport.declare("g", None, change=True)
        late, owner = await lab.receiver(transport), await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        [stale] = await collect(late, 1)
        [delivery] = await collect(owner, 1)
        assert delivery.native == stale.native
        settle = late.ack([stale], verify=True) if verify else late.settle([retry(stale)])
        failures = await settle
        assert isinstance(failures[0], LeaseLostError)
        assert await lab.redis.xlen(lab.names.queue("g")) == 1
        assert list(await late.renew([stale])) == [stale]
        assert not any(await owner.ack([delivery], verify=True))
        assert await lab.redis.xlen(lab.names.queue("g")) == 0

    async def test_a_lease_that_is_renewed_is_kept(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport(lease=0.6)
        await transport.declare("g", None, change=True)
        owner, rival = await lab.receiver(transport), await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        [delivery] = await collect(owner, 1)
        deadline = asyncio.get_running_loop().time() + 1.8
        while asyncio.get_running_loop().time() < deadline:
            assert list(await owner.renew([delivery])) == []
            assert list(await rival.receive(10)) == []
        assert not any(await owner.ack([delivery], verify=True))

    async def test_hundreds_are_renewed_at_once(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        for _ in range(6):
            await transport.send(lab.envelopes(200))
        held, gone = await collect(receiver, 1200), Delivery(b"", None, 1, b"1-1")
        assert list(await receiver.renew([*held, gone])) == [gone]


class TestRecovery:
    async def test_what_a_cancelled_read_brings_late_is_given_back(
        self, launch: Any, lab_at: Any, collect: Collect
    ) -> None:
        lab = lab_at(launch().url)
        transport = await lab.transport(lease=30.0)
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(3))
        await receiver._link.get()
        receiver._next_tick = asyncio.get_running_loop().time() + 60  # so that it only reads
        # Reads wait until the pause is over; what only looks does not.
        await lab.redis.execute_command("CLIENT", "PAUSE", 200, "WRITE")
        reading = asyncio.create_task(receiver.receive(10))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        async with bounds.within(3):
            assert list(await receiver.recover([])) == []
        assert len(await collect(receiver, 3)) == 3

    @pytest.mark.parametrize("why", ["a pause", "a demotion", "too few replicas"])
    async def test_stopping_in_a_failover_leaves_the_server_alive(self, launch: Any, lab_at: Any, why: str) -> None:
        lab = lab_at(launch().url)
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await receiver._link.get()
        receiver._next_tick = asyncio.get_running_loop().time() + 60  # so that it only reads
        await lab.redis.execute_command("CLIENT", "PAUSE", 300, "WRITE")
        reading = asyncio.create_task(receiver.receive(10))
        await asyncio.sleep(0)
        if why == "a demotion":
            await lab.redis.execute_command("REPLICAOF", "127.0.0.1", 1)
        elif why == "too few replicas":
            await lab.redis.execute_command("CONFIG", "SET", "min-replicas-to-write", 1)
        async with bounds.within(3):
            await receiver.stop()
            await asyncio.gather(reading, return_exceptions=True)
        assert await lab.redis.ping()

    async def test_a_group_on_a_demoted_server_is_not_taken_for_a_deleted_one(
        self, launch: Any, lab_at: Any, until: Until
    ) -> None:
        lab = lab_at(launch().url)
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await receiver._link.get()
        receiver._next_tick = asyncio.get_running_loop().time() + 60
        reading = asyncio.create_task(receiver.receive(10))

        async def waits() -> bool:
            return bool((await lab.redis.info("clients"))["blocked_clients"])

        await until(waits)
        await lab.redis.execute_command("REPLICAOF", "127.0.0.1", 1)
        async with bounds.within(3):
            with pytest.raises(BackendConnectionError):
                await reading

    async def test_a_consumer_whose_closing_is_cancelled_leaves_no_connection(
        self, launch: Any, lab_at: Any, until: Until
    ) -> None:
        lab = lab_at(launch().url)
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await receiver.receive(1)
        await lab.redis.execute_command("CLIENT", "PAUSE", 300, "WRITE")
        closing = asyncio.create_task(receiver.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])

        async def gone() -> bool:
            return all(client["name"] != "abe-read-g" for client in await lab.redis.client_list())

        await until(gone)

    async def test_what_the_receiver_does_not_know_of_is_given_back(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver, other = await lab.receiver(transport), await lab.receiver(transport)
        for _ in range(6):
            await transport.send(lab.envelopes(200))
        held = await collect(receiver, 1200)
        gone = Delivery(b"", None, 1, b"1-1")
        assert list(await receiver.recover([*held[:3], gone])) == [gone]
        again = await collect(other, 1197)
        assert {delivery.native for delivery in again} == {delivery.native for delivery in held[3:]}
        assert {delivery.attempt for delivery in again} == {1}

    async def test_closing_gives_back_everything_and_forgets_the_consumer(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        leaving, other = await lab.receiver(transport), await lab.receiver(transport)
        await transport.send(lab.envelopes(5))
        held = await collect(leaving, 5)
        await leaving.stop()
        await leaving.close()
        again = await collect(other, 5, within=1.0)
        assert {delivery.native for delivery in again} == {delivery.native for delivery in held}
        names = {consumer["name"] for consumer in await lab.redis.xinfo_consumers(lab.names.queue("g"), "group")}
        assert names == {b"released", other._consumer}

    async def test_an_entry_whose_message_is_gone_is_healed(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport(lease=0.2)
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(2))
        first, _ = await collect(receiver, 2)
        await lab.redis.xdel(lab.names.queue("g"), first.native)
        [again] = await collect(receiver, 1)
        assert again.native != first.native
        assert await lab.pending() == 1

    async def test_names_of_the_dead_are_forgotten(self, lab: Any, collect: Collect, until: Until) -> None:
        transport = await lab.transport(lease=1.0)
        await transport.declare("g", None, change=True)
        gone, holding, living = [await lab.receiver(transport) for _ in range(3)]
        await transport.send(lab.envelopes(1))
        [held] = await collect(holding, 1)
        await gone.receive(1)
        await gone._link.close()
        holding_alive = asyncio.create_task(_keep(holding, held))

        async def reaped() -> bool:
            living._next_tick = 0.0
            await living.receive(1)
            names = {consumer["name"] for consumer in await lab.redis.xinfo_consumers(lab.names.queue("g"), "group")}
            return gone._consumer not in names and {holding._consumer, living._consumer} <= names

        try:
            await until(reaped)
        finally:
            holding_alive.cancel()

    async def test_stopping_ends_a_read_that_waits(
        self, lab: Any, until: Until, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_receiver, "_STOPPED", 60.0)
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await receiver.receive(1)
        receiver._next_tick += 60.0  # a read that is not ended blocks for as long
        reading = asyncio.create_task(receiver.receive(10))
        await until(lambda: _is_blocked(lab))
        started = time.monotonic()
        await receiver.stop()
        assert list(await reading) == []
        assert time.monotonic() - started < 3.0 * bounds.slowness(started)
        assert list(await receiver.receive(10)) == []

    async def test_stopping_before_the_read_is_sent_ends_it_too(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await receiver.receive(1)
        monkeypatch.setattr(_receiver, "TICK", 60.0)
        monkeypatch.setattr(_receiver, "_STOPPED", 60.0)
        for turns in range(6):
            receiver._stopping, receiver._next_tick = False, 0.0
            reading = asyncio.create_task(receiver.receive(10))
            for _ in range(turns):
                await asyncio.sleep(0)
            started = time.monotonic()
            await receiver.stop()
            assert list(await reading) == []
            assert time.monotonic() - started < 3.0 * bounds.slowness(started), turns


async def _keep(receiver: RedisReceiver, delivery: Delivery) -> None:
    while True:
        await receiver.renew([delivery])
        await receiver.receive(1)


async def _is_blocked(lab: Any) -> bool:
    return any(client["name"] == "abe-read-g" and "b" in client["flags"] for client in await lab.redis.client_list())


def test_no_read_blocks_for_longer_than_the_declared_bound() -> None:
    assert _receiver.TICK <= 1.0
