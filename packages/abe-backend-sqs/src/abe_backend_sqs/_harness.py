"""The harnesses of the SQS provider: one for each server that speaks SQS's protocol."""

import base64
import socket
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any, ClassVar, Final, Literal, cast
from urllib.parse import urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import ClientError

from abe.types import MessageQueueBackendProtocol
from abe_backend_sqs import SqsBackend
from abe_contract_tests.bounds import slowness
from abe_contract_tests.harness import Counts, Evidence, Harness, Oracle
from abe_contract_tests.services import Service, sqs_service

_UNREACHABLE: Final = "http://127.0.0.1:1"
_REGION: Final = "us-east-1"
_CREDENTIALS: Final = {"AWS_REGION": _REGION, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
_ESTABLISHED: Final = "01"

_session: Final = cast("Any", get_session())
"""Reading the descriptions of the services is most of the cost of a client: one session reads them once."""


class _SqsHarness(Harness):
    """What the two have in common."""

    backend: ClassVar[type[MessageQueueBackendProtocol]] = SqsBackend
    evidence: ClassVar[Evidence] = "emulator"
    approximate: ClassVar[bool] = True
    retries_in_flight: ClassVar[bool] = True
    server: ClassVar[Literal["moto", "ministack"]]
    variables: ClassVar[Mapping[str, str]] = {}
    """What is set beside the server."""

    def __init__(self) -> None:
        self._service: Service | None = None

    @property
    def service(self) -> Service:
        """The running server."""
        assert self._service is not None, "start() first"
        return self._service

    def start(self) -> None:
        service = sqs_service(self.server)
        service.start()
        self._service = service

    def stop(self) -> None:
        self.service.stop()

    def environment(self, namespace: str, *, lease: float) -> Mapping[str, str]:
        # Emulators are slow where thousands of messages go through them beside dozens of polls.
        return {
            **_environment(self.service.url, namespace, lease),
            "QUEUE_PUBLISH_TIMEOUT_SECONDS": f"{30 * slowness():.0f}",
            **self.variables,
        }

    def unreachable(self, namespace: str) -> Mapping[str, str]:
        return {**_environment(_UNREACHABLE, namespace, 1.0), **self.variables}

    async def oracle(self, namespace: str) -> Oracle:
        client = await _client(self.service.url)
        return _SqsOracle(client, self.service.url, namespace, fifo="SQS_FIFO" in self.variables)

    async def clean(self, namespace: str) -> None:
        client = await _client(self.service.url)
        prefix = f"{_escaped(namespace)}-"
        for url in (await client.list_queues(QueueNamePrefix=prefix)).get("QueueUrls", ()):
            await client.delete_queue(QueueUrl=url)
        await client.close()
        if self.variables.get("SQS_FANOUT") == "sns":
            await _delete_topic(self.service.url, f"{prefix}topic")

    def broker_version(self) -> str:
        return self.service.version


class MotoHarness(_SqsHarness):
    """moto: what it holds it goes through message by message, whatever it is asked."""

    name: ClassVar[str] = "sqs-moto"
    server: ClassVar[Literal["moto", "ministack"]] = "moto"
    capacity: ClassVar[int] = 200
    pace: ClassVar[float] = 3.0
    # Asked twice at the same moment, it may give the same message to both.
    variables: ClassVar[Mapping[str, str]] = {"SQS_MAX_POLLERS": "1"}


class MiniStackHarness(_SqsHarness):
    """ministack: closer to SQS where receipts run out."""

    name: ClassVar[str] = "sqs-ministack"
    server: ClassVar[Literal["moto", "ministack"]] = "ministack"
    pace: ClassVar[float] = 2.0
    capacity: ClassVar[int] = 2_000


class FifoHarness(MiniStackHarness):
    """FIFO queues, where each key is a message group."""

    name: ClassVar[str] = "sqs-fifo"
    retries_in_flight: ClassVar[bool] = False
    capacity: ClassVar[int] = 500
    variables: ClassVar[Mapping[str, str]] = {"SQS_FIFO": "true"}


class OrderedHarness(FifoHarness):
    """FIFO queues, where all messages are one message group: everything in order, and one batch at a time."""

    name: ClassVar[str] = "sqs-fifo-ordered"
    variables: ClassVar[Mapping[str, str]] = {"SQS_FIFO": "true", "SQS_MESSAGE_GROUP": "all"}


class SnsHarness(MiniStackHarness):
    """Standard queues, and a topic that copies to them what all groups want."""

    name: ClassVar[str] = "sqs-sns"
    capacity: ClassVar[int] = 500
    variables: ClassVar[Mapping[str, str]] = {"SQS_FANOUT": "sns", "SQS_TOPIC_AFTER_SECONDS": "0.001"}


class _SqsOracle:
    """Looks at the provider's queues with the SDK."""

    def __init__(self, client: Any, url: str, namespace: str, *, fifo: bool) -> None:
        self._client = client
        self._suffix = ".fifo" if fifo else ""
        self._address = urlsplit(url)
        self._namespace = _escaped(namespace)

    async def inject(self, group: str, body: bytes, *, key: str = "injected") -> None:
        text, attributes = _text(body)
        attributes["key"] = {"DataType": "String", "StringValue": key}
        await self._send(group, text, attributes)

    async def inject_version(self, group: str, body: bytes) -> None:
        text, _ = _text(body)
        metadata = '[9,"from-the-future","injected",0]'
        await self._send(group, text, {"abe": {"DataType": "String", "StringValue": metadata}})

    async def counts(self, group: str) -> Counts:
        waiting, in_flight, delayed = await self._numbers("group", group)
        if self._suffix:
            delayed += sum(await self._numbers("delayed", group))
        return Counts(
            waiting=waiting, in_flight=in_flight, delayed=delayed, dead=sum(await self._numbers("dead", group))
        )

    async def consumers(self, group: str) -> int | None:
        return None

    async def connections(self) -> int:
        await self._client.list_queues(QueueNamePrefix=self._namespace)
        return _connections(self._address.port or 80) - 1

    async def aclose(self) -> None:
        await self._client.close()

    async def _send(self, group: str, body: str, attributes: Mapping[str, Any]) -> None:
        # A foreign message needs a message group and a deduplication id.
        fifo = {"MessageGroupId": "foreign", "MessageDeduplicationId": token_hex()} if self._suffix else {}
        await self._client.send_message(
            QueueUrl=await self._url("group", group), MessageBody=body, MessageAttributes=attributes, **fifo
        )

    async def _url(self, kind: str, group: str) -> str:
        name = f"{self._namespace}-{kind}-{_escaped(group)}{self._suffix if kind != 'delayed' else ''}"
        url: str = (await self._client.get_queue_url(QueueName=name))["QueueUrl"]
        return url

    async def _numbers(self, kind: str, group: str) -> tuple[int, int, int]:
        names = ("", "NotVisible", "Delayed")
        try:
            found = await self._client.get_queue_attributes(
                QueueUrl=await self._url(kind, group),
                AttributeNames=[f"ApproximateNumberOfMessages{name}" for name in names],
            )
        except ClientError as exc:
            if "QueueDoesNotExist" not in str(exc) and "NonExistentQueue" not in str(exc):
                raise
            return 0, 0, 0
        waiting, in_flight, delayed = (int(found["Attributes"][f"ApproximateNumberOfMessages{name}"]) for name in names)
        return waiting, in_flight, delayed


async def _delete_topic(url: str, name: str) -> None:
    client = await _client(url, "sns")
    for topic in (await client.list_topics()).get("Topics", ()):
        if topic["TopicArn"].endswith(f":{name}"):
            await client.delete_topic(TopicArn=topic["TopicArn"])
    await client.close()


async def _client(url: str, service: str = "sqs") -> Any:
    # One connection: the oracle's questions come one after the other, and `connections` leaves out exactly this one.
    config = AioConfig(max_pool_connections=1, retries={"total_max_attempts": 3})
    context = _session.create_client(
        service,
        region_name=_REGION,
        endpoint_url=url,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        config=config,
    )
    return await context.__aenter__()


def _environment(url: str, namespace: str, lease: float) -> Mapping[str, str]:
    return {
        **_CREDENTIALS,
        "AWS_ENDPOINT_URL": url,
        "SQS_REGISTRY_TTL_SECONDS": "0.1",
        "SQS_WAIT_SECONDS": "1",
        "QUEUE_NAMESPACE": namespace,
        "QUEUE_LEASE_SECONDS": str(lease),
    }


def _escaped(name: str) -> str:
    return name.replace("-", "--").replace(".", "-_")


def _text(body: bytes) -> tuple[str, dict[str, Any]]:
    """Return a body as another program can send it: unchanged, or in base64 with a label."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = ""
    if text and text.isprintable():
        return text, {}
    return base64.b64encode(body).decode(), {"encoding": {"DataType": "String", "StringValue": "base64"}}


def _connections(port: int) -> int:
    """Count this machine's connections to that port of its own."""
    end = f"{socket.htonl(int.from_bytes(socket.inet_aton('127.0.0.1'), 'big')):08X}:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(fields[2] == end and fields[3] == _ESTABLISHED for fields in map(str.split, lines))
