"""The dead letters of a group."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol, TypeVar

from abe.backends.message_queue.base.names import check_count
from abe.backends.message_queue.base.transport import DeadLetter
from abe.backends.message_queue.engine.session import Session

_T = TypeVar("_T")


class Call(Protocol):
    """Runs an operation on the connected transport, within the time limit."""

    def __call__(self, operation: Callable[[Session], Awaitable[_T]]) -> Awaitable[_T]: ...


class DeadLetters:
    """List, show, replay and purge what a group gave up. All of it works while consumers run.

    Args:
        call: Runs an operation on the connected transport.
        group: Whose they are.
    """

    def __init__(self, call: Call, group: str) -> None:
        self._call = call
        self.group = group

    async def list(self, limit: int = 100) -> Sequence[DeadLetter]:
        """Return up to `limit` dead letters, the oldest first."""
        check_count("limit", limit)
        return await self._call(lambda session: session.transport.dead_letters(self.group, limit))

    async def get(self, id: str) -> DeadLetter | None:
        """Return the dead letter with that id, or None."""
        return await self._call(lambda session: session.transport.find_dead_letter(self.group, id))

    async def replay(self, *ids: str) -> int:
        """Move dead letters (none named: all) back to the group, starting again at attempt 1, and return how many."""
        return await self._call(lambda session: session.transport.replay(self.group, _some(ids)))

    async def purge(self, *ids: str) -> int:
        """Remove dead letters (none named: all) for good, and return how many."""
        return await self._call(lambda session: session.transport.purge(self.group, _some(ids)))


def _some(ids: Collection[str]) -> Collection[str] | None:
    return frozenset(ids) if ids else None
