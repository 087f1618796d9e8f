"""Messages that were published before their group existed: they join it in steps, while others publish, and whatever is interrupted."""

import asyncio
import itertools
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from abe.backends.message_queue.base import Delivery
from abe.backends.message_queue.base.names import matches
from abe_backend_redis._transport import RedisTransport
from abe_contract_tests import bounds

Collect = Callable[..., Awaitable[list[Delivery]]]

STEP = 500
"""Messages that a step looks at."""


async def park(lab: Any, transport: RedisTransport, count: int, key: str = "k", *, delay: float = 0.0) -> list[str]:
    sent = lab.envelopes(count, key, delay=delay)
    for start in range(0, count, 250):
        assert await transport.send(sent[start : start + 250]) == ()
    return [envelope.id for envelope in sent]


async def received(lab: Any, transport: RedisTransport, collect: Collect, group: str, count: int) -> list[str]:
    receiver = await lab.receiver(transport, group)
    return [receiver.metadata(delivery).id for delivery in await collect(receiver, count)]


async def calls_of(lab: Any, operation: Awaitable[object]) -> int:
    async def calls() -> int:
        return int((await lab.redis.info("commandstats"))["cmdstat_evalsha"]["calls"])

    before = await calls()
    await operation
    return await calls() - before


async def test_order_is_kept_over_many_steps(lab: Any, collect: Collect) -> None:
    transport = await lab.transport()
    wanted: list[str] = []
    for _ in range(10):
        wanted += await park(lab, transport, 130, "a.x")
        await park(lab, transport, 120, "b.x")
    assert await transport.declare("a", ("a.*",), change=False) == ("a.*",)
    wanted += await park(lab, transport, 10, "a.x")
    assert await received(lab, transport, collect, "a", len(wanted)) == wanted
    assert await lab.redis.xlen(lab.names.parked) == 1200
    assert not await lab.redis.exists(lab.names.joining)


async def test_a_declaration_that_was_interrupted_is_continued_by_the_next(lab: Any, collect: Collect) -> None:
    transport, other = await lab.transport(), await lab.transport()
    wanted = await park(lab, transport, 3 * STEP, "a")
    assert await transport._join("a", b'["a"]', change=False) == (b"a", b"")  # and its process is gone
    assert await transport.groups() == {}
    assert await lab.redis.xlen(lab.names.queue("a")) == STEP
    wanted += await park(lab, other, 10, "a")
    await park(lab, other, 10, "b")
    assert await other.declare("b", ("b",), change=False) == ("b",)
    assert await other.groups() == {"a": ("a",), "b": ("b",)}
    assert await received(lab, other, collect, "a", len(wanted)) == wanted
    assert (await other.stats("b")).waiting == 10


async def test_the_same_group_goes_on_where_it_was(lab: Any, collect: Collect) -> None:
    transport = await lab.transport()
    await park(lab, transport, 2 * STEP, "b")
    wanted = await park(lab, transport, 10, "a")
    assert await transport._join("a", b'["a"]', change=False) == (b"a", b"")
    assert await transport._join("a", b'["a"]', change=False) == (b"a", b"")
    assert await calls_of(lab, transport.declare("a", ("a",), change=False)) == 1
    assert await received(lab, transport, collect, "a", 10) == wanted


async def test_a_group_that_is_deleted_while_it_joins_is_gone(lab: Any) -> None:
    transport = await lab.transport()
    await park(lab, transport, 2 * STEP, "a")
    await transport._join("a", b'["a"]', change=False)
    await transport.delete_group("a")
    assert not await lab.redis.exists(lab.names.joining, lab.names.queue("a"))
    await transport.declare("rest", ("a",), change=False)
    assert (await transport.stats("rest")).waiting == STEP


async def test_nothing_is_lost_or_doubled_while_others_publish(lab: Any, collect: Collect) -> None:
    """Two publishers, two groups with patterns of their own that several processes declare at once.

    From when the first of them exists until the second does, no group wants the second one's key: that is told.
    """
    transports = [await lab.transport() for _ in range(4)]
    sent = {"a": await park(lab, transports[0], 2 * STEP, "a"), "b": await park(lab, transports[0], 2 * STEP, "b")}
    publishing = True

    async def publish(transport: RedisTransport, key: str) -> None:
        while publishing:
            for delay in (0.0, 0.001):
                envelopes = lab.envelopes(20, key, delay=delay)
                if await transport.send(envelopes) == ():
                    sent[key] += [envelope.id for envelope in envelopes]

    publishers = [asyncio.create_task(publish(transports[n], key)) for n, key in enumerate("ab")]
    async with bounds.within(20):
        declared = await asyncio.gather(
            *(transports[2 + n % 2].declare(group, (group,), change=False) for n, group in enumerate("abab"))
        )
        assert declared == [("a",), ("b",), ("a",), ("b",)]
        publishing = False
        await asyncio.gather(*publishers)
    for group in "ab":
        found = await received(lab, transports[0], collect, group, len(sent[group]))
        assert sorted(found) == sorted(sent[group])
    assert not await lab.redis.exists(lab.names.parked, lab.names.parked_delayed, lab.names.parked_passed)


@pytest.mark.parametrize("parked", [0, 3 * STEP])
async def test_of_several_who_declare_at_once_one_makes_the_group(lab: Any, parked: int) -> None:
    transports = [await lab.transport() for _ in range(5)]
    await park(lab, transports[0], parked)
    patterns = await asyncio.gather(*(t.declare("g", (f"p{n}",), change=False) for n, t in enumerate(transports)))
    assert len(set(patterns)) == 1
    assert await transports[0].groups() == {"g": patterns[0]}


async def test_who_changes_the_patterns_of_a_joining_group_has_all_looked_at_again(lab: Any) -> None:
    transport = await lab.transport()
    await park(lab, transport, STEP, "b")
    await park(lab, transport, STEP, "a")
    await transport._join("g", b'["a"]', change=False)
    assert await transport.declare("g", ("b",), change=True) == ("b",)
    assert (await transport.stats("g")).waiting == STEP


async def test_a_group_that_exists_looks_at_no_parked_message(lab: Any) -> None:
    """However many there are that nobody wants: each start of a consumer declares its group."""
    transport = await lab.transport()
    await transport.declare("g", ("a",), change=False)
    await lab.redis.delete(lab.names.groups)
    await lab.redis.set(lab.names.version, "another")
    await park(lab, transport, 4 * STEP, "b")
    assert await calls_of(lab, transport.declare("g", ("a",), change=False)) == 5
    for change in (True, False):
        assert await calls_of(lab, transport.declare("g", ("a",), change=change)) == 1
        assert await calls_of(lab, transport.declare("g", None, change=change)) == 1


async def test_a_step_moves_a_few_megabytes_at_most(one_lab: Any) -> None:
    transport = await one_lab.transport()
    big = b'{"x": "%s"}' % (b"y" * 1_000_000)
    for _ in range(6):
        await transport.send([one_lab.envelope("a", body=big)])
        await transport.send([one_lab.envelope("a", body=big, delay=60)])
    assert await transport._join("g", b'["a"]', change=False) == (b"g", b"")
    assert 4 <= await one_lab.redis.zcard(one_lab.names.delayed("g")) <= 5
    await transport.declare("g", ("a",), change=False)
    stats = await transport.stats("g")
    assert (stats.waiting, stats.delayed) == (6, 6)


async def test_delayed_ones_that_are_parked_meanwhile_are_looked_at_whenever_they_are_due(
    lab: Any, collect: Collect
) -> None:
    transport = await lab.transport()
    await park(lab, transport, 2 * STEP, "b", delay=100)
    await park(lab, transport, 2 * STEP, "a", delay=200)
    await transport._join("g", b'["a"]', change=False)
    late = await park(lab, transport, 3, "a", delay=0.01)  # before all that were looked at
    await transport.declare("g", ("a",), change=False)
    assert await received(lab, transport, collect, "g", 3) == late
    assert (await transport.stats("g")).delayed == 2 * STEP
    assert await lab.redis.zcard(lab.names.parked_passed) == 2 * STEP
    await transport.declare("rest", ("b",), change=False)
    assert (await transport.stats("rest")).delayed == 2 * STEP


class TestHeld:
    async def test_the_first_group_gets_what_was_published_before_it(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        sent = lab.envelopes(1500)
        for start in range(0, 1500, 250):
            await transport.send(sent[start : start + 250])
        await transport.declare("g", None, change=True)
        received = await collect(receiver := await lab.receiver(transport), 1500)
        assert [receiver.metadata(delivery).id for delivery in received] == [envelope.id for envelope in sent]
        assert not await lab.redis.exists(lab.names.parked)

    async def test_patterns_choose_among_any_number(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        sent = [lab.envelope("a.x" if number % 3 else "b.x") for number in range(2500)]
        for start in range(0, 2500, 250):
            await transport.send(sent[start : start + 250])
        wanted = [envelope.id for envelope in sent if envelope.key == "a.x"]
        await transport.declare("a", ("a.*",), change=True)
        receiver = await lab.receiver(transport, "a")
        received = await collect(receiver, len(wanted))
        assert [receiver.metadata(delivery).id for delivery in received] == wanted
        assert await lab.redis.xlen(lab.names.parked) == 2500 - len(wanted)
        await transport.declare("rest", None, change=True)
        assert (await transport.stats("rest")).waiting == 2500 - len(wanted)
        assert not await lab.redis.exists(lab.names.parked)

    async def test_a_later_group_gets_no_second_copy(self, lab: Any) -> None:
        transport = await lab.transport()
        await transport.send(lab.envelopes(3))
        await transport.declare("first", None, change=True)
        await transport.declare("second", None, change=True)
        assert (await transport.stats("first")).waiting == 3
        assert (await transport.stats("second")).waiting == 0

    async def test_a_group_that_narrows_and_widens_takes_what_is_left(self, lab: Any) -> None:
        transport = await lab.transport()
        await transport.send([lab.envelope("a"), lab.envelope("b")])
        await transport.declare("g", ("a",), change=True)
        await transport.declare("g", ("a", "b"), change=True)
        assert (await transport.stats("g")).waiting == 2

    async def test_delayed_ones_are_held_too_and_keep_their_time(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.send([lab.envelope("a", delay=0.4), lab.envelope("b", delay=0.4), lab.envelope("a", delay=60)])
        started = time.monotonic()
        await transport.declare("g", ("a",), change=True)
        assert (await transport.stats("g")).delayed == 2
        assert await lab.redis.zcard(lab.names.parked_passed) == 1
        receiver = await lab.receiver(transport)
        [delivery] = await collect(receiver, 1)
        assert receiver.metadata(delivery).key == "a"
        assert 0.3 < time.monotonic() - started < 2.4 * bounds.slowness(started)

    async def test_what_a_stranger_left_there_stops_nobody(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await lab.redis.xadd(lab.names.parked, {"m": "[1,broken", "p": "{}"})
        await lab.redis.xadd(lab.names.parked, {"p": "{}", "k": "a"})
        await transport.send([lab.envelope("a"), lab.envelope("b")])
        await transport.declare("g", ("a",), change=True)
        assert (await transport.stats("g")).waiting == 2
        await transport.declare("rest", None, change=True)
        assert (await transport.stats("rest")).waiting == 2

    async def test_patterns_mean_the_same_to_redis_as_to_us(self, lab: Any) -> None:
        words = ["a", "b", "", "*", "#"]
        keys = [
            ".".join(key)
            for size in (1, 2, 3)
            for key in itertools.product(["a", "b", ""], repeat=size)
            if key != ("",)
        ]
        patterns = [
            ".".join(pattern)
            for size in (1, 2, 3)
            for pattern in itertools.product(words, repeat=size)
            if pattern != ("",)
        ]
        transport = await lab.transport()
        for pattern in patterns[:: max(1, len(patterns) // 60)]:
            await transport.send([lab.envelope(key) for key in keys])
            await transport.declare("g", (pattern,), change=True)
            entries = await lab.redis.xrange(lab.names.queue("g"))
            found = [re.match(rb'\[1,"[^"]*","([^"]*)"', fields[b"m"]).group(1).decode() for _, fields in entries]  # type: ignore[union-attr]
            assert found == [key for key in keys if matches(pattern, key)], pattern
            await transport.delete_group("g")
            await lab.redis.delete(lab.names.parked)

    async def test_no_pattern_keeps_the_server_busy(self, lab: Any) -> None:
        transport = await lab.transport()
        await transport.send([lab.envelope(".".join("a" * 100))])
        async with bounds.within(2):
            await transport.declare("g", (".".join("#a" * 20) + ".x", ".".join(["#", "a"] * 20) + ".x"), change=True)
        assert (await transport.stats("g")).waiting == 0
