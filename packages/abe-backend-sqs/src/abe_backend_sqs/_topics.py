"""Fan-out by SNS: one topic for the namespace, to which the queue of each group is subscribed."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, cast

from abe.backends.message_queue.base import Outcomes
from abe.backends.message_queue.base.log import Log
from abe.errors import AbeError
from abe_backend_sqs import _wire
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._errors import QueueMissingError, translated
from abe_backend_sqs._queue import Queue, requests, stored
from abe_backend_sqs._registry import RegistryKeeper
from abe_backend_sqs._tags import Registry
from abe_backend_sqs._wire import Entry, Message

_log: Final = Log("abe.sqs")

SNS_LIMIT: Final = 262_144
"""Bytes of a message, and of a batch of them, that any topic takes. What is larger goes to the queues directly."""

_STATEMENT: Final = "abe-topic"


class Topics:
    """Creates and deletes topics, subscribes queues to them, and publishes to them.

    Args:
        clients: The AWS clients.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._address = clients.settings.address

    async def publish(self, arn: str, entries: Sequence[Entry]) -> Outcomes:
        """Publish up to ten messages, and return each one's outcome."""
        sns, wanted = await self._clients.topics(), requests(entries)
        for request in wanted:
            request["Message"] = request.pop("MessageBody")
        call = sns.publish_batch(TopicArn=arn, PublishBatchRequestEntries=wanted)
        return await stored(call, len(entries), self._address)

    async def create(self, name: str) -> str:
        """Create the topic of that name unless it exists, and return its ARN."""
        sns = await self._clients.topics()
        with translated(self._address):
            return (await sns.create_topic(Name=name))["TopicArn"]

    async def subscribe(self, topic: str, queue: Queue) -> str:
        """Subscribe a queue to a topic, with raw delivery; return the subscription's ARN, or nothing if the topic was deleted.

        A topic that was deleted is not created again: groups that were subscribed to it would seem to be subscribed to the new one.
        """
        sns = await self._clients.topics()
        found = await queue.attributes("QueueArn", "Policy")
        arn = found["QueueArn"]
        await queue.set_attributes({"Policy": allowing(found.get("Policy", ""), topic=topic, queue=arn)})
        try:
            with translated(self._address):
                reply = await sns.subscribe(
                    TopicArn=topic,
                    Protocol="sqs",
                    Endpoint=arn,
                    Attributes={"RawMessageDelivery": "true"},
                    ReturnSubscriptionArn=True,
                )
                return reply["SubscriptionArn"]
        except QueueMissingError:
            return ""

    async def delete(self, topic: str) -> None:
        """Delete a topic."""
        sns = await self._clients.topics()
        with suppress(QueueMissingError), translated(self._address):
            await sns.delete_topic(TopicArn=topic)

    async def unsubscribe(self, subscription: str) -> None:
        """End a subscription; a no-op when there is none."""
        sns = await self._clients.topics()
        with suppress(QueueMissingError), translated(self._address):
            await sns.unsubscribe(SubscriptionArn=subscription)


def allowing(policy: str, *, topic: str, queue: str) -> str:
    """Return a queue's policy with the statement that lets the topic send to the queue; its other statements are kept."""
    document: dict[str, Any] = json.loads(policy) if policy else {"Version": "2012-10-17"}
    statements: Any = document.get("Statement", [])
    others = cast("list[dict[str, Any]]", [statements] if isinstance(statements, dict) else statements)
    ours = {
        "Sid": _STATEMENT,
        "Effect": "Allow",
        "Principal": {"Service": "sns.amazonaws.com"},
        "Action": "sqs:SendMessage",
        "Resource": queue,
        "Condition": {"ArnEquals": {"aws:SourceArn": topic}},
    }
    document["Statement"] = [*(each for each in others if each.get("Sid") != _STATEMENT), ours]
    return json.dumps(document)


async def wanted(keeper: RegistryKeeper, queue: Queue, group: str, messages: Sequence[Message]) -> Sequence[Message]:
    """Return the messages that a group wants, and delete the others: publishers use the topic until they know a group's new patterns."""
    came = time.monotonic()
    try:
        unwanted = _unwanted(await keeper.registry(), group, messages)
        if unwanted:  # by a registry that may be too old: read it again
            unwanted = _unwanted(await keeper.registry(came), group, messages)
            await queue.delete([message["ReceiptHandle"] for message in unwanted])
    except AbeError as exc:
        _log.debug("the patterns of group %r cannot be read now, so it gets every message: %s", group, exc)
        return messages
    return [message for message in messages if message not in unwanted]


def _unwanted(registry: Registry, group: str, messages: Sequence[Message]) -> Sequence[Message]:
    """Return the messages that were published to all groups since this one has its patterns, and that it does not want.

    What was published before stays: the group may have wanted it then.
    """
    if not (patterns := registry.groups.get(group)):
        return []
    since = registry.wanted_since(group)
    return [each for each in messages if _wire.published(each, since) and not _wire.wants(patterns, each)]
