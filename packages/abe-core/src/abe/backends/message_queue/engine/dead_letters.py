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
    """Goes through what a transport does in steps, each of them within the time limit."""

    def __call__(self, start: Callable[[Transport], AsyncGenerator[_T]]) -> AsyncGenerator[_T]: ...


class DeadLetters:
    """List, show, replay and purge what a group gave up. All of it works while consumers run.

    Each request to the broker is bounded by `publish_timeout`; the whole takes the time that it takes.

    Args:
        steps: Goes through what the transport does in steps.
        group: Whose they are.
    """

    def __init__(self, steps: Steps, group: str) -> None:
        self._steps = steps
        self.group = group

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """Iterate over all of them, the oldest first, page by page."""
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
        """Return the dead letter with that id, or None. It looks through all of them.

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
        """Move the dead letters with these ids back to the group, starting again at attempt 1, and return how many there were.

        Raises:
            GroupMissingError: There is no such group.
            BackendConnectionError: The broker was lost; the text says how many were moved before.
        """
        return await self._some("replayed", partial(_replay, group=self.group, ids=frozenset(ids))) if ids else 0

    async def replay_all(self, *, progress: Callable[[int], object] | None = None) -> int:
        """Move all that are there now back to the group, and return how many; one that fails again meanwhile is not moved again.

        Args:
            progress: Called after each step with the number moved so far.

        Raises:
            GroupMissingError: There is no such group.
            BackendConnectionError: The broker was lost; the text says how many were moved before.
        """
        return await self._some("replayed", partial(_replay, group=self.group, ids=None), progress)

    async def purge(self, *ids: str) -> int:
        """Remove the dead letters with these ids for good, and return how many there were.

        Raises:
            GroupMissingError: There is no such group.
            BackendConnectionError: The broker was lost; the text says how many were removed before.
        """
        return await self._some("purged", partial(_purge, group=self.group, ids=frozenset(ids))) if ids else 0

    async def purge_all(self, *, progress: Callable[[int], object] | None = None) -> int:
        """Remove all that are there now for good, and return how many.

        Args:
            progress: Called after each step with the number removed so far.

        Raises:
            GroupMissingError: There is no such group.
            BackendConnectionError: The broker was lost; the text says how many were removed before.
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
