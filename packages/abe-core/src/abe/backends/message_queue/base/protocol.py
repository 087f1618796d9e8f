"""The protocols of a message-queue backend, under the names applications import.

`MessageQueueBackend` is the least that a provider has. `FullBackend` is what `load_backend` returns: every backend on the engine is one,
and a provider with less is wrapped.
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
    """The dead letters of a group. All of it works while consumers run, and raises `GroupMissingError` when there is no such group."""

    def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """Iterate over all of them, the oldest first, in bounded memory."""
        ...

    async def list(self, limit: int = 100) -> Sequence[DeadLetter]:
        """Return up to `limit` dead letters, the oldest first."""
        ...

    async def get(self, id: str) -> DeadLetter | None:
        """Return the dead letter with that id, or None."""
        ...

    async def replay(self, *ids: str) -> int:
        """Move the dead letters with these ids back to the group, starting again at attempt 1, and return how many there were."""
        ...

    async def replay_all(self, *, progress: Callable[[int], object] | None = None) -> int:
        """Move all that are there now back to the group; `progress` is told how many were moved so far."""
        ...

    async def purge(self, *ids: str) -> int:
        """Remove the dead letters with these ids for good, and return how many there were."""
        ...

    async def purge_all(self, *, progress: Callable[[int], object] | None = None) -> int:
        """Remove all that are there now for good; `progress` is told how many were removed so far."""
        ...


@runtime_checkable
class FullBackend(Protocol):
    """Everything that a backend on the engine offers; what each method does is written on ``engine.TransportBackend``."""

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
