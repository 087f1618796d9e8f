"""The transport: what the engine asks of a broker, in SQL."""

import asyncio
import json
import sqlite3
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, cast
from uuid import uuid4

from abe.backends.message_queue.base import (
    Batching,
    DeadLetter,
    Delivery,
    Envelope,
    Failures,
    GroupStats,
    Metadata,
    Receipt,
    Settlement,
    Verb,
)
from abe.backends.message_queue.base.names import EVERYTHING, matches
from abe.errors import AbeError, BackpressureError, LeaseLostError, UnroutableError
from abe.settings import QueueSettings
from sqlite_queue.database import Database

_NOBODY: Final = ""
"""The name under which messages are held while no group exists."""

_VERSION: Final = 1
"""Of what stands in the columns beside a body."""

_FIRST_PAUSE: Final = 0.005
_LONGEST_PAUSE: Final = 0.05
_MOVED: Final = "space, name, id, key, body, published_at, headers"


class SqliteTransport:
    """All the queues of a namespace in a file."""

    batching = Batching(messages=500, bytes=1 << 20, flights=1)

    def __init__(self, path: str, settings: QueueSettings) -> None:
        self._database = Database(path)
        self._space = settings.namespace
        self._lease = settings.lease
        self._max_backlog = settings.max_backlog

    async def open(self) -> None:
        """Open the file; make it when it is missing."""
        await self.ping()

    async def close(self) -> None:
        """Close the file."""
        await self._database.close()

    async def ping(self) -> None:
        """Look into the file."""
        await self._database.run(lambda db: db.execute("SELECT 1").fetchone(), write=False)

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        """Store a copy of each message for each group that wants it."""
        return await self._database.run(lambda db: self._store(db, envelopes))

    def _store(self, db: sqlite3.Connection, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        groups, now = self._groups(db), time.time()
        room = {group: self._room(db, group) for group in groups} if self._max_backlog is not None else {}
        outcomes: list[AbeError | None] = []
        for envelope in envelopes:
            wanted = [
                group
                for group, patterns in groups.items()
                if any(matches(pattern, envelope.key) for pattern in patterns)
            ]
            if groups and not wanted:
                outcomes.append(UnroutableError(f"no group wants the key {envelope.key!r}"))
            elif any(room.get(group, 1) < 1 for group in wanted):
                outcomes.append(
                    BackpressureError(f"a group has {self._max_backlog} messages waiting already (max_backlog)")
                )
            else:
                outcomes.append(None)
                for group in wanted or [_NOBODY]:
                    room[group] = room.get(group, 1) - (self._max_backlog is not None)
                    _insert(db, self._space, group, envelope, now)
        return outcomes

    def _room(self, db: sqlite3.Connection, group: str) -> int:
        query = "SELECT count(*) FROM messages WHERE space = ? AND name = ? AND (deadline IS NULL OR deadline <= ?)"
        waiting: int = db.execute(query, (self._space, group, time.time())).fetchone()[0]
        return (self._max_backlog or 0) - waiting

    async def declare(self, group: str, patterns: tuple[str, ...] | None) -> None:
        """Make the group exist, with what was held for the first one that wants it."""
        await self._database.run(lambda db: _declare(db, self._space, group, patterns))

    async def delete_group(self, group: str) -> None:
        """Remove the group and all that is its own."""

        def delete(db: sqlite3.Connection) -> None:
            for table in ("groups", "messages", "dead"):
                db.execute(f"DELETE FROM {table} WHERE space = ? AND name = ?", (self._space, group))

        await self._database.run(delete)

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Return each group's patterns."""
        return await self._database.run(self._groups, write=False)

    def _groups(self, db: sqlite3.Connection) -> dict[str, tuple[str, ...]]:
        rows = db.execute("SELECT name, patterns FROM groups WHERE space = ?", (self._space,))
        return {row["name"]: tuple(json.loads(row["patterns"])) for row in rows}

    async def subscribe(self, group: str, prefetch: int) -> "SqliteReceiver":
        """Join the group under a name that nobody had before."""
        receiver = SqliteReceiver(self._database, self._space, group, self._lease)
        await self._database.run(receiver.sign_in)
        return receiver

    async def stats(self, group: str) -> GroupStats:
        """Count the group's messages."""
        query = """SELECT
            count(*) FILTER (WHERE due <= :now AND coalesce(deadline, 0) <= :now) AS waiting,
            count(*) FILTER (WHERE deadline > :now) AS in_flight,
            count(*) FILTER (WHERE due > :now AND coalesce(deadline, 0) <= :now) AS delayed,
            :now - min(since) FILTER (WHERE due <= :now AND coalesce(deadline, 0) <= :now) AS oldest,
            (SELECT count(*) FROM dead WHERE space = :space AND name = :name) AS dead
            FROM messages WHERE space = :space AND name = :name"""
        values = {"now": time.time(), "space": self._space, "name": group}
        row = await self._database.run(lambda db: db.execute(query, values).fetchone(), write=False)
        return GroupStats(**dict(row))

    async def dead_letters(self, group: str, limit: int) -> Sequence[DeadLetter]:
        """Return the oldest dead letters."""
        query = "SELECT * FROM dead WHERE space = ? AND name = ? ORDER BY serial LIMIT ?"
        rows = await self._database.run(
            lambda db: db.execute(query, (self._space, group, limit)).fetchall(), write=False
        )
        return [_dead_letter(row) for row in rows]

    async def find_dead_letter(self, group: str, id: str) -> DeadLetter | None:
        """Return the dead letter with that id."""
        query = "SELECT * FROM dead WHERE space = ? AND name = ? AND id = ? ORDER BY serial LIMIT 1"
        row = await self._database.run(lambda db: db.execute(query, (self._space, group, id)).fetchone(), write=False)
        return None if row is None else _dead_letter(row)

    async def replay(self, group: str, ids: Collection[str] | None) -> int:
        """Move dead letters back to the group."""

        def move(db: sqlite3.Connection) -> int:
            where, values = self._chosen(group, ids)
            now = time.time()
            db.execute(
                f"INSERT INTO messages ({_MOVED}, due, since) SELECT {_MOVED}, ?, ? FROM dead {where}",
                (now, now, *values),
            )
            return db.execute(f"DELETE FROM dead {where}", values).rowcount

        return await self._database.run(move)

    async def purge(self, group: str, ids: Collection[str] | None) -> int:
        """Remove dead letters for good."""
        where, values = self._chosen(group, ids)
        return await self._database.run(lambda db: db.execute(f"DELETE FROM dead {where}", values).rowcount)

    def _chosen(self, group: str, ids: Collection[str] | None) -> tuple[str, tuple[str, ...]]:
        one_of = "" if ids is None else f" AND id IN ({', '.join('?' * len(ids))})"
        return f"WHERE space = ? AND name = ?{one_of}", (self._space, group, *(ids or ()))


class SqliteReceiver:
    """One consumer. A receipt is a message's serial number and which of its deliveries this is."""

    def __init__(self, database: Database, space: str, group: str, lease: float) -> None:
        self._database = database
        self._space = space
        self._group = group
        self._lease = lease
        self._consumer = uuid4().hex
        self._seen = 0.0
        self._stopped = asyncio.Event()

    def sign_in(self, db: sqlite3.Connection) -> None:
        """Say that we live, and forget those that have said nothing for two of their leases."""
        self._seen = now = time.time()
        _declare(db, self._space, self._group, None)
        db.execute("DELETE FROM consumers WHERE seen + patience < ?", (now,))
        row = (self._space, self._group, self._consumer, now, 2 * self._lease)
        db.execute(
            "INSERT OR REPLACE INTO consumers (space, name, consumer, seen, patience) VALUES (?, ?, ?, ?, ?)", row
        )

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Look for messages, at first often, then less so."""
        pause = _FIRST_PAUSE
        while not self._stopped.is_set():
            if await self._database.run(self._something, write=False):
                deliveries = await self._database.run(lambda db: self._take(db, limit))
                if deliveries:
                    return deliveries
            if time.time() - self._seen > self._lease / 3:
                await self._database.run(self.sign_in)
            try:
                async with asyncio.timeout(pause):
                    await self._stopped.wait()
            except TimeoutError:
                pause = min(2 * pause, _LONGEST_PAUSE)
        return ()

    def _something(self, db: sqlite3.Connection) -> bool:
        return bool(self._free(db, "serial", 1))

    def _free(self, db: sqlite3.Connection, columns: str, limit: int) -> list[sqlite3.Row]:
        query = f"""SELECT {columns} FROM messages WHERE space = :space AND name = :name
            AND due <= :now AND coalesce(deadline, 0) <= :now ORDER BY serial LIMIT :limit"""
        return db.execute(
            query, {"space": self._space, "name": self._group, "now": time.time(), "limit": limit}
        ).fetchall()

    def _take(self, db: sqlite3.Connection, limit: int) -> list[Delivery]:
        rows = self._free(db, "*", limit)
        update = """UPDATE messages SET consumer = ?, deadline = ?, attempts = attempts + 1, delivery = delivery + 1
            WHERE serial = ?"""
        deadline = time.time() + self._lease
        db.executemany(update, [(self._consumer, deadline, row["serial"]) for row in rows])
        return [_delivery(row) for row in rows]

    def metadata(self, delivery: Delivery) -> Metadata:
        """Return what stands beside the body."""
        row = delivery.header
        assert isinstance(row, sqlite3.Row)
        headers = json.loads(row["headers"]) if row["headers"] else None
        return Metadata(row["id"] or f"sqlite-{row['serial']}", row["key"], row["published_at"], headers)

    async def ack(self, receipts: Sequence[Receipt], *, verify: bool) -> Failures:
        """Remove messages that are done, where they are still ours."""
        return await self._database.run(
            lambda db: _failures(receipt for receipt in receipts if not self._remove(db, receipt))
        )

    async def settle(self, settlements: Sequence[Settlement]) -> Failures:
        """Carry out verdicts, where the messages are still ours."""
        return await self._database.run(
            lambda db: _failures(item.receipt for item in settlements if not self._settle(db, item))
        )

    def _settle(self, db: sqlite3.Connection, item: Settlement) -> bool:
        if item.verb is Verb.DEAD:
            insert = f"""INSERT INTO dead ({_MOVED}, attempts, reason, error, dead_at)
                SELECT space, name, coalesce(id, 'sqlite-' || serial), key, body, published_at, headers, attempts, ?, ?, ?
                FROM messages WHERE serial = ? AND delivery = ? AND consumer = ?"""
            db.execute(insert, (item.reason, item.error, time.time(), *self._ours(item.receipt)))
            return self._remove(db, item.receipt)
        update = """UPDATE messages SET consumer = NULL, deadline = NULL, due = ?, attempts = attempts - ?
            WHERE serial = ? AND delivery = ? AND consumer = ?"""
        released = item.verb is Verb.RELEASE
        return db.execute(update, (time.time() + item.delay, released, *self._ours(item.receipt))).rowcount == 1

    def _remove(self, db: sqlite3.Connection, receipt: Receipt) -> bool:
        delete = "DELETE FROM messages WHERE serial = ? AND delivery = ? AND consumer = ?"
        return db.execute(delete, self._ours(receipt)).rowcount == 1

    def _ours(self, receipt: Receipt) -> tuple[int, int, str]:
        serial, delivery = cast("tuple[int, int]", receipt)
        return serial, delivery, self._consumer

    async def renew(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Start leases anew, and return those that are lost."""

        def extend(db: sqlite3.Connection) -> list[Receipt]:
            self.sign_in(db)
            update = "UPDATE messages SET deadline = ? WHERE serial = ? AND delivery = ? AND consumer = ?"
            deadline = time.time() + self._lease
            return [item for item in receipts if db.execute(update, (deadline, *self._ours(item))).rowcount == 0]

        return await self._database.run(extend)

    async def recover(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Give back what a failed `receive` may have taken."""
        serials = {self._ours(receipt)[0] for receipt in receipts}
        await self._database.run(lambda db: self._give_back(db, keep=serials))
        return await self.renew(receipts)

    async def stop(self) -> None:
        """End a waiting `receive`."""
        self._stopped.set()

    async def close(self) -> None:
        """Give back everything, and sign out."""

        def leave(db: sqlite3.Connection) -> None:
            self._give_back(db, keep=set())
            db.execute("DELETE FROM consumers WHERE consumer = ?", (self._consumer,))

        await self._database.run(leave)

    def _give_back(self, db: sqlite3.Connection, *, keep: Collection[int]) -> None:
        rows = db.execute("SELECT serial FROM messages WHERE consumer = ?", (self._consumer,)).fetchall()
        update = "UPDATE messages SET consumer = NULL, deadline = NULL, attempts = attempts - 1 WHERE serial = ?"
        db.executemany(update, [(row["serial"],) for row in rows if row["serial"] not in keep])


def _delivery(row: sqlite3.Row) -> Delivery:
    fault = None if row["version"] == _VERSION else f"the message is of version {row['version']}; known is {_VERSION}"
    return Delivery((row["serial"], row["delivery"] + 1), row["body"], row, row["attempts"] + 1, fault)


def _declare(db: sqlite3.Connection, space: str, group: str, patterns: tuple[str, ...] | None) -> None:
    made = db.execute(
        "INSERT OR IGNORE INTO groups (space, name, patterns) VALUES (?, ?, ?)",
        (space, group, json.dumps(patterns or EVERYTHING)),
    ).rowcount
    if patterns is not None:
        db.execute("UPDATE groups SET patterns = ? WHERE space = ? AND name = ?", (json.dumps(patterns), space, group))
    if not made and patterns is None:
        return
    stored = db.execute("SELECT patterns FROM groups WHERE space = ? AND name = ?", (space, group)).fetchone()
    wanted = json.loads(stored["patterns"])
    held = db.execute("SELECT serial, key FROM messages WHERE space = ? AND name = ?", (space, _NOBODY)).fetchall()
    mine = [(group, row["serial"]) for row in held if any(matches(pattern, row["key"]) for pattern in wanted)]
    db.executemany("UPDATE messages SET name = ? WHERE serial = ?", mine)


def _insert(db: sqlite3.Connection, space: str, group: str, envelope: Envelope, now: float) -> None:
    headers = json.dumps(envelope.headers) if envelope.headers else None
    row = (
        space,
        group,
        envelope.id,
        envelope.key,
        envelope.body,
        envelope.published_at,
        headers,
        now + envelope.delay,
        now,
    )
    db.execute(f"INSERT INTO messages ({_MOVED}, due, since) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def _dead_letter(row: sqlite3.Row) -> DeadLetter:
    return DeadLetter(
        id=row["id"],
        key=row["key"],
        body=row["body"],
        headers=json.loads(row["headers"]) if row["headers"] else {},
        attempts=row["attempts"],
        reason=row["reason"],
        error=row["error"],
        published_at=row["published_at"] / 1000,
        dead_at=row["dead_at"],
    )


def _failures(lost: Iterable[Receipt]) -> Failures:
    return {receipt: LeaseLostError("somebody else has the message, or will get it") for receipt in lost}
