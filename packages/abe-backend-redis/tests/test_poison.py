"""Whatever is found in Redis under our names stops nobody but itself."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from redis_primitives import dead, letters_of, total

from abe import AsyncLoopConsumer, ExponentialBackoff, RetryPolicy
from abe.backends.message_queue.base import Delivery, Disposition, Metadata, Settlement
from abe.errors import AbeError, DecodeError
from abe_backend_redis import _wire
from abe_contract_tests import bounds

Until = Callable[..., Awaitable[None]]
Collect = Callable[..., Awaitable[list[Delivery]]]

WIDE = {f"field-{number}": "x" for number in range(4_001)}
"""More fields than Lua passes to a command."""

DEEP = "[" * 10_240
"""Nested more deeply than parsers recurse."""

ENTRIES: dict[str, list[Any]] = {
    "4,001 fields beside the body": ["p", b"{}", *(word for pair in WIDE.items() for word in pair)],
    "4,001 fields and no body": [word for pair in WIDE.items() for word in pair],
    "4,001 times the body": ["p", b"{}"] * 4_001,
    "an envelope that is nested deeply": ["m", DEEP, "p", b"{}"],
    "an envelope with a deeply nested part of its own": ["m", '[1,"id","k",0,null,' + DEEP, "p", b"{}"],
    "an envelope with deeply nested headers": ["m", '[1,"id","k",0,' + DEEP, "p", b"{}"],
    "an envelope that is a number": ["m", "1", "p", b"{}"],
    "an envelope of the wrong types": ["m", '[1,2,3,"4"]', "p", b"{}"],
    "an envelope of another version": ["m", '[9,"id","k",0]', "p", b"{}"],
    "an envelope of bytes": ["m", b"[1,\xff\xfe", "p", b"\xff"],
    "a time that no clock shows": ["m", '[1,"id","k",1e400]', "p", b"{}"],
    "a negative time": ["m", '[1,"id","k",-5]', "p", b"{}"],
    "half a surrogate": ["m", '[1,"\\ud800","k",0]', "p", b"{}"],
    "an id and a key of bytes": ["i", b"\xff\xfe", "k", b"\x00\xff", "p", b"{}"],
    "a body that is nested deeply": ["p", DEEP],
    "attempts without end": ["p", b"{}", "a", "9" * 400],
    "attempts that are infinite": ["p", b"{}", "a", "inf"],
    "attempts that are hexadecimal": ["p", b"{}", "a", "0x7fffffffffffffff"],
    "attempts below zero": ["p", b"{}", "a", "-7"],
    "the fields of a dead letter": ["r", b"\xff", "e", b"\xff", "t", "never", "a", "0"],
    "nothing but names": ["", ""],
    "fields named like no field": [b"\xff\x00", b"\x00", "p", b"{}"],
    "the same field twice": ["p", b"1", "p", b"{}", "k", "a", "k", "b"],
}


def member(entry: list[Any]) -> bytes:
    words = [word if isinstance(word, bytes) else word.encode() for word in entry]
    return b"1-1|" + _packed(words)


def _packed(words: list[bytes]) -> bytes:
    """MessagePack as Redis's Lua writes strings: of the type for text, whatever bytes they are."""
    return b"\xdd" + len(words).to_bytes(4, "big") + b"".join(b"\xdb" + len(w).to_bytes(4, "big") + w for w in words)


MEMBERS: dict[str, bytes] = {
    "nothing": b"",
    "no separator": b"hello",
    "nothing after the separator": b"1-1|",
    "half a message": member(["p", b"{}"])[:-1],
    "an odd number of words": member(["p", b"{}", "k"]),
    "a number": b"1-1|" + msgspec.msgpack.encode(17),
    "a map": b"1-1|" + msgspec.msgpack.encode({"p": "{}"}),
    "no words": b"1-1|" + msgspec.msgpack.encode([]),
    "words that are none": b"1-1|" + msgspec.msgpack.encode([1, 2.5, None, True, ["p"], {"p": 1}]),
    "deeply nested": b"1-1|" + b"\x91" * 20_000,
    "thousands of objects": b"1-1|" + b"\x01" * 20_000,
    "bytes": b"1-1|\xff\xfe\x00\xc1",
    **{f"the entry: {name}": member(entry) for name, entry in ENTRIES.items()},
}


@asynccontextmanager
async def consuming(backend: Any) -> AsyncIterator[list[Any]]:
    """Consume the group with a handler that fails, but for the good ones, which are noted."""
    good: list[Any] = []

    async def handle(message: Any) -> None:
        if not isinstance(message, dict) or "good" not in message:
            raise ValueError("odd")
        good.append(message["good"])

    async with AsyncLoopConsumer(
        backend, "g", concurrency=5, retry=RetryPolicy(max_attempts=2, backoff=ExponentialBackoff(initial=0.001))
    ) as consumer:
        running = asyncio.create_task(consumer.run(handle))
        yield good
        await consumer.shutdown()
        await running


class TestOddThings:
    """Each oddity in each place; the good message behind them arrives, and the dead letters can be worked with."""

    async def test_in_a_group_s_stream(self, one_lab: Any, until: Until) -> None:
        backend = await one_lab.backend(groups={"g": ()})
        for entry in ENTRIES.values():
            await one_lab.redis.execute_command("XADD", one_lab.names.queue("g"), "*", *entry)
        await self.survive(backend, until, len(ENTRIES))

    async def test_among_the_delayed(self, one_lab: Any, until: Until) -> None:
        backend = await one_lab.backend(groups={"g": ()})
        for number, odd in enumerate(MEMBERS.values()):
            await one_lab.redis.zadd(one_lab.names.delayed("g"), {odd: number})
        await self.survive(backend, until, len(MEMBERS))

    async def test_among_the_parked(self, one_lab: Any, until: Until) -> None:
        backend = await one_lab.backend()
        for entry in ENTRIES.values():
            await one_lab.redis.execute_command("XADD", one_lab.names.parked, "*", *entry)
        for number, odd in enumerate(MEMBERS.values()):
            await one_lab.redis.zadd(one_lab.names.parked_delayed, {odd: number})
        await backend.publish("good", {"good": 0})
        await backend.publish("good", {"good": 0}, delay=0.01)
        await backend.declare("narrow", ["good"])
        stats = await backend.stats("narrow")
        assert (stats.waiting, stats.delayed) == (1, 1)
        await backend.delete_group("narrow")
        await backend.declare("g", ["#"])
        await self.survive(backend, until, len(ENTRIES) + len(MEMBERS))

    async def test_among_the_dead_letters(self, one_lab: Any, until: Until) -> None:
        backend = await one_lab.backend(groups={"g": ()})
        for entry in ENTRIES.values():
            await one_lab.redis.execute_command("XADD", one_lab.names.dead("g"), "*", *entry)
        await self.survive(backend, until, len(ENTRIES))

    async def survive(self, backend: Any, until: Until, odd: int) -> None:
        async def dead() -> bool:
            stats = await backend.stats("g")
            return (stats.waiting, stats.in_flight, stats.delayed, stats.dead) == (0, 0, 0, odd)

        letters = backend.dead_letters("g")
        for turn in range(2):
            async with consuming(backend) as good:
                await backend.publish("good", {"good": turn})
                await backend.publish("good", {"good": turn}, delay=0.01)
                await until(dead, within=15)
                assert good == [turn, turn]
            ids = [letter.id async for letter in letters]
            assert await letters.get(ids[-1]) is not None
            assert await letters.replay(*ids) == odd
        assert (await backend.stats("g")).waiting == odd
        assert await letters.purge_all() == 0


async def test_a_due_time_that_is_none_stops_nobody(one_lab: Any, until: Until) -> None:
    backend = await one_lab.backend(groups={"g": ()})
    for number, score in enumerate(["-inf", "0", "1.5", "9e15", "inf"]):
        await one_lab.redis.zadd(one_lab.names.delayed("g"), {member(["p", b'{"good": %d}' % number]): score})
    async with consuming(backend) as good:

        async def arrived() -> bool:
            return len(good) == 3

        await until(arrived)


async def test_an_entry_with_too_many_fields_keeps_its_body_and_its_fields(one_lab: Any, collect: Collect) -> None:
    transport = await one_lab.transport()
    await transport.declare("g", None, change=False)
    receiver = await one_lab.receiver(transport)
    await one_lab.redis.execute_command("XADD", one_lab.names.queue("g"), "*", *ENTRIES["4,001 fields beside the body"])
    [delivery] = await collect(receiver, 1)
    assert not any(await receiver.settle([Settlement(delivery, Disposition.RETRY, delay=0.001)]))
    [again] = await collect(receiver, 1)
    assert (again.body, again.attempt) == (b"{}", 2)
    [(_, fields)] = await one_lab.redis.xrange(one_lab.names.queue("g"))
    others = msgspec.msgpack.decode(fields[b"x"], type=list[str])
    assert dict(zip(others[::2], others[1::2], strict=True)) == WIDE


async def test_one_of_a_batch_that_is_odd_is_settled_with_the_others(one_lab: Any, collect: Collect) -> None:
    transport = await one_lab.transport()
    await transport.declare("g", None, change=False)
    receiver = await one_lab.receiver(transport)
    await transport.send(one_lab.envelopes(2))
    await one_lab.redis.xadd(one_lab.names.queue("g"), WIDE)
    await transport.send(one_lab.envelopes(2))
    held = await collect(receiver, 5)
    assert [delivery.fault is None for delivery in held] == [True, True, False, True, True]
    verbs = [Disposition.RETRY, Disposition.DEAD, Disposition.DEAD, Disposition.RELEASE, Disposition.RETRY]
    assert not any(await receiver.settle([Settlement(d, verb) for d, verb in zip(held, verbs, strict=True)]))
    stats = await transport.stats("g")
    assert (stats.waiting, stats.in_flight, stats.dead) == (3, 0, 2)


async def test_a_registry_that_somebody_else_wrote_is_told(one_lab: Any) -> None:
    backend = await one_lab.backend()
    await backend.declare("g")
    await one_lab.redis.hset(one_lab.names.groups, "odd", DEEP)
    for call in (backend.groups(), backend.declare("odd"), backend.publish("k", {})):
        with pytest.raises(AbeError, match="'odd'"):
            await call
    await backend.delete_group("odd")
    await backend.publish("k", {})


@pytest.mark.parametrize("seed", range(3))
async def test_anything_at_all_may_lie_in_any_place(one_lab: Any, until: Until, seed: int) -> None:
    """What is drawn at random, many at once."""
    dice = random.Random(seed)
    backend = await one_lab.backend(max_attempts=2, groups={"g": ()})
    names = ["m", "p", "k", "i", "a", "r", "e", "t", "x", "", "zz"]
    words = [b"", b"\xff", b"[1,", b'[1,"a","b",0]', b"9" * 30, DEEP.encode(), b"{}", b"null", b"\x00" * 9, b"1-1"]
    for _ in range(150):
        entry = [word for _ in range(dice.randint(1, 6)) for word in (dice.choice(names), dice.choice(words))]
        place = dice.choice(["queue", "dead", "delayed"])
        key = one_lab.names._tag + place.encode() + b":g"
        if place == "delayed":
            odd = dice.choice(
                [member(entry), member(entry)[: dice.randint(0, 30)], dice.randbytes(dice.randint(0, 40))]
            )
            await one_lab.redis.zadd(key, {odd: dice.choice([0, 1, 1e12])})
        else:
            await one_lab.redis.execute_command("XADD", key, "*", *entry)
    async with consuming(backend) as good, bounds.within(20):
        await backend.publish("good", {"good": seed})

        async def arrived() -> bool:
            return good == [seed]

        await until(arrived)
        letters = [letter async for letter in backend.dead_letters("g")]
        assert await backend.dead_letters("g").replay(*{letter.id for letter in letters}) >= len(letters)


@pytest.mark.parametrize("header", [DEEP, '[1,"id","k",0,null,' + DEEP, '[1,"id","k",0,' + DEEP, "", "null", "\x00"])
def test_an_envelope_that_cannot_be_read_is_a_decode_error_and_nothing_else(header: str) -> None:
    with pytest.raises(DecodeError):
        _wire.unpack(header.encode())


class TestStrangers:
    async def test_a_body_alone_is_a_message(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        entry = await lab.redis.xadd(lab.names.queue("g"), {"p": '{"a": 1}'})
        [delivery] = await collect(receiver, 1)
        assert (delivery.body, delivery.fault) == (b'{"a": 1}', None)
        assert delivery.header == Metadata(entry.decode())
        await receiver.settle([dead(delivery)])
        assert await total(transport.replay("g", [entry.decode()])) == 1
        [again] = await collect(receiver, 1)
        assert (again.body, again.header) == (b'{"a": 1}', Metadata(entry.decode()))

    async def test_poison_becomes_a_dead_letter_of_raw_bytes(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        stream = lab.names.queue("g")
        await lab.redis.xadd(stream, {"m": '[9,"a","k",17]', "p": "from the future"})
        await lab.redis.xadd(stream, {"foo": "bar"})
        await lab.redis.xadd(stream, {"p": b"\xff\x00 no JSON"})
        await lab.redis.xadd(stream, {"p": "{}", "a": "9" * 5000})
        await backend.publish("k", {"good": True})
        async with backend.consume(group="g") as subscription, bounds.within(5):
            assert await subscription.receive() == {}
            message = await subscription.receive()
            assert message == {"good": True}
            await message.ack()
        letters = await backend.dead_letters("g").list()
        assert [letter.body for letter in letters] == [b"from the future", b"", b"\xff\x00 no JSON"]
        assert {letter.reason for letter in letters} == {"undecodable"}

    async def test_a_broken_envelope_is_told_to_who_asks(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await lab.redis.xadd(lab.names.queue("g"), {"m": "[1,broken", "p": "{}"})
        [delivery] = await collect(receiver, 1)
        with pytest.raises(DecodeError):
            receiver.metadata(delivery)
        await receiver.settle([dead(delivery)])
        [letter] = await letters_of(transport)
        assert letter.body == b"{}"
