"""The messages, in SQL: each method is one transaction. What it must do is written on `Store`."""

import json
import time
from collections.abc import Collection, Sequence
from sqlite3 import Connection
from typing import Any, Final

from abe.backends.message_queue.base import GroupStats
from abe.backends.message_queue.base.routing import PARKED, group_missing, matches_any
from abe.backends.message_queue.stored import Change, Choose, Claim, Groups, Row, Span, Store
from sqlite_queue.database import Database

_COLUMNS: Final = "serial, key, header, body, attempts, delivery, dead_at, reason, error"
_GROUP: Final = "space = :space AND name = :group"
_CLAIM: Final = "serial = :serial AND delivery = :delivery AND consumer = :consumer"

# A message can be delivered from `due` on: its delay has passed or, where a consumer has it, that consumer's lease has run out.
# AUTOINCREMENT: no serial number is used again, so that a claim to a message that is gone fits no other.
_TABLES: Final = """
PRAGMA journal_mode = WAL;  -- readers and the writer do not wait for each other
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS groups (space TEXT, name TEXT, patterns TEXT, PRIMARY KEY (space, name));
CREATE TABLE IF NOT EXISTS messages (
    serial INTEGER PRIMARY KEY AUTOINCREMENT, space TEXT, name TEXT, key TEXT, header BLOB, body BLOB, due REAL,
    consumer TEXT, attempts INTEGER DEFAULT 0, delivery INTEGER DEFAULT 0,
    dead_at REAL DEFAULT 0, reason TEXT DEFAULT '', error TEXT DEFAULT ''
);
CREATE INDEX IF NOT EXISTS messages_serial ON messages (space, name, serial) WHERE dead_at = 0;
CREATE INDEX IF NOT EXISTS messages_due ON messages (space, name, due) WHERE dead_at = 0;
CREATE INDEX IF NOT EXISTS messages_dead ON messages (space, name, dead_at, serial) WHERE dead_at > 0;
CREATE INDEX IF NOT EXISTS messages_consumer ON messages (consumer) WHERE consumer IS NOT NULL;
"""


class SqliteStore(Store):
    """The queues of a namespace in a file."""

    def __init__(self, path: str, namespace: str) -> None:
        self._file = Database(path)
        self._space = namespace

    async def open(self) -> None:
        await self._file.run(lambda db: db.executescript(_TABLES), write=False)

    async def close(self) -> None:
        await self._file.close()

    async def groups(self) -> Groups:
        return await self._file.run(self._groups, write=False)

    async def put(self, choose: Choose, *, counted: bool) -> None:
        def store(db: Connection) -> None:
            count = """SELECT name, count(*) FROM messages WHERE space = :space AND dead_at = 0
                AND (due <= :now OR consumer IS NULL) GROUP BY name"""
            copies = choose(self._groups(db), dict(db.execute(count, self._at()).fetchall()) if counted else {})
            insert = "INSERT INTO messages (space, name, key, header, body, due) VALUES (?, ?, ?, ?, ?, ?)"
            db.executemany(insert, [(self._space, *copy[:-1], time.time() + copy.delay) for copy in copies])

        await self._file.run(store)

    async def declare(self, group: str, patterns: tuple[str, ...], *, change: bool) -> tuple[str, ...]:
        def make(db: Connection) -> tuple[str, ...]:
            there = self._groups(db).get(group)
            if there is not None and not change:
                return there
            db.execute("INSERT OR REPLACE INTO groups VALUES (?, ?, ?)", (self._space, group, json.dumps(patterns)))
            parked = db.execute(f"SELECT serial, key FROM messages WHERE {_GROUP}", self._at(PARKED)).fetchall()
            wanted = [(group, serial) for serial, key in parked if matches_any(patterns, key)]
            db.executemany("UPDATE messages SET name = ? WHERE serial = ?", wanted)
            return patterns

        return await self._file.run(make)

    async def delete(self, group: str | None) -> None:
        def delete(db: Connection) -> None:
            which = "space = :space" if group is None else _GROUP
            for table in ("groups", "messages"):
                db.execute(f"DELETE FROM {table} WHERE {which}", self._at(group))

        await self._file.run(delete)

    async def count(self, group: str) -> GroupStats:
        query = f"""SELECT
            count(*) FILTER (WHERE due <= :now),
            count(*) FILTER (WHERE due > :now AND consumer IS NOT NULL),
            count(*) FILTER (WHERE due > :now AND consumer IS NULL),
            (SELECT count(*) FROM messages WHERE {_GROUP} AND dead_at > 0),
            :now - min(due) FILTER (WHERE due <= :now)
            FROM messages WHERE {_GROUP} AND dead_at = 0"""
        counts = await self._file.run(lambda db: db.execute(query, self._at(group)).fetchone(), write=False)
        return GroupStats(**dict(zip(("waiting", "in_flight", "delayed", "dead", "oldest"), counts, strict=True)))

    async def take(self, group: str, consumer: str, limit: int, lease: float) -> tuple[Sequence[Row], float | None]:
        # Not what the consumer has itself: a lease that ran out while nobody else took the message is about to be renewed.
        others = f"{_GROUP} AND dead_at = 0 AND consumer IS NOT :consumer"
        look = f"""SELECT (SELECT due - :now FROM messages WHERE {others} ORDER BY due LIMIT 1) FROM groups WHERE {_GROUP}"""
        take = f"""UPDATE messages SET consumer = :consumer, due = :now + :lease, attempts = attempts + 1, delivery = delivery + 1
            WHERE serial IN (SELECT serial FROM messages INDEXED BY messages_serial
                WHERE {others} AND due <= :now ORDER BY serial LIMIT :limit) RETURNING {_COLUMNS}"""
        values = {"consumer": consumer, "limit": limit, "lease": lease}
        found = await self._file.run(lambda db: db.execute(look, values | self._at(group)).fetchone(), write=False)
        if found is None:
            raise group_missing(group)
        if found[0] is None or found[0] > 0:
            return (), found[0]
        rows = await self._file.run(lambda db: db.execute(take, values | self._at(group)).fetchall())
        return [Row(*row) for row in sorted(rows)], None

    async def remove(self, claims: Sequence[Claim]) -> Sequence[bool]:
        return await self._each(f"DELETE FROM messages WHERE {_CLAIM}", [claim._asdict() for claim in claims])

    async def settle(self, changes: Sequence[Change]) -> Sequence[bool]:
        update = f"""UPDATE messages SET consumer = NULL, due = :now + :delay, attempts = attempts - :uncounted,
            dead_at = :dead * :now, reason = :reason, error = :error WHERE {_CLAIM}"""
        return await self._each(update, [change._asdict() for change in changes])

    async def renew(self, claims: Sequence[Claim], lease: float) -> Sequence[bool]:
        update = f"UPDATE messages SET due = :now + :lease WHERE {_CLAIM}"
        return await self._each(update, [claim._asdict() | {"lease": lease} for claim in claims])

    async def give_back(self, consumer: str, keep: Collection[int]) -> None:
        update = """UPDATE messages SET consumer = NULL, due = :now, attempts = attempts - 1
            WHERE consumer = :consumer AND serial NOT IN (SELECT value FROM json_each(:keep))"""
        await self._each(update, [{"consumer": consumer, "keep": json.dumps(list(keep))}])

    async def dead(self, group: str, span: Span, size: int) -> tuple[Sequence[Row], float]:
        values = self._at(group) | span._asdict() | {"size": size}
        query = f"""SELECT {_COLUMNS} FROM (SELECT *, sum(length(body)) OVER (ORDER BY dead_at, serial) AS size
            FROM (SELECT * FROM messages WHERE {_GROUP} AND dead_at > 0 AND dead_at <= coalesce(:until, :now)
                AND (dead_at, serial) > (:died, :serial) ORDER BY dead_at, serial LIMIT 100))
            WHERE size - length(body) < :size ORDER BY dead_at, serial"""
        rows = await self._file.run(lambda db: db.execute(query, values).fetchall(), write=False)
        return [Row(*row) for row in rows], values["now"]

    async def revive(self, serials: Collection[int]) -> int:
        update = "UPDATE messages SET dead_at = 0, attempts = 0, due = :now WHERE serial = :serial AND dead_at > 0"
        return sum(await self._each(update, [{"serial": serial} for serial in serials]))

    async def purge(self, serials: Collection[int]) -> int:
        delete = "DELETE FROM messages WHERE serial = :serial AND dead_at > 0"
        return sum(await self._each(delete, [{"serial": serial} for serial in serials]))

    async def _each(self, statement: str, rows: Sequence[dict[str, Any]]) -> Sequence[bool]:
        """Execute a statement for each of these rows; return whether there is such a row."""

        def change(db: Connection) -> list[bool]:
            return [db.execute(statement, self._at() | row).rowcount == 1 for row in rows]

        return await self._file.run(change)

    def _groups(self, db: Connection) -> dict[str, tuple[str, ...]]:
        rows = db.execute("SELECT name, patterns FROM groups WHERE space = ?", (self._space,))
        return {name: tuple(json.loads(patterns)) for name, patterns in rows}

    def _at(self, group: str | None = None) -> dict[str, Any]:
        return {"space": self._space, "group": group, "now": time.time()}
