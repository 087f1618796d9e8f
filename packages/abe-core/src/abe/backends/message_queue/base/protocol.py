"""The protocols of a message-queue backend, under the names applications import.

`MessageQueueBackend` is the least that a provider has. `FullBackend` is what every backend on the engine has, our own included; an
application that needs it narrows what it loaded: ``assert isinstance(backend, FullBackend)``.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from abe.backends.message_queue.base.capabilities import Capabilities
from abe.backends.message_queue.base.middleware import Publication
from abe.backends.message_queue.base.subscription import Subscription
from abe.backends.message_queue.base.transport import DeadLetter, GroupStats
from abe.types import MessageQueueBackendProtocol, MessageQueuePayload

MessageQueueBackend = MessageQueueBackendProtocol
QueueBackend = MessageQueueBackendProtocol


class DeadLetterBox(Protocol):
    """The dead letters of a group. All of it works while consumers run."""

    async def list(self, limit: int = 100) -> Sequence[DeadLetter]:
        """Return up to `limit` dead letters, the oldest first."""
        ...

    async def get(self, id: str) -> DeadLetter | None:
        """Return the dead letter with that id, or None."""
        ...

    async def replay(self, *ids: str) -> int:
        """Move dead letters (none named: all) back to the group, starting again at attempt 1, and return how many."""
        ...

    async def purge(self, *ids: str) -> int:
        """Remove dead letters (none named: all) for good, and return how many."""
        ...


@runtime_checkable
class FullBackend(Protocol):
    """Everything that a backend on the engine offers; what each method does is written on ``engine.TransportBackend``."""

    capabilities: Capabilities

    async def publish(
        self,
        key: str,
        payload: MessageQueuePayload,
        *,
        headers: Mapping[str, str] | None = None,
        id: str | None = None,
        delay: float | None = None,
        mandatory: bool = False,
    ) -> None: ...
    async def publish_many(self, items: Iterable[Publication | tuple[str, MessageQueuePayload]]) -> None: ...
    def consume(
        self,
        *,
        group: str | None = None,
        keys: Sequence[str] | None = None,
        prefetch: int | None = None,
        max_attempts: int | None = None,
    ) -> Subscription: ...
    async def connect(self) -> None: ...
    async def disconnect(self) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    async def ping(self) -> None: ...
    async def declare(self, group: str | None = None, keys: Sequence[str] | None = None) -> None: ...
    async def delete_group(self, group: str | None = None) -> None: ...
    async def groups(self) -> Mapping[str, tuple[str, ...]]: ...
    async def stats(self, group: str | None = None) -> GroupStats: ...
    def dead_letters(self, group: str | None = None) -> DeadLetterBox: ...
    @classmethod
    def from_env(cls) -> Self: ...
