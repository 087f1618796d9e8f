"""What a consumer does with what it holds: deletions that share requests, verdicts that fail, what is given back, what is let go."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from aiohttp import web

from abe.backends.message_queue.base import Delivery, Envelope, Settlement, Verb
from abe.errors import BackendConnectionError, LeaseLostError
from abe_backend_sqs import _handles
from abe_backend_sqs._handles import beside
from abe_backend_sqs._polls import Poll, Polls
from abe_backend_sqs._receiver import SqsReceiver, _Arrival
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
    client = await receiver._transport.clients.calls()
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


async def counts(lab: Any, kind: str = "group") -> tuple[int, int]:
    """Return how many messages wait, and how many are held."""
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    found = await lab.ask("get_queue_attributes", QueueUrl=await lab.url(kind, "g"), AttributeNames=names)
    return int(found["Attributes"][names[0]]), int(found["Attributes"][names[1]])


async def test_acknowledgements_share_requests(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_handles, "_LINGER", 60)
    async with bounds.within(15):
        receiver, held = await holding(lab, 20)
        outcomes = await asyncio.gather(*(receiver.ack([each.receipt], verify=False) for each in held))
        assert outcomes == [{}] * 20
        assert deleted(lab) == [10, 10]
        assert await counts(lab) == (0, 0)
        await receiver.close()


async def test_one_that_finds_none_to_share_its_request_with_leaves_soon(lab: Any) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 12)
        assert not await receiver.ack([held[0].receipt], verify=False)
        assert deleted(lab) == [1]
        await receiver.close()


async def test_nobody_waits_for_others_in_vain(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_handles, "_LINGER", 60)
    async with bounds.within(15):
        receiver, held = await holding(lab, 15)
        receipts = [each.receipt for each in held]
        assert not await receiver.ack(receipts[:1], verify=True), "somebody waits for the answer"
        assert not await receiver.ack(receipts[1:13], verify=False), "the rest of what filled a request"
        assert not await receiver.ack(receipts[13:14], verify=False), "too few are held to fill one"
        assert deleted(lab) == [1, 10, 2, 1]
        await receiver.close()


async def test_a_fifo_queue_is_not_kept_waiting_for_a_deletion(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_handles, "_LINGER", 60)
    async with bounds.within(15):
        transport = await lab.transport(fifo=True)
        await transport.declare("g", None, change=False)
        await transport.send([Envelope(f"id-{n}", f"k.{n}", b"{}", 1) for n in range(12)])
        receiver = await transport.subscribe("g", 12)
        held: list[Delivery] = []
        while len(held) < 12:
            held += await receiver.receive(12 - len(held))
        assert not await receiver.ack([held[0].receipt], verify=False)
        await receiver.close()


async def test_those_who_wait_share_what_follows_the_request_under_way(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_handles, "_LINGER", 60)
    async with bounds.within(15):
        receiver, held = await holding(lab, 4)
        go, waiting = await stalled(monkeypatch, receiver, "delete_message_batch")
        acks = [asyncio.create_task(receiver.ack([each.receipt], verify=True)) for each in held]
        await waiting.wait()
        go.set()
        assert await asyncio.gather(*acks) == [{}] * 4
        assert deleted(lab) == [1, 3]
        await receiver.close()


async def test_each_who_shares_a_request_hears_of_its_own(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_handles, "_LINGER", 60)
    async with bounds.within(15):
        receiver, held = await holding(lab, 10)
        lab.gate.fails(1, "DeleteMessageBatch", (1, "ReceiptHandleIsInvalid", True), (2, "InternalError", False))
        outcomes = await asyncio.gather(
            *(receiver.ack([each.receipt], verify=False) for each in held), return_exceptions=True
        )
        assert isinstance(outcomes[1], dict)
        assert list(outcomes[1]) == [held[1].receipt]
        assert isinstance(outcomes[1][held[1].receipt], LeaseLostError)
        assert isinstance(outcomes[2], BackendConnectionError)
        assert [outcomes[0], *outcomes[3:]] == [{}] * 8
        assert not await receiver.ack([held[2].receipt], verify=True)
        await receiver.close()


async def test_who_stops_waits_for_nobody_to_share_a_request(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_handles, "_LINGER", 60)
    async with bounds.within(15):
        receiver, held = await holding(lab, 12)
        ack = asyncio.create_task(receiver.ack([held[0].receipt], verify=False))
        await asyncio.wait([ack], timeout=0.1)
        assert not deleted(lab)
        await receiver.stop()
        assert not await ack
        assert not await receiver.ack([held[1].receipt], verify=False)
        assert deleted(lab) == [1, 1]
        await receiver.close()


async def test_an_acknowledgement_that_is_cancelled_before_it_leaves_is_carried_out(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_handles, "_LINGER", 60)
    async with bounds.within(15):
        receiver, held = await holding(lab, 12)
        ack = asyncio.create_task(receiver.ack([held[0].receipt], verify=False))
        await asyncio.wait([ack], timeout=0.1)
        ack.cancel()
        await asyncio.wait([ack])
        await receiver.close()
        assert await counts(lab) == (11, 0)


async def test_what_is_being_deleted_when_the_receiver_is_closed_is_not_given_back(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 3)
        go, waiting = await stalled(monkeypatch, receiver, "delete_message_batch")
        ack = asyncio.create_task(receiver.ack([held[0].receipt], verify=True))
        await waiting.wait()
        ack.cancel()
        await asyncio.wait([ack])
        closing = asyncio.create_task(receiver.close())
        while not lab.gate.requests("SendMessageBatch"):  # noqa: ASYNC110 - the server sets no event of ours
            await asyncio.sleep(0.01)
        go.set()
        await closing
        (copies,) = lab.gate.requests("SendMessageBatch")
        assert sorted(json.loads(each["MessageBody"])["n"] for each in copies["Entries"]) == sorted(
            json.loads(each.body)["n"] for each in held[1:]
        )
        assert await counts(lab) == (2, 0)


async def test_one_verdict_that_fails_does_not_double_another(
    lab: Any, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 2)
        lab.gate.times(1, "ChangeMessageVisibilityBatch", lambda _: refusal("RequestThrottled"))
        go, waiting = await stalled(monkeypatch, receiver, "send_message_batch")
        verdicts = [
            Settlement(held[0].receipt, Verb.RETRY, delay=60),
            Settlement(held[1].receipt, Verb.DEAD, reason="bad"),
        ]
        settling = asyncio.create_task(receiver.settle(verdicts))
        await waiting.wait()
        done, _ = await asyncio.wait([settling], timeout=0.3)
        assert not done, "one of its requests is under way"
        go.set()
        with pytest.raises(BackendConnectionError):
            await settling
        assert not await receiver.settle(verdicts)
        assert await counts(lab, "dead") == (1, 0)
        assert len(lab.gate.requests("SendMessageBatch")) == 1
        await receiver.close()


async def test_a_lost_lease_is_still_told_when_another_verdict_has_to_be_repeated(lab: Any) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 2)
        receipts = [each.receipt for each in held]
        lab.gate.fails(1, "DeleteMessageBatch", (0, "ReceiptHandleIsInvalid", True), (1, "InternalError", False))
        with pytest.raises(BackendConnectionError):
            await receiver.ack(receipts, verify=True)
        failures = await receiver.ack(receipts, verify=True)
        assert list(failures) == receipts[:1]
        assert isinstance(failures[receipts[0]], LeaseLostError)
        await receiver.close()


async def test_what_an_answer_leaves_out_is_not_taken_for_done(lab: Any) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 2)
        receipts = [each.receipt for each in held]
        lab.gate.times(1, "DeleteMessageBatch", lambda _: web.json_response({"Successful": [{"Id": "1"}]}))
        with pytest.raises(BackendConnectionError, match="leaves out whether"):
            await receiver.ack(receipts, verify=False)
        assert not await receiver.ack(receipts[:1], verify=False)
        assert await counts(lab) == (0, 1), "the second was said to be deleted, and the server was never asked"
        await receiver.close()


async def test_verdicts_of_one_kind_make_no_requests_of_another(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 2)
        async with receiver._renewing:  # a renewal is under way, which only what is hidden has to wait for
            assert not await receiver.settle([Settlement(held[0].receipt, Verb.DEAD, reason="bad")])
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

    task = asyncio.create_task(beside(call(1), call(2)))
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
            assert not messages._inbox._receiver._held


async def test_what_arrived_and_nobody_was_handed_is_given_back_when_the_receiver_stops(lab: Any) -> None:
    async with bounds.within(15):
        receiver, _ = await holding(lab, 0)
        for _ in range(3):
            await lab.ask("send_message", QueueUrl=await lab.url("group", "g"), MessageBody="{}")
        receiver._polls.ask_for(3)
        while len(receiver._arrived) < 3:
            receiver._polls.news.clear()
            receiver._polls.ask_for(3 - len(receiver._arrived) - receiver._polls.asked_for)
            await receiver._polls.news.wait()
        assert await counts(lab) == (0, 3)
        await receiver.stop()
        assert await counts(lab) == (3, 0)
        assert not receiver._held
        assert not await receiver.receive(3)
        await receiver.close()


async def test_a_poll_that_outlives_the_receiver_gives_back_what_arrived_before_too(lab: Any) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 1)
        await receiver.stop()
        # Another poll's, which came while this one's were being looked at.
        receiver._arrived.append(_Arrival(held[0], receiver._held[held[0].receipt]))
        await receiver._take([])
        assert await counts(lab) == (1, 0)
        await receiver.close()


async def test_records_of_verdicts_that_were_given_up_are_let_go(lab: Any) -> None:
    async with bounds.within(15):
        receiver, held = await holding(lab, 3)
        for each in held[:2]:
            receiver._held[each.receipt].deadline = time.monotonic()
        with receiver._held.being_settled([held[1].receipt]):
            assert not await receiver.renew([held[2].receipt])
            assert set(receiver._held) == {held[1].receipt, held[2].receipt}, "one has a verdict on its way"
        (failure,) = (await receiver.ack([held[0].receipt], verify=False)).values()
        assert isinstance(failure, LeaseLostError), "it is not taken for one that was carried out"
        await receiver.close()


async def test_what_a_topic_brings_is_deleted_only_by_what_the_registry_says_now(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounds.within(15):
        receiver, _ = await holding(lab, 0, fanout="sns")
        queues = receiver._transport.queues
        await receiver._transport.declare("g", ("wanted.#",), change=True)
        now = queues.registry

        async def registry(*, since: float | None = None) -> Any:
            found = await now(since=since)
            return found if since is not None else found._replace(groups={"g": ("stale",)})

        monkeypatch.setattr(queues, "registry", registry)
        for key in ("wanted.k", "unwanted"):
            await lab.ask(
                "send_message",
                QueueUrl=await lab.url("group", "g"),
                MessageBody="{}",
                MessageAttributes={"abe": {"DataType": "String", "StringValue": json.dumps([1, "i", key, 1])}},
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


async def test_there_are_as_many_polls_as_messages_flow(lab: Any) -> None:
    transport = await lab.transport(pollers=3)

    async def take(messages: Sequence[Any]) -> None:
        return

    polls = Polls(transport, "name", "url", take)
    sizes: list[int] = []
    for brought in (10, 10, 10, 9, 1, 1, 10, 10, 0, 10):
        await polls.brought(Poll(10, polls), [{}] * brought)
        sizes.append(polls._most)
    assert sizes == [2, 3, 3, 2, 1, 1, 2, 3, 1, 2]


async def test_stopping_does_not_wait_for_a_group_that_is_being_made_again(lab: Any) -> None:
    async with bounds.within(15):
        transport = await lab.transport()
        await transport.declare("g", None, change=False)
        receiver = await transport.subscribe("g", 10)
        begun = asyncio.Event()

        async def restore(group: str) -> None:
            begun.set()
            await asyncio.Event().wait()

        transport.restore = restore
        await lab.ask("delete_queue", QueueUrl=await lab.url("group", "g"))
        receiving = asyncio.create_task(receiver.receive(10))
        await begun.wait()
        await receiver.stop()
        assert await receiving == ()
        await receiver.close()
