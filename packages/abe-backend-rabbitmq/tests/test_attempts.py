"""Attempts that the broker counts and no handler has begun: what is given up for its attempts, and what is not."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import AsyncMock

import aio_pika
import pytest

from abe import AsyncLoopConsumer, ConstantBackoff, Message, RetryPolicy
from abe.backends.message_queue.base import Delivery, Disposition, Settlement
from abe.errors import BackendConnectionError, PermissionDeniedError
from abe_backend_rabbitmq._control import Control
from abe_contract_tests import bounds

pytestmark = pytest.mark.xdist_group("rabbitmq-node")

Collect = Callable[..., Awaitable[list[Delivery]]]


async def taken_and_lost(lab: Any, times: int) -> None:
    """Deliver the only message of the queue to a client that vanishes, as often as that."""
    async with await aio_pika.connect(lab.url) as connection, bounds.within(20):
        for _ in range(times):
            channel = await connection.channel()
            queue = await channel.get_queue(lab.names.queue("g"), ensure=False)
            while await queue.get(fail=False) is None:  # noqa: ASYNC110 - it is on its way back
                await asyncio.sleep(0.005)
            await channel.close()


async def one(collect: Collect, receiver: Any) -> tuple[int, int, int | None, Delivery]:
    (delivery,) = await collect(receiver, 1)
    return delivery.attempt, delivery.uncertain, delivery.alone, delivery


def alone(delivery: Delivery) -> list[Settlement]:
    return [Settlement(delivery, Disposition.RELEASE, alone=True)]


@pytest.fixture
async def transport(lab: Any) -> Any:
    transport = await lab.transport()
    await transport.declare("g", None, change=True)
    await transport.send(lab.envelopes(1))
    return transport


@pytest.mark.parametrize("delay", [0.0, 0.05])
async def test_what_fails_in_a_live_process_is_counted_and_what_was_uncertain_forgotten(
    lab: Any, collect: Collect, transport: Any, delay: float
) -> None:
    await taken_and_lost(lab, 3)
    receiver = await lab.receiver(transport)
    *counts, delivery = await one(collect, receiver)
    assert counts == [4, 3, None]
    assert not any(await receiver.settle([Settlement(delivery, Disposition.RELEASE)]))
    *counts, delivery = await one(collect, receiver)
    assert counts == [4, 3, None], "it was given back"
    assert not any(await receiver.settle([Settlement(delivery, Disposition.RETRY, delay=delay)]))
    *counts, delivery = await one(collect, receiver)
    assert counts == [2, 0, None], "one attempt has failed"
    assert not any(await receiver.settle([Settlement(delivery, Disposition.RETRY, delay=delay)]))
    *counts, delivery = await one(collect, receiver)
    assert counts == [3, 0, None]
    await receiver.ack([delivery], verify=True)


async def test_it_is_recorded_that_a_handler_begins_with_nothing_else_in_hand(
    lab: Any, collect: Collect, transport: Any
) -> None:
    await taken_and_lost(lab, 1)
    receiver = await lab.receiver(transport)
    *_, delivery = await one(collect, receiver)
    assert not any(await receiver.settle(alone(delivery)))
    await receiver.close()
    await taken_and_lost(lab, 2)  # no handler has begun
    receiver = await lab.receiver(transport, prefetch=1)
    *_, tried, delivery = await one(collect, receiver)
    assert tried == 0
    assert not any(await receiver.settle([Settlement(delivery, Disposition.RELEASE)]))  # nor here
    await receiver.close()
    await taken_and_lost(lab, 1)
    receiver = await lab.receiver(transport, prefetch=1)
    attempt, uncertain, tried, delivery = await one(collect, receiver)
    assert (attempt - uncertain, tried) == (1, 0)
    assert uncertain >= 4  # the broker may have counted what was on its way to one that was closed
    await receiver._channel.close()  # as when the process is killed
    another = await lab.transport()
    other = await lab.receiver(another)
    *_, tried, delivery = await one(collect, other)
    assert tried is None, "it has others in hand"
    assert not any(await other.settle([Settlement(delivery, Disposition.RELEASE)]))
    await other.close()
    other = await lab.receiver(another, prefetch=1)
    *_, tried, delivery = await one(collect, other)
    assert tried == 1, "a handler had begun"
    name = lab.names.tried("g", _record(delivery))
    assert await transport._broker.control.count(name) == 0
    delivery.header = other.metadata(delivery)  # as when a handler looks at the id
    assert not any(await other.settle([Settlement(delivery, Disposition.DEAD, reason="r")]))
    assert await other.receive(1) == []
    assert await transport._broker.control.count(name) is None


def _record(delivery: Delivery) -> str:
    return str(delivery.header.properties.partition(b"abe-aloneS\0\0\0\x10")[2][:16], "ascii")  # type: ignore[attr-defined]


async def test_a_connection_of_our_own_that_is_lost_meanwhile_ends_no_try(
    lab: Any, collect: Collect, transport: Any
) -> None:
    await taken_and_lost(lab, 1)
    receiver = await lab.receiver(transport, prefetch=1)
    *counts, delivery = await one(collect, receiver)
    assert not any(await receiver.settle(alone(delivery)))
    for _ in range(2):
        *counts, delivery = await one(collect, receiver)
        assert counts == [2, 1, 0]
        await receiver._channel.close()
        await receiver.recover([])
    await collect(receiver, 1)


@pytest.mark.parametrize("backoff", [0.0, 0.02])
async def test_handlers_get_as_many_tries_as_are_configured_whatever_the_broker_has_counted(
    lab: Any, backoff: float
) -> None:
    backend = await lab.backend(groups={"g": ()})
    await backend.publish("k", {})
    await taken_and_lost(lab, 7)
    tries = 0
    last = asyncio.Event()

    async def fails(_: Message) -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            last.set()
        raise ValueError("never")

    policy = RetryPolicy(max_attempts=3, backoff=ConstantBackoff(backoff))
    async with AsyncLoopConsumer(backend, "g", retry=policy) as consumer, bounds.within(20):
        running = asyncio.create_task(consumer.run(fails))
        await last.wait()
        while not (letters := await backend.dead_letters("g").list()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await consumer.shutdown()
        await running
    assert tries == 3
    assert letters[0].reason == "ValueError: never"


async def full_group(lab: Any, collect: Collect, *, lost: int = 0) -> tuple[Any, Any, Delivery]:
    """Return a transport, a receiver that has a message of a group which is full beside it, and that message."""
    transport = await lab.transport(max_backlog=2)
    await transport.declare("g", None, change=True)
    await transport.send(lab.envelopes(1))
    await taken_and_lost(lab, lost)
    receiver = await lab.receiver(transport, prefetch=1)
    (delivery,) = await collect(receiver, 1)
    async with bounds.within(10):
        while not any(await transport.send(lab.envelopes(1))):
            continue
    return transport, receiver, delivery


async def test_what_fails_while_its_group_is_full_counts_too(lab: Any, collect: Collect) -> None:
    _, receiver, delivery = await full_group(lab, collect)
    assert not any(await receiver.settle([Settlement(delivery, Disposition.RETRY)]))
    (again,) = await collect(receiver, 1)
    assert receiver.metadata(again).id == receiver.metadata(delivery).id
    assert (again.attempt, again.uncertain) == (2, 0)


async def test_what_is_to_be_handled_alone_while_its_group_is_full_is_recorded_without_a_copy(
    lab: Any, collect: Collect
) -> None:
    _, receiver, delivery = await full_group(lab, collect, lost=3)
    assert not any(await receiver.settle(alone(delivery)))
    *counts, again = await one(collect, receiver)
    assert receiver.metadata(again).id == receiver.metadata(delivery).id
    assert counts == [4, 3, 0]
    await receiver._channel.close()  # as when the process is killed
    other = await lab.receiver(await lab.transport(max_backlog=2), prefetch=1)
    *counts, again = await one(collect, other)
    assert counts == [6, 5, None]
    assert not any(await other.settle(alone(again)))
    *counts, again = await one(collect, other)
    assert other.metadata(again).id == receiver.metadata(delivery).id
    assert counts == [6, 5, 1]


async def test_a_record_is_deleted_when_its_message_returns_under_the_same_name(lab: Any, collect: Collect) -> None:
    transport = await lab.transport(max_backlog=2)
    await transport.declare("g", None, change=True)
    await transport.send(lab.envelopes(1))
    await taken_and_lost(lab, 1)
    receiver = await lab.receiver(transport, prefetch=1)
    *_, delivery = await one(collect, receiver)
    assert not any(await receiver.settle(alone(delivery)))
    *_, tried, delivery = await one(collect, receiver)
    assert tried == 0
    name = lab.names.tried("g", _record(delivery))
    assert await transport._broker.control.count(name) == 0
    async with bounds.within(10):
        while not any(await transport.send(lab.envelopes(1))):
            continue
    assert not any(await receiver.settle([Settlement(delivery, Disposition.RELEASE)]))
    assert await transport._broker.control.count(name) is None
    await receiver.close()
    other = await lab.receiver(await lab.transport(), prefetch=1)
    while other.metadata((found := await one(collect, other))[-1]).id != receiver.metadata(delivery).id:
        await other.ack([found[-1]], verify=True)
    assert found[-2] == 0, "no handler had begun"


async def test_a_record_that_cannot_be_made_ends_no_consumer(
    lab: Any, collect: Collect, transport: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await taken_and_lost(lab, 1)
    receiver = await lab.receiver(transport, prefetch=1)
    *_, delivery = await one(collect, receiver)
    assert not any(await receiver.settle(alone(delivery)))
    monkeypatch.setattr(Control, "count", AsyncMock(side_effect=PermissionDeniedError("no right to configure")))
    *_, tried, delivery = await one(collect, receiver)
    assert tried == 0
    assert "handled alone: no right to configure" in caplog.text
    await receiver.ack([delivery], verify=True)


async def test_what_can_be_settled_in_no_other_way_returns_to_its_queue(
    lab: Any, collect: Collect, transport: Any
) -> None:
    receiver = await lab.receiver(transport, prefetch=1)
    *_, delivery = await one(collect, receiver)
    transport._broker.publisher.move = AsyncMock(side_effect=BackendConnectionError("no connection to publish"))
    outcomes = await receiver.settle([Settlement(delivery, Disposition.RETRY)])
    assert [each.retryable for each in outcomes] == [True]
    assert not any(await receiver.settle([Settlement(delivery, Disposition.RETURN)]))
    *counts, again = await one(collect, receiver)
    assert counts == [1, 0, None]
    await receiver.ack([again], verify=True)
