"""Type aliases and structural protocols for the signatures of applications and providers.

Nothing here has behaviour. A provider subclasses none of it: a class with the methods satisfies the protocol.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, ClassVar, Protocol, Self, TypeAlias, runtime_checkable

JSONPrimitive: TypeAlias = str | int | float | bool | None
JSONValue: TypeAlias = "JSONPrimitive | JSONList | JSONDict"
JSONList: TypeAlias = "list[JSONValue]"
JSONDict: TypeAlias = "dict[str, JSONValue]"

MessageQueueKey: TypeAlias = str
"""What a message is about: dot-separated words, 1 to 200 bytes of UTF-8, e.g. ``"order.created"``."""

MessageQueuePayload: TypeAlias = dict[str, Any]
"""A JSON object. ``Any`` rather than ``JSONValue``, so that handlers may read ``payload["order"]["id"]`` without casts."""


class DataclassInstance(Protocol):
    """An object of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class StructInstance(Protocol):
    """An object of a msgspec Struct."""

    __struct_fields__: ClassVar[tuple[str, ...]]


class AttrsInstance(Protocol):
    """An object of an attrs class."""

    __attrs_attrs__: ClassVar[Any]


class ModelInstance(Protocol):
    """An object of a Pydantic model."""

    __pydantic_serializer__: ClassVar[Any]


Publishable: TypeAlias = Mapping[str, Any] | DataclassInstance | StructInstance | AttrsInstance | ModelInstance
"""A payload for the backends built on the engine: a JSON object, or an object with declared fields that is encoded as one."""

MessageQueueMessage: TypeAlias = dict[str, Any]
"""A message that a consumer receives. Backends built on the engine yield ``Message``, a subclass of dict."""

MessageQueueBackendConfig: TypeAlias = dict[str, Any]
ConsumerGroup: TypeAlias = str
QueueKey: TypeAlias = MessageQueueKey
QueuePayload: TypeAlias = MessageQueuePayload

WebhookEventPayload: TypeAlias = dict[str, Any]
AsyncEventHandlerFunc: TypeAlias = Callable[[Any], Awaitable[object]]
SyncEventHandlerFunc: TypeAlias = Callable[[Any], object]
EventHandlerFunc: TypeAlias = AsyncEventHandlerFunc | SyncEventHandlerFunc


@runtime_checkable
class EventHandlerProtocol(Protocol):
    """An object that handles events."""

    async def handle_event(self, event: Any) -> object:
        """Handle one event. Returning means success; an exception means failure."""
        ...


@runtime_checkable
class MessageQueueBackendProtocol(Protocol):
    """A message queue. These three methods are all that a provider must have.

    ``abe.backends.message_queue.base.FullBackend`` adds the methods of the backends built on the engine (``connect``, ``declare``,
    ``dead_letters`` and others).
    """

    async def publish(self, key: MessageQueueKey, payload: MessageQueuePayload) -> None:
        """Hand a message to the broker. Returning means that the broker has taken responsibility for it.

        May be called by any number of tasks at once. A cancelled call leaves none or one copy behind.
        """
        ...

    def consume(self, *, group: ConsumerGroup | None = None) -> AsyncIterator[MessageQueueMessage]:
        """Iterate over the messages of `group` (None: the group ``default``), which its consumers share."""
        ...

    @classmethod
    def from_env(cls) -> Self:
        """Make an instance from environment variables. No I/O happens here."""
        ...
