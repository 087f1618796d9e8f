"""The file, and a thread of its own that waits for it: SQLite blocks, and an event loop must not."""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from abe.errors import BackendClosedError, BackendConnectionError, ConfigurationError

_T = TypeVar("_T")


class Database:
    """A connection that is used by one thread. What is asked for is done in that order, also for callers that were cancelled."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-queue")
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    async def run(self, work: Callable[[sqlite3.Connection], _T], *, write: bool = True) -> _T:
        """Do work in one transaction. Whoever does not write keeps nobody from writing.

        Raises:
            BackendConnectionError: The file cannot be opened, or is locked for too long (ConfigurationError: it is no database).
            BackendClosedError: It was closed.
        """
        if self._closed:
            raise BackendClosedError("the queue's file was closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work, write)

    async def close(self) -> None:
        """Close the file after what is under way, and end the thread. May be repeated."""
        if not self._closed:
            self._closed = True
            closing = self._thread.submit(self._close)
            self._thread.shutdown(wait=False)
            await asyncio.wait([asyncio.wrap_future(closing)])

    def _transact(self, work: Callable[[sqlite3.Connection], _T], write: bool) -> _T:
        try:
            if self._connection is None:
                self._connection = sqlite3.connect(self._path, timeout=5.0, isolation_level=None)
            with self._connection as connection:
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                return work(connection)
        except sqlite3.DatabaseError as exc:
            kind = BackendConnectionError if isinstance(exc, sqlite3.OperationalError) else ConfigurationError
            raise kind(f"the queue's file: {exc}") from exc

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
