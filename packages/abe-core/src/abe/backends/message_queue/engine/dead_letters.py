"""The dead letters of a group."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol, TypeVar

from abe.backends.message_queue.base.groups import DeadLetter
from abe.backends.message_queue.base.names import check_count
from abe.backends.message_queue.base.transport import Transport
from abe.errors import AbeError

_T = TypeVar("_T")


class Steps(Protocol):
    """Iterates over the steps of a transport's operation, each within the time limit."""

    def __call__(self, start: Callable[[Transport], AsyncGenerator[_T]]) -> AsyncGenerator[_T]: ...


class DeadLetters:
    """Lists, shows, replays and purges the dead letters of a group. Every method works while consumers run.

    Each request to the broker is bounded by `publish_timeout`; the whole operation is not.

    Args:
        steps: Iterates over the steps of a transport's operation.
        group: The group.
    """

    def __init__(self, steps: Steps, group: str) -> None:
        self._steps = steps
        self.group = group

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """Iterate over all dead letters, the oldest first, page by page."""
        async with aclosing(self._pages()) as pages:
            async for page in pages:
                for letter in page:
                    yield letter

    async def list(self, limit: int = 100) -> Sequence[DeadLetter]:
        """Return up to `limit` dead letters, the oldest first.

        Raises:
            GroupMissingError: There is no such group.
        """
        check_count("limit", limit)
        letters: list[DeadLetter] = []
        async with aclosing(self._pages()) as pages:
            async for page in pages:
                letters += page
                if len(letters) >= limit:
                    break
        return letters[:limit]

    async def get(self, id: str) -> DeadLetter | None:
        """Return the dead letter with that id, or None. It searches all of them.

        Raises:
            GroupMissingError: There is no such group.
        """
        async with aclosing(self._pages()) as pages:
            async for page in pages:
                for letter in page:
                    if letter.id == id:
                        return letter
        return None

    async def replay(self, *ids: str) -> int:
        """Move the dead letters with these ids back to the group, with attempt 1, and return how many were moved.

        Raises:
            GroupMissingError: There is no such group.
            BackendConnectionError: The connection was lost; the text says how many were moved before.
        """
        return await self._some("replayed", partial(_replay, group=self.group, ids=frozenset(ids))) if ids else 0

    async def replay_all(self, *, progress: Callable[[int], object] | None = None) -> int:
        """Move all current dead letters back to the group, and return how many; one that fails again meanwhile stays.

        Args:
            progress: Called after each step with the number moved so far.

        Raises:
            GroupMissingError: There is no such group.
            BackendConnectionError: The connection was lost; the text says how many were moved before.
        """
        return await self._some("replayed", partial(_replay, group=self.group, ids=None), progress)

    async def purge(self, *ids: str) -> int:
        """Delete the dead letters with these ids, and return how many were deleted.

        Raises:
            GroupMissingError: There is no such group.
            BackendConnectionError: The connection was lost; the text says how many were deleted before.
        """
        return await self._some("purged", partial(_purge, group=self.group, ids=frozenset(ids))) if ids else 0

    async def purge_all(self, *, progress: Callable[[int], object] | None = None) -> int:
        """Delete all current dead letters, and return how many.

        Args:
            progress: Called after each step with the number deleted so far.

        Raises:
            GroupMissingError: There is no such group.
            BackendConnectionError: The connection was lost; the text says how many were deleted before.
        """
        return await self._some("purged", partial(_purge, group=self.group, ids=None), progress)

    def _pages(self) -> AsyncGenerator[Sequence[DeadLetter]]:
        return self._steps(lambda transport: transport.dead_letters(self.group))

    async def _some(
        self,
        done: str,
        start: Callable[[Transport], AsyncGenerator[int]],
        progress: Callable[[int], object] | None = None,
    ) -> int:
        total = 0
        try:
            async with aclosing(self._steps(start)) as steps:
                async for count in steps:
                    total += count
                    if progress is not None:
                        progress(total)
        except AbeError as exc:
            if total:
                exc.args = (f"{exc} ({total} dead letters were {done} before that; call it again for the rest)",)
            raise
        return total


def _replay(transport: Transport, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
    return transport.replay(group, ids)


def _purge(transport: Transport, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
    return transport.purge(group, ids)
