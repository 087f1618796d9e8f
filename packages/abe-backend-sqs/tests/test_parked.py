"""Messages from before there was a group: found, and moved once there is one that wants them."""

import asyncio
import time
from typing import Any

import pytest
from aiohttp import web

from abe.backends.message_queue.base import Envelope
from abe_backend_sqs import _parked
from abe_backend_sqs._transport import SqsTransport
from abe_contract_tests import bounds


def envelope(key: str = "k", id: str = "id") -> Envelope:
    return Envelope(id, key, b"{}", time.time_ns() // 1_000_000, None, 0)


async def until(holds: Any) -> None:
    while not await holds():  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def test_parked_messages_are_found_whatever_sqs_counts(lab: Any) -> None:
    """Its counts may be a minute old."""
    async with bounds.within(20):
        transport: SqsTransport = await lab.transport(registry_ttl=1.0)
        assert await transport.send([envelope()]) == ()
        attributes = {f"ApproximateNumberOfMessages{each}": "0" for each in ("", "NotVisible", "Delayed")}
        lab.gate.times(
            1,
            "GetQueueAttributes",
            lambda body: None if "parked" not in body["QueueUrl"] else web.json_response({"Attributes": attributes}),
        )
        await transport.declare("g", None, change=False)
        assert (await transport.stats("g")).waiting == 1


async def test_a_message_that_was_parked_beside_a_new_group_is_handed_over_however_often_that_fails(
    lab: Any, refusal: Any
) -> None:
    async with bounds.within(20):
        maker, publisher = await lab.transport(), await lab.transport(registry_ttl=5.0)
        assert not (await publisher.broker.groups.keeper.registry()).groups
        await maker.declare("g", None, change=False)
        lab.gate.times(2, "ReceiveMessage", lambda _: refusal("RequestThrottled"))
        await publisher.send([envelope()])  # it does not know the group yet

        async def there() -> bool:
            return (await maker.stats("g")).waiting == 1

        await until(there)


async def test_a_parked_message_that_cannot_be_moved_now_is_moved_by_the_next_try(lab: Any, refusal: Any) -> None:
    async with bounds.within(20):
        backend = await lab.backend()
        await backend.publish("k", {"n": 1})
        lab.gate.times(
            1,
            "SendMessageBatch",
            lambda body: refusal("RequestThrottled") if "-group-" in body["QueueUrl"] else None,
        )
        await backend.declare("g")
        assert (await backend.stats("g")).waiting == 1


async def test_a_publish_returns_when_a_group_that_was_made_meanwhile_has_its_message(lab: Any) -> None:
    """The process may end after it, and nobody else would look."""
    async with bounds.within(20):
        maker, publisher = await lab.transport(), await lab.transport(registry_ttl=5.0)
        assert not (await publisher.broker.groups.keeper.registry()).groups
        await maker.declare("g", None, change=False)
        await publisher.send([envelope()])
        assert (await maker.stats("g")).waiting == 1


async def test_what_no_group_wants_is_not_in_the_way_of_what_one_does(lab: Any) -> None:
    """In a FIFO queue a message that is looked at keeps back those behind it in its message group."""
    async with bounds.within(20):
        transport: SqsTransport = await lab.transport(fifo=True, message_group="all")
        await transport.send([envelope("other", f"o{n}") for n in range(11)])
        await transport.send([envelope("wanted", "w")])
        await transport.declare("g", ("wanted",), change=True)
        assert (await transport.stats("g")).waiting == 1


async def test_what_nobody_wants_is_not_gone_through_by_every_consumer_that_starts(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_parked, "_SHORT_LOOK", 20)
    async with bounds.within(30):
        backend = await lab.backend()
        await backend.publish_many([("unwanted", {"n": n}) for n in range(60)])
        await backend.publish("wanted", {"n": 60})
        await backend.declare("g", ["wanted"])
        assert (await backend.stats("g")).waiting == 1, "a new group finds what it wants, wherever it is"
        lab.gate.seen.clear()
        other = await lab.transport()
        monkeypatch.setattr(other.broker.groups, "_propagation", lambda *_: 0.0)  # as if it had been there for long
        await other.declare("g", None, change=False)
        assert other._parked._looking is not None
        await other._parked._looking
        looks = [each for each in lab.gate.requests("ReceiveMessage") if "-parked" in each["QueueUrl"]]
        assert 1 <= len(looks) <= 3
