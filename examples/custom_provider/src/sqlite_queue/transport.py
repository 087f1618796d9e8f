"""The transport: what the engine asks of a broker, in SQL."""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Final
from uuid import uuid4

from abe.backends.message_queue.base import (
    Batching,
    DeadLetter,
    Delivery,
    Disposition,
    Envelope,
    GroupStats,
    Metadata,
    Outcomes,
    Settlement,
    Settling,
)
from abe.backends.message_queue.base.names import EVERYTHING
from abe.backends.message_queue.base.routing import group_full, group_missing, matches_any, unroutable
from abe.errors import AbeError, LeaseLostError
from abe.settings import QueueSettings
from sqlite_queue.database import Database

_NOBODY: Final = ""
"""The name under which messages are held while no group exists."""

_VERSION: Final = 1
"""Of what stands in the columns beside a body."""

_FIRST_PAUSE: Final = 0.005
_LONGEST_PAUSE: Final = 0.05
_PAGE: Final = 100
_PAGE_BYTES: Final = 4 << 20
_MOVED: Final = "space, name, id, key, body, published_at, headers"


class SqliteTransport:
    """All the queues of a namespace in a file."""

    batching = Batching(messages=500, bytes=1 << 20, max_concurrent=1)
    settling = Settling()

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

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        """Store a copy of each message for each group that wants it."""
        return await self._database.run(lambda db: self._store(db, envelopes))

    def _store(self, db: sqlite3.Connection, envelopes: Sequence[Envelope]) -> Outcomes:
        groups, now = self._groups(db), time.time()
        room = {group: self._room(db, group) for group in groups} if self._max_backlog is not None else {}
        outcomes: list[AbeError | None] = []
        for envelope in envelopes:
            wanted = [group for group, patterns in groups.items() if _wants(group, patterns, envelope)]
            if not wanted and (groups or envelope.group is not None):
                outcomes.append(unroutable(envelope))
            elif any(room.get(group, 1) < 1 for group in wanted):
                outcomes.append(group_full())
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

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Make the group exist, with what was parked for the first one that wants it."""
        return await self._database.run(lambda db: _declare(db, self._space, group, patterns, change=change))

    async def delete_group(self, group: str) -> None:
        """Remove the group and all that is its own."""

        def delete(db: sqlite3.Connection) -> None:
            for table in ("groups", "messages", "dead"):
                db.execute(f"DELETE FROM {table} WHERE space = ? AND name = ?", (self._space, group))

        await self._database.run(delete)

    async def delete_namespace(self) -> None:
        """Remove every row of the namespace."""

        def delete(db: sqlite3.Connection) -> None:
            for table in ("groups", "messages", "dead", "consumers"):
                db.execute(f"DELETE FROM {table} WHERE space = ?", (self._space,))

        await self._database.run(delete)

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Return each group's patterns."""
        return await self._database.run(self._groups, write=False)

    def _groups(self, db: sqlite3.Connection) -> dict[str, tuple[str, ...]]:
        rows = db.execute("SELECT name, patterns FROM groups WHERE space = ?", (self._space,))
        return {row["name"]: tuple(json.loads(row["patterns"])) for row in rows}

    async def subscribe(self, group: str, prefetch: int) -> "SqliteReceiver":
        """Join the group under a name that nobody had before."""
        await self._database.run(lambda db: self._existing(db, group), write=False)
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

        def count(db: sqlite3.Connection) -> sqlite3.Row:
            self._existing(db, group)
            row: sqlite3.Row = db.execute(query, values).fetchone()
            return row

        return GroupStats(**dict(await self._database.run(count, write=False)))

    async def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        """Read pages of the dead letters that are there now."""
        async for rows in self._pages(group, None):
            yield [_dead_letter(row) for row in rows]

    async def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Move dead letters back to the group, a page in each step."""

        def move(db: sqlite3.Connection, serials: Sequence[tuple[int]]) -> int:
            now = time.time()
            copy = f"INSERT INTO messages ({_MOVED}, due, since) SELECT {_MOVED}, ?, ? FROM dead WHERE serial = ?"
            db.executemany(copy, [(now, now, *serial) for serial in serials])
            return db.executemany("DELETE FROM dead WHERE serial = ?", serials).rowcount

        async for rows in self._pages(group, ids):
            serials = [(row["serial"],) for row in rows]
            yield await self._database.run(lambda db, chosen=serials: move(db, chosen))

    async def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Remove dead letters for good, a page in each step."""
        async for rows in self._pages(group, ids):
            serials = [(row["serial"],) for row in rows]
            yield await self._database.run(
                lambda db, chosen=serials: db.executemany("DELETE FROM dead WHERE serial = ?", chosen).rowcount
            )

    async def _pages(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[Sequence[sqlite3.Row]]:
        """Go through the dead letters that are there now, those with these ids: as many at a time as memory should hold."""
        query = """SELECT * FROM (SELECT *, sum(length(body)) OVER (ORDER BY serial) AS size, row_number() OVER (ORDER BY serial) AS number
            FROM (SELECT * FROM dead WHERE space = ? AND name = ? AND serial > ? AND serial <= ? ORDER BY serial LIMIT ?))
            WHERE number = 1 OR size <= ? ORDER BY serial"""

        def newest(db: sqlite3.Connection) -> int:
            self._existing(db, group)
            last = "SELECT coalesce(max(serial), 0) FROM dead WHERE space = ? AND name = ?"
            serial: int = db.execute(last, (self._space, group)).fetchone()[0]
            return serial

        last, after = await self._database.run(newest, write=False), 0
        while after < last:
            values = (self._space, group, after, last, _PAGE, _PAGE_BYTES)
            rows = await self._database.run(lambda db, v=values: db.execute(query, v).fetchall(), write=False)
            if not rows:
                return
            after = rows[-1]["serial"]
            if chosen := [row for row in rows if ids is None or row["id"] in ids]:
                yield chosen

    def _existing(self, db: sqlite3.Connection, group: str) -> tuple[str, ...]:
        groups = self._groups(db)
        if group not in groups:
            raise group_missing(group)
        return groups[group]


class SqliteReceiver:
    """One consumer. It knows a delivery by the message's serial number and which of its deliveries this is."""

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
        if not db.execute("SELECT 1 FROM groups WHERE space = ? AND name = ?", (self._space, self._group)).fetchone():
            raise group_missing(self._group)
        return bool(self._free(db, "serial", 1))

    def _free(self, db: sqlite3.Connection, columns: str, limit: int) -> list[sqlite3.Row]:
        # Not what we hold ourselves: a lease that ran out while nobody else took the message is about to be renewed.
        query = f"""SELECT {columns} FROM messages WHERE space = :space AND name = :name AND due <= :now
            AND coalesce(deadline, 0) <= :now AND consumer IS NOT :me ORDER BY serial LIMIT :limit"""
        values = {"space": self._space, "name": self._group, "now": time.time(), "me": self._consumer, "limit": limit}
        return db.execute(query, values).fetchall()

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

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        """Remove messages that are done, where they are still ours."""
        return await self._database.run(lambda db: [_outcome(self._remove(db, each)) for each in deliveries])

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        """Carry out settlements, where the messages are still ours."""
        return await self._database.run(lambda db: [_outcome(self._settle(db, each)) for each in settlements])

    def _settle(self, db: sqlite3.Connection, item: Settlement) -> bool:
        if item.disposition is Disposition.DEAD:
            insert = f"""INSERT INTO dead ({_MOVED}, attempts, reason, error, dead_at)
                SELECT space, name, coalesce(id, 'sqlite-' || serial), key, body, published_at, headers, attempts, ?, ?, ?
                FROM messages WHERE serial = ? AND delivery = ? AND consumer = ?"""
            db.execute(insert, (item.reason, item.error, time.time(), *self._ours(item.delivery)))
            return self._remove(db, item.delivery)
        update = """UPDATE messages SET consumer = NULL, deadline = NULL, due = ?, attempts = attempts - ?
            WHERE serial = ? AND delivery = ? AND consumer = ?"""
        released = item.disposition is Disposition.RELEASE
        return db.execute(update, (time.time() + item.delay, released, *self._ours(item.delivery))).rowcount == 1

    def _remove(self, db: sqlite3.Connection, delivery: Delivery) -> bool:
        delete = "DELETE FROM messages WHERE serial = ? AND delivery = ? AND consumer = ?"
        return db.execute(delete, self._ours(delivery)).rowcount == 1

    def _ours(self, delivery: Delivery) -> tuple[int, int, str]:
        return *delivery.native, self._consumer

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Start leases anew, and return those that are lost."""

        def extend(db: sqlite3.Connection) -> list[Delivery]:
            self.sign_in(db)
            update = "UPDATE messages SET deadline = ? WHERE serial = ? AND delivery = ? AND consumer = ?"
            deadline = time.time() + self._lease
            return [each for each in deliveries if db.execute(update, (deadline, *self._ours(each))).rowcount == 0]

        return await self._database.run(extend)

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Give back what a failed `receive` may have taken."""
        serials = {delivery.native[0] for delivery in deliveries}
        await self._database.run(lambda db: self._give_back(db, keep=serials))
        return await self.renew(deliveries)

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
    return Delivery(row["body"], row, row["attempts"] + 1, (row["serial"], row["delivery"] + 1), fault=fault)


def _wants(group: str, patterns: Sequence[str], envelope: Envelope) -> bool:
    if envelope.group is not None:
        return envelope.group == group
    return matches_any(patterns, envelope.key)


def _declare(
    db: sqlite3.Connection, space: str, group: str, patterns: tuple[str, ...] | None, *, change: bool
) -> tuple[str, ...]:
    made = db.execute(
        "INSERT OR IGNORE INTO groups (space, name, patterns) VALUES (?, ?, ?)",
        (space, group, json.dumps(patterns or EVERYTHING)),
    ).rowcount
    if patterns is not None and change:
        db.execute("UPDATE groups SET patterns = ? WHERE space = ? AND name = ?", (json.dumps(patterns), space, group))
    stored = db.execute("SELECT patterns FROM groups WHERE space = ? AND name = ?", (space, group)).fetchone()
    wanted = tuple(json.loads(stored["patterns"]))
    if not made and not change:
        return wanted
    held = db.execute("SELECT serial, key FROM messages WHERE space = ? AND name = ?", (space, _NOBODY)).fetchall()
    mine = [(group, row["serial"]) for row in held if matches_any(wanted, row["key"])]
    db.executemany("UPDATE messages SET name = ? WHERE serial = ?", mine)
    return wanted


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


def _outcome(done: bool) -> AbeError | None:
    return None if done else LeaseLostError("somebody else has the message, or will get it")
