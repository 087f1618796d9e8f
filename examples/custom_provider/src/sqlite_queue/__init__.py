"""Message queues in an SQLite file: an example of a provider that the project did not write."""

from sqlite_queue.backend import SqliteBackend, SqliteSettings

__all__ = ["SqliteBackend", "SqliteSettings"]
