"""FIFO queues: order, deduplication, and what may not get in their way."""

import asyncio
import re
from typing import Any

import pytest

from abe.backends.message_queue.base import Envelope
from abe_backend_sqs import SqsBackend, SqsSettings, _wire


async def collect(backend: SqsBackend, count: int) -> list[Any]:
    messages: list[Any] = []
    async with backend.consume(group="g") as subscription:
        while len(messages) < count:
            messages.append(message := await subscription.receive())
            await message.ack()
    return messages


def test_the_capabilities_follow_the_settings() -> None:
    plain, by_key, one = (
        SqsBackend(settings).capabilities
        for settings in (SqsSettings(), SqsSettings(fifo=True), SqsSettings(fifo=True, message_group="all"))
    )
    assert (plain.ordered, plain.ordered_per_key, plain.publish_dedup, plain.spurious_duplicates) == (
        False,
        False,
        None,
        True,
    )
    assert (by_key.ordered, by_key.ordered_per_key, by_key.publish_dedup, by_key.spurious_duplicates) == (
        False,
        True,
        300.0,
        False,
    )
    assert one.ordered
    assert one.ordered_per_key


@pytest.mark.parametrize("text", ["order-1", "k" * 128, "k" * 129, "a b", "é", "\x00"])
def test_a_key_or_an_id_of_any_characters_makes_a_message_group_and_a_deduplication_id(text: str) -> None:
    entry = _wire.in_order(_wire.pack(Envelope("i", "k", b"{}", 1)), text, text)
    assert re.fullmatch("[!-~]{1,128}", entry.group)
    assert entry.group == entry.dedup
    assert (entry.group == text) is bool(re.fullmatch("[!-~]{1,128}", text))


@pytest.mark.parametrize(("message_group", "expected"), [(None, "order.created"), ("all", "all")])
async def test_the_message_group_is_the_key_or_the_one_that_is_set(
    lab: Any, message_group: str | None, expected: str
) -> None:
    async with asyncio.timeout(15):
        backend = await lab.backend(fifo=True, message_group=message_group)
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1}, id="order-1")
        (entry,) = lab.gate.requests("SendMessageBatch")[0]["Entries"]
        assert (entry["MessageGroupId"], entry["MessageDeduplicationId"]) == (expected, "order-1")


async def test_one_message_group_keeps_all_messages_in_order(lab: Any) -> None:
    async with asyncio.timeout(20):
        backend = await lab.backend(fifo=True, message_group="all")
        await backend.declare("g")
        for n in range(10):
            await backend.publish(f"key.{n % 3}", {"n": n})
        await backend.publish_many([(f"key.{n % 3}", {"n": n}) for n in range(10, 60)])
        assert [message["n"] for message in await collect(backend, 60)] == list(range(60))


async def test_what_was_held_enters_its_first_group_in_order_and_once(lab: Any) -> None:
    async with asyncio.timeout(15):
        backend = await lab.backend(fifo=True)
        await backend.publish_many([("k", {"n": n}) for n in range(25)])
        await backend.publish("k", {"n": 25}, id="twice")
        await backend.publish("k", {"n": 25}, id="twice")
        assert [message["n"] for message in await collect(backend, 26)] == list(range(26))
        assert (await backend.stats("g")).waiting == 0


async def test_a_message_that_waits_for_its_retry_does_not_hold_up_those_behind_it(lab: Any) -> None:
    async with asyncio.timeout(15):
        backend = await lab.backend(fifo=True)
        seen: list[tuple[int, int]] = []
        async with backend.consume(group="g") as messages:
            await backend.publish_many([("k", {"n": n}) for n in range(5)])
            while len(seen) < 6:
                message = await messages.receive()
                seen.append((message["n"], message.attempt))
                await (message.nack(delay=1) if seen[-1] == (0, 1) else message.ack())
        assert seen == [*((n, 1) for n in range(5)), (0, 2)]


async def test_a_retry_at_once_keeps_its_place(lab: Any) -> None:
    async with asyncio.timeout(15):
        backend = await lab.backend(fifo=True)
        await backend.declare("g")
        await backend.publish_many([("k", {"n": n}) for n in range(3)])
        async with backend.consume(group="g", prefetch=1) as messages:
            await (await messages.receive()).nack(delay=0)
        assert [(message["n"], message.attempt) for message in await collect(backend, 3)] == [(0, 2), (1, 1), (2, 1)]


async def test_what_is_given_back_keeps_its_place_and_is_no_attempt(lab: Any) -> None:
    async with asyncio.timeout(15):
        backend = await lab.backend(fifo=True)
        await backend.declare("g")
        await backend.publish_many([("k", {"n": n}) for n in range(3)])
        async with backend.consume(group="g") as messages:
            await messages.receive()
        assert [(message["n"], message.attempt) for message in await collect(backend, 3)] == [(0, 1), (1, 1), (2, 1)]


async def test_a_delayed_message_with_the_id_of_one_published_before_is_delivered_once(lab: Any) -> None:
    async with asyncio.timeout(15):
        backend = await lab.backend(fifo=True)
        await backend.declare("g")
        await backend.publish("k", {"n": 1}, id="i")
        await backend.publish("k", {"n": 1}, id="i", delay=1)
        async with backend.consume(group="g") as messages:
            await (await messages.receive()).ack()
            while (await backend.stats("g")).delayed:  # noqa: ASYNC110 - the server sets no event of ours
                await asyncio.sleep(0.02)
            await backend.publish("k", {"n": 2})
            assert (await messages.receive())["n"] == 2


async def test_a_dead_letter_that_is_replayed_and_fails_again_at_once_is_kept_each_time(lab: Any) -> None:
    async with asyncio.timeout(15):
        backend = await lab.backend(fifo=True)
        await backend.declare("g")
        await backend.publish("k", {"n": 1}, id="i")
        async with backend.consume(group="g") as messages:
            for reason in ("first", "second", "third"):
                await (await messages.receive()).reject(reason)
                (letter,) = await backend.dead_letters("g").list()
                assert (letter.id, letter.reason) == ("i", reason)
                assert await backend.dead_letters("g").replay("i") == 1
            message = await messages.receive()
            assert (message.id, message.attempt) == ("i", 1)
            await message.ack()


async def test_the_dead_letters_of_one_key_are_all_listed(lab: Any) -> None:
    async with asyncio.timeout(15):
        backend = await lab.backend(fifo=True)
        async with backend.consume(group="g") as messages:
            await backend.publish_many([("k", {"n": n}) for n in range(25)])
            for _ in range(25):
                await (await messages.receive()).reject("no")
        letters = await backend.dead_letters("g").list()
        assert [letter.body for letter in letters] == [b'{"n":%d}' % n for n in range(25)]


async def test_a_stranger_s_message_keeps_its_message_group_when_it_is_retried(lab: Any) -> None:
    async with asyncio.timeout(15):
        backend = await lab.backend(fifo=True)
        async with backend.consume(group="g") as messages:
            await lab.ask(
                "send_message",
                QueueUrl=await lab.url("group", "g", ".fifo"),
                MessageBody='{"n": 1}',
                MessageGroupId="theirs",
                MessageDeduplicationId="1",
            )
            await (await messages.receive()).nack(delay=1)
            message = await messages.receive()
            assert (message["n"], message.attempt) == (1, 2)
            entry = lab.gate.requests("SendMessageBatch")[-1]["Entries"][0]
            assert entry["MessageGroupId"] == "theirs"
            assert "abe-order" not in entry["MessageAttributes"]
            await message.ack()


async def test_standard_and_fifo_queues_of_one_namespace_are_apart(lab: Any) -> None:
    async with asyncio.timeout(15):
        standard, fifo = await lab.backend(), await lab.backend(fifo=True)
        await standard.declare("s")
        await fifo.declare("f")
        assert (list(await standard.groups()), list(await fifo.groups())) == (["s"], ["f"])
