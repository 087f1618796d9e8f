"""How consuming and publishing begin and end: what is given back, and what a cancellation leaves."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from abe.backends.message_queue.base import Delivery, Disposition, Settlement
from abe.errors import AbeError, BackpressureError
from abe_backend_rabbitmq import _movers
from abe_backend_rabbitmq._channel import Channel
from abe_backend_rabbitmq._consuming import Consuming
from abe_backend_rabbitmq._control import Lock
from abe_contract_tests import bounds

pytestmark = pytest.mark.xdist_group("rabbitmq-node")

Collect = Callable[..., Awaitable[list[Delivery]]]


async def test_what_is_given_back_to_a_full_group_goes_back_to_its_queue_at_once(
    lab: Any, collect: Callable[..., Awaitable[list[Delivery]]]
) -> None:
    transport = await lab.transport(max_backlog=2)
    await transport.declare("g", None, change=True)
    receiver = await lab.receiver(transport, prefetch=2)
    await transport.send(lab.envelopes(2))
    held = await collect(receiver, 2)
    ids = {receiver.metadata(each).id for each in held}
    async with bounds.within(10):
        while not any(await transport.send(waiting := lab.envelopes(1))):  # until the group is full
            ids.add(waiting[0].id)
    assert not any(await receiver.settle([Settlement(each, Disposition.RELEASE) for each in held]))
    await receiver.close()
    other = await lab.receiver(transport)
    assert {other.metadata(each).id for each in await collect(other, len(ids))} == ids


async def test_a_consumer_whose_beginning_is_cancelled_does_not_go_on_by_itself(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = await lab.transport()
    await transport.declare("g", None, change=True)
    receiver = await lab.receiver(transport)
    begun = asyncio.Event()

    async def begin(_: Consuming) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Consuming, "begin", begin)
    recovering = asyncio.create_task(receiver.recover([]))
    async with bounds.within(10):
        await begun.wait()
    recovering.cancel()
    await asyncio.wait([recovering])
    assert receiver._channel.closed == "the consumer did not begin"


async def test_what_arrives_while_a_mover_ends_is_not_taken_for_its_next_channel(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str | None] = []
    close = Channel.close

    async def closing(self: Channel) -> None:
        closed.append(self.closed)
        await close(self)

    transport = await lab.transport()
    await transport.declare("g", None, change=True)
    await lab.receiver(transport)
    monkeypatch.setattr(Channel, "close", closing)
    await transport.send(lab.envelopes(1, delay=3600))
    async with bounds.within(20):
        while not closed:  # noqa: ASYNC110 - it looks at the message, which is not near
            await asyncio.sleep(0.01)
    assert None not in closed


async def test_a_lock_whose_acquiring_is_cancelled_is_free(lab: Any) -> None:
    transport, other = await lab.transport(), await lab.transport()
    control = transport._broker.control
    connection = await control.connection()
    lock = Lock(control, lab.names.look("g"), 5.0)
    for turns in range(4):
        acquiring = asyncio.create_task(lock.acquire(connection))
        for _ in range(turns):
            await asyncio.sleep(0)
        acquiring.cancel()
        await asyncio.wait([acquiring])
    async with Lock(other._broker.control, lab.names.look("g"), 5.0).held():
        pass


async def test_publishes_with_little_time_share_one_channel_that_is_opened(lab: Any) -> None:
    transport = await lab.transport()
    await transport.declare("g", None, change=True)
    publisher = transport._broker.publisher
    publisher._channel.lose("lost")
    prepare, times, begun, go_on = publisher._prepare, 0, asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        nonlocal times
        times += 1
        begun.set()
        await go_on.wait()
        await prepare()

    publisher._prepare = slow
    async with bounds.within(20):
        for _ in range(3):
            opening = asyncio.create_task(publisher.open())
            await begun.wait()
            opening.cancel()
            await asyncio.wait([opening])
        go_on.set()
        assert not any(await transport.send(lab.envelopes(1)))
    assert times == 1


async def test_parked_messages_go_on_as_soon_as_their_group_has_room(
    lab: Any, collect: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = await lab.transport()
    await transport.send(lab.envelopes(9))
    publisher, parked = transport._broker.publisher, transport._broker.parked
    move = publisher.move

    async def two(copies: Sequence[Any], **options: Any) -> list[AbeError | None]:
        """Publish as many as there is room for."""
        outcomes = await move(copies[:2], **options) or [None] * len(copies[:2])
        return [*outcomes, *(BackpressureError("full") for _ in copies[2:])]

    monkeypatch.setattr(publisher, "move", two)
    await transport.declare("g", None, change=True)
    receiver = await lab.receiver(transport)
    seen = 0
    async with bounds.within(20):
        while seen < 9:
            found = await collect(receiver, min(2, 9 - seen))
            seen += len(found)
            await receiver.ack(found, verify=True)
            await parked._look()
    assert await lab.waiting(lab.names.parked) == 0


async def test_delayed_messages_come_in_time_where_several_processes_move_them(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes some, and returns those that are not near: one at a time, or the others find them in another order."""
    monkeypatch.setattr(_movers, "_PREFETCH", 4)
    monkeypatch.setattr(_movers, "_NEAR", 0.2)
    transports = [await lab.transport() for _ in range(3)]
    await transports[0].declare("g", None, change=True)
    receivers = [await lab.receiver(each) for each in transports]
    due: dict[str, float] = {}
    late: list[float] = []
    loop = asyncio.get_running_loop()

    async def receive(receiver: Any) -> None:
        while len(late) < 24:
            for delivery in await receiver.receive(10):
                late.append(loop.time() - due[receiver.metadata(delivery).id])
                await receiver.ack([delivery], verify=False)

    async with bounds.within(40), asyncio.TaskGroup() as tasks:
        for receiver in receivers:
            tasks.create_task(receive(receiver))
        for _ in range(24):
            message = lab.envelope(delay=6.4)
            due[message.id] = loop.time() + message.delay
            assert not any(await transports[0].send([message]))
            await asyncio.sleep(0.4)  # the rate of a publisher
    assert max(late) < bounds.slowness() * 0.5, late
