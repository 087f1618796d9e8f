"""The primitives."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import aio_pika
import msgspec
import pytest

from abe.backends.message_queue.base import DeadLetter, Delivery, Disposition, Settlement
from abe.backends.message_queue.base.names import matches
from abe.errors import (
    BackendConnectionError,
    BackpressureError,
    ConfigurationError,
    LeaseLostError,
    PublishUnknownError,
    UnroutableError,
)
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._transport import RabbitMQTransport
from abe_contract_tests import bounds

Collect = Callable[..., Awaitable[list[Delivery]]]

pytestmark = pytest.mark.xdist_group("rabbitmq")


def retry(delivery: Delivery, delay: float = 0.0) -> Settlement:
    return Settlement(delivery, Disposition.RETRY, delay=delay)


def release(delivery: Delivery) -> Settlement:
    return Settlement(delivery, Disposition.RELEASE)


def dead(delivery: Delivery, reason: str = "why", error: str = "trace") -> Settlement:
    return Settlement(delivery, Disposition.DEAD, reason=reason, error=error)


async def buried(transport: RabbitMQTransport, group: str = "g") -> list[DeadLetter]:
    return [letter async for page in transport.dead_letters(group) for letter in page]


class TestPublishing:
    async def test_order_is_kept_within_and_across_batches(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        sent = lab.envelopes(900)
        await asyncio.gather(*(transport.send(sent[start : start + 300]) for start in range(0, 900, 300)))
        received = await collect(receiver, 900)
        assert [receiver.metadata(delivery).id for delivery in received] == [envelope.id for envelope in sent]

    async def test_patterns_mean_the_same_to_rabbitmq_as_to_us(self, lab: Any) -> None:
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
        await transport.declare("g", ("nothing",), change=True)
        for pattern in patterns[:: max(1, len(patterns) // 30)]:
            await transport.declare("g", (pattern,), change=True)
            outcomes = await transport.send([lab.envelope(key) for key in keys]) or [None] * len(keys)
            wanted = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome is None]
            assert wanted == [key for key in keys if matches(pattern, key)], pattern


class TestTopology:
    async def test_a_queue_with_other_arguments_is_named_with_both_values_and_a_remedy(self, lab: Any) -> None:
        await (await lab.transport(max_backlog=10)).declare("g", None, change=True)
        transport = await lab.transport(max_backlog=20)
        with pytest.raises(ConfigurationError) as caught:
            await transport.declare("other", None, change=True)
            await transport.declare("g", None, change=True)
        text = str(caught.value)
        for part in (lab.names.queue("g"), "x-max-length", "9", "19", "QUEUE_MAX_BACKLOG"):
            assert part in text
        assert "guest" not in text

    async def test_an_exchange_of_another_namespace_is_refused(self, lab: Any, lab_at: Callable[..., Any]) -> None:
        await lab.transport()
        with pytest.raises(ConfigurationError, match=lab.names.exchange):
            await lab_at(lab.url).transport(exchange=lab.names.exchange)

    async def test_an_exchange_of_our_own_choice_is_published_to(self, lab: Any) -> None:
        exchange = f"{lab.namespace}-events"
        transport = await lab.transport(exchange=exchange)
        await transport.declare("g", None, change=True)
        channel = await lab.pika()
        await (await channel.get_exchange(exchange)).publish(aio_pika.Message(b"{}"), "a.b")
        await channel.exchange_delete(exchange)
        assert (await transport.stats("g")).waiting == 1

    async def test_an_exchange_deleted_underneath_comes_back_with_its_bindings(
        self, lab: Any, collect: Collect, caplog: pytest.LogCaptureFixture
    ) -> None:
        transport = await lab.transport()
        await transport.declare("orders", ("orders.*",), change=True)
        await transport.declare("all", None, change=True)
        await (await lab.pika()).exchange_delete(lab.names.exchange)
        backend = await lab.backend()
        with caplog.at_level(logging.WARNING, "abe.rabbitmq"):
            await backend.publish("orders.x", {"n": 1})
            await backend.publish("users.x", {"n": 2})
        assert "deleted underneath" in caplog.text
        assert [(await transport.stats(group)).waiting for group in ("orders", "all")] == [1, 2]


class TestBacklog:
    async def test_what_a_full_group_refuses_is_nowhere_and_what_only_some_took_goes_to_the_full_one_alone(
        self, lab: Any, collect: Collect
    ) -> None:
        transport = await lab.transport(max_backlog=5)
        for group in ("free", "full", "other"):
            await transport.declare(group, ("other",) if group == "other" else None, change=True)
        sent = lab.envelopes(8)
        assert await transport.send(sent[:5]) == ()
        got: dict[str, list[str]] = {"free": [], "full": []}
        receivers = {group: await lab.receiver(transport, group, prefetch=1) for group in got}

        async def drain(group: str, count: int) -> None:
            receiver = receivers[group]
            for _ in range(count):
                [delivery] = await collect(receiver, 1)
                got[group].append(receiver.metadata(delivery).id)
                await receiver.ack([delivery], verify=True)

        await drain("free", 5)
        outcomes = await transport.send(sent[5:])
        assert [type(outcome) for outcome in outcomes] == [PublishUnknownError, BackpressureError, BackpressureError]
        assert "'full'" in str(outcomes[0])
        assert "'free'" not in str(outcomes[0])
        for _ in range(3):
            outcomes = await transport.send(sent[5:])
            assert [type(outcome) for outcome in outcomes] == [
                PublishUnknownError,
                BackpressureError,
                BackpressureError,
            ]
        await drain("full", 2)
        async with bounds.within(10):
            left = sent[5:7]
            while outcomes := await transport.send(left):  # the queue says late that there is room again
                left = [each for each, outcome in zip(left, outcomes, strict=True) if outcome is not None]
        for group, receiver in receivers.items():
            while (await transport.stats(group)).waiting or receiver.in_flight:
                await drain(group, 1)
        assert got == {group: [envelope.id for envelope in sent[:7]] for group in receivers}
        assert transport._fan_out._partial == {}

    async def test_a_message_that_no_group_wants_is_not_refused_for_one_that_is_full(self, lab: Any) -> None:
        transport = await lab.transport(max_backlog=1)
        assert await transport.send(lab.envelopes(1, "early")) == ()  # parked
        await transport.declare("g", ("k",), change=True)
        outcomes = await transport.send([lab.envelope("k"), lab.envelope("other"), lab.envelope("k")])
        assert [type(outcome) for outcome in outcomes] == [type(None), UnroutableError, BackpressureError]


class TestOneGroup:
    @pytest.mark.parametrize("delay", [0.0, 0.1])
    @pytest.mark.parametrize("max_backlog", [None, 100])
    async def test_only_that_group_gets_it_whatever_it_wants(
        self, lab: Any, collect: Collect, delay: float, max_backlog: int | None
    ) -> None:
        transport = await lab.transport(max_backlog=max_backlog)
        missing = msgspec.structs.replace(lab.envelope("k", delay=delay), group="g")
        (outcome,) = await transport.send([missing])
        assert str(outcome) == "there is no group 'g'"
        await transport.declare("g", ("nothing",), change=True)
        await transport.declare("h", None, change=True)
        envelope = msgspec.structs.replace(lab.envelope("k", delay=delay, headers={"a": "b"}), group="g")
        assert await transport.send([envelope, lab.envelope("nothing")]) == ()
        receiver = await lab.receiver(transport)
        found = [receiver.metadata(each) for each in await collect(receiver, 2)]
        assert {each.key: each.headers for each in found} == {"k": {"a": "b"}, "nothing": None}
        assert (await transport.stats("h")).waiting == 1


class TestParked:
    async def test_the_first_group_gets_what_was_published_before_it(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        sent = lab.envelopes(1500)
        for start in range(0, 1500, 250):
            await transport.send(sent[start : start + 250])
        await transport.declare("g", None, change=True)
        received = await collect(receiver := await lab.receiver(transport, prefetch=2000), 1500)
        assert [receiver.metadata(delivery).id for delivery in received] == [envelope.id for envelope in sent]
        assert await lab.waiting(lab.names.parked) == 0

    async def test_those_that_nobody_wants_are_in_nobody_s_way_and_left_alone(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        unwanted = [lab.envelope("b.x") for _ in range(2_600)]
        wanted = [lab.envelope("a.x") for _ in range(20)]
        for start in range(0, 2_600, 250):
            await transport.send(unwanted[start : start + 250])
        await transport.send(wanted)
        await transport.declare("a", ("a.*",), change=False)
        receiver = await lab.receiver(transport, "a", prefetch=100)
        assert [receiver.metadata(each).id for each in await collect(receiver, 20)] == [each.id for each in wanted]
        for _ in range(4):  # as an idle consumer does
            transport._broker.parked.look()
            await asyncio.wait([transport._broker.parked._begun])
        assert await lab.waiting(lab.names.parked) == 2_600
        queue = await (await lab.pika()).get_queue(lab.names.parked)
        first = await queue.get()
        assert first.headers["x-delivery-count"] <= 2
        await first.nack()

    async def test_what_a_stranger_left_there_stops_nobody(self, lab: Any) -> None:
        transport = await lab.transport()
        await lab.put(lab.names.parked, b"\xff", headers={"abe-headers": "broken", "abe-due": -1})
        await transport.send([lab.envelope("a"), lab.envelope("b")])
        await transport.declare("g", ("a",), change=True)
        assert (await transport.stats("g")).waiting == 1
        await transport.declare("rest", None, change=True)
        assert (await transport.stats("rest")).waiting == 2

    async def test_a_full_group_gets_its_copies_later_and_the_others_theirs_once(
        self, lab: Any, collect: Collect
    ) -> None:
        transport = await lab.transport(max_backlog=5)
        sent = lab.envelopes(8)
        await transport.send(sent)
        await transport.declare("slow", ("nothing",), change=True)
        await transport.declare("fast", ("nothing",), change=True)
        await transport.declare("slow", ("#",), change=True)
        await transport.declare("fast", ("#",), change=True)
        seen: list[tuple[str, str]] = []
        for group in ("slow", "fast"):
            receiver = await lab.receiver(transport, group, prefetch=5)
            while (await transport.stats(group)).waiting or receiver.in_flight:
                held = await collect(receiver, 1)
                seen += [(group, receiver.metadata(delivery).id) for delivery in held]
                await receiver.ack(held, verify=True)
                await transport.declare(group, None, change=True)
        assert len(seen) == len(set(seen))
        assert [id for group, id in seen if group == "slow"] == [envelope.id for envelope in sent]


class TestDelayed:
    async def test_who_knows_old_groups_finds_the_one_that_wants_it(self, lab: Any, collect: Collect) -> None:
        transport, other = await lab.transport(), await lab.transport()
        await transport.declare("g", ("a",), change=True)
        (outcome,) = await transport.send([lab.envelope("b", delay=0.1)])
        assert isinstance(outcome, UnroutableError)
        await other.declare("h", ("b",), change=True)
        assert await transport.send([lab.envelope("b", delay=0.1)]) == ()
        await collect(await lab.receiver(transport, "h"), 1)

    async def test_the_groups_are_those_of_the_time_of_publishing(self, lab: Any) -> None:
        ours, theirs = await lab.transport(), await lab.transport()
        await ours.declare("one", None, change=True)
        await theirs.send(lab.envelopes(1, delay=60))
        await ours.declare("two", None, change=True)
        await theirs.send(lab.envelopes(1, delay=60))
        assert [(await ours.stats(group)).delayed for group in ("one", "two")] == [2, 1]

    async def test_an_unwanted_one_is_told_and_the_others_go(self, lab: Any) -> None:
        transport = await lab.transport()
        await transport.declare("g", ("a",), change=True)
        outcomes = await transport.send(
            [lab.envelope("a"), lab.envelope("b", delay=60), lab.envelope("a", delay=60), lab.envelope("b")]
        )
        assert [type(each) for each in outcomes] == [type(None), UnroutableError, type(None), UnroutableError]
        stats = await transport.stats("g")
        assert (stats.waiting, stats.delayed) == (1, 1)

    async def test_a_level_deleted_underneath_is_made_again(self, lab: Any) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        await transport.send(lab.envelopes(1, delay=0.4))
        await (await lab.pika()).queue_delete(lab.names.waiting("g", 2))
        assert await transport.send(lab.envelopes(3, delay=0.4)) == ()
        assert (await transport.stats("g")).delayed == 3

    async def test_a_retry_passes_the_same_levels_again_and_again(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        sent = lab.envelope("orders.x", headers={"h": "v"})
        await transport.send([sent])
        for attempt in range(1, 5):
            [delivery] = await collect(receiver, 1)
            assert (delivery.attempt, delivery.body) == (attempt, sent.body)
            assert receiver.metadata(delivery) == (sent.id, sent.key, sent.published_at, sent.headers)
            assert not any(await receiver.settle([retry(delivery, 0.1)]))
        assert await lab.waiting(lab.names.dead("g")) == 0


class TestSettling:
    async def test_what_was_settled_is_not_ours_any_more(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        [delivery] = await collect(receiver, 1)
        assert not any(await receiver.ack([delivery], verify=True))
        for outcomes in (
            await receiver.ack([delivery], verify=True),
            await receiver.settle([retry(delivery)]),
            await receiver.settle([dead(delivery)]),
        ):
            assert isinstance(outcomes[0], LeaseLostError)
        assert list(await receiver.renew([delivery])) == [delivery]
        assert (await transport.stats("g")).dead == 0

    async def test_an_endless_error_text_is_cut_and_buries_the_message_all_the_same(
        self, lab: Any, collect: Collect
    ) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(1))
        [delivery] = await collect(receiver, 1)
        assert not any(await receiver.settle([dead(delivery, "why" * 50_000, "x" * 500_000 + "the end")]))
        [letter] = await buried(transport)
        assert letter.error.endswith("the end")


class TestLeaving:
    async def test_closing_gives_back_everything(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        leaving, other = await lab.receiver(transport), await lab.receiver(transport, prefetch=5)
        await transport.send(lab.envelopes(5))
        await leaving.stop()
        await leaving.close()
        again = await collect(other, 5)
        assert {delivery.attempt for delivery in again} == {1}

    async def test_what_was_acknowledged_just_before_closing_does_not_come_again(
        self, lab: Any, collect: Collect
    ) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        for round in range(1, 6):
            receiver = await lab.receiver(transport, prefetch=600)
            await transport.send(lab.envelopes(600 if round == 1 else 400))
            held = await collect(receiver, 600)
            done = [delivery for number, delivery in enumerate(held) if number % 3]
            await receiver.stop()
            assert not any(await receiver.ack(done, verify=False))  # one by one: those in between are open
            await receiver.close()
            assert await lab.waiting(lab.names.queue("g")) == 200

    async def test_a_consumer_that_begins_anew_leaves_nothing_on_its_old_channel(
        self, lab: Any, collect: Collect
    ) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport, prefetch=3)
        await transport.send(lab.envelopes(6))
        await collect(receiver, 3)
        await receiver.recover([])
        again = await collect(receiver, 3)
        assert not any(await receiver.ack(again, verify=True))
        assert len(await collect(receiver, 3)) == 3

    async def test_a_lost_channel_loses_what_it_delivered_and_the_next_one_gets_it(
        self, lab: Any, collect: Collect
    ) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(3))
        held = await collect(receiver, 3)
        channel = receiver._channel
        assert channel is not None
        await channel.native.close()
        assert all(delivery.lost for delivery in held)
        assert list(await receiver.recover(held)) == list(held)
        again = await collect(receiver, 3)
        assert {delivery.attempt for delivery in again} == {1}
        assert all(await receiver.ack(held, verify=False))  # and costs the new channel nothing
        assert not any(await receiver.ack(again, verify=True))


class TestChangesThatDied:
    async def test_an_exchange_half_restored_is_restored_by_the_next(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await (await lab.transport()).declare("g", None, change=True)
        await (await lab.pika()).exchange_delete(lab.names.exchange)

        async def die(*_: object) -> None:
            raise BackendConnectionError("died here")

        with monkeypatch.context() as patch:
            patch.setattr("abe_backend_rabbitmq._groups.Groups._make_queues", die)
            with pytest.raises(BackendConnectionError, match="died here"):
                await lab.transport()
        transport = await lab.transport()
        assert await transport.send(lab.envelopes(1)) == ()
        assert (await transport.stats("g")).waiting == 1

    @pytest.mark.parametrize("change", ["declare", "delete"])
    async def test_a_change_is_finished_by_whoever_reads_the_registry(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        transport = await lab.transport()
        await transport.declare("g", ("a",), change=True)

        async def die(*_: object) -> None:
            raise BackendConnectionError("died here")

        with monkeypatch.context() as patch:
            patch.setattr("abe_backend_rabbitmq._groups.Groups._finish", die)
            with pytest.raises(BackendConnectionError, match="died here"):
                await (
                    transport.declare("g", ("b",), change=True) if change == "declare" else transport.delete_group("g")
                )
        other = await lab.transport()
        assert await other.groups() == ({"g": ("b",)} if change == "declare" else {})
        outcomes = await other.send([lab.envelope("a"), lab.envelope("b")])
        if change == "declare":
            assert [type(outcome) for outcome in outcomes] == [UnroutableError, type(None)]
        else:
            assert await lab.waiting(lab.names.parked) == 2

    async def test_a_group_that_cannot_be_finished_stops_nobody_else(
        self, lab: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        await (await lab.pika()).declare_queue(lab.names.queue("taken"), durable=True)
        transport = await lab.transport()
        with pytest.raises(ConfigurationError, match=lab.names.queue("taken")):
            await transport.declare("taken", None, change=True)
        other = await lab.transport()
        async with bounds.within(10):
            await other.declare("g", ("a",), change=True)
            assert await other.send([lab.envelope("a", delay=60)]) == ()
        assert set(await other.groups()) == {"g", "taken"}
        assert "half made" in caplog.text

    async def test_what_is_left_for_groups_that_are_gone_is_dropped(self, lab: Any) -> None:
        transport = await lab.transport()
        await lab.put(lab.names.parked, b"{}", headers={"abe-for": "gone", "abe-key": "a"})
        async with bounds.within(10):
            await transport.declare("g", ("b",), change=True)
        assert await lab.waiting(lab.names.parked) == 0

    async def test_who_shares_a_lock_does_not_free_it_for_the_other(self, lab: Any) -> None:
        transport = await lab.transport()
        keeper, connection = transport._broker.registry, await transport._broker.control.connection()
        rival = await lab.transport(publish_timeout=0.2)
        async with keeper.locked():
            async with keeper.locked(connection):
                pass
            with pytest.raises(BackendConnectionError, match="another process"):
                await rival.declare("g", None, change=False)
            assert await rival.groups() == {}  # reading needs no lock
        assert await rival.declare("g", None, change=False) == ("#",)


class TestRegistry:
    async def test_many_that_declare_at_once_lose_no_group(self, lab: Any) -> None:
        transports = [await lab.transport() for _ in range(4)]
        async with bounds.within(20):
            await asyncio.gather(*(each.declare(f"g{i}", (f"k{i}",), change=True) for i, each in enumerate(transports)))
        assert await transports[0].groups() == {f"g{i}": (f"k{i}",) for i in range(4)}

    async def test_a_cancelled_change_is_finished(self, lab: Any) -> None:
        transport = await lab.transport()
        for number in range(20):
            declaring = asyncio.create_task(transport.declare("g", (f"k{number}",), change=True))
            for _ in range(number):
                await asyncio.sleep(0)
            declaring.cancel()
            await asyncio.wait([declaring])
            other = await lab.transport()
            patterns = (await other.groups()).get("g", ())
            outcome = await other.send([other_envelope := lab.envelope(f"k{number}")])
            wanted = any(matches(pattern, other_envelope.key) for pattern in patterns)
            assert number == 0 or not patterns or (not outcome) is wanted
            await other.close()

    async def test_reading_it_often_does_not_wear_it_out(self, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("abe_backend_rabbitmq._registry._TOO_OFTEN", 3)
        transport = await lab.transport()
        await transport.declare("g", ("a",), change=True)
        for _ in range(12):
            assert await transport.groups() == {"g": ("a",)}
        assert await lab.waiting(lab.names.registry) == 1

    async def test_forty_that_start_at_once_on_a_group_are_all_let_in(self, lab: Any) -> None:
        owner = await lab.transport()
        await owner.declare("g", ("a.*",), change=False)
        async with owner._broker.registry.locked():  # nobody needs the lock
            transports = await asyncio.gather(*(lab.transport(publish_timeout=10.0) for _ in range(40)))

            async def join(transport: RabbitMQTransport) -> None:
                assert await transport.declare("g", None, change=False) == ("a.*",)
                await lab.receiver(transport, prefetch=1)

            async with bounds.within(20):
                await asyncio.gather(*(join(transport) for transport in transports))
        async with bounds.within(10):
            while await lab.waiting(lab.names.registry) != 1:  # it is in a reader's hands
                pass

    async def test_who_asks_for_other_patterns_is_told_those_that_there_are(self, lab: Any) -> None:
        transports = [await lab.transport() for _ in range(4)]
        asked = [(f"k{number}",) for number in range(4)]
        told = await asyncio.gather(
            *(each.declare("g", keys, change=False) for each, keys in zip(transports, asked, strict=True))
        )
        assert len(set(told)) == 1
        assert told[0] in asked
        assert await transports[0].declare("g", ("new",), change=True) == ("new",)
        assert await transports[1].declare("g", ("k1",), change=False) == ("new",)
        assert await transports[2].groups() == {"g": ("new",)}

    async def test_a_namespace_is_deleted_with_all_it_has(self, lab: Any) -> None:
        transport, other = await lab.transport(), await lab.transport()
        await transport.send(lab.envelopes(3))
        await transport.declare("g", ("a.*",), change=False)
        await transport.send([lab.envelope("a.b", delay=60)])
        await transport.delete_namespace()
        for queue in (lab.names.parked, lab.names.registry, lab.names.queue("g"), lab.names.dead("g")):
            assert await transport._broker.control.count(queue) is None
        await transport.delete_namespace()
        assert await other.groups() == {}
        assert await other.send(lab.envelopes(1)) == ()
        await other.declare("g", None, change=False)
        assert (await other.stats("g")).waiting == 1


class TestOddDelays:
    async def test_a_delayed_message_that_cannot_be_moved_keeps_no_other_waiting(
        self, lab: Any, collect: Collect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=False)
        receiver = await lab.receiver(transport)
        odd = _wire.copy

        def copy(header: Any, body: bytes, *rest: Any) -> bytes:
            if body == b"odd":
                raise ValueError("nobody knows how to copy this")
            return odd(header, body, *rest)

        monkeypatch.setattr("abe_backend_rabbitmq._wire.copy", copy)
        sent = [lab.envelope(delay=0.3, body=body) for body in (b"1", b"odd", b"2")]
        assert await transport.send(sent) == ()
        assert [each.body for each in await collect(receiver, 2)] == [b"1", b"2"]
        assert (await transport.stats("g")).delayed == 1

    async def test_a_foreign_message_on_a_level_goes_on_when_the_level_s_time_is_over(
        self, lab: Any, collect: Collect
    ) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=False)
        receiver = await lab.receiver(transport)
        await transport.send([lab.envelope(delay=0.3)])
        await collect(receiver, 1)
        await lab.put(lab.names.waiting("g", 1), b"{}", headers={"abe-until": "soon", "deep": {"er": [1, {"x": None}]}})
        assert [each.body for each in await collect(receiver, 1)] == [b"{}"]
