"""The SQS provider beside aiobotocore used the plain way, both on a small SQS in memory."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast
from uuid import uuid4

from aiobotocore.session import get_session

from abe_backend_sqs import SqsBackend, SqsSettings
from benchmarks.ratios import CONCURRENCY, IN_FLIGHT, PAYLOAD, Comparison, Cost, Meter, Ours, Side, Tally, run
from benchmarks.sqs_server import Server

ACCOUNT: Final = {"region": "us-east-1", "access_key_id": "bench", "secret_access_key": "bench"}
POLL: Final = 10
"""Messages that SQS hands out at once, at most."""


class Plain(Side):
    """aiobotocore as its documentation shows it: an awaited send each; ten received, the handler, a deletion each."""

    def __init__(self, url: str) -> None:
        self._context = cast("Any", get_session()).create_client(
            "sqs",
            endpoint_url=url,
            region_name=ACCOUNT["region"],
            aws_access_key_id=ACCOUNT["access_key_id"],
            aws_secret_access_key=ACCOUNT["secret_access_key"],
        )

    async def open(self) -> None:
        self._client = await self._context.__aenter__()
        self._queue = (await self._client.create_queue(QueueName=f"plain-{uuid4().hex}"))["QueueUrl"]

    async def publish(self, payload: Mapping[str, Any]) -> None:
        await self._client.send_message(QueueUrl=self._queue, MessageBody=json.dumps(payload))

    async def waiting(self) -> int:
        name = "ApproximateNumberOfMessages"
        reply = await self._client.get_queue_attributes(QueueUrl=self._queue, AttributeNames=[name])
        return int(reply["Attributes"][name])

    async def drain(self, messages: int) -> Cost:
        for start in range(0, messages, POLL):
            numbers = range(start, min(start + POLL, messages))
            entries = [{"Id": str(n), "MessageBody": json.dumps({**PAYLOAD, "n": n})} for n in numbers]
            await self._client.send_message_batch(QueueUrl=self._queue, Entries=entries)
        tally, meter = Tally(messages), Meter()
        while tally.left:
            reply = await self._client.receive_message(
                QueueUrl=self._queue, MaxNumberOfMessages=POLL, WaitTimeSeconds=20
            )
            for message in reply["Messages"]:
                tally.add(json.loads(message["Body"])["n"])
                await self._client.delete_message(QueueUrl=self._queue, ReceiptHandle=message["ReceiptHandle"])
        cost = meter.stop(messages)
        tally.check()
        return cost

    async def close(self) -> None:
        await self._client.delete_queue(QueueUrl=self._queue)
        await self._context.__aexit__(None, None, None)


def _backend(url: str) -> SqsBackend:
    """At the defaults, but for the time that making a group takes."""
    return SqsBackend(SqsSettings(endpoint_url=url, namespace=f"ours-{uuid4().hex[:8]}", registry_ttl=1.0, **ACCOUNT))


COMPARISONS: Final = (
    Comparison(f"publish, {IN_FLIGHT} in flight", 5.0, 1.0, Plain.publish_at_once, Ours.publish_at_once),
    Comparison(f"drain, concurrency {CONCURRENCY}", 4.0, 1.0, Plain.drain, Ours.drain),
    Comparison("publish, one after the other", 1.0, 0.1, Plain.publish_in_turn, Ours.publish_in_turn),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; see `run`."""
    return run(
        arguments,
        program="sqs_ratios",
        client="aiobotocore",
        comparisons=COMPARISONS,
        service=lambda options: Server(latency=options.latency),
        sides=lambda url: (Plain(url), Ours(_backend(url))),
        options=lambda parser: parser.add_argument(
            "--latency", type=float, default=0.0, help="milliseconds that the server takes for an answer besides"
        ),
        messages=5_000,
    )


if __name__ == "__main__":
    sys.exit(main())
