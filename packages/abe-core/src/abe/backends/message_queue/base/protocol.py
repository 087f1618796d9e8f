"""The protocols of a message-queue backend, under the names applications import.

`MessageQueueBackend` is the minimum for a provider. `load_backend` returns a `FullBackend`: every backend built on the engine is one, and a
minimal provider is wrapped.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from abe.backends.message_queue.base.capabilities import Capabilities
from abe.backends.message_queue.base.groups import DeadLetter, GroupStats
from abe.backends.message_queue.base.middleware import Publication
from abe.backends.message_queue.base.subscription import Subscription
from abe.types import MessageQueueBackendProtocol, Publishable

MessageQueueBackend = MessageQueueBackendProtocol
QueueBackend = MessageQueueBackendProtocol


class DeadLetterBox(Protocol):
    """The dead letters of a group. Every method works while consumers run, and raises `GroupMissingError` if the group does not exist."""

    def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """Iterate over all dead letters, the oldest first, in bounded memory."""
        ...

    async def list(self, limit: int = 100) -> Sequence[DeadLetter]:
        """Return up to `limit` dead letters, the oldest first."""
        ...

    async def get(self, id: str) -> DeadLetter | None:
        """Return the dead letter with that id, or None."""
        ...

    async def replay(self, *ids: str) -> int:
        """Move the dead letters with these ids back to the group, with attempt 1, and return how many were moved."""
        ...

    async def replay_all(self, *, progress: Callable[[int], object] | None = None) -> int:
        """Move all current dead letters back to the group; `progress` is called with the number moved so far."""
        ...

    async def purge(self, *ids: str) -> int:
        """Delete the dead letters with these ids, and return how many were deleted."""
        ...

    async def purge_all(self, *, progress: Callable[[int], object] | None = None) -> int:
        """Delete all current dead letters; `progress` is called with the number deleted so far."""
        ...


@runtime_checkable
class FullBackend(Protocol):
    """All methods of a backend built on the engine; ``engine.TransportBackend`` documents them."""

    capabilities: Capabilities
    unroutable: int

    async def publish(
        self,
        key: str,
        payload: Publishable,
        *,
        headers: Mapping[str, str] | None = None,
        id: str | None = None,
        delay: float | None = None,
        mandatory: bool = False,
        group: str | None = None,
        timeout: float | None = None,
    ) -> None: ...
    async def publish_many(self, items: Iterable[Publication | tuple[str, Publishable]]) -> None: ...
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
    async def delete_namespace(self) -> None: ...
    async def groups(self) -> Mapping[str, tuple[str, ...]]: ...
    async def stats(self, group: str | None = None) -> GroupStats: ...
    def dead_letters(self, group: str | None = None) -> DeadLetterBox: ...
    @classmethod
    def from_env(cls) -> Self: ...
