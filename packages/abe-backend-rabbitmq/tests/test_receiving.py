"""How a receiver begins, and what it gives back."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from abe.backends.message_queue.base import Delivery, Disposition, Settlement
from abe_backend_rabbitmq._consuming import Consuming
from abe_contract_tests import bounds

pytestmark = pytest.mark.xdist_group("rabbitmq-node")


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
