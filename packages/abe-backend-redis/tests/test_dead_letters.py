"""Dead letters, by the page."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from redis_primitives import dead, letters_of, total

from abe.backends.message_queue.base import Delivery
from abe.errors import BackpressureError, GroupMissingError
from abe_backend_redis._receiver import RedisReceiver
from abe_backend_redis._transport import RedisTransport

Collect = Callable[..., Awaitable[list[Delivery]]]
Until = Callable[..., Awaitable[None]]

MEGABYTE = b'{"x": "%s"}' % (b"y" * 1_000_000)


async def bury(lab: Any, count: int, body: bytes = b"{}", **settings: Any) -> RedisTransport:
    """Make a group with dead letters, as `Disposition.DEAD` leaves them."""
    transport: RedisTransport = await lab.transport(**settings)
    await transport.declare("g", None, change=False)
    for number in range(count):
        letter = {"m": f'[1,"id-{number}","k",0]', "p": body, "a": "5", "r": "why", "e": "trace", "t": "1"}
        await lab.redis.xadd(lab.names.dead("g"), letter)
    return transport


async def test_a_page_has_a_few_megabytes_and_at_least_one_letter(one_lab: Any) -> None:
    transport = await bury(one_lab, 10, MEGABYTE)
    pages = [[letter.id for letter in page] async for page in transport.dead_letters("g")]
    assert [len(page) for page in pages] == [4, 4, 2]
    assert [id for page in pages for id in page] == [f"id-{number}" for number in range(10)]
    await one_lab.redis.xadd(one_lab.names.dead("g"), {"m": '[1,"huge","k",0]', "p": MEGABYTE * 6})
    assert [len(page) async for page in transport.dead_letters("g")] == [4, 4, 2, 1]


async def test_looking_for_letters_does_not_carry_their_bodies(one_lab: Any) -> None:
    transport = await bury(one_lab, 10, MEGABYTE)

    async def sent() -> int:
        return int((await one_lab.redis.info("stats"))["total_net_output_bytes"])

    before = await sent()
    assert [count async for count in transport.replay("g", ["id-9", "nobody"])] == [0, 0, 1]
    assert [count async for count in transport.purge("g", None)] == [4, 4, 1]
    assert await sent() - before < 100_000


async def test_they_are_looked_through_on_a_connection_of_its_own(one_lab: Any, until: Until) -> None:
    async def browses() -> bool:
        return "abe-browse" in {client["name"] for client in await one_lab.redis.client_list()}

    async def browses_no_more() -> bool:
        return not await browses()

    transport = await bury(one_lab, 3)
    assert not await browses()
    assert [len(page) async for page in transport.dead_letters("g")] == [3]
    assert await browses()
    await transport.close()
    await until(browses_no_more)  # the server sees the end of a connection in its own time


async def test_those_that_come_meanwhile_are_not_met(lab: Any) -> None:
    transport = await bury(lab, 1100)
    letter = {"m": '[1,"late","k",0]', "p": b"{}"}
    for steps in (transport.dead_letters("g"), transport.replay("g", None)):
        found = 0
        async with aclosing(steps):
            async for step in steps:
                found += step if isinstance(step, int) else len(step)
                await lab.redis.xadd(lab.names.dead("g"), letter)
        assert found <= 1103
    assert (await transport.stats("g")).dead == 3


async def test_who_stops_early_leaves_each_in_one_place(lab: Any) -> None:
    transport = await bury(lab, 1100)
    async with aclosing(transport.replay("g", None)) as steps:
        assert await anext(steps) == 500
    stats = await transport.stats("g")
    assert (stats.waiting, stats.dead) == (500, 600)
    async with aclosing(transport.purge("g", [f"id-{number}" for number in range(1100)])) as steps:
        assert await anext(steps) == 500
    stats = await transport.stats("g")
    assert (stats.waiting, stats.dead) == (500, 100)


async def test_a_full_memory_stops_a_replay_and_loses_nothing(launch: Any, lab_at: Any) -> None:
    lab = lab_at(launch("--maxmemory", "100mb", "--maxmemory-policy", "noeviction").url)
    transport = await bury(lab, 10)
    await lab.redis.config_set("maxmemory", "1mb")
    with pytest.raises(BackpressureError):
        async for moved in transport.replay("g", None):
            assert moved == 0
    await lab.redis.config_set("maxmemory", "100mb")
    stats = await transport.stats("g")
    assert (stats.waiting, stats.dead) == (0, 10)


async def test_a_group_that_is_deleted_meanwhile_is_told(lab: Any) -> None:
    transport = await bury(lab, 600)
    steps = transport.replay("g", None)
    assert await anext(steps) == 500
    await transport.delete_group("g")
    assert [count async for count in steps] == []
    with pytest.raises(GroupMissingError, match="'g'"):
        await anext(transport.dead_letters("g"))
    assert not await lab.redis.exists(lab.names.queue("g"))


async def test_the_namespace_goes_with_everything_in_it(lab: Any) -> None:
    transport = await bury(lab, 600)
    receiver = await lab.receiver(transport)
    await transport.declare("h", ("h",), change=False)
    await transport.send([lab.envelope("h"), lab.envelope("k", delay=60)])
    await receiver.receive(1)
    await lab.redis.set(lab.names._tag + b"of a stranger", "x")
    await lab.redis.set("elsewhere", "x")
    await transport.delete_namespace()
    assert [key async for key in lab.redis.scan_iter(match=lab.names.pattern)] == []
    assert await lab.redis.delete("elsewhere") == 1
    await transport.delete_namespace()
    assert await transport.groups() == {}
    assert await transport.send([lab.envelope("k")]) == ()
    assert await lab.redis.xlen(lab.names.parked) == 1


class TestDeadLetters:
    async def bury(self, lab: Any, collect: Collect, count: int) -> tuple[RedisTransport, RedisReceiver]:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        for start in range(0, count, 250):
            await transport.send(lab.envelopes(min(250, count - start)))
        buried = await collect(receiver, count)
        for start in range(0, count, 500):
            assert not any(await receiver.settle([dead(delivery) for delivery in buried[start : start + 500]]))
        return transport, receiver

    async def test_more_than_a_page_is_replayed_and_starts_anew(self, lab: Any, collect: Collect) -> None:
        transport, receiver = await self.bury(lab, collect, 1201)
        assert [len(page) async for page in transport.dead_letters("g")] == [500, 500, 201]
        assert await total(transport.replay("g", None)) == 1201
        assert await letters_of(transport) == []
        again = await collect(receiver, 1201)
        assert {delivery.attempt for delivery in again} == {1}
        assert all(delivery.fault is None for delivery in again)

    async def test_more_than_a_page_is_purged(self, lab: Any, collect: Collect) -> None:
        transport, _ = await self.bury(lab, collect, 1201)
        assert await total(transport.purge("g", None)) == 1201
        assert (await transport.stats("g")).dead == 0
        assert await total(transport.purge("g", None)) == 0

    async def test_the_ids_that_are_named_and_no_others(self, lab: Any, collect: Collect) -> None:
        transport, receiver = await self.bury(lab, collect, 10)
        letters = await letters_of(transport)
        assert await total(transport.replay("g", [letters[3].id, "nobody"])) == 1
        assert await total(transport.purge("g", [letters[3].id, letters[5].id])) == 1
        [again] = await collect(receiver, 1)
        assert receiver.metadata(again).id == letters[3].id
        left = [letter.id for letter in await letters_of(transport)]
        assert left == [letter.id for letter in letters if letter not in (letters[3], letters[5])]
