"""Publishing, and what the transport tells, on each make of server."""

import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis_primitives import dead, letters_of, release, retry, total

from abe.backends.message_queue.base import Delivery
from abe.errors import (
    BackpressureError,
    ConfigurationError,
    GroupMissingError,
    UnroutableError,
    UnsupportedCapabilityError,
)
from abe_contract_tests import bounds

Collect = Callable[..., Awaitable[list[Delivery]]]


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
