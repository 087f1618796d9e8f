"""Servers for the provider's tests, and a gate before one of them that can be made to fail."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeAlias, cast
from uuid import uuid4

import boto3
import pytest
from aiohttp import ClientSession, web

from abe_backend_sqs import SqsBackend, SqsSettings
from abe_backend_sqs._broker import lingering
from abe_backend_sqs._transport import SqsTransport
from abe_contract_tests import bounds
from abe_contract_tests.services import Service, ServiceUnavailable, sqs_service

REGION = "us-east-1"

Request: TypeAlias = tuple[str, dict[str, Any]]
Rule: TypeAlias = Callable[[str, dict[str, Any]], "web.Response | None"]


def refusal(code: str, status: int = 400) -> web.Response:
    """Return what SQS answers to a request that it refuses."""
    return web.json_response({"__type": f"com.amazonaws.sqs#{code}", "message": f"it is {code}"}, status=status)


class Gate:
    """Stands before a server: writes down what it is asked, and answers in its place where a rule says so.

    Args:
        upstream: The server's address.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.url = ""
        self.seen: list[Request] = []
        self.rules: list[Rule] = []
        self.after: dict[str, Callable[[dict[str, Any]], web.Response | None]] = {}
        """By operation: what becomes of the server's answer."""

    def times(self, count: int, operation: str, answer: Callable[[dict[str, Any]], "web.Response | None"]) -> None:
        """Answer an operation that many times; not those for which the answer is None."""
        left = count

        def rule(name: str, body: dict[str, Any]) -> web.Response | None:
            nonlocal left
            if name != operation or not left:
                return None
            if (found := answer(body)) is not None:
                left -= 1
            return found

        self.rules.append(rule)

    def fails(self, count: int, operation: str, *entries: tuple[int, str, bool]) -> None:
        """Answer a batch that many times: these entries failed, with a code and whose fault it was, and the others are done."""
        failures = [{"Id": str(id), "Code": code, "SenderFault": fault} for id, code, fault in entries]
        failed = {each["Id"] for each in failures}

        def answer(body: dict[str, Any]) -> web.Response:
            done = [{"Id": each["Id"]} for each in body["Entries"] if each["Id"] not in failed]
            return web.json_response({"Successful": done, "Failed": failures})

        self.times(count, operation, answer)

    def requests(self, operation: str) -> list[dict[str, Any]]:
        """Return the bodies of the requests for an operation, in their order."""
        return [body for name, body in self.seen if name == operation]

    async def handle(self, request: web.Request) -> web.Response:
        raw = await request.read()
        # SQS is asked in JSON, SNS in the older form.
        operation = request.headers.get("X-Amz-Target", "").rpartition(".")[2]
        body = json.loads(raw) if operation else dict(await request.post())
        operation = operation or str(body["Action"])
        self.seen.append((operation, body))
        for rule in self.rules:
            if (answer := rule(operation, body)) is not None:
                return answer
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Content-Length")}
        async with (
            ClientSession(auto_decompress=False) as session,
            session.post(self._upstream, data=raw, headers=headers) as reply,
        ):
            text = await reply.read()
            if (change := self.after.get(operation)) is not None and (changed := change(json.loads(text))) is not None:
                return changed
            return web.Response(body=text, status=reply.status, content_type=reply.content_type)


class Lab:
    """A namespace of its own behind a gate: backends and transports in it, and a look at it with boto3."""

    def __init__(self, server: Service, gate: Gate, stranger: Any, stack: AsyncExitStack) -> None:
        self.server = server
        self.gate = gate
        self.stranger = stranger
        self.namespace = f"test-{uuid4().hex[:8]}"
        self._stack = stack

    def settings(self, **changes: Any) -> SqsSettings:
        defaults: dict[str, Any] = {
            "namespace": self.namespace,
            "endpoint_url": self.gate.url,
            "topic_endpoint_url": self.gate.url,
            "region": REGION,
            "access_key_id": "test",
            "secret_access_key": "test",
            "registry_ttl": 0.1,
            "topic_after": 0.001,
            "wait": 1,
        }
        return bounds.stretched(SqsSettings(**defaults | changes))

    async def backend(self, **changes: Any) -> SqsBackend:
        return await self._stack.enter_async_context(SqsBackend(self.settings(**changes)))

    async def transport(self, **changes: Any) -> SqsTransport:
        transport = SqsTransport(self.settings(**changes))
        self._stack.push_async_callback(transport.close)  # one that could not be opened is closed too
        await transport.open()
        return transport

    async def ask(self, operation: str, **arguments: Any) -> Any:
        """Ask SQS as a stranger would, past the gate."""
        return await asyncio.to_thread(lambda: getattr(self.stranger, operation)(**arguments))

    async def url(self, kind: str, group: str, suffix: str = "") -> str:
        name = f"{self.namespace.replace('-', '--')}-{kind}-{group}{suffix}"
        return str((await self.ask("get_queue_url", QueueName=name))["QueueUrl"])


@pytest.fixture(scope="session")
def server() -> Iterator[Service]:
    try:
        service = sqs_service("ministack")
        service.start()
    except ServiceUnavailable as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))
    yield service
    service.stop()


@pytest.fixture
def stranger(server: Service) -> Iterator[Any]:
    client = boto3.client(
        "sqs", endpoint_url=server.url, region_name=REGION, aws_access_key_id="test", aws_secret_access_key="test"
    )
    yield client
    client.close()


@pytest.fixture
async def lab(server: Service, stranger: Any) -> AsyncIterator[Lab]:
    gate = Gate(server.url)
    application = web.Application(client_max_size=2**22)
    application.router.add_post("/{path:.*}", gate.handle)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    gate.url = f"http://127.0.0.1:{cast('Any', runner.addresses)[0][1]}"
    try:
        async with AsyncExitStack() as stack:
            yield Lab(server, gate, stranger, stack)
        async with bounds.within(10):  # polls outlive their consumers, and transports their last poll
            await lingering.drain()
    finally:
        await runner.cleanup()


@pytest.fixture(name="refusal", scope="session")
def refusal_fixture() -> Callable[..., web.Response]:
    return refusal


def header(message: Mapping[str, Any]) -> list[Any]:
    """Return the metadata of a message, as it is in a request or in an answer."""
    return cast("list[Any]", json.loads(message["MessageAttributes"]["abe"]["StringValue"]))


@pytest.fixture(name="header", scope="session")
def header_fixture() -> Callable[[Mapping[str, Any]], list[Any]]:
    return header
