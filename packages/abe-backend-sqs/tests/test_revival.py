"""Leases that ran out while nobody else had the message, and while somebody had."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from abe import AsyncLoopConsumer
from abe.backends.message_queue.base import Delivery, Disposition, Settlement
from abe.errors import LeaseLostError, PermissionDeniedError
from abe_backend_sqs._receiver import SqsReceiver
from abe_contract_tests import bounds
from abe_contract_tests.services import Service, sqs_service


def keep_busy(seconds: float) -> None:
    """Compute for that long, so that nothing else of the event loop gets its turn."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


async def receiving(lab: Any, count: int, **settings: Any) -> tuple[SqsReceiver, Sequence[Delivery]]:
    transport = await lab.transport(lease=1.0, **settings)
    await transport.declare("g", None, change=False)
    receiver: SqsReceiver = await transport.subscribe("g", 100)
    for n in range(count):
        await lab.ask("send_message", QueueUrl=await lab.url("group", "g"), MessageBody=f'{{"n":{n}}}')
    deliveries: list[Delivery] = []
    while len(deliveries) < count:
        deliveries += await receiver.receive(count - len(deliveries))
    return receiver, deliveries


async def run_out(receiver: SqsReceiver) -> None:
    """Wait until the leases of all that is held are over."""
    while any(held.deadline > time.monotonic() for held in receiver._in_flight.values()):  # noqa: ASYNC110 - by the clock
        await asyncio.sleep(0.05)


async def total(lab: Any, kind: str = "group") -> int:
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    found = await lab.ask("get_queue_attributes", QueueUrl=await lab.url(kind, "g"), AttributeNames=names)
    return sum(int(found["Attributes"][name]) for name in names)


async def test_an_event_loop_that_is_busy_past_the_lease_handles_each_message_once(lab: Any) -> None:
    """They were handled, and refused to be deleted by the consumer's own clock, until each was dead after its fifth time."""
    handled: list[int] = []
    done = asyncio.Event()

    async def handle(message: Any) -> None:
        keep_busy(0.5)
        handled.append(message["n"])
        if len(set(handled)) == 8:
            done.set()

    async with bounds.within(60):
        backend = await lab.backend(lease=1.0)
        await backend.declare("g")
        await backend.publish_many([("k", {"n": n}) for n in range(8)])
        async with AsyncLoopConsumer(backend, "g", concurrency=8) as consumer:
            running = asyncio.create_task(consumer.run(handle))
            await done.wait()
            while await total(lab):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)
            await consumer.shutdown()
            await running
        assert sorted(handled) == list(range(8))
        assert (await backend.stats("g")).dead == 0


@pytest.mark.parametrize("fifo", [False, True])
async def test_what_nobody_else_had_is_acknowledged_after_its_lease(lab: Any, fifo: bool) -> None:
    async with bounds.within(30):
        if fifo:
            transport = await lab.transport(lease=1.0, fifo=True)
            await transport.declare("g", None, change=False)
            url = await lab.url("group", "g", ".fifo")
            for n in range(3):
                await lab.ask(
                    "send_message", QueueUrl=url, MessageBody="{}", MessageGroupId="m", MessageDeduplicationId=f"{n}"
                )
            receiver = await transport.subscribe("g", 10)
            held = await receiver.receive(10)
        else:
            receiver, held = await receiving(lab, 3)
        await run_out(receiver)
        assert not any(await receiver.ack(held, verify=True))
        if not fifo:
            assert await total(lab) == 0
        await receiver.close()


async def test_what_somebody_else_has_is_not_acknowledged_after_the_lease(lab: Any) -> None:
    async with bounds.within(30):
        receiver, held = await receiving(lab, 2)
        await receiver.stop()
        await run_out(receiver)
        url = await lab.url("group", "g")
        theirs: list[Any] = []
        while len(theirs) < 2:
            reply = await lab.ask(
                "receive_message", QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=1, VisibilityTimeout=60
            )
            theirs += reply.get("Messages", [])
        outcomes = await receiver.ack(held, verify=False)
        assert [type(error) for error in outcomes] == [LeaseLostError] * 2
        assert await total(lab) == 2
        await receiver.close()


async def test_what_was_handled_and_refused_is_not_handed_out_again(lab: Any) -> None:
    """SQS says that a handle is none any more: what comes next of that message, and was with nobody else, is done."""
    async with bounds.within(30):
        receiver, held = await receiving(lab, 1)
        lab.gate.fails(1, "DeleteMessageBatch", (0, "ReceiptHandleIsInvalid", True))
        (failure,) = await receiver.ack([held[0]], verify=True)
        assert isinstance(failure, LeaseLostError)
        while await total(lab):
            assert not await receiver.receive(10)
        await receiver.close()


async def test_a_lease_that_is_renewed_late_is_ours_again(lab: Any) -> None:
    async with bounds.within(30):
        receiver, held = await receiving(lab, 2)
        await run_out(receiver)
        assert not await receiver.renew(held)
        assert all(receiver._in_flight[each.native].deadline > time.monotonic() for each in held)
        assert not any(await receiver.settle([Settlement(each, Disposition.RETRY, delay=0) for each in held]))
        again: list[Delivery] = []
        while len(again) < 2:
            again += await receiver.receive(10)
        assert {each.attempt for each in again} == {2}, "the delivery in between was no attempt"
        await receiver.close()


async def test_rights_that_are_missing_end_a_consumer_at_once(lab: Any, refusal: Any) -> None:
    """Each message was handled five times, with success, and then dead, while the consumer went on."""
    handled: list[int] = []

    async def handle(message: Any) -> None:
        handled.append(message["n"])

    async with bounds.within(30):
        backend = await lab.backend()
        await backend.declare("g")
        await backend.publish("k", {"n": 1})
        lab.gate.rules.append(lambda name, _: refusal("AccessDenied", 403) if name == "DeleteMessageBatch" else None)
        with pytest.raises(PermissionDeniedError):
            async with AsyncLoopConsumer(backend, "g") as consumer:
                await consumer.run(handle)
        assert handled == [1]
        lab.gate.rules.clear()


async def test_rights_that_are_missing_for_one_entry_are_told_at_once(lab: Any) -> None:
    async with bounds.within(30):
        receiver, held = await receiving(lab, 2)
        lab.gate.fails(1, "DeleteMessageBatch", (0, "AccessDenied", True), (1, "InternalError", False))
        refused, _ = await receiver.ack(held, verify=True)
        assert isinstance(refused, PermissionDeniedError)
        await receiver.close()


@pytest.fixture(scope="module")
def moto() -> Any:
    service: Service = sqs_service("moto")
    service.start()
    yield service
    service.stop()


async def test_an_old_handle_is_not_used_where_the_server_would_take_it(moto: Service) -> None:
    """moto deletes by it what somebody else has by now. SQS may."""
    from abe_backend_sqs import SqsSettings
    from abe_backend_sqs._transport import SqsTransport

    async with bounds.within(30):
        settings = SqsSettings(
            namespace="revival",
            endpoint_url=moto.url,
            region="us-east-1",
            access_key_id="test",
            secret_access_key="test",
            registry_ttl=0.1,
            wait=1,
            lease=1.0,
            pollers=1,
        )
        ours, theirs = SqsTransport(settings), SqsTransport(replace(settings, lease=30.0))
        await ours.declare("g", None, change=False)
        client = await ours.broker.clients.calls()
        url = (await ours.broker.groups.find(ours.broker.groups.names.queue("g"))).url
        await client.send_message(QueueUrl=url, MessageBody="{}")
        one = await ours.subscribe("g", 10)
        (mine,) = await one.receive(1)
        await one.stop()
        await run_out(one)
        other = await theirs.subscribe("g", 10)
        again: Sequence[Delivery] = ()
        while not again:
            again = await other.receive(1)
        (failure,) = await one.ack([mine], verify=True)
        assert isinstance(failure, LeaseLostError)
        assert not await other.renew([again[0]])
        assert not any(await other.ack([again[0]], verify=True))
        for receiver in (one, other):
            await receiver.close()
        for transport in (ours, theirs):
            await transport.close()
