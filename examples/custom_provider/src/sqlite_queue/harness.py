"""What the contract suite needs in order to test the provider: an environment, and a look into the file with plain SQL."""

import asyncio
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from abe.types import MessageQueueBackendProtocol
from abe_contract_tests.harness import Counts, Evidence, Harness, Oracle
from sqlite_queue.backend import SqliteBackend


class SqliteHarness(Harness):
    """A file in a folder of the run's own. The workers are processes: they share it as an application's would."""

    name: ClassVar[str] = "sqlite"
    backend: ClassVar[type[MessageQueueBackendProtocol]] = SqliteBackend
    evidence: ClassVar[Evidence] = "real broker"

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="sqlite-queue-")

    def stop(self) -> None:
        self._folder.cleanup()

    def environment(self, namespace: str, *, lease: float) -> Mapping[str, str]:
        # A file for each test: what one test leaves behind does not slow down the next.
        return _variables(Path(self._folder.name) / f"{namespace}.sqlite3", namespace, lease)

    def unreachable(self, namespace: str) -> Mapping[str, str]:
        return _variables(Path(self._folder.name) / "no such folder" / "queue.sqlite3", namespace, 1.0)

    async def oracle(self, namespace: str) -> Oracle:
        return _SqliteOracle(Path(self.environment(namespace, lease=1.0)["SQLITE_QUEUE_PATH"]), namespace)

    def broker_version(self) -> str:
        return f"SQLite {sqlite3.sqlite_version}"


class _SqliteOracle:
    def __init__(self, path: Path, namespace: str) -> None:
        self._path = path
        self._space = namespace

    async def inject(self, group: str, body: bytes, *, key: str = "injected") -> None:
        await self._put(group, body, key, header=b"")

    async def inject_version(self, group: str, body: bytes) -> None:
        await self._put(group, body, "injected", header=b'[9,"id","injected",0]')

    async def counts(self, group: str) -> Counts:
        query = """SELECT
            count(*) FILTER (WHERE dead_at = 0 AND due <= :now) AS waiting,
            count(*) FILTER (WHERE dead_at = 0 AND due > :now AND consumer IS NOT NULL) AS in_flight,
            count(*) FILTER (WHERE dead_at = 0 AND due > :now AND consumer IS NULL) AS delayed,
            count(*) FILTER (WHERE dead_at > 0) AS dead
            FROM messages WHERE space = :space AND name = :name"""
        row = await self._query(query, {"now": time.time(), "space": self._space, "name": group})
        return Counts(waiting=row[0], in_flight=row[1], delayed=row[2], dead=row[3])

    async def consumers(self, group: str) -> None:
        """The file knows messages, and the names of those who have some."""

    async def connections(self) -> int:
        return 0

    async def aclose(self) -> None:
        """Each question opens the file for itself."""

    async def _put(self, group: str, body: bytes, key: str, *, header: bytes) -> None:
        insert = "INSERT INTO messages (space, name, key, header, body, due) VALUES (:space, :name, :key, :header, :body, :now)"
        values = {"space": self._space, "name": group, "key": key, "header": header, "body": body, "now": time.time()}
        await self._query(insert, values)

    async def _query(self, query: str, values: Mapping[str, Any]) -> Any:
        def run() -> Any:
            with closing(sqlite3.connect(self._path, timeout=5.0)) as connection, connection:
                return connection.execute(query, values).fetchone()

        return await asyncio.to_thread(run)


def _variables(path: Path, namespace: str, lease: float) -> Mapping[str, str]:
    return {"SQLITE_QUEUE_PATH": str(path), "QUEUE_NAMESPACE": namespace, "QUEUE_LEASE_SECONDS": str(lease)}
