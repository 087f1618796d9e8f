"""FIFO queues: order, deduplication, and what may not get in their way."""

import asyncio
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from abe.backends.message_queue.base import Delivery, Disposition, Envelope, Settlement
from abe_backend_sqs import SqsBackend, SqsSettings, _delays, _inflight, _wire
from abe_backend_sqs._copies import Copies
from abe_backend_sqs._topology import Topology
from abe_contract_tests import bounds, suite

Refusal = Callable[..., web.Response]


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
    async with bounds.within(15):
        backend = await lab.backend(fifo=True, message_group=message_group)
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1}, id="order-1")
        (entry,) = lab.gate.requests("SendMessageBatch")[0]["Entries"]
        assert (entry["MessageGroupId"], entry["MessageDeduplicationId"]) == (expected, "order-1")


async def test_one_message_group_keeps_all_messages_in_order(lab: Any) -> None:
    async with bounds.within(20):
        backend = await lab.backend(fifo=True, message_group="all")
        await backend.declare("g")
        for n in range(10):
            await backend.publish(f"key.{n % 3}", {"n": n})
        await backend.publish_many([(f"key.{n % 3}", {"n": n}) for n in range(10, 60)])
        assert [message["n"] for message in await collect(backend, 60)] == list(range(60))


async def test_what_was_held_enters_its_first_group_in_order_and_once(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend(fifo=True)
        await backend.publish_many([("k", {"n": n}) for n in range(25)])
        await backend.publish("k", {"n": 25}, id="twice")
        await backend.publish("k", {"n": 25}, id="twice")
        assert [message["n"] for message in await collect(backend, 26)] == list(range(26))
        assert (await backend.stats("g")).waiting == 0


async def test_a_message_that_waits_for_its_retry_does_not_hold_up_those_behind_it(lab: Any) -> None:
    async with bounds.within(15):
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
    async with bounds.within(15):
        backend = await lab.backend(fifo=True)
        await backend.declare("g")
        await backend.publish_many([("k", {"n": n}) for n in range(3)])
        async with backend.consume(group="g", prefetch=1) as messages:
            await (await messages.receive()).nack(delay=0)
        assert [(message["n"], message.attempt) for message in await collect(backend, 3)] == [(0, 2), (1, 1), (2, 1)]


async def test_what_is_given_back_keeps_its_place_and_is_no_attempt(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend(fifo=True)
        await backend.declare("g")
        await backend.publish_many([("k", {"n": n}) for n in range(3)])
        async with backend.consume(group="g") as messages:
            await messages.receive()
        assert [(message["n"], message.attempt) for message in await collect(backend, 3)] == [(0, 1), (1, 1), (2, 1)]


async def test_a_delayed_message_with_the_id_of_one_published_before_is_delivered_once(lab: Any) -> None:
    async with bounds.within(15):
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
    async with bounds.within(15):
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
    async with bounds.within(15):
        backend = await lab.backend(fifo=True)
        async with backend.consume(group="g") as messages:
            await backend.publish_many([("k", {"n": n}) for n in range(25)])
            for _ in range(25):
                await (await messages.receive()).reject("no")
        letters = await backend.dead_letters("g").list()
        assert [letter.body for letter in letters] == [b'{"n":%d}' % n for n in range(25)]


async def test_a_foreign_message_keeps_its_message_group_when_it_is_retried(lab: Any) -> None:
    async with bounds.within(15):
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
    async with bounds.within(15):
        standard, fifo = await lab.backend(), await lab.backend(fifo=True)
        await standard.declare("s")
        await fifo.declare("f")
        assert (list(await standard.groups()), list(await fifo.groups())) == (["s"], ["f"])


async def test_a_release_that_was_cancelled_and_is_repeated_is_counted_once(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounds.within(20):
        transport = await lab.transport(fifo=True)
        await transport.declare("g", None, change=False)
        await transport.send([Envelope("the-id", "k", b'{"n":1}', 1)])
        receiver = await transport.subscribe("g", 5)
        (delivery,) = await receiver.receive(5)
        client, waiting = await transport.broker.clients.calls(), asyncio.Event()

        async def hang(**_: Any) -> None:
            waiting.set()
            await asyncio.Event().wait()

        with monkeypatch.context() as patch:
            patch.setattr(client, "change_message_visibility_batch", hang)
            releasing = asyncio.create_task(receiver.settle([Settlement(delivery, Disposition.RELEASE)]))
            await waiting.wait()
            releasing.cancel()  # as where closing takes too long
            await asyncio.wait([releasing])
        await receiver.close()
        backend = await lab.backend(fifo=True)
        async with backend.consume(group="g") as messages:
            message = await messages.receive()
            assert message.attempt == 1
            await message.nack(delay=1)
            message = await messages.receive()
            assert (message.id, message.attempt) == ("the-id", 2)
            await message.ack()


def test_a_delivery_is_said_to_be_no_attempt_once_and_that_can_be_taken_back() -> None:
    message = {"MessageId": "a-message"}
    first, second = (_inflight.Leased(message, Delivery(b"", None, n, ""), 0.0) for n in (1, 2))
    for _ in range(2):
        first.uncount()
    assert _inflight.uncounted(message) == 1
    second.uncount()
    assert _inflight.uncounted(message) == 2
    for _ in range(2):
        second.recount()
    assert _inflight.uncounted(message) == 1
    first.recount()
    assert "a-message" not in _inflight._uncounted


async def test_no_attempt_comes_before_the_first(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bounds.within(15):
        backend = await lab.backend(fifo=True)
        await backend.declare("g")
        url = await lab.url("group", "g", ".fifo")
        sent = await lab.ask(
            "send_message", QueueUrl=url, MessageBody="{}", MessageGroupId="k", MessageDeduplicationId="1"
        )
        monkeypatch.setitem(
            _inflight._uncounted, sent["MessageId"], 3
        )  # more than SQS counted, whose count is approximate
        async with backend.consume(group="g") as messages:
            message = await messages.receive()
            assert message.attempt == 1
            await message.ack()


@pytest.mark.parametrize(
    ("attributes", "dedup"),
    [
        ({}, "published"),
        ({"abe-order": {"DataType": "String", "StringValue": "k"}}, "of-sqs"),
    ],
)
def test_what_has_left_a_fifo_queue_comes_back_with_a_deduplication_id_of_its_own(
    attributes: dict[str, Any], dedup: str
) -> None:
    copies = Copies(SqsSettings(fifo=True), Topology("n", fifo=True))
    header = {"DataType": "String", "StringValue": '[1,"published","k",1]'}
    message = {"MessageId": "of-sqs", "Body": "{}", "MessageAttributes": {"abe": header, **attributes}}
    assert copies.due("g", message).entry.dedup == dedup


async def test_delayed_messages_of_a_group_do_not_wait_because_another_group_was_deleted(lab: Any) -> None:
    async with bounds.within(20):
        backend = await lab.backend(fifo=True, wait=5)
        await backend.declare("other")
        async with backend.consume(group="g") as messages:
            later = await lab.url("delayed", "g")
            while not any(each["QueueUrl"] == later for each in lab.gate.requests("ReceiveMessage")):  # noqa: ASYNC110 - the server sets no event of ours
                await asyncio.sleep(0.01)
            await backend.delete_group("other")
            await backend.publish("k", {"n": 1}, delay=1)
            async with bounds.within(10):  # less than the lease for which it would be hidden
                await (await messages.receive()).ack()


class Pauses:
    """Stands in for waiting, and says for how long it would have been."""

    def __init__(self, count: int) -> None:
        self.seconds: list[float] = []
        self.enough = asyncio.Event()
        self._count = count

    async def __call__(self, ended: asyncio.Event, seconds: float) -> bool:
        self.seconds.append(seconds)
        if len(self.seconds) >= self._count:
            self.enough.set()
            return await ended.wait()
        return False


@pytest.mark.parametrize(
    ("code", "status", "level"), [("AccessDenied", 403, logging.ERROR), ("ThrottlingException", 400, logging.WARNING)]
)
async def test_delayed_messages_that_cannot_be_moved_are_complained_about_once(
    lab: Any,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: str,
    status: int,
    level: int,
) -> None:
    caplog.set_level(logging.DEBUG, logger="abe.sqs")
    pauses = Pauses(4)
    monkeypatch.setattr(_delays, "pause", pauses)
    async with bounds.within(15):
        transport = await lab.transport(fifo=True)
        await transport.declare("g", None, change=False)
        later = await lab.url("delayed", "g")
        lab.gate.rules.append(
            lambda name, body: refusal(code, status) if name == "ReceiveMessage" and body["QueueUrl"] == later else None
        )
        receiver = await transport.subscribe("g", 1)
        await pauses.enough.wait()
        await receiver.close()
    complaints = [each.levelno for each in caplog.records if "do not move" in each.getMessage()]
    assert complaints == [level, *[logging.DEBUG] * 3]
    permanent = level == logging.ERROR
    assert (min(pauses.seconds) == 30) is permanent
    assert (max(pauses.seconds) < 1) is not permanent


async def test_tries_to_move_delayed_messages_are_rare_although_consumers_come_and_go(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounds.within(15):
        transport = await lab.transport(fifo=True)
        await transport.declare("g", None, change=False)
        first = await transport.subscribe("g", 1)
        await first.close()
        second = await transport.subscribe("g", 1)
        assert not transport.broker.delays("g")._unused.is_set(), "what a pause waits for is that the last one has left"
        await second.close()
        assert transport.broker.delays("g")._unused.is_set()


@pytest.mark.thorough
def test_the_clauses_of_order_hold_with_one_message_group() -> None:
    """Of the suite these alone: others hold more at a time than SQS gives out of one message group."""
    folder = Path(suite.__path__[0])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(folder / "test_ordering.py"),
            f"{folder / 'test_transport.py'}::test_order_is_kept_within_and_across_batches",
            "--contract",
            "sqs-fifo-ordered",
            "-k",
            "not busy_key",  # with one message group there are no other keys to run beside it
            "-n0",
            "-p",
            "no:cacheprovider",
        ],
        capture_output=True,
        text=True,
        timeout=600,
        # In continuous integration a run of a part of the suite counts as failed.
        env={name: value for name, value in os.environ.items() if name != "CI"} | {"ABE_TEST_SERVICES": "processes"},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"C-ORD-01 +CAP +3 tests +passed", done.stdout), done.stdout


async def test_many_parked_messages_of_one_key_are_handed_over(lab: Any) -> None:
    """Those behind ten of a message group come only when these are deleted."""
    async with bounds.within(30):
        backend: SqsBackend = await lab.backend(fifo=True)
        await backend.publish_many([("k", {"n": n}) for n in range(65)])
        await backend.declare("g")
        assert (await backend.stats("g")).waiting == 65
        async with backend.consume(group="g") as messages:
            for n in range(65):
                message = await messages.receive()
                assert message["n"] == n
                await message.ack()
