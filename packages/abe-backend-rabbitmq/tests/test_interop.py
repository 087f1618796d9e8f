"""Messages from and to a plain client."""

import json
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import aio_pika
import pytest

from abe.backends.message_queue.base import Delivery, Disposition, Settlement
from abe_backend_rabbitmq._channel import Outgoing
from abe_contract_tests import bounds

pytestmark = pytest.mark.xdist_group("rabbitmq-node")


async def exchange_of(lab: Any) -> Any:
    channel = await lab.pika()
    return await channel.get_exchange(lab.names.exchange)


async def test_a_message_of_a_plain_client_is_consumed(lab: Any) -> None:
    backend = await lab.backend()
    await backend.declare("g", ["orders.#"])
    exchange = await exchange_of(lab)
    when = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    await exchange.publish(
        aio_pika.Message(
            b'{"order": 1}',
            message_id="m-1",
            timestamp=when,
            content_type="application/json",
            headers={"trace": "t", "x-request-id": "r", "retries": 3, "share": 0.5, "extra": {"a": [1, 2]}},
        ),
        "orders.created",
    )
    async with bounds.within(10), backend.consume(group="g") as messages:
        message = await messages.receive()
        assert message == {"order": 1}
        assert (message.id, message.key, message.attempt) == ("m-1", "orders.created", 1)
        assert message.published_at == when.timestamp()
        assert message.headers == {"trace": "t", "x-request-id": "r", "retries": "3", "share": "0.5"}
        await message.nack(0.1)
        message = await messages.receive()
        assert (message.id, message.key, message.attempt) == ("m-1", "orders.created", 2)
        assert message.headers == {"trace": "t", "x-request-id": "r", "retries": "3", "share": "0.5"}
        await message.ack()


async def test_a_message_without_any_properties_keeps_one_id(lab: Any) -> None:
    backend = await lab.backend()
    await backend.declare("g")
    exchange = await exchange_of(lab)
    await exchange.publish(aio_pika.Message(b"[1, 2]"), "k")
    await exchange.publish(aio_pika.Message(b'{"n": 1}'), "k")
    async with bounds.within(10), backend.consume(group="g", prefetch=1) as messages:
        ids: set[str] = set()
        for attempt, delay in ((1, 0), (2, 0.1), (3, None)):
            message = await messages.receive()
            assert (message, message.attempt) == ({"n": 1}, attempt)
            assert (message.key, message.headers) == ("k", {})
            ids.add(message.id)
            await (message.ack() if delay is None else message.nack(delay))
        assert len(ids) == 1
    (letter,) = await backend.dead_letters("g").list()  # what is no object cannot be handled
    assert (letter.body, letter.key) == (b"[1, 2]", "k")


async def test_a_message_of_ours_is_read_by_a_plain_client(lab: Any) -> None:
    backend = await lab.backend()
    await backend.declare("g")
    channel, exchange = await lab.pika(), await exchange_of(lab)
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange, "orders.*")
    before = datetime.now(UTC).replace(microsecond=0)
    long = "n" * 129
    await backend.publish(
        "orders.created", {"order": 1, "name": "é"}, id="m-1", headers={"trace": "t", "x-death": "mine", long: "v"}
    )
    async with bounds.within(10):
        message = await queue.get(timeout=None)
        assert json.loads(message.body) == {"order": 1, "name": "é"}
        assert (message.content_type, message.message_id, message.routing_key) == (
            "application/json",
            "m-1",
            "orders.created",
        )
        assert message.delivery_mode is aio_pika.DeliveryMode.PERSISTENT
        assert before <= message.timestamp <= datetime.now(UTC)
        headers = dict(message.headers)
        assert headers["trace"] == "t"
        assert headers["abe-version"] == 1
        assert headers["abe-published-at"] // 1000 == int(message.timestamp.timestamp())
        assert json.loads(headers["abe-headers"]) == {"x-death": "mine", long: "v"}
        await message.ack()
        async with backend.consume(group="g") as messages:
            own = await messages.receive()
            assert own.headers == {"trace": "t", "x-death": "mine", long: "v"}
            await own.ack()


async def test_a_dead_letter_of_a_stranger_s_message_is_replayed_with_all_it_had(lab: Any) -> None:
    backend = await lab.backend()
    await backend.declare("g")
    exchange = await exchange_of(lab)
    table = {
        "share": 0.5,
        "when": datetime(2024, 5, 6, tzinfo=UTC),
        "deep": {"a": [1, None, "x"]},
        "raw": bytearray(b"\xff"),
    }
    await exchange.publish(
        aio_pika.Message(b'{"n": 1}', headers=table, correlation_id="c", reply_to="r", priority=3), "k"
    )
    async with bounds.within(15):
        async with backend.consume(group="g") as messages:
            await (await messages.receive()).reject("no good")
        assert await backend.dead_letters("g").replay_all() == 1
        queue = await (await lab.pika()).get_queue(lab.names.queue("g"))
        message = await queue.get(timeout=None)
        assert {name: message.headers[name] for name in table} == table
        assert (message.correlation_id, message.reply_to, message.priority) == ("c", "r", 3)
        await message.ack()


def _table(name: bytes, field: bytes) -> bytes:
    headers = bytes((len(name),)) + name + field
    return b"\x20\x00" + len(headers).to_bytes(4, "big") + headers


def _nested(depth: int) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"F" + (len(value) + 2).to_bytes(4, "big") + b"\x01k" + value
    return value


ODD = {
    "no properties": b"\0\0",
    "a table of 400 tables": _table(b"deep", _nested(400)),
    "a table of 4,000 tables": _table(b"deep", _nested(4_000)),
    "a time that never comes": b"\x00\x40" + b"\xff" * 8,
    "a header that is a time that never comes": _table(b"when", b"T" + b"\xff" * 8),
    "text that is none": _table(b"\xff", b"S\0\0\0\1\xff"),
    "an id that is no text": b"\x00\x80\x02\xff\xfe",
    "headers without end": _table(b"long", b"S" + (120_000).to_bytes(4, "big") + b"x" * 120_000),
    "headers of ours that nest": _table(b"abe-headers", b"S" + (100_000).to_bytes(4, "big") + b"[" * 100_000),
    "counts that are none": _table(b"x-delivery-count", b"l" + b"\xff" * 8),
    "every property": b"\xdf\xf8\1a\1b\x02\xff\1c\1d\x06600000\1e" + bytes(8) + b"\1f\5guest\1h",
}


async def _odd(lab: Any, transport: Any) -> None:
    channel = await transport._broker.publisher.open()
    for number, properties in enumerate(ODD.values()):
        for body in (b"", b'{"n": %d}' % number, b'"' + b"x" * 400_000 + b'"'):
            assert not await channel.publish([Outgoing(lab.names.exchange, "k", properties, body, "")])
        assert await transport.send([lab.envelope()]) == ()


async def test_whatever_was_published_before_a_group_existed_reaches_the_first(lab: Any, collect: Any) -> None:
    transport = await lab.transport()
    await _odd(lab, transport)
    await transport.declare("g", None, change=False)
    receiver = await lab.receiver(transport)
    found = await collect(receiver, 4 * len(ODD))
    assert Counter(len(each.body) for each in found) == {0: len(ODD), 400_002: len(ODD), 8: 10, 9: 1, 2: len(ODD)}
    assert [each.attempt for each in found] == [1] * len(found)
    assert sum(each.fault is not None for each in found) == 3  # headers of ours that are not JSON
    assert not any(await receiver.ack(found, verify=True))
    assert await lab.waiting(lab.names.queue("g")) == 0


@pytest.mark.parametrize("disposition", [None, *Disposition, "at once"], ids=str)
async def test_whatever_comes_can_be_settled_beside_others_and_keeps_no_place(
    lab: Any, collect: Any, disposition: Any
) -> None:
    transport = await lab.transport()
    await transport.declare("g", None, change=False)
    await _odd(lab, transport)
    receiver = await lab.receiver(transport, prefetch=5)
    left = 4 * len(ODD)

    def settlement(delivery: Delivery) -> Settlement:
        if disposition == "at once":
            return Settlement(delivery, Disposition.RETRY)
        delay = 0.1 if disposition is Disposition.RETRY else 0.0
        return Settlement(delivery, disposition, delay=delay, reason="r", error="e")

    again = 0
    while left:
        page = await receiver.receive(5)
        for delivery in page:
            if delivery.fault is None:
                receiver.metadata(delivery)
        new = [each for each in page if each.attempt == 1 and again < 4 * len(ODD)] if disposition else []
        if disposition is not Disposition.DEAD:
            again += len(new)
        if new:
            assert not any(await receiver.settle([settlement(each) for each in new]))
        done = [each for each in page if each not in new]
        assert not any(await receiver.ack(done, verify=True))
        left -= len(new if disposition is Disposition.DEAD else done)
    assert receiver.in_flight == 0
    assert await lab.waiting(lab.names.queue("g")) == 0
    assert await lab.waiting(lab.names.dead("g")) == (4 * len(ODD) if disposition is Disposition.DEAD else 0)
