"""The rights that the README lists: enough for each role, for the queues that they name, and no more than are used."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from abe_contract_tests import bounds

README = Path(__file__).parents[1] / "README.md"

Use: TypeAlias = tuple[str, str]
"""An action, and what it is done to, without the account."""


def rights(namespace: str) -> list[set[Use]]:
    """Return what the README allows to each role, with patterns: who publishes, who consumes as well, who makes groups as well."""
    policies = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", README.read_text(), re.DOTALL)]
    publisher, consumer, maker = (
        {
            (action, resource.rpartition(":")[2].replace("shop-", f"{namespace.replace('-', '--')}-"))
            for statement in policy["Statement"]
            for action in _listed(statement["Action"])
            for resource in _listed(statement["Resource"])
        }
        for policy in policies
    )
    return [publisher, publisher | consumer, publisher | consumer | maker]


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def used(lab: Any) -> set[Use]:
    """Return what the requests since the last call did; a batch is allowed by its single form."""
    tagged = {
        ("sqs:TagQueue", body["QueueName"])
        for name, body in lab.gate.seen
        if name == "CreateQueue" and body.get("tags")
    }
    topics = {"PublishBatch", "CreateTopic", "Subscribe", "Unsubscribe"}
    seen, lab.gate.seen = lab.gate.seen, []
    return {
        (f"{'sns' if name in topics else 'sqs'}:{name.removesuffix('Batch')}", _resource(name, body))
        for name, body in seen
    } | tagged


def _resource(name: str, body: dict[str, Any]) -> str:
    if name in ("ListQueues", "Unsubscribe"):
        return "*"
    found = body.get("QueueUrl") or body.get("QueueName") or body.get("TopicArn") or body["Name"]
    return re.split("[/:]", found)[-1]


def allowed(use: Use, granted: set[Use]) -> bool:
    return any(use[0] == action and fnmatchcase(use[1], pattern) for action, pattern in granted)


@pytest.mark.parametrize("changes", [{}, {"fanout": "sns"}, {"fifo": True}], ids=["direct", "sns", "fifo"])
async def test_they_are_enough_and_not_too_many(lab: Any, changes: dict[str, Any]) -> None:
    publishing, consuming, making = rights(lab.namespace)
    async with bounds.within(30):
        maker, publisher, consumer = [await lab.backend(**changes) for _ in range(3)]
        lab.gate.seen.clear()
        await maker.publish("k", {"n": 0})
        await maker.declare("g")
        await maker.declare("g", ["k", "#"])
        await maker.declare("gone")
        await maker.delete_group("gone")
        makes = used(lab)
        await publisher.publish_many([("k", {"n": n}) for n in range(1, 4)])
        await publisher.publish("k", {"n": 4}, delay=600)
        publishes = used(lab)
        async with consumer.consume(group="g") as messages:
            held = [await messages.receive() for _ in range(4)]
            await held[0].ack()
            await held[1].nack(delay=0)
            await held[2].nack(delay=100)
            await held[3].reject("no")
        await consumer.dead_letters("g").list()
        await consumer.dead_letters("g").replay_all()
        await consumer.stats("g")
        consumes = used(lab)
    for uses, granted in ((publishes, publishing), (consumes, consuming), (makes, making)):
        assert not {use for use in uses if not allowed(use, granted)}
    every = makes | consumes | publishes
    unused = {action for action, _ in making} - {action for action, _ in every}
    unused.discard("sns:DeleteTopic")  # of delete_namespace
    assert unused <= (set() if changes.get("fanout") == "sns" else {"sqs:SetQueueAttributes", *_of_topics(making)})


def _of_topics(granted: set[Use]) -> set[str]:
    return {action for action, _ in granted if action.startswith("sns:")}
