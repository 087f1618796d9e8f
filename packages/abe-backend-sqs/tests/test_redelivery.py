"""What SQS delivers again to the consumer that had it, where the engine has it no more, or never had it."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest

from abe.backends.message_queue.base import Delivery, Disposition, Settlement
from abe.errors import BackendConnectionError, GroupMissingError, LeaseLostError
from abe_backend_sqs._receiver import SqsReceiver
from abe_contract_tests import bounds

FAILS = 0, "InternalError", False


async def subscribed(lab: Any, *, fifo: bool = False) -> SqsReceiver:
    transport = await lab.transport(lease=1.0, fifo=fifo)
    await transport.declare("g", None, change=False)
    receiver: SqsReceiver = await transport.subscribe("g", 10)
    return receiver


async def inject(lab: Any, *, fifo: bool = False) -> None:
    ordered = {"MessageGroupId": "m", "MessageDeduplicationId": "1"} if fifo else {}
    url = await lab.url("group", "g", ".fifo" if fifo else "")
    await lab.ask("send_message", QueueUrl=url, MessageBody='{"n":1}', **ordered)


async def next_of(receiver: SqsReceiver) -> Delivery:
    deliveries: Sequence[Delivery] = ()
    while not deliveries:
        deliveries = await receiver.receive(10)
    (delivery,) = deliveries
    return delivery


async def total(lab: Any, kind: str = "group") -> int:
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    found = await lab.ask("get_queue_attributes", QueueUrl=await lab.url(kind, "g"), AttributeNames=names)
    return sum(int(found["Attributes"][name]) for name in names)


async def given_up(receiver: SqsReceiver, settlement: Settlement) -> None:
    """Fail to settle as the engine does that has no time left."""
    (error,) = await receiver.settle([settlement])
    assert isinstance(error, BackendConnectionError)
    settlement.delivery.lost = True


@pytest.mark.parametrize("fifo", [False, True])
async def test_what_came_unsought_and_could_not_be_given_back_is_handed_out_next(lab: Any, fifo: bool) -> None:
    async with bounds.within(30):
        receiver = await subscribed(lab, fifo=fifo)
        await inject(lab, fifo=fifo)
        lab.gate.fails(1, "ChangeMessageVisibilityBatch" if fifo else "SendMessageBatch", FAILS)
        while not await receiver._again(10):
            pass
        delivery = await next_of(receiver)
        assert delivery.attempt == 1, "no handler had it before"
        assert not any(await receiver.ack([delivery], verify=True))
        await receiver.close()


@pytest.mark.parametrize("fifo", [False, True])
@pytest.mark.parametrize("renewed", [False, True])
@pytest.mark.parametrize(
    ("disposition", "operation", "attempt"),
    [
        (Disposition.RETRY, "ChangeMessageVisibilityBatch", 2),
        (Disposition.RELEASE, "SendMessageBatch", 1),
    ],
)
async def test_what_could_not_be_settled_until_its_lease_was_over_is_handed_out_next(
    lab: Any, disposition: Disposition, operation: str, attempt: int, fifo: bool, renewed: bool
) -> None:
    async with bounds.within(30):
        receiver = await subscribed(lab, fifo=fifo)
        await inject(lab, fifo=fifo)
        delivery = await next_of(receiver)
        delivery.begun = disposition is Disposition.RETRY
        lab.gate.fails(1, "ChangeMessageVisibilityBatch" if fifo else operation, FAILS)
        await given_up(receiver, Settlement(delivery, disposition))
        if renewed:  # for the sake of another message
            receiver._in_flight[delivery.native].deadline = time.monotonic()
            assert not await receiver.renew([])
        again = await next_of(receiver)
        assert again.attempt == attempt
        assert not any(await receiver.ack([again], verify=True))
        await receiver.close()


@pytest.mark.parametrize("renewed", [False, True])
async def test_what_was_handled_and_could_not_be_acknowledged_is_deleted_next(lab: Any, renewed: bool) -> None:
    async with bounds.within(30):
        receiver = await subscribed(lab)
        await inject(lab)
        delivery = await next_of(receiver)
        delivery.begun = delivery.handled = True
        lab.gate.fails(1, "DeleteMessageBatch", FAILS)
        (error,) = await receiver.ack([delivery], verify=True)
        assert isinstance(error, BackendConnectionError)
        delivery.lost = True
        if renewed:
            receiver._in_flight[delivery.native].deadline = time.monotonic()
            assert not await receiver.renew([])
        while await total(lab):
            assert not await receiver.receive(10)
        await receiver.close()


@pytest.mark.parametrize("renewed", [False, True])
async def test_what_has_a_copy_in_its_place_is_only_deleted(lab: Any, renewed: bool) -> None:
    async with bounds.within(30):
        receiver = await subscribed(lab)
        await inject(lab)
        delivery = await next_of(receiver)
        delivery.begun = True
        lab.gate.fails(1, "DeleteMessageBatch", FAILS)
        await given_up(receiver, Settlement(delivery, Disposition.DEAD, reason="bad"))
        if renewed:
            receiver._in_flight[delivery.native].deadline = time.monotonic()
            assert not await receiver.renew([])
        while await total(lab):
            assert not await receiver.receive(10)
        assert await total(lab, "dead") == 1
        await receiver.close()


async def test_what_could_not_be_put_off_keeps_nothing_from_being_deleted(lab: Any) -> None:
    async with bounds.within(30):
        receiver = await subscribed(lab)
        await inject(lab)
        early = await next_of(receiver)
        await inject(lab)
        repeated = await next_of(receiver)
        lab.gate.fails(1, "SendMessageBatch", FAILS)
        await receiver._set_aside([early.native], [repeated.native])
        assert len(lab.gate.requests("DeleteMessageBatch")) == 1
        assert await total(lab) == 1
        await receiver.close()


async def test_leases_that_ran_out_do_not_hide_that_the_group_is_missing(lab: Any) -> None:
    async with bounds.within(30):
        receiver = await subscribed(lab)
        held = []
        for _ in range(3):
            await inject(lab)
            held.append(await next_of(receiver))
        await lab.ask("delete_queue", QueueUrl=await lab.url("group", "g"))
        for each in held:
            receiver._in_flight[each.native].deadline = time.monotonic()
        with pytest.raises(GroupMissingError):
            await receiver.recover(held)
        acked, nacked, renewed = held
        (error,) = await receiver.ack([acked], verify=True)
        assert isinstance(error, LeaseLostError)
        (error,) = await receiver.settle([Settlement(nacked, Disposition.RETRY)])
        assert isinstance(error, LeaseLostError)
        assert await receiver.renew([renewed]) == [renewed]
        await (await lab.transport()).declare("g", None, change=False)
        assert await receiver.recover(held) == held
        await receiver.close()


async def test_a_poll_of_a_deleted_queue_is_not_taken_over_by_a_consumer_of_the_next(lab: Any) -> None:
    async with bounds.within(30):
        transport = await lab.transport(wait=5)
        await transport.declare("g", None, change=False)
        first = await transport.subscribe("g", 10)
        waiting = asyncio.create_task(first.receive(5))
        while not lab.gate.requests("ReceiveMessage"):  # noqa: ASYNC110 - the server sets no event of ours
            await asyncio.sleep(0.01)
        await first.stop()
        assert not await waiting
        await transport.delete_group("g")
        await transport.declare("g", None, change=False)
        second = await transport.subscribe("g", 10)
        waiting = asyncio.create_task(second.receive(5))
        while len(lab.gate.requests("ReceiveMessage")) < 2 and not waiting.done():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        assert len(lab.gate.requests("ReceiveMessage")) == 2
        for receiver in (first, second):
            await receiver.close()
        await waiting
