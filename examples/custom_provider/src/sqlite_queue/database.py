"""The file: its tables, and a thread of its own to wait for it."""

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from abe.errors import BackendClosedError, BackendConnectionError

_T = TypeVar("_T")

_BUSY_SECONDS: Final = 5.0

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS groups (space TEXT, name TEXT, patterns TEXT, PRIMARY KEY (space, name));
CREATE TABLE IF NOT EXISTS consumers (space TEXT, name TEXT, consumer TEXT PRIMARY KEY, seen REAL, patience REAL);
CREATE TABLE IF NOT EXISTS messages (
    serial INTEGER PRIMARY KEY AUTOINCREMENT, space TEXT, name TEXT, version INTEGER DEFAULT 1,
    id TEXT, key TEXT, body BLOB, published_at INTEGER, headers TEXT,
    due REAL, since REAL, attempts INTEGER DEFAULT 0, delivery INTEGER DEFAULT 0, consumer TEXT, deadline REAL
);
CREATE INDEX IF NOT EXISTS messages_next ON messages (space, name, serial);
CREATE INDEX IF NOT EXISTS messages_held ON messages (consumer) WHERE consumer IS NOT NULL;
CREATE TABLE IF NOT EXISTS dead (
    serial INTEGER PRIMARY KEY AUTOINCREMENT, space TEXT, name TEXT,
    id TEXT, key TEXT, body BLOB, published_at INTEGER, headers TEXT,
    attempts INTEGER, reason TEXT, error TEXT, dead_at REAL
);
"""


class Database:
    """A connection, used by one thread: SQLite blocks, and an event loop must not."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    async def run(self, work: Callable[[sqlite3.Connection], _T], *, write: bool = True) -> _T:
        """Do the work in one transaction.

        Raises:
            BackendConnectionError: The file cannot be opened, or is locked for too long. Nothing was done.
            BackendClosedError: The file was closed.
        """
        if self._closed:
            raise BackendClosedError("the queue's file was closed")
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-queue")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work, write)

    async def close(self) -> None:
        """Close the file after what is under way, and end the thread."""
        self._closed = True
        if self._thread is not None:
            thread, self._thread = self._thread, None
            await asyncio.get_running_loop().run_in_executor(thread, self._close)
            thread.shutdown()

    def _run(self, work: Callable[[sqlite3.Connection], _T], write: bool) -> _T:
        try:
            if self._connection is None:
                self._connection = self._open()
            with self._connection as connection:
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                return work(connection)
        except sqlite3.OperationalError as exc:
            raise BackendConnectionError(f"the queue's file: {exc}") from exc

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            # With a write-ahead log readers and the writer do not wait for each other.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_TABLES)
        except sqlite3.Error:
            connection.close()
            raise
        connection.row_factory = sqlite3.Row
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
