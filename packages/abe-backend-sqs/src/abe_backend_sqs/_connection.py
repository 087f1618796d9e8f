"""The AWS clients: one for polls, one for all other requests to SQS, one for SNS."""

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from importlib.metadata import version
from platform import python_version
from typing import TYPE_CHECKING, Any, Final

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.loaders import Loader

from abe.backends.message_queue.base.tasks import result_of
from abe.errors import BackendConnectionError
from abe_backend_sqs._answers import checked
from abe_backend_sqs._errors import translated
from abe_backend_sqs._settings import SqsSettings

if TYPE_CHECKING:
    from types_aiobotocore_sns.client import SNSClient
    from types_aiobotocore_sqs.client import SQSClient

_CALLS: Final = 64
"""Connections of the client that does not poll: more requests than that wait for one."""

_POLLS: Final = 1_000
"""Connections of the client that polls: all consumers of a process together."""

_ANSWER: Final = 4.0
"""Seconds beyond a poll's own time after which a silent connection counts as lost. With the default of `wait` it is replaced within the
15 s that the capabilities declare."""

_SHARE: Final = 0.4
"""The share of `publish_timeout` that connecting, and an answer, may take each, so that there is time for a retry."""

_LEAST: Final = 2.0
"""Seconds that an answer is waited for at least."""

_IDLE: Final = 3.0
"""Seconds for which an idle connection is kept."""

_USER_AGENT: Final = (
    f"abe-backend-sqs/{version('abe-backend-sqs')} aiobotocore/{version('aiobotocore')} Python/{python_version()}"
)
"""botocore would build a longer one for each request, which is an eighth of its cost."""

_PROFILES: Final = ("AWS_DEFAULT_PROFILE", "AWS_PROFILE")
_models: Final = Loader()
"""The descriptions of the services. Reading them is most of the cost of a client, so that every session shares them."""


class Clients:
    """The clients of one event loop, each made when it is first needed.

    Args:
        settings: The provider's settings.
    """

    def __init__(self, settings: SqsSettings) -> None:
        self.settings = settings
        self._made: dict[str, asyncio.Task[Any]] = {}
        self._thread = ThreadPoolExecutor(1, "abe-sqs")
        self._closed = False

    async def calls(self) -> "SQSClient":
        """Return the client for everything but polls.

        Raises:
            ConfigurationError: There is no region, no such profile, or they are malformed.
            BackendConnectionError: The clients were closed.
        """
        client: SQSClient = await self._client("calls", _CALLS, self._answer)
        return client

    async def polls(self) -> "SQSClient":
        """Return the client for polls, which would occupy the connections of other requests; raises as `calls` does."""
        client: SQSClient = await self._client("polls", _POLLS, self.settings.wait + _ANSWER)
        return client

    async def topics(self) -> "SNSClient":
        """Return the client for SNS; raises as `calls` does."""
        client: SNSClient = await self._client("topics", _CALLS, self._answer)
        return client

    async def reset(self) -> None:
        """Close the connections, and leave the clients usable: after a failed `open` they may be neither used nor closed."""
        for task in self._made.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                http = task.result()._endpoint.http_session
                await http.close()
                await http.__aenter__()

    async def close(self) -> None:
        """Close all clients, even if this is cancelled meanwhile, as by an event loop that ends."""
        self._closed = True
        made, self._made = self._made, {}
        cancelled: asyncio.CancelledError | None = None
        for task in made.values():
            try:
                if not task.done():
                    await asyncio.wait([task])
                if not task.cancelled() and task.exception() is None:
                    await task.result().close()
            except asyncio.CancelledError as exc:
                cancelled = exc
        self._thread.shutdown(wait=False)
        if cancelled is not None:
            raise cancelled

    @property
    def _answer(self) -> float:
        return max(_SHARE * self.settings.publish_timeout, _LEAST)

    async def _client(self, name: str, connections: int, read_timeout: float) -> Any:
        task = self._made.get(name)
        if task is not None and task.done() and not task.cancelled() and task.exception() is None:
            return task.result()
        if self._closed:  # it would never be closed
            raise BackendConnectionError("the connection to SQS was closed")
        if task is None or task.done():
            # A task of its own: the first caller may be cancelled, but its thread cannot be.
            task = self._made[name] = asyncio.get_running_loop().create_task(
                self._make(name, connections, read_timeout)
            )
        return await result_of(task)

    async def _make(self, name: str, connections: int, read_timeout: float) -> Any:
        settings = self.settings
        service, endpoint = ("sns", settings.topic_endpoint_url) if name == "topics" else ("sqs", settings.endpoint_url)
        config = AioConfig(
            connector_args={"keepalive_timeout": _IDLE},
            connect_timeout=min(settings.connect_timeout, self._answer),
            read_timeout=read_timeout,
            max_pool_connections=connections,
            parameter_validation=False,
            user_agent=_USER_AGENT,
            # The engine retries, with the same ids and within its own deadline; a poll that is repeated here could strand its messages.
            retries={"mode": "standard", "total_max_attempts": 1},
        )
        local = endpoint is not None and endpoint.startswith("http:")
        arguments: Mapping[str, Any] = {
            "region_name": settings.region,
            "endpoint_url": endpoint,
            "aws_access_key_id": settings.access_key_id,
            "aws_secret_access_key": settings.secret_access_key,
            "aws_session_token": settings.session_token,
            "verify": False if local else None,
            "config": config,
        }
        # Reads files, so it runs in a thread, one after the other; nothing in it belongs to an event loop before the first request.
        loop = asyncio.get_running_loop()
        with translated(settings.address):
            return await loop.run_in_executor(self._thread, asyncio.run, self._create(service, arguments))

    def _create(self, service: str, arguments: Mapping[str, Any]) -> Any:
        # A session of its own: sessions are not thread-safe, and a cancelled caller leaves its thread behind.
        session: Any = AioSession(profile=self.settings.profile, session_vars=_empty_profile())
        session.register_component("data_loader", _models)
        session.register(f"before-parse.{service}", _check_form)
        return session.create_client(service, **arguments).__aenter__()


def _check_form(operation_model: Any, response_dict: dict[str, Any], **_: object) -> None:
    """Check an answer before the client reads it."""
    if response_dict["status_code"] < HTTPStatus.MULTIPLE_CHOICES:
        service, operation = operation_model.service_model.service_name, operation_model.name
        response_dict["body"] = checked(service, operation, response_dict["headers"], response_dict["body"])


def _empty_profile() -> Mapping[str, Any]:
    """Return session variables that keep the SDK from looking for a profile without a name: an empty variable counts as unset."""
    return {} if any(map(os.environ.get, _PROFILES)) else {"profile": (None, None, None, None)}
