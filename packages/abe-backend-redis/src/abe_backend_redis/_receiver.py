"""One consumer of one group."""

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Final, cast

from abe.backends.message_queue.base import Delivery, Failures, Metadata, Receipt, Settlement, Verb
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.errors import AbeError, ConfigurationError, GroupMissingError, LeaseLostError
from abe_backend_redis import _wire
from abe_backend_redis._connection import REPLY_TIMEOUT, Link
from abe_backend_redis._errors import ReplyError, code, is_refused, translate, translated
from abe_backend_redis._protocol import Reply, Wire
from abe_backend_redis._topology import GROUP, RELEASED

if TYPE_CHECKING:
    from abe_backend_redis._transport import RedisTransport

_log: Final = logging.getLogger("abe.redis")

TICK: Final = 0.5
"""Seconds between looks at what became due elsewhere, and at what others left behind. No read blocks for longer."""

_UNBLOCK_EVERY: Final = 0.02
_STOPPED: Final = 2 * TICK
"""Seconds after which a read that was to end means that the connection is dead."""

_PAGE: Final = 500
"""Ids a call: what keeps one call to Redis short."""


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
        self._lease = max(1, int(lease * 1000))
        # The lease is in the name, so that whoever claims goes by this consumer's lease, not by its own.
        self._consumer = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}@{self._lease}".encode()
        self._adopt_every = lease / 3
        self._loop = asyncio.get_running_loop()
        self._link = Link(transport.settings, f"abe-read-{group}", TICK + REPLY_TIMEOUT, self._prepare)
        self._client = 0
        self._reading: asyncio.Future[Reply] | None = None
        self._next_tick = 0.0
        self._next_adoption = 0.0
        self._on_record: set[bytes] = set()
        self._off_record: Sequence[bytes] = ()
        self._carried_out: set[Receipt] = set()
        self._stopping = False

    async def join(self) -> None:
        """Become one of the group's consumers.

        Raises:
            GroupMissingError: There is no such group, or it was deleted underneath.
        """
        keys = [self._transport.topology.groups, self._stream, self._alive]
        try:
            await self._transport.run("join", keys, [self._group, self._consumer, self._lease])
        except AbeError as exc:
            if _is_deleted(exc):
                raise GroupMissingError(f"group {self._group!r} was deleted underneath its consumers") from exc
            raise

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
        return _wire.unpack(header) if isinstance(header, bytes) else cast("Metadata", header)

    async def ack(self, receipts: Sequence[Receipt], *, verify: bool) -> Failures:
        """Delete and acknowledge. That order: an entry that is only deleted heals by itself, one only acknowledged would stay."""
        if verify:
            return await self._settle([(receipt, "ack", 0, "", "") for receipt in receipts])
        wire = await self._transport.control()
        with translated(self._transport.settings.address):
            if self._transport.has_xackdel:
                try:
                    gone = await wire.call(b"XACKDEL", self._stream, GROUP, b"IDS", len(receipts), *receipts)
                except ReplyError as exc:
                    if not is_refused(exc):
                        raise
                    self._transport.has_xackdel = False
                    _log.info("redis at %s refuses XACKDEL: XDEL and XACK do it", self._transport.settings.address)
                else:
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
        for start in range(0, len(ids), _PAGE):
            some = ids[start : start + _PAGE]
            lost += await self._run("renew", [self._stream, self._alive], [self._consumer, self._lease, *some], some)
        return lost

    async def recover(self, receipts: Collection[Receipt]) -> Collection[Receipt]:
        """Give back what a lost reply brought, and learn what was lost meanwhile."""
        await self._link.get()
        self._next_tick = 0.0
        return await self._give_back(receipts)

    async def stop(self) -> None:
        """End the read that waits: Redis is asked to, as a cancelled read could still be given messages.

        One that does not end has no connection any more; what it was given is given back with the rest, by a connection that answers.
        """
        self._stopping = True
        try:
            async with asyncio.timeout(_STOPPED):
                await self._end_read()
        except (TimeoutError, AbeError):
            self._link.drop()
            self._transport.drop(silence=_STOPPED / 2)

    async def close(self) -> None:
        """Give back everything, and be forgotten."""
        await self._link.close()
        await self._give_back(())
        await self._run("leave", [self._stream, self._alive], [self._consumer], ())

    async def _prepare(self, wire: Wire) -> None:
        try:
            self._client = await wire.call(b"CLIENT", b"ID")
        except ReplyError as exc:
            self._client = 0
            _log.debug("a read will not be ended early, as its connection's id is not told: %s", exc)

    async def _end_read(self) -> None:
        wire = await self._transport.control()
        while self._reading is not None and not self._reading.done():
            try:
                await wire.call(b"CLIENT", b"UNBLOCK", self._client)
            except ReplyError as exc:
                _log.debug("a read cannot be ended early, it ends by itself: %s", exc)
                await asyncio.wait([self._reading])
            else:
                await asyncio.wait([self._reading], timeout=_UNBLOCK_EVERY)

    async def _give_back(self, known: Collection[Receipt]) -> Collection[Receipt]:
        """Release what Redis counts as ours and we do not know of; return what we know of and is not ours."""
        lost, start = set(known), b"-"
        while start:
            page = await self._pending(start)
            ours = [entry for entry, *_ in page]
            if strange := [entry for entry in ours if entry not in known]:
                await self._settle([(entry, Verb.RELEASE.value, 0, "", "") for entry in strange])
            lost.difference_update(ours)
            start = b"(" + ours[-1] if len(ours) == _PAGE else b""
        return lost

    async def _pending(self, start: bytes) -> Sequence[tuple[bytes, bytes, int, int]]:
        wire = await self._transport.control()
        try:
            with translated(self._transport.settings.address):
                return await wire.call(  # type: ignore[no-any-return]
                    b"XPENDING", self._stream, GROUP, start, b"+", _PAGE, self._consumer
                )
        except AbeError as exc:
            if _is_deleted(exc):
                return ()
            raise

    async def _tick(self, wire: Wire, limit: int) -> Sequence[Delivery]:
        keys = [self._stream, self._delayed, self._dead, self._alive]
        # After a standstill leases have run out that are about to be renewed.
        late = self._loop.time() - self._next_tick > self._lease / 4_000
        args = [self._consumer, self._lease, limit, int(late), *self._off_record]
        entries, due, server_time = await self._transport.run("tick", keys, args, wire=wire)
        pause = TICK if due < 0 else min(TICK, due / 1000)
        now = self._loop.time()
        self._next_tick = now + pause
        if now >= self._next_adoption:
            self._next_adoption = now + self._adopt_every
            await self._adopt(wire, server_time)
        return [_wire.delivery(entry, fields, count) for entry, fields, count in entries]

    async def _adopt(self, wire: Wire, server_time: int) -> None:
        """Put consumers on record that hold messages and could not do so themselves: memory was full, or they are foreign."""
        _, _, _, holding = await wire.call(b"XPENDING", self._stream, GROUP)
        names = {name for name, _ in holding or ()} - {RELEASED}
        strange = [*(names - self._on_record)]
        self._on_record, self._off_record = names, ()
        for start in range(0, len(strange), _PAGE):
            scores = ((server_time, name) for name in strange[start : start + _PAGE])
            try:
                await wire.call(b"ZADD", self._alive, b"NX", *chain.from_iterable(scores))
            except ReplyError as exc:
                if code(exc) != "OOM":
                    raise
                self._on_record, self._off_record = set(), strange[:_PAGE]
                break

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
        """Carry out verdicts, some at a time.

        When some cannot be carried out now, or not at all, the error is raised after the others were; they are then not tried again.
        """
        failures: dict[Receipt, AbeError] = {}
        todo = [verdict for verdict in verdicts if verdict[0] not in self._carried_out]
        while todo:
            looked, failed = await self._settle_some(todo[:_PAGE])
            # Not what was released: it may be ours again, by the same receipt.
            self._carried_out.update(
                receipt for receipt, verb, *_ in todo[:looked] if receipt not in failed and verb != Verb.RELEASE.value
            )
            failures |= failed
            todo = todo[looked:]
        self._wake(verdicts)
        for error in failures.values():
            if error.retryable or isinstance(error, ConfigurationError):
                raise error
        self._carried_out.difference_update(verdict[0] for verdict in verdicts)
        return failures

    async def _settle_some(
        self, verdicts: Sequence[tuple[Receipt, str, int, str, str]]
    ) -> tuple[int, dict[Receipt, AbeError]]:
        """Return how many of them were looked at, and which of those were not carried out."""
        keys = [self._stream, self._delayed, self._dead]
        args = [self._consumer, *chain.from_iterable(verdicts)]
        try:
            looked, lost, failed = await self._transport.run("settle", keys, args)
        except AbeError as exc:
            if _is_deleted(exc):
                return len(verdicts), {verdict[0]: _lost() for verdict in verdicts}
            raise
        errors: dict[Receipt, AbeError] = {receipt: _lost() for receipt in lost}
        for receipt, text in zip(failed[::2], failed[1::2], strict=True):
            reply = ReplyError(text.decode(errors="replace"))
            errors[receipt] = _lost() if code(reply) == "NOGROUP" else self._translated(reply)
        return looked, errors

    def _wake(self, verdicts: Sequence[tuple[Receipt, str, int, str, str]]) -> None:
        """Look again when the first of those that were put off is due."""
        if delays := [delay for _, _, delay, _, _ in verdicts if delay]:
            self._next_tick = min(self._next_tick, self._loop.time() + min(delays) / 1000)

    def _translated(self, reply: ReplyError) -> AbeError:
        error = translate(reply, self._transport.settings.address)
        error.__cause__ = reply
        return error

    async def _run(
        self, script: str, keys: Sequence[bytes], args: Sequence[object], receipts: Collection[Receipt]
    ) -> Collection[Receipt]:
        """Run a script that returns those of the receipts that are lost: all, when the group was deleted."""
        try:
            return await self._transport.run(script, keys, args)  # type: ignore[no-any-return]
        except AbeError as exc:
            if _is_deleted(exc):
                return receipts
            raise


def _is_deleted(error: AbeError) -> bool:
    return isinstance(error.__cause__, ReplyError) and code(error.__cause__) == "NOGROUP"


def _lost() -> LeaseLostError:
    return LeaseLostError("the message is not ours any more: its lease had run out, or it was settled before")


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = RedisReceiver
