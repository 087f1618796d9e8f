"""The provider on a server: with strangers, pinned groups, queues made by others, and queues that fail."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

import boto3
import pytest

from abe.errors import ConfigurationError, PublishUnknownError
from abe_backend_sqs import SqsBackend, SqsSettings
from abe_contract_tests.services import Service, ServiceUnavailable, sqs_service

REGION = "us-east-1"


@pytest.fixture(scope="module")
def server() -> Iterator[Service]:
    try:
        service = sqs_service("ministack")
        service.start()
    except ServiceUnavailable as exc:
        pytest.skip(str(exc))
    yield service
    service.stop()


@pytest.fixture
def settings(server: Service) -> Mapping[str, Any]:
    return {
        "namespace": f"test-{uuid4().hex[:8]}",
        "endpoint_url": server.url,
        "region": REGION,
        "access_key_id": "test",
        "secret_access_key": "test",
        "registry_ttl": 0.1,
        "wait": 1,
    }


@pytest.fixture
def stranger(server: Service) -> Iterator[Any]:
    client = boto3.client(
        "sqs", endpoint_url=server.url, region_name=REGION, aws_access_key_id="test", aws_secret_access_key="test"
    )
    yield client
    client.close()


def queue_url(stranger: Any, settings: Mapping[str, Any], kind: str, group: str) -> str:
    name = f"{settings['namespace'].replace('-', '--')}-{kind}-{group}"
    return str(stranger.get_queue_url(QueueName=name)["QueueUrl"])


async def test_plain_json_of_a_stranger_is_consumed(settings: Mapping[str, Any], stranger: Any) -> None:
    async with asyncio.timeout(15), SqsBackend(SqsSettings(**settings)) as backend:
        await backend.declare("g")
        url = queue_url(stranger, settings, "group", "g")
        await asyncio.to_thread(lambda: stranger.send_message(QueueUrl=url, MessageBody='{"n": 1}'))
        async with backend.consume(group="g") as messages:
            message = await messages.receive()
            assert message == {"n": 1}
            assert message.id
            await message.ack()


async def test_ours_is_read_as_json_by_a_stranger(settings: Mapping[str, Any], stranger: Any) -> None:
    async with asyncio.timeout(15), SqsBackend(SqsSettings(**settings)) as backend:
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1, "text": "é"})
        url = queue_url(stranger, settings, "group", "g")
        (found,) = (await asyncio.to_thread(lambda: stranger.receive_message(QueueUrl=url)))["Messages"]
        assert json.loads(found["Body"]) == {"n": 1, "text": "é"}


async def test_pinned_groups_are_never_read_and_no_other_is_declared(settings: Mapping[str, Any]) -> None:
    pinned = SqsSettings(**settings, pinned=(("a", ("order.#",)), ("b", ("#",))))
    async with asyncio.timeout(15), SqsBackend(pinned) as backend:
        await backend.declare("a")
        await backend.declare("b")
        await backend.publish("order.created", {"n": 1})
        await backend.publish("other", {"n": 2})
        assert [(await backend.stats(group)).waiting for group in ("a", "b")] == [1, 2]
        with pytest.raises(ConfigurationError, match="SQS_GROUPS"):
            await backend.declare("c")
        with pytest.raises(ConfigurationError, match="SQS_GROUPS"):
            await backend.declare("a", ["x"])


async def test_nothing_is_made_where_others_make_the_queues(settings: Mapping[str, Any], stranger: Any) -> None:
    async with asyncio.timeout(15), SqsBackend(SqsSettings(**settings, ensure=False)) as backend:
        with pytest.raises(ConfigurationError, match=r"group-g.*SQS_ENSURE"):
            await backend.declare("g")
        with pytest.raises(ConfigurationError, match=r"held.*SQS_ENSURE"):
            await backend.publish("order.created", {"n": 1})
        listed = await asyncio.to_thread(lambda: stranger.list_queues(QueueNamePrefix=settings["namespace"]))
        assert not listed.get("QueueUrls")


async def test_a_fan_out_that_failed_in_part_is_repeated_for_the_missing_queues_only(
    settings: Mapping[str, Any], stranger: Any
) -> None:
    pinned = SqsSettings(**settings, pinned=(("a", ("#",)), ("b", ("#",))), publish_timeout=0.5)
    async with asyncio.timeout(15), SqsBackend(SqsSettings(**settings)) as maker, SqsBackend(pinned) as backend:
        await maker.declare("a")
        with pytest.raises(PublishUnknownError, match="group-b"):
            await backend.publish("order.created", {"n": 1}, id="order-1")
        await maker.declare("b")
        await backend.publish("order.created", {"n": 1}, id="order-1")
        assert [(await maker.stats(group)).waiting for group in ("a", "b")] == [1, 1]


async def test_a_long_delay_is_kept_by_sqs_and_not_by_a_consumer(settings: Mapping[str, Any]) -> None:
    async with asyncio.timeout(15), SqsBackend(SqsSettings(**settings)) as backend:
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1}, delay=86_400)
        stats = await backend.stats("g")
        assert (stats.waiting, stats.delayed) == (0, 1)
