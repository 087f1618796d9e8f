"""Queues that are there already: used as they are, put right, or refused."""

import json
from typing import Any

import pytest

from abe.errors import ConfigurationError
from abe_backend_sqs._attributes import faults_of
from abe_backend_sqs._tags import Group, tags
from abe_contract_tests import bounds

GOOD = {"MessageRetentionPeriod": "1209600", "DelaySeconds": "0", "MaximumMessageSize": "1048576"}
DEAD = "arn:aws:sqs:us-east-1:000000000000:dead"


def policy(target: str, count: Any) -> str:
    return json.dumps({"deadLetterTargetArn": target, "maxReceiveCount": count})


WRONG = [
    ("MessageRetentionPeriod", "345600", "1209600"),
    ("DelaySeconds", "5", "0"),
    ("MaximumMessageSize", "262144", "1048576"),
    ("RedrivePolicy", policy(DEAD, 3), policy(DEAD, 1000)),
    ("RedrivePolicy", policy("arn:other", 1000), policy(DEAD, 1000)),
    ("RedrivePolicy", "what", policy(DEAD, 1000)),
    ("FifoQueue", "true", "false"),
]


@pytest.mark.parametrize(("attribute", "found", "right"), WRONG)
def test_what_would_break_a_promise_is_a_fault(attribute: str, found: str, right: str) -> None:
    (fault,) = faults_of("q", {**GOOD, attribute: found}, DEAD)
    assert (fault.attribute, fault.found, fault.right) == (attribute, found, right)


@pytest.mark.parametrize(
    "attributes",
    [{}, GOOD, {**GOOD, "KmsMasterKeyId": "k", "Policy": "p"}, {**GOOD, "RedrivePolicy": policy(DEAD, "1000")}],
)
def test_what_breaks_none_is_used_as_it_is(attributes: dict[str, str]) -> None:
    assert not faults_of("q", attributes, DEAD)
    assert not faults_of("q.fifo", {**attributes, "FifoQueue": "true"}, DEAD)


def test_dead_letters_are_moved_nowhere() -> None:
    (fault,) = faults_of("q", {**GOOD, "RedrivePolicy": policy(DEAD, 1000)}, None)
    assert (fault.attribute, fault.right) == ("RedrivePolicy", "")


@pytest.mark.parametrize("kind", ["group", "dead"])
@pytest.mark.parametrize(("attribute", "found"), [("MessageRetentionPeriod", "345600"), ("DelaySeconds", "5")])
async def test_a_queue_of_somebody_else_s_is_refused(lab: Any, kind: str, attribute: str, found: str) -> None:
    """Any queue of the name was taken over, and messages went after four days, or came late."""
    async with bounds.within(20):
        name = f"{lab.namespace.replace('-', '--')}-{kind}-g"
        await lab.ask("create_queue", QueueName=name, Attributes={**GOOD, attribute: found})
        backend = await lab.backend()
        with pytest.raises(
            ConfigurationError, match=rf"{name}.*{attribute} was '{found}'.*must be '{GOOD[attribute]}'"
        ):
            await backend.declare("g")
        assert not lab.gate.requests("SetQueueAttributes")
        assert await backend.groups() == {}


async def test_one_that_can_keep_everything_is_used(lab: Any) -> None:
    async with bounds.within(20):
        for kind in ("group", "dead"):
            name = f"{lab.namespace.replace('-', '--')}-{kind}-g"
            await lab.ask("create_queue", QueueName=name, Attributes={**GOOD, "VisibilityTimeout": "77"})
        backend = await lab.backend()
        await backend.declare("g")
        assert await backend.groups() == {"g": ("#",)}
        await backend.publish("k", {"n": 1})
        assert (await backend.stats("g")).waiting == 1


async def test_a_group_s_own_queues_are_put_right(lab: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with bounds.within(20):
        await (await lab.transport()).declare("g", None, change=False)
        for kind in ("group", "dead"):
            await lab.ask(
                "set_queue_attributes", QueueUrl=await lab.url(kind, "g"), Attributes={"MessageRetentionPeriod": "60"}
            )
        await (await lab.transport()).declare("g", None, change=False)
        for kind in ("group", "dead"):
            found = await lab.ask("get_queue_attributes", QueueUrl=await lab.url(kind, "g"), AttributeNames=["All"])
            assert found["Attributes"]["MessageRetentionPeriod"] == "1209600"
        assert "was put right" in caplog.text


async def test_one_that_others_look_after_is_refused_though_it_is_a_group(lab: Any) -> None:
    async with bounds.within(20):
        for kind in ("group", "dead"):
            name = f"{lab.namespace.replace('-', '--')}-{kind}-g"
            await lab.ask("create_queue", QueueName=name)
        await lab.ask("tag_queue", QueueUrl=await lab.url("group", "g"), Tags=tags(Group("g", ("#",), 0.0)))
        backend = await lab.backend(ensure=False)
        with pytest.raises(ConfigurationError, match="MessageRetentionPeriod"):
            await backend.declare("g")


async def test_who_may_not_look_uses_what_is_there(lab: Any, refusal: Any) -> None:
    async with bounds.within(20):
        await (await lab.transport()).declare("g", None, change=False)
        lab.gate.rules.append(lambda name, _: refusal("AccessDenied") if name == "GetQueueAttributes" else None)
        assert await (await lab.transport()).declare("g", None, change=False) == ("#",)
