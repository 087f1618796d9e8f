"""Publishing where it goes wrong: fan-outs that reach some queues, and answers that say nothing."""

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from abe.backends.message_queue.base import Envelope, Publication
from abe.errors import BackpressureError, PermissionDeniedError, PublishUnknownError, UnroutableError
from abe_backend_sqs import SqsBackend, _publisher
from abe_contract_tests import bounds

Refusal = Callable[..., web.Response]
PINNED = (("a", ("#",)), ("b", ("#",)))


async def test_a_fan_out_that_failed_in_part_is_repeated_for_the_missing_queues_only(
    lab: Any, refusal: Refusal
) -> None:
    async with bounds.within(15):
        maker: SqsBackend = await lab.backend()
        await maker.declare("a")
        await maker.declare("b")
        backend = await lab.backend(pinned=PINNED)
        lab.gate.times(
            3,
            "SendMessageBatch",
            lambda body: refusal("RequestThrottled") if body["QueueUrl"].endswith("-group-b") else None,
        )
        await backend.publish("order.created", {"n": 1}, id="order-1")
        assert [(await maker.stats(group)).waiting for group in ("a", "b")] == [1, 1]
        assert len(lab.gate.requests("SendMessageBatch")) == 5


async def test_a_fan_out_that_is_tried_for_long_is_repeated_for_the_missing_queues_only(
    lab: Any, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounds.within(20):
        maker: SqsBackend = await lab.backend()
        await maker.declare("a")
        await maker.declare("b")
        transport = await lab.transport(pinned=PINNED)
        now = 1_000.0
        monkeypatch.setattr(_publisher, "time", SimpleNamespace(monotonic=lambda: now))
        lab.gate.times(
            4,
            "SendMessageBatch",
            lambda body: refusal("RequestThrottled") if body["QueueUrl"].endswith("-group-b") else None,
        )
        message = Envelope("id", "k", b"{}", 1_700_000_000_000)
        while any(await transport.send([message])):
            now += 0.9 * transport._settings.publish_timeout
        assert [(await maker.stats(group)).waiting for group in ("a", "b")] == [1, 1]


@pytest.mark.parametrize("again", ["the group stays", "the group is made again"])
async def test_what_an_earlier_publish_of_the_id_reached_is_no_reason_to_leave_a_queue_out(
    lab: Any, refusal: Refusal, again: str
) -> None:
    async with bounds.within(20):
        maker: SqsBackend = await lab.backend()
        await maker.declare("a")
        await maker.declare("b")
        backend: SqsBackend = await lab.backend(publish_timeout=0.5)
        broken = True

        def rule(name: str, body: dict[str, Any]) -> web.Response | None:
            return (
                refusal("RequestThrottled")
                if broken and name == "SendMessageBatch" and body["QueueUrl"].endswith("-group-b")
                else None
            )

        lab.gate.rules.append(rule)
        with pytest.raises(PublishUnknownError, match="group-b"):
            await backend.publish("report", {"day": "monday"}, id="daily-report")
        broken = False
        if again == "the group is made again":
            await maker.delete_group("a")
            await maker.declare("a")
        await backend.publish("report", {"day": "tuesday"}, id="daily-report")
        async with maker.consume(group="a") as messages:
            days = [(await messages.receive())["day"] for _ in range(1 if "again" in again else 2)]
        assert days[-1] == "tuesday"


async def test_two_messages_of_one_id_fail_in_part_each_on_its_own(lab: Any, refusal: Refusal) -> None:
    """Both reach a, then the first alone b: the second is not taken for it."""
    async with bounds.within(15):
        maker: SqsBackend = await lab.backend()
        await maker.declare("a")
        await maker.declare("b")
        backend: SqsBackend = await lab.backend(pinned=PINNED)
        failures = iter([(0, 1), (1,)])

        def rule(name: str, body: dict[str, Any]) -> web.Response | None:
            if (
                name == "SendMessageBatch"
                and body["QueueUrl"].endswith("-group-b")
                and (failing := next(failures, None))
            ):
                entries = [{"Id": str(n), "Code": "InternalError", "SenderFault": False} for n in failing]
                stored = [{"Id": each["Id"]} for each in body["Entries"] if int(each["Id"]) not in failing]
                return web.json_response({"Successful": stored, "Failed": entries})
            return None

        lab.gate.rules.append(rule)
        await backend.publish_many([Publication("k", {"n": n}, id="same") for n in range(2)])
        sent = [
            [json.loads(each["MessageBody"])["n"] for each in body["Entries"]]
            for body in lab.gate.requests("SendMessageBatch")
            if body["QueueUrl"].endswith("-group-b")
        ]
        assert sent == [[0, 1], [0, 1], [1]]
        assert (await maker.stats("a")).waiting == 2


async def test_what_nobody_sends_again_is_forgotten(lab: Any, refusal: Refusal) -> None:
    async with bounds.within(15):
        transport = await lab.transport(pinned=PINNED, publish_timeout=0.2)
        await transport.declare("a", ("#",), change=True)
        publisher = transport.broker.publisher
        registry = await transport.broker.groups.keeper.registry()
        (error,) = await publisher.send([Envelope("id", "k", b"{}", 1)], registry)
        assert isinstance(error, PublishUnknownError)
        assert len(publisher._partial) == 1
        async with bounds.within(2):
            while publisher._partial:
                await asyncio.sleep(0.02)
                await publisher.send([], registry)


@pytest.mark.parametrize("text", [b"", b"{}", b"<html>all is well</html>"])
@pytest.mark.parametrize("fanout", ["direct", "sns"])
async def test_an_answer_that_names_no_message_leaves_it_unknown(lab: Any, fanout: str, text: bytes) -> None:
    operation = "PublishBatch" if fanout == "sns" else "SendMessageBatch"
    async with bounds.within(15):
        maker: SqsBackend = await lab.backend(fanout=fanout)
        await maker.declare("g")
        backend: SqsBackend = await lab.backend(fanout=fanout, publish_timeout=3.0)
        broken = True

        def rule(name: str, _: dict[str, Any]) -> web.Response | None:
            return web.Response(body=text) if broken and name == operation else None

        lab.gate.rules.append(rule)
        with pytest.raises(PublishUnknownError):
            await backend.publish("k", {"n": 1})
        assert len(lab.gate.requests(operation)) > 1, "it is sent again within the time of the publish"
        assert (await maker.stats("g")).waiting == 0
        broken = False
        await backend.publish("k", {"n": 1})
        assert (await maker.stats("g")).waiting == 1


async def test_only_what_an_answer_does_not_name_is_sent_again(lab: Any) -> None:
    async with bounds.within(15):
        backend: SqsBackend = await lab.backend()
        await backend.declare("g")

        def rule(name: str, body: dict[str, Any]) -> web.Response | None:
            if name != "SendMessageBatch" or len(lab.gate.requests(name)) > 1:
                return None
            return web.json_response({"Successful": [{"Id": "0"}, {"Id": "2"}, {"Id": "nonsense"}]})

        lab.gate.rules.append(rule)
        await backend.publish_many([Publication("k", {"n": n}) for n in range(4)])
        again = lab.gate.requests("SendMessageBatch")[1]
        assert [json.loads(each["MessageBody"])["n"] for each in again["Entries"]] == [1, 3]


async def test_rights_that_are_missing_for_one_group_of_a_fan_out_do_not_say_that_nothing_was_stored(
    lab: Any, refusal: Refusal
) -> None:
    async with bounds.within(20):
        maker: SqsBackend = await lab.backend()
        await maker.declare("a")
        await maker.declare("b")
        backend = await lab.backend(pinned=PINNED, publish_timeout=3.0)

        def deny(name: str, body: dict[str, Any]) -> web.Response | None:
            denied = name == "SendMessageBatch" and body["QueueUrl"].endswith("-group-b")
            return refusal("AccessDenied", 403) if denied else None

        lab.gate.rules.append(deny)
        with pytest.raises(PublishUnknownError, match="-group-b") as caught:
            await backend.publish("k", {"n": 1})
        assert caught.value.maybe_accepted
        assert [(await maker.stats(group)).waiting for group in ("a", "b")] == [1, 0]


async def test_what_will_never_be_stored_anywhere_is_told_at_once(lab: Any, refusal: Refusal) -> None:
    async with bounds.within(20):
        maker: SqsBackend = await lab.backend()
        await maker.declare("a")
        await maker.declare("b")
        backend = await lab.backend(pinned=PINNED, publish_timeout=30.0)

        def deny(name: str, body: dict[str, Any]) -> web.Response | None:
            if name != "SendMessageBatch":
                return None
            return refusal("AccessDenied", 403) if body["QueueUrl"].endswith("-b") else refusal("RequestThrottled")

        lab.gate.rules.append(deny)
        with pytest.raises(PermissionDeniedError) as caught:
            await backend.publish("k", {"n": 1})
        assert not caught.value.maybe_accepted


async def test_a_message_for_one_group_reaches_that_one_alone(lab: Any) -> None:
    async with bounds.within(20):
        backend: SqsBackend = await lab.backend()
        await backend.publish("early", {"n": 0})  # parked: there is no group
        with pytest.raises(UnroutableError, match="'a'"):
            await backend.publish("k", {"n": 1}, group="a", mandatory=True)
        await backend.declare("a", ["other"])
        await backend.declare("b")
        await backend.publish("k", {"n": 2}, group="a")
        await backend.publish("k", {"n": 3}, group="a", delay=600)
        stats = [await backend.stats(group) for group in ("a", "b")]
        assert [(each.waiting, each.delayed) for each in stats] == [(1, 1), (1, 0)]


async def test_a_group_that_is_full_is_told_before_anything_is_stored(lab: Any) -> None:
    async with bounds.within(20):
        maker: SqsBackend = await lab.backend()
        await maker.declare("a")
        await maker.declare("b", ["only.b"])
        backend: SqsBackend = await lab.backend(max_backlog=2)
        for n in range(2):
            await backend.publish("only.b", {"n": n}, group="b")
        with pytest.raises(BackpressureError):
            await backend.publish("only.b", {"n": 2})
        assert [(await maker.stats(group)).waiting for group in ("a", "b")] == [0, 2]
        await backend.publish("k", {"n": 3})
        assert (await maker.stats("a")).waiting == 1
