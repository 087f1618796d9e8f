"""The primitives, on each make of server."""

import asyncio
import itertools
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from abe.backends.message_queue.base import DeadLetter, Delivery, Disposition, Metadata, Settlement
from abe.backends.message_queue.base.names import matches
from abe.errors import (
    BackpressureError,
    ConfigurationError,
    DecodeError,
    GroupMissingError,
    LeaseLostError,
    UnroutableError,
    UnsupportedCapabilityError,
)
from abe_backend_redis import _receiver
from abe_backend_redis._receiver import RedisReceiver
from abe_backend_redis._scripts import NAMES
from abe_backend_redis._transport import RedisTransport
from abe_contract_tests import bounds

Collect = Callable[..., Awaitable[list[Delivery]]]
Until = Callable[..., Awaitable[None]]


def retry(delivery: Delivery, delay: float = 0.0) -> Settlement:
    return Settlement(delivery, Disposition.RETRY, delay=delay)


def release(delivery: Delivery) -> Settlement:
    return Settlement(delivery, Disposition.RELEASE)


def dead(delivery: Delivery, reason: str = "why", error: str = "trace") -> Settlement:
    return Settlement(delivery, Disposition.DEAD, reason=reason, error=error)


async def letters_of(transport: RedisTransport, group: str = "g") -> list[DeadLetter]:
    return [letter async for page in transport.dead_letters(group) for letter in page]


async def total(steps: AsyncGenerator[int]) -> int:
    return sum([count async for count in steps])


async def commands_called(lab: Any, name: str) -> int:
    found = await lab.redis.info("commandstats")
    return int(found.get(f"cmdstat_{name}", {}).get("calls", 0))


class TestPublishing:
    async def test_a_message_arrives_with_all_it_had(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        sent = lab.envelope("orders.created", headers={"h": "\u00fc"}, body=b'{"a": 1}')
        assert await transport.send([sent]) == ()
        [delivery] = await collect(receiver, 1)
        assert (delivery.body, delivery.attempt, delivery.fault) == (sent.body, 1, None)
        assert receiver.metadata(delivery) == (sent.id, sent.key, sent.published_at, sent.headers)

    async def test_each_group_gets_what_its_patterns_want(self, lab: Any) -> None:
        transport = await lab.transport()
        await transport.declare("all", None, change=True)
        await transport.declare("orders", ("orders.*",), change=True)
        await transport.declare("two", ("orders.#", "users.#"), change=True)
        keys = ["orders.created", "users.x.y", "orders", "other"]
        assert await transport.send([lab.envelope(key) for key in keys]) == ()
        counts = {group: (await transport.stats(group)).waiting for group in ("all", "orders", "two")}
        assert counts == {"all": 4, "orders": 1, "two": 3}

    async def test_a_message_that_no_group_wants_is_told(self, lab: Any) -> None:
        transport = await lab.transport()
        await transport.declare("orders", ("orders.*",), change=True)
        outcomes = await transport.send([lab.envelope("orders.x"), lab.envelope("users.x"), lab.envelope("orders.y")])
        assert [type(outcome) for outcome in outcomes] == [type(None), UnroutableError, type(None)]
        assert (await transport.stats("orders")).waiting == 2

    async def test_a_group_declared_elsewhere_gets_the_next_publish(self, lab: Any) -> None:
        ours, theirs = await lab.transport(), await lab.transport()
        await ours.declare("one", None, change=True)
        await ours.send([lab.envelope()])
        await theirs.declare("two", None, change=True)
        await ours.send([lab.envelope()])
        assert (await ours.stats("two")).waiting == 1
        await theirs.delete_group("two")
        await ours.send([lab.envelope()])
        assert not await lab.redis.exists(lab.names.queue("two"))
        await theirs.declare("one", ("nothing",), change=True)
        assert isinstance((await ours.send([lab.envelope()]))[0], UnroutableError)
        assert await ours.groups() == {"one": ("nothing",)}

    async def test_what_no_group_wants_is_told_however_many_keys_there_are(self, one_lab: Any) -> None:
        transport = await one_lab.transport()
        await transport.declare("orders", ("orders.*",), change=True)
        for start in range(0, 10_250, 250):
            await transport.send([one_lab.envelope(f"orders.{number}") for number in range(start, start + 250)])
        mixed = [one_lab.envelope("users.x"), *(one_lab.envelope(f"orders.n{number}") for number in range(249))]
        outcomes = await transport.send(mixed)
        assert [type(outcome) for outcome in outcomes] == [UnroutableError] + [type(None)] * 249

    async def test_order_is_kept_within_and_across_batches(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        sent = lab.envelopes(700)
        for start in range(0, 700, 100):
            await transport.send(sent[start : start + 100])
        received = await collect(receiver, 700)
        assert [receiver.metadata(delivery).id for delivery in received] == [envelope.id for envelope in sent]

    async def test_keys_used_by_something_else_are_a_matter_of_configuration(self, lab: Any) -> None:
        transport = await lab.transport()
        await lab.redis.set(lab.names.queue("g"), "mine")
        with pytest.raises(ConfigurationError, match="QUEUE_NAMESPACE"):
            await transport.declare("g", None, change=True)


class TestBacklog:
    async def test_it_is_exact(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport(max_backlog=10)
        await transport.declare("g", None, change=True)
        outcomes = await transport.send(lab.envelopes(25))
        assert [isinstance(outcome, BackpressureError) for outcome in outcomes] == [False] * 10 + [True] * 15
        assert (await transport.stats("g")).waiting == 10
        receiver = await lab.receiver(transport)
        held = await collect(receiver, 4)
        outcomes = await transport.send(lab.envelopes(5))
        assert [outcome is None for outcome in outcomes] == [True] * 4 + [False]
        await receiver.ack(held, verify=False)
        assert isinstance((await transport.send(lab.envelopes(1)))[0], BackpressureError)

    async def test_delayed_messages_count(self, lab: Any) -> None:
        transport = await lab.transport(max_backlog=3)
        await transport.declare("g", None, change=True)
        outcomes = await transport.send([*lab.envelopes(2, delay=60), *lab.envelopes(2)])
        assert [outcome is None for outcome in outcomes] == [True, True, True, False]

    async def test_messages_given_back_count(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport(max_backlog=4)
        await transport.declare("g", None, change=True)
        await transport.send(lab.envelopes(4))
        receiver = await lab.receiver(transport)
        held = await collect(receiver, 4)
        assert not any(await receiver.settle([release(delivery) for delivery in held[:3]]))
        outcomes = await transport.send(lab.envelopes(2))
        assert [outcome is None for outcome in outcomes] == [True, False]

    async def test_a_full_group_keeps_the_message_from_the_others_too(self, lab: Any) -> None:
        transport = await lab.transport(max_backlog=2)
        await transport.declare("few", ("a",), change=True)
        await transport.declare("many", None, change=True)
        await transport.send([lab.envelope("a"), lab.envelope("a")])
        await lab.redis.delete(lab.names.queue("many"))
        outcomes = await transport.send([lab.envelope("a"), lab.envelope("b")])
        assert isinstance(outcomes[0], BackpressureError)
        assert outcomes[1] is None
        assert await lab.redis.xlen(lab.names.queue("many")) == 1

    async def test_held_messages_count(self, lab: Any) -> None:
        transport = await lab.transport(max_backlog=2)
        outcomes = await transport.send([*lab.envelopes(1, delay=60), *lab.envelopes(2)])
        assert [outcome is None for outcome in outcomes] == [True, True, False]


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


class TestDelayed:
    async def test_not_before_and_soon_after(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        started = time.monotonic()
        await transport.send([lab.envelope(delay=0.3), lab.envelope()])
        assert (await transport.stats("g")).delayed == 1
        first, second = await collect(receiver, 2)
        assert 0.29 < time.monotonic() - started < 2.3 * bounds.slowness(started)
        assert receiver.metadata(first).id > receiver.metadata(second).id

    @pytest.mark.parametrize(
        ("delay", "refusal"), [(math.inf, ConfigurationError), (1e306, UnsupportedCapabilityError)]
    )
    async def test_what_is_no_time_any_more_is_refused(
        self, one_lab: Any, delay: float, refusal: type[Exception]
    ) -> None:
        backend = await one_lab.backend(groups={"g": ()})
        with pytest.raises(refusal):
            await backend.publish("k", {}, delay=delay)
        await backend.publish("k", {}, delay=backend.capabilities.max_delay)
        assert (await backend.stats("g")).delayed == 1

    async def test_any_number_becomes_due_at_once(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        for _ in range(5):
            await transport.send(lab.envelopes(250, delay=0.05))
        receiver = await lab.receiver(transport)
        assert len(await collect(receiver, 1250)) == 1250
        assert await lab.redis.zcard(lab.names.delayed("g")) == 0

    async def test_a_retry_waits_in_redis(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        [delivery] = await collect(receiver, 1)
        started = time.monotonic()
        assert not any(await receiver.settle([retry(delivery, 0.2)]))
        assert (await transport.stats("g")).delayed == 1
        [again] = await collect(receiver, 1)
        assert time.monotonic() - started > 0.19
        assert (again.body, again.attempt) == (delivery.body, 2)


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


class TestStats:
    async def test_they_are_exact(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send([*lab.envelopes(10), *lab.envelopes(2, delay=60)])
        held = await collect(receiver, 6)
        await receiver.settle([release(held[0]), release(held[1]), dead(held[2]), retry(held[3], 60.0)])
        stats = await transport.stats("g")
        assert (stats.waiting, stats.in_flight, stats.delayed, stats.dead) == (6, 2, 3, 1)
        assert stats.oldest is not None
        assert 0 <= stats.oldest < 5

    async def test_a_group_that_does_not_exist_is_named(self, lab: Any) -> None:
        transport = await lab.transport()
        for call in (
            transport.stats("nobody"),
            transport.subscribe("nobody", 10),
            letters_of(transport, "nobody"),
            total(transport.replay("nobody", None)),
            total(transport.purge("nobody", ["x"])),
        ):
            with pytest.raises(GroupMissingError, match="'nobody'"):
                await call
        await transport.delete_group("nobody")

    async def test_the_oldest_is_the_one_given_back_where_there_is_one(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        [held] = await collect(receiver, 1)
        assert (await transport.stats("g")).oldest is None
        await receiver.settle([release(held)])
        assert (await transport.stats("g")).oldest is not None

    async def test_a_stream_made_anew_by_a_publisher_is_counted(self, lab: Any) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        await lab.redis.delete(lab.names.queue("g"))
        await transport.send(lab.envelopes(2))
        assert (await transport.stats("g")).waiting == 2


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


class TestScripts:
    async def test_every_one_is_loaded_again_where_it_was_forgotten(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        for operation in (
            lambda: transport.declare("g", None, change=True),
            lambda: transport.send(lab.envelopes(3)),
            lambda: collect(receiver, 3),
            lambda: transport.groups(),
            lambda: transport.stats("g"),
            lambda: receiver.renew([Delivery(b"", None, 1, b"1-1")]),
            lambda: receiver.settle([]),
            lambda: receiver.recover([]),
            lambda: receiver.join(),
            lambda: total(transport.replay("g", None)),
            lambda: transport.delete_group("g"),
        ):
            await lab.redis.script_flush()
            await operation()

    async def test_the_first_publish_after_a_flush_is_not_doubled(self, lab: Any) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        await transport.send(lab.envelopes(1))
        await lab.redis.script_flush()
        await transport.send(lab.envelopes(1))
        assert (await transport.stats("g")).waiting == 2

    async def test_they_touch_no_key_that_they_were_not_given(self, lab: Any, collect: Collect) -> None:
        seen: dict[bytes, set[str]] = {}
        ended = asyncio.Event()
        watching = asyncio.create_task(_watch(lab, seen, ended))
        try:
            async with bounds.within(10):
                while b"begin" not in seen:
                    await lab.redis.echo("begin")
                    await asyncio.sleep(0.01)
                await _everything(lab, collect)
                await lab.redis.echo("end")
                await ended.wait()
        finally:
            watching.cancel()
        del seen[b"begin"], seen[b"end"]
        assert len(seen) == len(NAMES)
        assert {sha: strange for sha, strange in seen.items() if strange} == {}

    async def test_they_are_legal_on_a_node_of_a_cluster(
        self, launch: Any, lab_at: Any, collect: Collect, until: Until, caplog: pytest.LogCaptureFixture
    ) -> None:
        service = launch("--cluster-enabled", "yes")
        lab = lab_at(service.url)
        await lab.redis.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

        async def ready() -> bool:
            return b"cluster_state:ok" in await lab.redis.execute_command("CLUSTER", "INFO")

        await until(ready)
        caplog.set_level(logging.WARNING)
        await _everything(lab, collect)
        assert caplog.messages == []


async def _everything(lab: Any, collect: Collect) -> None:
    """Use every script, on most of its paths."""
    transport = await lab.transport(max_backlog=1000, lease=0.3)
    await transport.send([lab.envelope("a"), lab.envelope("b"), lab.envelope("a", delay=0.1)])
    await transport.declare("g", ("a",), change=True)
    await transport.declare("rest", None, change=True)
    await transport.groups()
    receiver, other = await lab.receiver(transport), await lab.receiver(transport)
    await transport.send(lab.envelopes(5, "a"))
    held = await collect(receiver, 7)
    await receiver.renew(held)
    await receiver.settle([retry(held[0]), retry(held[1], 0.05), release(held[2]), dead(held[3])])
    await receiver.ack([held[4]], verify=True)
    await receiver.recover([held[5], held[6]])
    await transport.stats("g")
    await total(transport.replay("g", None))
    await receiver.settle([dead(held[6])])
    await total(transport.purge("g", None))
    await collect(other, 6)
    await receiver.close()
    await transport.delete_group("g")


async def _watch(lab: Any, seen: dict[bytes, set[str]], ended: asyncio.Event) -> None:
    """Note for each script what it touched beside its KEYS, in our namespace or out of it."""
    from redis.asyncio import Redis

    client = Redis.from_url(lab.url)
    try:
        async with client.monitor() as monitor:
            keys: list[str] = []
            sha = b""
            async for entry in monitor.listen():
                words = entry["command"].split(" ")  # keys come before anything that may hold a space
                name = words[0].upper()
                if name == "ECHO":
                    seen[words[1].encode()] = set()
                    if words[1] == "end":
                        ended.set()
                elif name == "EVALSHA":
                    sha, count = words[1].encode(), int(words[2])
                    keys = words[3 : 3 + count]
                    seen.setdefault(sha, set())
                elif entry["client_type"] == "lua" and name != "TIME":
                    key = words[2] if name in ("XGROUP", "XINFO") else words[1]
                    touched = words[1:3] if name == "RENAME" else words[1:] if name == "DEL" else [key]
                    seen[sha] |= {f"{name} {each}" for each in touched if each not in keys}
    finally:
        await client.aclose()


async def _keep(receiver: RedisReceiver, delivery: Delivery) -> None:
    while True:
        await receiver.renew([delivery])
        await receiver.receive(1)


async def _is_blocked(lab: Any) -> bool:
    return any(client["name"] == "abe-read-g" and "b" in client["flags"] for client in await lab.redis.client_list())


def test_no_read_blocks_for_longer_than_the_declared_bound() -> None:
    assert _receiver.TICK <= 1.0
