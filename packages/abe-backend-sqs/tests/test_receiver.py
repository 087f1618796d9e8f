"""What a consumer does with what it holds: deletions that share requests, settlements that fail, what is given back, what is let go."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from aiohttp import web

from abe import AsyncLoopConsumer
from abe.backends.message_queue.base import Delivery, Disposition, Envelope, Settlement
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import BackendConnectionError, GroupMissingError, LeaseLostError
from abe_backend_sqs import _transport
from abe_backend_sqs._receiver import SqsReceiver
from abe_contract_tests import bounds

Refusal = Callable[..., web.Response]


async def holding(lab: Any, count: int, **settings: Any) -> tuple[SqsReceiver, Sequence[Delivery]]:
    """Return a receiver that holds that many messages."""
    transport = await lab.transport(**settings)
    await transport.declare("g", None, change=False)
    receiver: SqsReceiver = await transport.subscribe("g", 100)
    for n in range(count):
        await lab.ask("send_message", QueueUrl=await lab.url("group", "g"), MessageBody=f'{{"n":{n}}}')
    deliveries: list[Delivery] = []
    while len(deliveries) < count:
        deliveries += await receiver.receive(count - len(deliveries))
    return receiver, deliveries


async def stalled(
    monkeypatch: pytest.MonkeyPatch, receiver: SqsReceiver, operation: str
) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold up an operation until the first event is set; the second says that somebody waits for it."""
    client = await receiver._broker.clients.calls()
    go, waiting, call = asyncio.Event(), asyncio.Event(), getattr(client, operation)

    async def wait(**arguments: Any) -> Any:
        waiting.set()
        await go.wait()
        return await call(**arguments)

    monkeypatch.setattr(client, operation, wait)
    return go, waiting


def deleted(lab: Any) -> list[int]:
    """Return the sizes of the deletions so far."""
    return [len(each["Entries"]) for each in lab.gate.requests("DeleteMessageBatch")]


async def polled(lab: Any, times: int) -> None:
    """Wait until SQS was asked that often for messages."""
    while len(lab.gate.requests("ReceiveMessage")) < times:  # noqa: ASYNC110 - the server sets no event of ours
        await asyncio.sleep(0.01)


async def counts(lab: Any, kind: str = "group") -> tuple[int, int]:
    """Return how many messages wait, and how many are held."""
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    found = await lab.ask("get_queue_attributes", QueueUrl=await lab.url(kind, "g"), AttributeNames=names)
    return int(found["Attributes"][names[0]]), int(found["Attributes"][names[1]])


async def handled_by(lab: Any, done: int, **settings: Any) -> None:
    """Hold 12 messages in a consumer's handlers, have that many of them done, and stop when the first of them are deleted."""
    holding, deletable, end = asyncio.Event(), asyncio.Event(), asyncio.Event()
    held = 0

    async def handle(_: Any) -> None:
        nonlocal held
        held += 1
        if held == 12:
            holding.set()
        await (deletable if held <= done else end).wait()

    backend = await lab.backend(**settings)
    await backend.declare("g")
    await backend.publish_many([(f"k.{n}", {"n": n}) for n in range(12)])
    async with AsyncLoopConsumer(backend, "g", concurrency=12, prefetch=12) as consumer:
        running = asyncio.create_task(consumer.run(handle))
        await holding.wait()
        deletable.set()
        while not deleted(lab):  # noqa: ASYNC110 - the server sets no event of ours
            await asyncio.sleep(0.01)
        end.set()
        await consumer.shutdown()
        await running


async def test_acknowledgements_share_requests(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transport, "_LINGER", 60)
    async with bounds.within(15):
        await handled_by(lab, 12)
        assert deleted(lab) == [10, 2]
        assert await counts(lab) == (0, 0)


async def test_one_that_finds_none_to_share_its_request_with_leaves_soon(lab: Any) -> None:
    async with bounds.within(15):
        await handled_by(lab, 1)
        assert deleted(lab)[0] == 1


async def test_a_fifo_queue_is_not_kept_waiting_for_a_deletion(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transport, "_LINGER", 60)
    async with bounds.within(15):
        await handled_by(lab, 1, fifo=True)
        assert deleted(lab)[0] == 1


async def test_an_acknowledgement_whose_caller_is_cancelled_is_carried_out(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        async with backend.consume(group="g") as messages:
            await backend.publish("k", {"n": 1})
            ack = asyncio.create_task((await messages.receive()).ack())
            await asyncio.sleep(0)
            ack.cancel()
            await asyncio.wait([ack])
        assert await counts(lab) == (0, 0)


async def test_each_entry_of_a_request_has_an_outcome_of_its_own(lab: Any) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 10)
        lab.gate.fails(1, "DeleteMessageBatch", (1, "ReceiptHandleIsInvalid", True), (2, "InternalError", False))
        outcomes = await receiver.ack(held, verify=False)
        assert isinstance(outcomes[1], LeaseLostError)
        assert isinstance(outcomes[2], BackendConnectionError)
        assert [outcomes[0], *outcomes[3:]] == [None] * 8
        assert not any(await receiver.ack([held[2]], verify=True))
        await receiver.close()


async def test_what_may_be_deleted_when_the_receiver_is_closed_is_not_given_back(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 3)
        client = await receiver._broker.clients.calls()
        answered, delete = asyncio.Event(), client.delete_message_batch

        async def never(**arguments: Any) -> None:
            await delete(**arguments)
            answered.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(client, "delete_message_batch", never)
        ack = asyncio.create_task(receiver.ack([held[0]], verify=True))
        await answered.wait()
        ack.cancel()
        await asyncio.wait([ack])
        monkeypatch.setattr(client, "delete_message_batch", delete)
        await receiver.close()
        (copies,) = lab.gate.requests("SendMessageBatch")
        assert sorted(json.loads(each["MessageBody"])["n"] for each in copies["Entries"]) == sorted(
            json.loads(each.body)["n"] for each in held[1:]
        )
        assert await counts(lab) == (2, 0)


async def test_one_settlement_that_fails_does_not_double_another(
    lab: Any, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 2)
        lab.gate.times(1, "ChangeMessageVisibilityBatch", lambda _: refusal("RequestThrottled"))
        go, waiting = await stalled(monkeypatch, receiver, "send_message_batch")
        settlements = [
            Settlement(held[0], Disposition.RETRY, delay=60),
            Settlement(held[1], Disposition.DEAD, reason="bad"),
        ]
        settling = asyncio.create_task(receiver.settle(settlements))
        await waiting.wait()
        done, _ = await asyncio.wait([settling], timeout=0.3)
        assert not done, "one of its requests is under way"
        go.set()
        failed, moved = await settling
        assert isinstance(failed, BackendConnectionError)
        assert moved is None
        assert not any(await receiver.settle(settlements))
        assert await counts(lab, "dead") == (1, 0)
        assert len(lab.gate.requests("SendMessageBatch")) == 1
        await receiver.close()


async def test_a_lost_lease_is_still_told_when_another_settlement_has_to_be_repeated(lab: Any) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 2)
        lab.gate.fails(1, "DeleteMessageBatch", (0, "ReceiptHandleIsInvalid", True), (1, "InternalError", False))
        for second in (BackendConnectionError, type(None)):
            outcomes = await receiver.ack(held, verify=True)
            assert [type(each) for each in outcomes] == [LeaseLostError, second]
        await receiver.close()


async def test_what_an_answer_leaves_out_is_not_taken_for_done(lab: Any) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 2)
        lab.gate.times(1, "DeleteMessageBatch", lambda _: web.json_response({"Successful": [{"Id": "1"}]}))
        left_out, done = await receiver.ack(held, verify=False)
        assert isinstance(left_out, BackendConnectionError)
        assert "does not say whether" in str(left_out)
        assert done is None
        assert not any(await receiver.ack(held[:1], verify=False))
        assert await counts(lab) == (0, 1), "the second was said to be deleted, and the server was never asked"
        await receiver.close()


async def test_settlements_of_one_kind_make_no_requests_of_another(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 2)
        async with receiver._settlements._renewing:  # a renewal is under way, which only what is shown has to wait for
            assert not any(await receiver.settle([Settlement(held[0], Disposition.DEAD, reason="bad")]))
        assert not lab.gate.requests("ChangeMessageVisibilityBatch")
        await receiver.close()


async def test_whoever_is_cancelled_waits_for_what_it_began() -> None:
    ended: list[int] = []
    began = asyncio.Event()

    async def call(number: int) -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(number)

    task = asyncio.create_task(gather_all(call(1), call(2)))
    await began.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert ended == [1, 2]


@pytest.mark.parametrize("delay", [5, 0])
async def test_a_handle_that_sqs_does_not_take_is_a_lost_lease(lab: Any, delay: float) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        async with backend.consume(group="g") as messages:
            await backend.publish("k", {"n": 1})
            message = await messages.receive()
            lab.gate.fails(1, "ChangeMessageVisibilityBatch", (0, "InvalidParameterValue", True))
            with pytest.raises(LeaseLostError):
                await message.nack(delay=delay)
            assert not messages._inbox._receiver._in_flight


async def test_a_poll_whose_receive_was_cancelled_is_taken_over_by_the_next(lab: Any) -> None:
    async with bounds.within(15):
        receiver, _ = await holding(lab, 0)
        cancelled = asyncio.create_task(receiver.receive(5))
        await polled(lab, 1)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        await lab.ask("send_message", QueueUrl=await lab.url("group", "g"), MessageBody="{}")
        (delivery,) = await receiver.receive(5)
        assert delivery.attempt == 1
        assert len(lab.gate.requests("ReceiveMessage")) == 1
        await receiver.close()


async def test_a_poll_of_a_receiver_that_stopped_is_taken_over_by_the_groups_next(lab: Any) -> None:
    async with bounds.within(15):
        first, _ = await holding(lab, 0, wait=5)
        waiting = asyncio.create_task(first.receive(5))
        await polled(lab, 1)
        await first.stop()
        assert not await waiting
        assert not await first.receive(5)
        second = SqsReceiver(first._broker, "g", first._settlements.queue)
        smaller = asyncio.create_task(second.receive(4))
        await polled(lab, 2)  # one that may bring more than is asked for is not taken over
        taken_over = asyncio.create_task(second.receive(5))
        await first.close()
        await lab.ask("send_message", QueueUrl=await lab.url("group", "g"), MessageBody="{}")
        done, _ = await asyncio.wait([smaller, taken_over], return_when=asyncio.FIRST_COMPLETED)
        (delivery,) = done.pop().result()
        assert delivery.attempt == 1
        assert not any(await second.ack([delivery], verify=True))
        assert len(lab.gate.requests("ReceiveMessage")) == 2
        await second.stop()
        await asyncio.wait([smaller, taken_over])
        await second.close()


async def test_an_answer_that_came_as_its_receive_was_cancelled_is_given_back(lab: Any) -> None:
    async with bounds.within(15):
        receiver, _ = await holding(lab, 0)
        waiting = asyncio.create_task(receiver.receive(5))
        await polled(lab, 1)
        (poll,) = receiver._broker.background._tasks
        poll.add_done_callback(lambda _: waiting.cancel())
        await lab.ask("send_message", QueueUrl=await lab.url("group", "g"), MessageBody="{}")
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        while not deleted(lab):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        assert await counts(lab) == (1, 0)
        assert not receiver._in_flight
        assert not receiver._broker.detached
        await receiver.close()


async def test_records_of_settlements_that_were_given_up_are_let_go(lab: Any) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 3)
        for each in held[:2]:
            receiver._in_flight[each.native].deadline = time.monotonic()
        with receiver._in_flight.being_settled([held[1].native]):
            assert not await receiver.renew([held[2]])
            assert set(receiver._in_flight) == {held[1].native, held[2].native}, "one has a settlement on its way"
        (failure,) = await receiver.ack([held[0]], verify=False)
        assert isinstance(failure, LeaseLostError), "it is not taken for one that was carried out"
        await receiver.close()


async def test_what_a_topic_brings_is_deleted_only_by_what_the_registry_says_now(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounds.within(15):
        receiver, _ = await holding(lab, 0, fanout="sns")
        keeper = receiver._broker.groups.keeper
        await (await lab.transport(fanout="sns")).declare("g", ("wanted.#",), change=True)
        now = keeper.registry

        async def registry(since: float | None = None) -> Any:
            found = await now(since)
            return found if since is not None else found._replace(groups={"g": ("stale",)})

        monkeypatch.setattr(keeper, "registry", registry)
        later = time.time_ns() // 1_000_000 + 1_000  # than the group got its patterns
        for key in ("wanted.k", "unwanted"):
            await lab.ask(
                "send_message",
                QueueUrl=await lab.url("group", "g"),
                MessageBody="{}",
                MessageAttributes={"abe": {"DataType": "String", "StringValue": json.dumps([1, "i", key, later])}},
            )
        (delivery,) = await receiver.receive(10)
        assert receiver.metadata(delivery).key == "wanted.k"
        while (await counts(lab)) != (0, 1):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        await receiver.close()


async def test_a_group_that_is_made_again_keeps_its_patterns(lab: Any) -> None:
    async with bounds.within(30):
        backend = await lab.backend()
        async with backend.consume(group="g", keys=["order.#"]):
            await lab.ask("delete_queue", QueueUrl=await lab.url("group", "g"))
            while (patterns := (await backend.groups()).get("g")) is None:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
            assert patterns == ("order.#",)


async def test_a_receiver_goes_on_when_its_group_was_declared_again(lab: Any) -> None:
    async with bounds.within(30):
        receiver, (gone,) = await holding(lab, 1)
        transport = await lab.transport()
        await lab.ask("delete_queue", QueueUrl=await lab.url("group", "g"))
        with pytest.raises(GroupMissingError):
            while True:
                await receiver.receive(10)
        with pytest.raises(GroupMissingError):
            await receiver.recover([gone])
        await transport.declare("g", None, change=False)
        assert not await receiver.recover([gone]), "its lease is what tells"
        (failure,) = await receiver.ack([gone], verify=True)
        assert isinstance(failure, LeaseLostError)
        await transport.send([Envelope("id", "k", b"{}", 1)])
        (delivery,) = await receiver.receive(10)
        assert not any(await receiver.ack([delivery], verify=True))
        await receiver.close()


async def test_closing_does_not_wait_for_a_group_that_is_being_declared_again(lab: Any, refusal: Refusal) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        async with backend.consume(group="g"):
            lab.gate.rules.append(lambda name, _: refusal("RequestThrottled") if name == "CreateQueue" else None)
            await lab.ask("delete_queue", QueueUrl=await lab.url("group", "g"))
            before = len(lab.gate.requests("CreateQueue"))
            while len(lab.gate.requests("CreateQueue")) == before:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
