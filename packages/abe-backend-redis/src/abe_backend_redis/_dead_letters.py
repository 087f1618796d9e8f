"""Browses, replays and purges a group's dead letters, in steps of bounded count and size.

They are in a stream, whose ids only grow: an operation ends at the entry that was the newest when it began.
"""

from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

from abe.backends.message_queue.base import DeadLetter
from abe_backend_redis import _wire
from abe_backend_redis._errors import ReplyError, translate
from abe_backend_redis._protocol import Reply
from abe_backend_redis._topology import Topology

Entry: TypeAlias = tuple[bytes, list[bytes]]
Run: TypeAlias = Callable[[str, Sequence[bytes], Sequence[object]], Coroutine[Any, Any, Reply]]
"""Runs a script on the connection for dead letters."""


class DeadLetters:
    """The dead letters of a group.

    Args:
        run: Runs a script.
        topology: The key names.
        group: The group.
        address: The server's, for error texts.
    """

    def __init__(self, run: Run, topology: Topology, group: str, address: str) -> None:
        self._run = run
        self._group = group
        self._address = address
        self._groups = topology.groups
        self._dead = topology.dead(group)
        self._queue = topology.queue(group)

    async def browse(self) -> AsyncGenerator[Sequence[DeadLetter]]:
        """Yield all of them in pages, the oldest first."""
        async with aclosing(self._pages(b"all")) as pages:
            async for page in pages:
                yield [_wire.dead_letter(*entry) for entry in page]

    async def replay(self, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Move them to the group's stream, each atomically."""
        keys = [self._groups, self._dead, self._queue]
        async with aclosing(self._chosen(ids)) as steps:
            async for entries in steps:
                moved, why = await self._run("replay", keys, [self._group, *entries]) if entries else (0, b"")
                yield moved
                if why:
                    error = ReplyError(why.decode(errors="replace"))
                    raise translate(error, self._address) from error

    async def purge(self, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Delete them."""
        async with aclosing(self._chosen(ids)) as steps:
            async for entries in steps:
                yield await self._run("purge", [self._dead], entries) if entries else 0

    async def _chosen(self, ids: Collection[str] | None) -> AsyncGenerator[list[bytes]]:
        """Yield the entry ids of the dead letters with these message ids (None: all), page by page."""
        async with aclosing(self._pages(b"none" if ids is None else b"name")) as pages:
            async for page in pages:
                yield [entry for entry, fields in page if ids is None or _wire.letter_id(entry, fields) in ids]

    async def _pages(self, what: bytes) -> AsyncGenerator[Sequence[Entry]]:
        start, end = b"-", b""
        while True:
            end, page = await self._run("page", [self._groups, self._dead], [self._group, start, end, what])
            if page:
                yield page
            if not end or not page:
                return
            start = b"(" + page[-1][0]
