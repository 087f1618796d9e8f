"""Fan-out by SNS: what goes through the topic, what does not, and what the queues allow."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from abe.errors import AbeError
from abe_backend_sqs._tags import Group, common_topic, from_tags, tags
from abe_backend_sqs._topics import allowing
from abe_contract_tests import bounds

TOPIC, QUEUE = "arn:aws:sns:us-east-1:000000000000:t", "arn:aws:sqs:us-east-1:000000000000:q"


def operations(lab: Any) -> list[str]:
    return [name for name, _ in lab.gate.seen if name in ("PublishBatch", "SendMessageBatch")]


async def test_what_every_group_wants_is_one_request_for_all_of_them(lab: Any) -> None:
    async with bounds.within(20):
        backend = await lab.backend(fanout="sns")
        for group in ("a", "b", "c"):
            await backend.declare(group)
        await backend.publish_many([("k", {"n": n}) for n in range(10)])
        assert operations(lab) == ["PublishBatch"]
        assert [(await backend.stats(group)).waiting for group in ("a", "b", "c")] == [10, 10, 10]
        async with backend.consume(group="b") as messages:
            message = await messages.receive()
            assert (message.key, message.attempt) == ("k", 1)


@pytest.mark.parametrize("reason", ["not all want it", "it is delayed", "it is over 256 KiB"])
async def test_what_a_topic_cannot_carry_goes_to_the_queues(lab: Any, reason: str) -> None:
    async with bounds.within(20):
        backend = await lab.backend(fanout="sns")
        await backend.declare("a", ["order.#"])
        await backend.declare("b")
        key = "other" if reason == "not all want it" else "order.created"
        size, delay = (270_000 if "KiB" in reason else 1), (60 if "delayed" in reason else None)
        await backend.publish(key, {"text": "x" * size}, delay=delay)
        assert set(operations(lab)) == {"SendMessageBatch"}
        found = [await backend.stats(group) for group in ("a", "b")]
        assert [each.waiting + each.delayed for each in found] == ([0, 1] if key == "other" else [1, 1])


async def test_a_group_that_is_not_subscribed_keeps_publishers_from_the_topic(lab: Any) -> None:
    async with bounds.within(20):
        backend, direct = await lab.backend(fanout="sns"), await lab.backend()
        await backend.declare("a")
        await direct.declare("b")
        await backend.publish("k", {"n": 1})
        assert set(operations(lab)) == {"SendMessageBatch"}
        assert [(await backend.stats(group)).waiting for group in ("a", "b")] == [1, 1]


async def test_where_others_make_the_queues_nothing_is_subscribed(lab: Any) -> None:
    async with bounds.within(20):
        maker, backend = await lab.backend(), await lab.backend(fanout="sns", ensure=False)
        await maker.declare("g")
        await backend.declare("g")
        await backend.publish("k", {"n": 1})
        assert set(operations(lab)) == {"SendMessageBatch"}
        assert not lab.gate.requests("CreateTopic")
        assert (await backend.stats("g")).waiting == 1


async def test_what_a_publisher_of_old_patterns_sends_is_dropped_and_what_was_there_or_is_foreign_is_not(
    lab: Any,
) -> None:
    async with bounds.within(20):
        backend, late = await lab.backend(fanout="sns"), await lab.backend(fanout="sns", registry_ttl=60.0)
        await backend.declare("g")
        await backend.publish_many([("order.created", {"n": 1}), ("other", {"n": 2})])
        await late.publish("order.created", {"n": 5})
        await lab.ask("send_message", QueueUrl=await lab.url("group", "g"), MessageBody='{"n": 3}')
        seen: set[int] = set()
        await backend.publish("other", {"n": 4}, group="g")
        await backend.declare("g", ["order.#"])
        await late.publish_many([("other", {"n": 6}), ("order.created", {"n": 7})])
        async with backend.consume(group="g") as messages:
            while len(seen) < 6:
                message = await messages.receive()
                seen.add(message["n"])
                await message.ack()
            while (stats := await backend.stats("g")).waiting or stats.in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert seen == {1, 2, 3, 4, 5, 7}


async def test_a_new_group_wants_nothing_but_its_patterns_from_its_first_moment(lab: Any) -> None:
    """It is subscribed after it is made, and its tags are set again then."""
    async with bounds.within(20):
        transport = await lab.transport(fanout="sns")
        await transport.declare("g", ("order.#",), change=False)
        registry = await transport.broker.groups.keeper.registry()
        (group,) = registry.members
        assert group.subscription
        made = registry.wanted_since("g")
        assert made < registry.since["g"]
        await transport.declare("g", ("invoice.#",), change=True)
        registry = await transport.broker.groups.keeper.registry()
        assert made < registry.wanted_since("g") <= registry.since["g"]


async def test_a_deleted_group_is_subscribed_no_more(lab: Any) -> None:
    async with bounds.within(20):
        backend = await lab.backend(fanout="sns")
        await backend.declare("g")
        (subscribing,) = lab.gate.requests("Subscribe")
        assert subscribing["Attributes.entry.1.key"] == "RawMessageDelivery"
        await backend.delete_group("g")
        (ending,) = lab.gate.requests("Unsubscribe")
        assert ending["SubscriptionArn"].startswith(subscribing["TopicArn"])


def test_a_queue_allows_the_topic_and_keeps_what_it_allowed_before() -> None:
    theirs = {"Sid": "theirs", "Effect": "Deny", "Principal": "*", "Action": "sqs:*", "Resource": QUEUE}
    before = json.dumps({"Version": "2012-10-17", "Statement": theirs})
    once = allowing(before, topic=TOPIC, queue=QUEUE)
    first, ours = json.loads(once)["Statement"]
    assert first == theirs
    assert (ours["Principal"], ours["Condition"]) == (
        {"Service": "sns.amazonaws.com"},
        {"ArnEquals": {"aws:SourceArn": TOPIC}},
    )
    assert allowing(once, topic=TOPIC, queue=QUEUE) == once


def test_the_topic_is_one_that_reaches_every_group() -> None:
    def reaching(*subscriptions: str) -> str:
        return common_topic([Group(str(n), ("#",), 1.0, each) for n, each in enumerate(subscriptions)], 1.0)

    assert reaching(f"{TOPIC}:1", f"{TOPIC}:2") == TOPIC
    assert not reaching(f"{TOPIC}:1", "")
    assert not reaching(f"{TOPIC}:1", f"{TOPIC}-other:2")
    assert not reaching()
    assert not common_topic([Group("g", ("#",), 1.1, f"{TOPIC}:1")], 1.0)


def test_a_subscription_travels_in_the_tags() -> None:
    group = Group("g", ("#",), 1.0, f"{TOPIC}:1")
    assert from_tags(tags(group)) == group


def gone() -> web.Response:
    """Return what SNS answers where there is no such topic."""
    return web.Response(
        status=404,
        content_type="text/xml",
        text="<ErrorResponse><Error><Type>Sender</Type><Code>NotFound</Code>"
        "<Message>Topic does not exist</Message></Error></ErrorResponse>",
    )


async def test_a_topic_is_used_when_the_groups_have_been_there_for_long_enough(lab: Any) -> None:
    async with bounds.within(20):
        backend = await lab.backend(fanout="sns", topic_after=60)
        await backend.declare("g")
        await backend.publish("k", {"n": 1})
        assert not lab.gate.requests("PublishBatch")
        assert (await backend.stats("g")).waiting == 1


async def test_a_group_whose_deletion_was_interrupted_still_gets_everything(lab: Any, refusal: Any) -> None:
    async with bounds.within(20):
        one, other = await lab.backend(fanout="sns"), await lab.backend(fanout="sns")
        await one.declare("a")
        await one.declare("b")
        lab.gate.times(1, "DeleteQueue", lambda _: refusal("AccessDenied"))
        with pytest.raises(AbeError):
            await one.delete_group("a")
        await other.declare("a")
        await other.publish("k", {"n": 1})
        assert [(await other.stats(group)).waiting for group in ("a", "b")] == [1, 1]


async def test_a_topic_that_was_deleted_is_done_without(lab: Any) -> None:
    async with bounds.within(20):
        backend = await lab.backend(fanout="sns")
        await backend.declare("a")
        lab.gate.times(1, "PublishBatch", lambda _: gone())
        await backend.publish("k", {"n": 1})
        await backend.publish("k", {"n": 2})
        assert len(lab.gate.requests("PublishBatch")) == 1
        assert (await backend.stats("a")).waiting == 2
        lab.gate.times(1, "Subscribe", lambda _: gone())
        await (await lab.backend(fanout="sns")).declare("b")
        assert len(lab.gate.requests("CreateTopic")) == 1  # nobody takes himself for subscribed to a new one
        await backend.publish("k", {"n": 3})
        assert [(await backend.stats(group)).waiting for group in ("a", "b")] == [3, 1]
