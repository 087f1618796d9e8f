"""Messages from and to a plain client."""

import json
from datetime import UTC, datetime
from typing import Any

import aio_pika
import pytest

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
        message = await queue.get(timeout=5)
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
        message = await queue.get(timeout=5)
        assert {name: message.headers[name] for name in table} == table
        assert (message.correlation_id, message.reply_to, message.priority) == ("c", "r", 3)
        await message.ack()
