"""Delays and leases longer than SQS knows: what it is asked for in their place."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from abe.backends.message_queue.base import Disposition, Settlement
from abe_backend_sqs._receiver import SqsReceiver
from abe_contract_tests import bounds

Header = Callable[[Mapping[str, Any]], list[Any]]
MINUTE, HOUR, DAY = 60, 3_600, 86_400
ATTEMPTS, DUE = 5, 6
"""Where they are in a message's metadata."""


async def taken(lab: Any) -> tuple[SqsReceiver, Any]:
    """Publish a message, and return a receiver that holds it, with the delivery."""
    transport = await lab.transport()
    await transport.declare("g", None, change=False)
    receiver = await transport.subscribe("g", 10)
    await lab.ask("send_message", QueueUrl=await lab.url("group", "g"), MessageBody="{}")
    (delivery,) = await receiver.receive(10)
    return receiver, delivery


async def appears(lab: Any, operation: str) -> dict[str, Any]:
    """Wait for a request of that kind, and return its only entry."""
    while not (found := lab.gate.requests(operation)):  # noqa: ASYNC110 - the server sets no event of ours
        await asyncio.sleep(0.01)
    (entry,) = found[-1]["Entries"]
    return dict(entry)


async def injected(lab: Any, *, due: float, attempts: int = 0) -> None:
    """Put a message into the queue whose time is that many seconds away."""
    metadata = [1, "id", "k", 1_700_000_000_000, None, attempts, int((time.time() + due) * 1000)]
    await lab.ask(
        "send_message",
        QueueUrl=await lab.url("group", "g"),
        MessageBody='{"n": 1}',
        MessageAttributes={"abe": {"DataType": "String", "StringValue": json.dumps(metadata)}},
    )


@pytest.mark.parametrize(("delay", "seconds", "noted"), [(899.5, 900, False), (900, 900, False), (DAY, 900, True)])
async def test_sqs_delays_for_as_long_as_it_can_and_the_message_says_the_rest(
    lab: Any, header: Header, delay: float, seconds: int, noted: bool
) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        await backend.declare("g")
        before = time.time()
        await backend.publish("k", {"n": 1}, delay=delay)
        entry = await appears(lab, "SendMessageBatch")
        assert entry["DelaySeconds"] == seconds
        metadata = header(entry)
        assert (len(metadata) > DUE) is noted
        if noted:
            assert before + delay - 0.001 <= metadata[DUE] / 1000 <= time.time() + delay, "in whole milliseconds"
        stats = await backend.stats("g")
        assert (stats.waiting, stats.delayed) == (0, 1)


@pytest.mark.parametrize(
    ("due", "hidden"), [(DAY * 10, 12 * HOUR - 60), (HOUR, HOUR - 10 * MINUTE), (16 * MINUTE, 6 * MINUTE)]
)
async def test_what_comes_too_early_is_hidden_until_shortly_before_it_is_due(
    lab: Any, due: float, hidden: float
) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        async with backend.consume(group="g") as messages:
            await injected(lab, due=due)
            entry = await appears(lab, "ChangeMessageVisibilityBatch")
            assert hidden - 2 <= entry["VisibilityTimeout"] <= hidden
            assert messages.take() is None


async def test_what_could_not_be_hidden_is_hidden_when_it_comes_next(lab: Any) -> None:
    async with bounds.within(30):
        transport = await lab.transport(lease=1.0)
        await transport.declare("g", None, change=False)
        receiver = await transport.subscribe("g", 10)
        await injected(lab, due=HOUR)
        lab.gate.fails(1, "ChangeMessageVisibilityBatch", (0, "InternalError", False))
        while len(lab.gate.requests("ChangeMessageVisibilityBatch")) < 2:
            assert not await receiver.receive(10)
        await receiver.close()


async def test_its_last_stretch_is_a_delay_which_is_no_attempt(lab: Any, header: Header) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        async with backend.consume(group="g") as messages:
            await injected(lab, due=10 * MINUTE, attempts=3)
            entry = await appears(lab, "SendMessageBatch")
            assert 10 * MINUTE - 2 <= entry["DelaySeconds"] <= 10 * MINUTE
            assert header(entry)[ATTEMPTS:] == [3]
            while (await backend.stats("g")).in_flight:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
            assert (await backend.stats("g")).delayed == 1, "the copy, and nothing else"
            assert messages.take() is None


async def test_one_that_nobody_was_there_for_has_not_been_attempted(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        await backend.declare("g")
        await injected(lab, due=-1, attempts=2)
        # Somebody hid it before it was due, and left.
        url = await lab.url("group", "g")
        await lab.ask("receive_message", QueueUrl=url, VisibilityTimeout=0)
        async with backend.consume(group="g") as messages:
            message = await messages.receive()
            assert message.attempt == 3
            await message.ack()


async def test_one_that_is_first_seen_when_it_is_due_begins_with_its_first_attempt(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        await backend.declare("g")
        await injected(lab, due=-1)
        async with backend.consume(group="g") as messages:
            for attempt in (1, 2, 3):
                message = await messages.receive()
                assert message.attempt == attempt
                await message.nack(delay=0)


async def test_a_retry_within_12_hours_hides_the_message(lab: Any) -> None:
    async with bounds.within(15):
        receiver, delivery = await taken(lab)
        delay = 12 * HOUR - 5 * MINUTE
        assert not any(await receiver.settle([Settlement(delivery, Disposition.RETRY, delay=delay - 0.5)]))
        entry = await appears(lab, "ChangeMessageVisibilityBatch")
        assert entry["VisibilityTimeout"] == delay
        await receiver.close()


@pytest.mark.parametrize("delay", [12 * HOUR - 30, 13 * HOUR])
async def test_a_retry_beyond_12_hours_or_nearly_so_is_a_copy_that_says_when(
    lab: Any, header: Header, delay: float
) -> None:
    async with bounds.within(15):
        receiver, delivery = await taken(lab)
        assert not any(await receiver.settle([Settlement(delivery, Disposition.RETRY, delay=delay)]))
        entry = await appears(lab, "SendMessageBatch")
        metadata = header(entry)
        assert (entry["DelaySeconds"], metadata[ATTEMPTS]) == (900, 1)
        assert abs(metadata[DUE] / 1000 - time.time() - delay) < 5
        assert len(lab.gate.requests("DeleteMessageBatch")) == 1
        await receiver.close()


async def test_a_message_that_was_held_for_long_is_copied_where_it_cannot_be_hidden_for_long_enough(lab: Any) -> None:
    async with bounds.within(15):
        receiver, delivery = await taken(lab)
        receiver._in_flight[delivery.native].expires = time.monotonic() + MINUTE
        assert not any(await receiver.settle([Settlement(delivery, Disposition.RETRY, delay=2 * MINUTE)]))
        assert (await appears(lab, "SendMessageBatch"))["DelaySeconds"] == 2 * MINUTE
        await receiver.close()


async def test_a_lease_is_renewed_for_12_hours_and_then_lost_which_is_said(
    lab: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="abe.sqs")
    async with bounds.within(15):
        receiver, delivery = await taken(lab)
        held = receiver._in_flight[delivery.native]
        assert not await receiver.renew([delivery])
        assert "12 hours" not in caplog.text
        held.expires = time.monotonic() + 5.9
        for _ in range(2):
            assert not await receiver.renew([delivery])
        assert caplog.text.count("12 hours") == 1, "while there is time to do something about it"
        renewals = [
            each["Entries"][0]["VisibilityTimeout"] for each in lab.gate.requests("ChangeMessageVisibilityBatch")
        ]
        assert renewals == [31, 5, 5], "as long as SQS allows, and no longer"
        held.expires = time.monotonic()
        assert list(await receiver.renew([delivery])) == [delivery]
        assert len(lab.gate.requests("ChangeMessageVisibilityBatch")) == 3
        await receiver.close()
