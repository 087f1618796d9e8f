"""The protocols: what fits them, and what does not."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self, get_args

import pytest

from abe import types
from abe.backends.message_queue import base
from abe.backends.message_queue.base.protocol import MessageQueueBackend, QueueBackend
from abe.types import EventHandlerProtocol, MessageQueueBackendProtocol


class Stranger:
    """A provider that subclasses nothing, and has the three methods only."""

    @classmethod
    def from_env(cls) -> Self:
        return cls()

    async def publish(self, key: str, payload: dict[str, Any]) -> None:
        pass

    async def consume(self, *, group: str | None = None) -> AsyncIterator[dict[str, Any]]:
        yield {}


class Handler:
    async def handle_event(self, event: dict[str, Any]) -> None:
        pass


def test_a_class_with_the_three_methods_is_a_backend() -> None:
    assert isinstance(Stranger(), MessageQueueBackendProtocol)


@pytest.mark.parametrize("missing", ["publish", "consume", "from_env"])
def test_a_class_that_lacks_one_of_the_three_is_none(missing: str) -> None:
    members = {name: value for name, value in vars(Stranger).items() if name != missing}
    assert not isinstance(type("Partial", (), members)(), MessageQueueBackendProtocol)


def test_an_object_with_handle_event_is_a_handler_and_a_function_is_not() -> None:
    assert isinstance(Handler(), EventHandlerProtocol)
    assert not isinstance(lambda event: event, EventHandlerProtocol)


def test_the_backend_has_one_protocol_under_three_names() -> None:
    assert MessageQueueBackend is QueueBackend is MessageQueueBackendProtocol
    assert base.MessageQueueBackend is base.QueueBackend is MessageQueueBackendProtocol


def test_the_provider_in_the_readme_is_a_backend() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    found = re.search(r"## Minimal provider\n.*?```python\n(.*?)```", readme, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    assert isinstance(names["backend"], MessageQueueBackendProtocol)


def test_the_short_names_are_the_long_ones() -> None:
    assert types.QueueKey is types.MessageQueueKey
    assert types.QueuePayload is types.MessageQueuePayload


def test_a_handler_is_an_async_or_a_sync_function() -> None:
    assert get_args(types.EventHandlerFunc) == (types.AsyncEventHandlerFunc, types.SyncEventHandlerFunc)


@pytest.mark.parametrize(
    "name",
    [
        "AsyncEventHandlerFunc",
        "ConsumerGroup",
        "EventHandlerFunc",
        "EventHandlerProtocol",
        "JSONDict",
        "JSONList",
        "JSONPrimitive",
        "JSONValue",
        "MessageQueueBackendConfig",
        "MessageQueueBackendProtocol",
        "MessageQueueKey",
        "MessageQueueMessage",
        "MessageQueuePayload",
        "QueueKey",
        "QueuePayload",
        "SyncEventHandlerFunc",
        "WebhookEventPayload",
    ],
)
def test_the_promised_names_are_there(name: str) -> None:
    assert hasattr(types, name)
