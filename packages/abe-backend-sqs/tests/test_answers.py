"""Answers that are not of their form: what somebody on the way says in the place of SQS, and messages that nobody can read."""

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from abe.backends.message_queue.base import Envelope
from abe.errors import BackendConnectionError, PublishUnknownError
from abe_backend_sqs import _wire
from abe_backend_sqs._answers import FAULT, FormError, checked
from abe_contract_tests import bounds

OURS: Mapping[str, str] = {"content-type": "application/x-amz-json-1.0", "x-amzn-requestid": "r"}
THEIRS: Mapping[str, str] = {"content-type": "text/html"}
PAGE = b"<html><body>Please log in</body></html>"
ASKING = ("ListQueues", "ListQueueTags", "ReceiveMessage")
DOING = ("DeleteQueue", "TagQueue", "SetQueueAttributes")
TELLING = (
    "CreateQueue",
    "GetQueueUrl",
    "GetQueueAttributes",
    "SendMessageBatch",
    "DeleteMessageBatch",
    "ChangeMessageVisibilityBatch",
)


def page() -> web.Response:
    return web.Response(body=PAGE, content_type="text/html")


@pytest.mark.parametrize("operation", [*ASKING, *DOING, *TELLING])
@pytest.mark.parametrize("body", [PAGE, b"", b"null", b"[]", b'"text"', b'{"message": "hello"}', b"{}", b'{"a'])
def test_what_something_on_the_way_says_is_no_answer(operation: str, body: bytes) -> None:
    with pytest.raises(FormError, match=operation):
        checked("sqs", operation, {"content-type": "application/json"}, body)


@pytest.mark.parametrize("operation", ASKING)
def test_sqs_itself_may_leave_out_what_there_is_nothing_of(operation: str) -> None:
    assert checked("sqs", operation, OURS, b"{}") == b"{}"
    for body in (b"", PAGE):
        with pytest.raises(FormError):
            checked("sqs", operation, OURS, body)


@pytest.mark.parametrize("operation", TELLING)
def test_sqs_itself_does_not_leave_out_what_is_the_answer(operation: str) -> None:
    with pytest.raises(FormError, match=operation):
        checked("sqs", operation, OURS, b"{}")


@pytest.mark.parametrize("operation", DOING)
@pytest.mark.parametrize("body", [b"", b"{}"])
def test_what_only_does_something_may_be_answered_with_nothing(operation: str, body: bytes) -> None:
    assert checked("sqs", operation, OURS, body) == body


def test_sns_answers_in_its_own_form() -> None:
    body = b"<PublishBatchResponse><PublishBatchResult/></PublishBatchResponse>"
    assert checked("sns", "PublishBatch", {}, body) == body
    for other in (b"", PAGE):
        with pytest.raises(FormError):
            checked("sns", "PublishBatch", OURS, other)


def message(**changes: Any) -> dict[str, Any]:
    return {"MessageId": "m", "ReceiptHandle": "h", "Body": "{}"} | changes


def mended(*messages: Any) -> list[dict[str, Any]]:
    body = checked("sqs", "ReceiveMessage", OURS, json.dumps({"Messages": messages}).encode())
    found: list[dict[str, Any]] = json.loads(body)["Messages"]
    return found


@pytest.mark.parametrize(
    "broken",
    [
        message(Body=5),
        message(Body="\ud800"),
        message(MessageId=None),
        message(MessageAttributes=[]),
        message(MessageAttributes={"abe": "text"}),
        message(MessageAttributes={"abe": {"DataType": "String", "StringValue": 5}}),
        message(MessageAttributes={"x": {"DataType": "Binary", "BinaryValue": "é"}}),
        message(Attributes="text"),
        message(Attributes={"ApproximateReceiveCount": []}),
    ],
)
def test_a_message_that_is_not_of_its_form_is_at_fault_alone(broken: dict[str, Any]) -> None:
    good = message(MessageId="good", ReceiptHandle="g")
    first, second = mended(broken, good)
    assert second["MessageId"] == "good"
    assert FAULT not in second["Attributes"]
    assert _wire.parse(second).fault is None
    assert "not of its form" in str(_wire.parse(first).fault)
    assert _wire.delivery(first, _wire.parse(first)).native == "h"


def test_a_message_without_a_handle_is_left_to_its_lease() -> None:
    assert [each["ReceiptHandle"] for each in mended(message(ReceiptHandle=None), 5, message())] == ["h"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
METADATA = st.one_of(
    st.text(),
    ANYTHING.map(json.dumps),
    st.lists(ANYTHING, max_size=9).map(lambda fields: json.dumps([1, *fields])),
    st.integers(1, 20_000).map(lambda depth: '[1,"i","k",0,' + "[" * depth),
    st.integers(1, 20_000).map(lambda depth: '[1,"i","k",0,null,0,0,0,' + "[" * depth),
    st.integers(1, 6_000).map(lambda digits: f'[1,"i","k",{"9" * digits}]'),
)
VALUES = st.fixed_dictionaries({"DataType": st.just("String"), "StringValue": st.text() | METADATA}) | ANYTHING
NAMES = st.sampled_from(["abe", "abe-dead", "abe-order", "key", "id", "encoding"])


@settings(max_examples=300, deadline=None)
@given(
    body=st.text() | st.binary().map(lambda raw: base64.b64encode(raw).decode()),
    attributes=st.dictionaries(NAMES, VALUES, max_size=6),
    encoding=st.sampled_from(["base64", "x"]),
    count=st.text() | st.integers().map(str) | st.integers(4_000, 6_000).map(lambda digits: "9" * digits),
)
def test_whatever_is_in_a_message_it_can_be_read_moved_and_buried(
    body: str, attributes: dict[str, Any], encoding: str, count: str
) -> None:
    attributes.setdefault("encoding", {"DataType": "String", "StringValue": encoding})
    system = {"ApproximateReceiveCount": count, "SentTimestamp": count}
    (received,) = mended(message(Body=body, MessageAttributes=attributes, Attributes=system))
    parsed = _wire.parse(received)
    delivery = _wire.delivery(received, parsed)
    assert delivery.attempt >= 1
    _wire.wants(("a.*", "#"), received)
    assert _wire.order(received)
    letter = _wire.dead_letter(received)
    assert letter.attempts >= 0
    buried = _wire.bury(received, attempts=delivery.attempt, reason="r", error="e", at=1)
    for entry in (_wire.repack(received, attempts=delivery.attempt), buried):
        assert entry.size <= _wire.LIMIT


async def test_one_message_that_cannot_be_read_does_not_keep_the_others_of_the_answer(lab: Any) -> None:
    """A body beyond ASCII that is said to be base64, for one, ended the poll: nine others lost a lease and an attempt each time."""
    async with bounds.within(20):
        backend = await lab.backend()
        await backend.declare("g")
        url = await lab.url("group", "g")
        said = {"encoding": {"DataType": "String", "StringValue": "base64"}}
        await lab.ask("send_message", QueueUrl=url, MessageBody="é", MessageAttributes=said)
        for n in range(9):
            await lab.ask("send_message", QueueUrl=url, MessageBody=f'{{"n":{n}}}')
        async with backend.consume(group="g") as messages:
            found = [await messages.receive() for _ in range(9)]
            assert sorted(each["n"] for each in found) == list(range(9))
            assert {each.attempt for each in found} == {1}
            for each in found:
                await each.ack()
        assert (await backend.stats("g")).dead == 1


@pytest.mark.parametrize("operation", ["ListQueues", "ListQueueTags"])
@pytest.mark.parametrize(
    "answer",
    [page, lambda: web.Response(body=b""), lambda: web.json_response({}), lambda: web.json_response({"message": "x"})],
)
async def test_what_is_no_answer_is_not_taken_for_no_groups(
    lab: Any, operation: str, answer: Callable[[], web.Response]
) -> None:
    """Then it would be kept for the first group, and no other would get it."""
    async with bounds.within(20):
        maker = await lab.backend()
        for group in ("a", "b"):
            await maker.declare(group)
        backend = await lab.backend()
        lab.gate.times(3, operation, lambda _: answer())
        await maker.declare("c")
        await backend.publish("k", {"n": 1})
        assert [(await maker.stats(group)).waiting for group in ("a", "b", "c")] == [1, 1, 1]


async def test_what_is_no_answer_leaves_it_unknown_whether_messages_are_stored(lab: Any) -> None:
    async with bounds.within(20):
        transport = await lab.transport()
        await transport.declare("g", None, change=False)
        for answer in (page, lambda: web.json_response({})):
            lab.gate.times(1, "SendMessageBatch", lambda _, answer=answer: answer())
            (outcome,) = await transport.send([Envelope("id", "k", b"{}", 1)])
            assert isinstance(outcome, PublishUnknownError)


async def test_a_poll_that_something_else_answers_fails_and_does_not_ask_again_at_once(lab: Any) -> None:
    async with bounds.within(20):
        transport = await lab.transport()
        await transport.declare("g", None, change=False)
        receiver = await transport.subscribe("g", 10)
        lab.gate.times(1, "ReceiveMessage", lambda _: page())
        with pytest.raises(BackendConnectionError, match="not one of its own"):
            await receiver.receive(1)
        await receiver.close()
