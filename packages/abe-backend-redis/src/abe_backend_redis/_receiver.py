"""One consumer of one group."""

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import Delivery, Failures, Metadata, Receipt, Settlement
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.errors import AbeError, LeaseLostError
from abe_backend_redis import _wire
from abe_backend_redis._connection import Link, Reply, Wire
from abe_backend_redis._errors import ReplyError, code, translated
from abe_backend_redis._topology import GROUP

if TYPE_CHECKING:
    from abe_backend_redis._transport import RedisTransport

_log: Final = logging.getLogger("abe.redis")

TICK: Final = 0.5
"""Seconds between looks at what became due elsewhere, and at what others left behind. No read blocks for longer."""

_READ_PATIENCE: Final = TICK + 5.0
"""Seconds after which a read that should have returned means that the connection is dead."""

_UNBLOCK_EVERY: Final = 0.02


class RedisReceiver:
    """Reads a group's stream on a connection of its own, as a consumer that never existed before.

    Args:
        transport: Runs the scripts and holds the connection for everything but reading.
        group: The group.
        lease: Seconds.
    """

    def __init__(self, transport: "RedisTransport", group: str, lease: float) -> None:
        self._transport = transport
        self._group = group
        names = transport.topology
        self._stream, self._delayed, self._dead = names.queue(group), names.delayed(group), names.dead(group)
        self._alive = names.alive(group)
        self._consumer = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}".encode()
        self._lease = b"%d" % (lease * 1000)
        self._forgotten = b"%d" % (2 * lease * 1000)
        self._beat_every = lease / 3
        self._loop = asyncio.get_running_loop()
        self._link = Link(transport.settings, f"abe-read-{group}", _READ_PATIENCE, self._prepare)
        self._client = 0
        self._reading: asyncio.Future[Reply] | None = None
        self._next_tick = 0.0
        self._next_beat = 0.0
        self._stopping = False

    async def beat(self, wire: Wire | None = None) -> None:
        """Say that this consumer lives, and forget those that do not."""
        self._next_beat = self._loop.time() + self._beat_every
        await self._transport.run("beat", [self._stream, self._alive], [self._consumer, self._forgotten], wire=wire)

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Read what is new; before that, now and then, what became due and what others left behind."""
        if self._stopping:
            return ()
        wire = await self._link.get()
        try:
            if self._loop.time() >= self._next_tick:
                left_behind = await self._tick(wire, limit)
                if left_behind or self._stopping:
                    return left_behind
            entries = await self._read(wire, limit)
        except ReplyError as exc:
            if code(exc) not in ("NOGROUP", "UNBLOCKED"):
                with translated(self._transport.settings.address):
                    raise
            _log.warning("group %r was deleted underneath its consumers: it is made again", self._group)
            await self._transport.restore(self._group)
            return ()
        return [_wire.delivery(entry, fields) for entry, fields in entries]

    def metadata(self, delivery: Delivery) -> Metadata:
        """Parse the field ``m``."""
        header = delivery.header
        assert isinstance(header, bytes)
        return _wire.unpack(header)

    async def ack(self, receipts: Sequence[Receipt], *, verify: bool) -> Failures:
        """Delete and acknowledge. That order: an entry that is only deleted heals by itself, one only acknowledged would stay."""
        if verify:
            return await self._settle([(receipt, "ack", 0, "", "") for receipt in receipts])
        wire = await self._transport.control()
        with translated(self._transport.settings.address):
            if self._transport.has_xackdel:
                gone = await wire.call(b"XACKDEL", self._stream, GROUP, b"IDS", len(receipts), *receipts)
                return {receipt: _lost() for receipt, status in zip(receipts, gone, strict=True) if status < 0}
            calls = wire.call_many((b"XDEL", self._stream, *receipts), (b"XACK", self._stream, GROUP, *receipts))
            _, acked = await asyncio.gather(*calls)
            if (missing := len(receipts) - acked) > 0:
                _log.warning(
                    "%d of %d acknowledged messages of group %r were not ours any more",
                    missing,
                    len(receipts),
                    self._group,
                )
        return {}

    async def settle(self, settlements: Sequence[Settlement]) -> Failures:
        """Carry out verdicts."""
        return await self._settle(
            [(s.receipt, s.verb.value, -int(-s.delay * 1000 // 1), s.reason, s.error) for s in settlements]
        )

    async def renew(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Reset the idle times of those that are still ours."""
        lost: list[Receipt] = []
        ids = list(receipts)
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            lost += await self._run("renew", [self._stream], [self._consumer, *some], some)
        return lost

    async def recover(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Give back what a lost reply brought, and learn what was lost meanwhile."""
        await self._link.get()
        self._next_tick = 0.0
        return await self._leave(receipts, for_good=False)

    async def stop(self) -> None:
        """End the read that waits: Redis is asked to, as a cancelled read could still be given messages."""
        self._stopping = True
        wire = await self._transport.control()
        while self._reading is not None and not self._reading.done():
            try:
                await wire.call(b"CLIENT", b"UNBLOCK", self._client)
            except ReplyError as exc:
                _log.debug("a read cannot be ended early, it ends by itself: %s", exc)
                await asyncio.wait([self._reading])
            else:
                await asyncio.wait([self._reading], timeout=_UNBLOCK_EVERY)

    async def close(self) -> None:
        """Give back everything, and be forgotten."""
        try:
            await self._leave((), for_good=True)
        finally:
            await self._link.close()

    async def _prepare(self, wire: Wire) -> None:
        self._client = await wire.call(b"CLIENT", b"ID")

    async def _tick(self, wire: Wire, limit: int) -> Sequence[Delivery]:
        args = [self._consumer, self._lease, limit]
        entries, due = await self._transport.run("tick", [self._stream, self._delayed], args, wire=wire)
        pause = TICK if due < 0 else min(TICK, due / 1000)
        now = self._loop.time()
        self._next_tick = now if len(entries) == limit else now + pause
        if now >= self._next_beat:
            await self.beat(wire)
        return [_wire.delivery(entry, fields, count) for entry, fields, count in entries]

    async def _read(self, wire: Wire, limit: int) -> Sequence[tuple[bytes, list[bytes]]]:
        block = max(1, int((self._next_tick - self._loop.time()) * 1000))
        self._reading = wire.call(
            b"XREADGROUP",
            b"GROUP",
            GROUP,
            self._consumer,
            b"COUNT",
            limit,
            b"BLOCK",
            block,
            b"STREAMS",
            self._stream,
            b">",
        )
        reply = await self._reading
        return reply[0][1] if reply else ()

    async def _settle(self, verdicts: Sequence[tuple[Receipt, str, int, str, str]]) -> Failures:
        args: list[object] = [self._consumer]
        for verdict in verdicts:
            args += verdict
        receipts = [verdict[0] for verdict in verdicts]
        lost = await self._run("settle", [self._stream, self._delayed, self._dead], args, receipts)
        if any(delay for _, _, delay, _, _ in verdicts):
            self._next_tick = min(
                self._next_tick, self._loop.time() + min(delay for _, _, delay, _, _ in verdicts if delay) / 1000
            )
        return {receipt: _lost() for receipt in lost}

    async def _leave(self, receipts: Collection[Receipt], *, for_good: bool) -> Collection[Receipt]:
        keys = [self._stream, self._alive]
        return await self._run("recover", keys, [self._consumer, int(for_good), *receipts], receipts)

    async def _run(
        self, script: str, keys: Sequence[bytes], args: Sequence[object], receipts: Collection[Receipt]
    ) -> Collection[Receipt]:
        """Run a script that returns those of the receipts that are lost: all, when the group was deleted."""
        try:
            return await self._transport.run(script, keys, args)  # type: ignore[no-any-return]
        except AbeError as exc:
            if isinstance(exc.__cause__, ReplyError) and code(exc.__cause__) == "NOGROUP":
                return receipts
            raise


def _lost() -> LeaseLostError:
    return LeaseLostError("the message is not ours any more: its lease had run out, or it was settled before")


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = RedisReceiver
