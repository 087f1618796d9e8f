"""The RabbitMQ provider beside aio-pika used the plain way, both on quorum queues, persistent and confirmed."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final
from uuid import uuid4

import aio_pika

from abe_backend_rabbitmq import RabbitMQBackend, RabbitMQSettings
from abe_contract_tests.services import rabbitmq_service
from benchmarks.ratios import IN_FLIGHT, PAYLOAD, Comparison, Cost, Meter, Ours, Side, Tally, run

PREFETCH: Final = 100


class Plain(Side):
    """aio-pika as its documentation shows it: an awaited publish with its confirm; the queue's iterator, the handler, an ack each."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._name = f"plain-{uuid4().hex}"

    async def open(self) -> None:
        self._connection = await aio_pika.connect(self._url)
        self._channel = await self._connection.channel()
        self._exchange = await self._channel.declare_exchange(self._name, "topic", durable=True)
        self._queue = await self._channel.declare_queue(self._name, durable=True, arguments={"x-queue-type": "quorum"})
        await self._queue.bind(self._exchange, "#")

    async def publish(self, payload: Mapping[str, Any]) -> None:
        message = aio_pika.Message(
            json.dumps(payload).encode(),
            message_id=uuid4().hex,
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        await self._exchange.publish(message, "order.created")

    async def waiting(self) -> int:
        found = await self._channel.declare_queue(self._name, passive=True)
        return found.declaration_result.message_count or 0

    async def drain(self, messages: int) -> Cost:
        for start in range(0, messages, IN_FLIGHT):
            await asyncio.gather(
                *(self.publish({**PAYLOAD, "n": n}) for n in range(start, min(start + IN_FLIGHT, messages)))
            )
        await self._channel.set_qos(prefetch_count=PREFETCH)
        tally, meter = Tally(messages), Meter()
        async with self._queue.iterator() as arriving:
            async for message in arriving:
                tally.add(json.loads(message.body)["n"])
                await message.ack()
                if not tally.left:
                    break
        cost = meter.stop(messages)
        tally.check()
        return cost

    async def close(self) -> None:
        await self._queue.delete(if_unused=False, if_empty=False)
        await self._exchange.delete()
        await self._connection.close()


COMPARISONS: Final = (
    Comparison(f"publish, {IN_FLIGHT} in flight", 5.0, 0.5, Plain.publish_at_once, Ours.publish_at_once),
    Comparison(f"drain, prefetch {PREFETCH}", 6.0, 1.0, Plain.drain, partial(Ours.drain, prefetch=PREFETCH)),
    Comparison("drain, our default prefetch", 6.0, 1.0, Plain.drain, Ours.drain),
    Comparison("publish, one after the other", 1.0, 0.03, Plain.publish_in_turn, Ours.publish_in_turn),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; see `run`."""
    return run(
        arguments,
        program="rabbitmq_ratios",
        client="aio-pika",
        comparisons=COMPARISONS,
        service=lambda _: rabbitmq_service(environ={"ABE_TEST_SERVICES": "processes"}),
        sides=lambda url: (
            Plain(url),
            Ours(RabbitMQBackend(RabbitMQSettings(url=url, namespace=f"ours-{uuid4().hex}"))),
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
