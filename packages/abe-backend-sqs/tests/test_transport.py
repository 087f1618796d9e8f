"""The provider on a server: with foreign messages, pinned groups and queues made by others."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from abe.backends.message_queue.base import Envelope
from abe.errors import ConfigurationError
from abe_backend_sqs import SqsBackend
from abe_backend_sqs._queue import Queue
from abe_backend_sqs._tags import Group, tags
from abe_contract_tests import bounds


async def test_plain_json_of_a_foreign_program_is_consumed(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        async with backend.consume(group="g") as messages:
            await lab.ask("send_message", QueueUrl=await lab.url("group", "g"), MessageBody='{"n": 1}')
            message = await messages.receive()
            assert message == {"n": 1}
            assert message.id
            assert (message.key, message.attempt, message.headers) == ("", 1, {})
            await message.ack()


async def test_a_foreign_program_may_name_a_key_and_an_id_and_send_base64(lab: Any) -> None:
    attributes = {"key": "order.created", "id": "order-1", "encoding": "base64"}
    async with bounds.within(15):
        backend = await lab.backend()
        async with backend.consume(group="g") as messages:
            await lab.ask(
                "send_message",
                QueueUrl=await lab.url("group", "g"),
                MessageBody="eyJuIjogMX0=",
                MessageAttributes={
                    name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()
                },
            )
            message = await messages.receive()
            assert (message, message.key, message.id) == ({"n": 1}, "order.created", "order-1")
            await message.ack()


async def test_ours_is_read_as_json_by_a_foreign_program(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1, "text": "é"}, id="order-1")
        reply = await lab.ask(
            "receive_message", QueueUrl=await lab.url("group", "g"), MessageAttributeNames=["All"], VisibilityTimeout=0
        )
        (found,) = reply["Messages"]
        assert json.loads(found["Body"]) == {"n": 1, "text": "é"}
        assert json.loads(found["MessageAttributes"]["abe"]["StringValue"])[:3] == [1, "order-1", "order.created"]


async def test_a_body_that_sqs_refuses_arrives_as_it_was(lab: Any) -> None:
    bodies = [b"\x00\x01", "\uffff".encode(), b"", b"\xff\xfe", b'{"n":1}']
    async with bounds.within(15):
        transport = await lab.transport()
        await transport.declare("g", None, change=False)
        assert not await transport.send([Envelope(f"id-{n}", "k", body, 1) for n, body in enumerate(bodies)])
        receiver = await transport.subscribe("g", 10)
        found: dict[str, bytes] = {}
        while len(found) < len(bodies):
            deliveries = await receiver.receive(10)
            found.update({receiver.metadata(delivery).id: delivery.body for delivery in deliveries})
        assert [found[f"id-{n}"] for n in range(len(bodies))] == bodies
        await receiver.close()


async def test_pinned_groups_are_never_read_and_no_other_is_declared(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend(pinned=(("a", ("order.#",)), ("b", ("#",))))
        await backend.declare("a")
        await backend.declare("b")
        await backend.publish("order.created", {"n": 1})
        await backend.publish("other", {"n": 2})
        assert [(await backend.stats(group)).waiting for group in ("a", "b")] == [1, 2]
        assert not lab.gate.requests("ListQueues")
        with pytest.raises(ConfigurationError, match="SQS_GROUPS"):
            await backend.declare("c")
        with pytest.raises(ConfigurationError, match="SQS_GROUPS"):
            await backend.declare("a", ["x"])


async def test_nothing_is_made_where_others_make_the_queues(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend(ensure=False)
        with pytest.raises(ConfigurationError, match=r"dead-g.*SQS_ENSURE"):
            await backend.declare("g")
        with pytest.raises(ConfigurationError, match=r"parked.*SQS_ENSURE"):
            await backend.publish("order.created", {"n": 1})
        with pytest.raises(ConfigurationError, match="SQS_ENSURE"):
            await backend.delete_group("g")
        listed = await lab.ask("list_queues", QueueNamePrefix=lab.namespace)
        assert not listed.get("QueueUrls")
        made = {"CreateQueue", "SetQueueAttributes", "TagQueue", "DeleteQueue"}
        assert not made.intersection(name for name, _ in lab.gate.seen)


@pytest.mark.parametrize("known_by", ["tags", "SQS_GROUPS"])
async def test_queues_that_others_made_serve_from_publish_to_dead_letter(lab: Any, known_by: str) -> None:
    prefix = lab.namespace.replace("-", "--")
    async with bounds.within(15):
        for kind in ("group", "dead"):
            kept = {"MessageRetentionPeriod": "1209600"}
            await lab.ask("create_queue", QueueName=f"{prefix}-{kind}-g", Attributes=kept)
        pinned = (("g", ("#",)),) if known_by == "SQS_GROUPS" else None
        if pinned is None:
            await lab.ask("tag_queue", QueueUrl=await lab.url("group", "g"), Tags=tags(Group("g", ("#",), 0.0)))
        backend: SqsBackend = await lab.backend(ensure=False, pinned=pinned)
        async with backend.consume(group="g") as messages:
            await backend.publish("order.created", {"n": 1})
            await (await messages.receive()).reject("why not")
        assert [letter.reason for letter in await backend.dead_letters("g").list()] == ["why not"]
        assert await backend.dead_letters("g").replay_all() == 1
        async with backend.consume(group="g") as messages:
            await (await messages.receive()).ack()


async def test_a_busy_group_is_polled_several_times_at_once_and_an_idle_one_once(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounds.within(20):
        backend = await lab.backend(pollers=3)
        await backend.declare("g")
        await backend.publish_many([("k", {"n": n}) for n in range(300)])
        under_way, seen, poll = 0, list[int](), Queue.poll

        async def counted(queue: Queue, count: int, wait: int | None = None) -> Sequence[Any]:
            nonlocal under_way
            under_way += 1
            seen.append(under_way)
            try:
                return await poll(queue, count, wait)
            finally:
                under_way -= 1

        monkeypatch.setattr(Queue, "poll", counted)
        left = 300
        async with backend.consume(group="g", prefetch=100) as messages:
            async for _ in messages:
                left -= 1
                if not left:
                    break
            assert max(seen) == 3
            busy = len(seen)
            while len(seen) < busy + 4:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.02)
            assert under_way == 1
