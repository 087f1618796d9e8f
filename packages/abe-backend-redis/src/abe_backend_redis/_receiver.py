"""Redis's receiver: one consumer of one group."""

import asyncio
import os
import socket
import uuid
from collections.abc import Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Final, cast

from abe.backends.message_queue.base import Delivery, Disposition, Metadata, Outcomes, Settlement
from abe.backends.message_queue.base import Receiver as ReceiverProtocol
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.routing import lease_lost
from abe.backends.message_queue.base.tasks import ignore_failure
from abe.errors import AbeError, GroupMissingError, LeaseLostError
from abe_backend_redis import _wire
from abe_backend_redis._broker import Broker
from abe_backend_redis._connection import REPLY_TIMEOUT, Link
from abe_backend_redis._errors import ReplyError, code, is_refused, translate, translated
from abe_backend_redis._protocol import Wire
from abe_backend_redis._scripts import SCRIPTS
from abe_backend_redis._topology import GROUP, RELEASED

_log: Final = Log("abe.redis")

TICK: Final = 0.5
"""Seconds between two ticks, which move due messages and claim abandoned ones. No read blocks for longer."""

_UNBLOCK_EVERY: Final = 0.02
_STOPPED: Final = 2 * TICK
"""Seconds after which a read that does not end means that the connection is lost."""

_PAGE: Final = 500
"""Ids per call, which keeps a call to Redis short."""


class RedisReceiver:
    """Reads a group's stream on its own connection, as a new consumer.

    Args:
        broker: Runs the scripts, and has the connection for everything but reading.
        group: The group.
        lease: The lease, in seconds.
    """

    def __init__(self, broker: Broker, group: str, lease: float) -> None:
        self._broker = broker
        self._group = group
        names = broker.topology
        self._stream, self._delayed, self._dead = names.queue(group), names.delayed(group), names.dead(group)
        self._alive = names.alive(group)
        self._lease = max(1, int(lease * 1000))
        # The lease is part of the name, so that other consumers claim by this consumer's lease, not by their own.
        self._consumer = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}@{self._lease}".encode()
        self._register_every = lease / 3
        self._loop = asyncio.get_running_loop()
        self._link = Link(broker.settings, f"abe-read-{group}", TICK + REPLY_TIMEOUT, self._prepare)
        self._client = 0
        self._wire: Wire | None = None
        self._read_until = 0.0
        self._next_tick = 0.0
        self._claims_own_from = 0.0
        self._next_registration = 0.0
        self._unregistered: Sequence[bytes] = ()
        self._stopping = False

    async def join(self) -> None:
        """Register as a consumer of the group.

        Raises:
            GroupMissingError: The group does not exist, or was deleted underneath.
        """
        keys = [self._broker.topology.groups, self._stream, self._alive]
        try:
            await self._broker.run("join", keys, [self._group, self._consumer, self._lease])
        except AbeError as exc:
            if _is_deleted(exc):
                raise GroupMissingError(f"group {self._group!r} was deleted underneath its consumers") from exc
            raise

    async def receive(self, limit: int) -> Sequence[Delivery]:
        """Read new messages; before that, every `TICK`, move due ones and return abandoned ones."""
        if self._stopping:
            return ()
        wire = self._wire = await self._link.get()
        try:
            if self._loop.time() >= self._next_tick and (claimed := await self._tick(wire, limit)):
                return claimed
            entries = await self._read(wire, limit)
        except ReplyError as exc:
            if _is_missing(exc):
                raise GroupMissingError(f"group {self._group!r} was deleted underneath its consumers") from exc
            with translated(self._broker.settings.address):
                raise
        return [_wire.delivery(entry, fields) for entry, fields in entries]

    def metadata(self, delivery: Delivery) -> Metadata:
        """Parse the field ``m``."""
        header = delivery.header
        return _wire.unpack(header) if isinstance(header, bytes) else cast("Metadata", header)

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        """Delete and acknowledge, in that order: a tick cleans up an entry that is only deleted; one only acknowledged would stay."""
        if verify:
            return await self._settle([(delivery.native, "ack", 0, "", "") for delivery in deliveries])
        entries = [delivery.native for delivery in deliveries]
        wire = await self._broker.control()
        with translated(self._broker.settings.address):
            if self._broker.has_xackdel:
                try:
                    gone = await wire.call(b"XACKDEL", self._stream, GROUP, b"IDS", len(entries), *entries)
                except ReplyError as exc:
                    if not is_refused(exc):
                        raise
                    self._broker.has_xackdel = False
                    _log.info("redis at %s refuses XACKDEL: using XDEL and XACK", self._broker.settings.address)
                else:
                    return [lease_lost() if status < 0 else None for status in gone]
            calls = wire.call_many((b"XDEL", self._stream, *entries), (b"XACK", self._stream, GROUP, *entries))
            _, acked = await asyncio.gather(*calls)
            if (missing := len(entries) - acked) > 0:
                _log.warning(
                    "the leases of %d of %d acknowledged messages of group %r were lost",
                    missing,
                    len(entries),
                    self._group,
                )
        return ()

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        """Carry out settlements with one script."""
        outcomes = await self._settle(
            [
                (s.delivery.native, s.disposition.value, -int(-s.delay * 1000 // 1), s.reason, s.error)
                for s in settlements
            ]
        )
        if delays := [settlement.delay for settlement in settlements if settlement.delay]:
            self._next_tick = min(self._next_tick, self._loop.time() + min(delays))  # tick when the first is due
        return outcomes

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Reset the idle times of the deliveries that this consumer still has."""
        ours = {delivery.native: delivery for delivery in deliveries}
        lost: list[Delivery] = []
        entries = list(ours)
        self._expect_renewal()
        for start in range(0, len(entries), _PAGE):
            some = entries[start : start + _PAGE]
            keys, args = [self._stream, self._alive], [self._consumer, self._lease, *some]
            lost += [ours[entry] for entry in await self._run("renew", keys, args, some)]
        self._claims_own_from = 0.0
        return lost

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        """Give back deliveries of a lost reply, renew the others, and return the lost ones."""
        await self._end_reads()
        await self._link.get()
        self._next_tick = 0.0
        ours = {delivery.native: delivery for delivery in deliveries}
        lost = await self._give_back(ours)
        return [*(ours.pop(entry) for entry in lost), *await self.renew(ours.values())]

    async def stop(self) -> None:
        """End the waiting read with CLIENT UNBLOCK, as a cancelled read could still receive messages.

        If it does not end, the connection is lost; `close` gives its messages back by another connection.
        """
        self._stopping = True
        try:
            async with asyncio.timeout(_STOPPED):
                await self._end_reads()
        except (TimeoutError, AbeError):
            self._link.drop()
            self._broker.controlling.drop(silence=_STOPPED / 2)

    async def close(self) -> None:
        """Give back all deliveries, and unregister the consumer."""
        try:
            await self.stop()
        finally:
            await self._link.close()
        await self._give_back(())
        await self._run("unregister", [self._stream, self._alive], [self._consumer], ())

    async def _prepare(self, wire: Wire) -> None:
        try:
            self._client = await wire.call(b"CLIENT", b"ID")
        except ReplyError as exc:
            self._client = 0
            _log.debug("reads cannot be ended early, as CLIENT ID is refused: %s", exc)

    async def _end_reads(self) -> None:
        """End the read that waits, and have Redis carry out all that was sent on the reading connection, also by cancelled calls.

        Where that connection is lost, Redis may not know it: the read that waits there takes messages until its time is over.

        The script is a gate: while clients are paused, as in a failover, Redis holds it back, and with it the CLIENT UNBLOCK behind it.
        Some servers crash when a paused client is unblocked (7.0.15 does). A plain write is no gate: a demoted server refuses it at once.
        """
        if (wire := self._wire) is None:
            return
        if not wire.alive:
            await asyncio.sleep(max(0.0, self._read_until - self._loop.time()))
            return
        control = await self._broker.control()
        last = wire.call(b"PING")
        last.add_done_callback(ignore_failure)
        while not last.done():
            names = self._broker.topology
            gate = b"EVALSHA", SCRIPTS["registry"].sha, 2, names.version, names.groups
            passed, unblocked = control.call_many(gate, (b"CLIENT", b"UNBLOCK", self._client))
            passed.add_done_callback(ignore_failure)
            try:
                await unblocked
            except ReplyError as exc:
                _log.debug("the read cannot be ended early, waiting for its timeout: %s", exc)
                await asyncio.wait([last])
            else:
                await asyncio.wait([last], timeout=_UNBLOCK_EVERY)

    async def _give_back(self, known: Collection[bytes]) -> Collection[bytes]:
        """Release this consumer's pending entries that are not in `known`; return the known ones that are no longer pending."""
        lost, start = set(known), b"-"
        while start:
            page = await self._pending(start)
            ours = [entry for entry, *_ in page]
            if unknown := [entry for entry in ours if entry not in known]:
                release = Disposition.RELEASE.value
                for error in await self._settle([(entry, release, 0, "", "") for entry in unknown]):
                    if error is not None and not isinstance(error, LeaseLostError):
                        raise error
            lost.difference_update(ours)
            start = b"(" + ours[-1] if len(ours) == _PAGE else b""
        return lost

    async def _pending(self, start: bytes) -> Sequence[tuple[bytes, bytes, int, int]]:
        wire = await self._broker.control()
        try:
            with translated(self._broker.settings.address):
                return await wire.call(  # type: ignore[no-any-return]
                    b"XPENDING", self._stream, GROUP, start, b"+", _PAGE, self._consumer
                )
        except AbeError as exc:
            if _is_deleted(exc):
                return ()
            raise

    async def _tick(self, wire: Wire, limit: int) -> Sequence[Delivery]:
        keys = [self._stream, self._delayed, self._dead, self._alive]
        claims_own = self._loop.time() >= self._claims_own_from
        args = [self._consumer, self._lease, limit, int(claims_own), *self._unregistered]
        entries, due, server_time, in_time = await self._broker.run("tick", keys, args, wire=wire)
        if not in_time:
            self._expect_renewal()
        pause = TICK if due < 0 else min(TICK, due / 1000)
        now = self._loop.time()
        self._next_tick = now + pause
        if now >= self._next_registration:
            self._next_registration = now + self._register_every
            await self._register_holders(wire, server_time)
        return [_wire.delivery(entry, fields, count) for entry, fields, count in entries]

    def _expect_renewal(self) -> None:
        """Leave our own entries alone for now: those in hand may have leases that have run out, and are about to be renewed."""
        self._claims_own_from = self._loop.time() + self._lease / 1000

    async def _register_holders(self, wire: Wire, server_time: int) -> None:
        """Register consumers with pending entries that could not register themselves: memory was full, or they are foreign."""
        _, _, _, holding = await wire.call(b"XPENDING", self._stream, GROUP)
        names = [name for name, _ in holding or () if name != RELEASED]
        self._unregistered = ()
        for start in range(0, len(names), _PAGE):
            scores = ((server_time, name) for name in names[start : start + _PAGE])
            try:
                await wire.call(b"ZADD", self._alive, b"NX", *chain.from_iterable(scores))
            except ReplyError as exc:
                if code(exc) != "OOM":
                    raise
                self._unregistered = names[:_PAGE]
                break

    async def _read(self, wire: Wire, limit: int) -> Sequence[tuple[bytes, list[bytes]]]:
        if self._stopping:  # since `receive` began
            return ()
        now = self._loop.time()
        block = max(1, int((self._next_tick - now) * 1000))
        self._read_until = now + block / 1000
        reply = await wire.call(
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
        return reply[0][1] if reply else ()

    async def _settle(self, settlements: Sequence[tuple[bytes, str, int, str, str]]) -> Outcomes:
        """Carry them out, in as many calls as the script needs."""
        outcomes: list[AbeError | None] = []
        while len(outcomes) < len(settlements):
            left = settlements[len(outcomes) :]
            try:
                outcomes += await self._settle_some(left)
            except AbeError as exc:
                if not outcomes:
                    raise
                outcomes += [exc] * len(left)
        return outcomes

    async def _settle_some(self, settlements: Sequence[tuple[bytes, str, int, str, str]]) -> Outcomes:
        """Return the outcomes of those that the script processed, the first ones."""
        keys = [self._stream, self._delayed, self._dead]
        args = [self._consumer, *chain.from_iterable(settlements)]
        try:
            processed, lost, failed = await self._broker.run("settle", keys, args)
        except AbeError as exc:
            if _is_deleted(exc):
                return [lease_lost()] * len(settlements)
            raise
        errors: dict[bytes, AbeError] = {entry: lease_lost() for entry in lost}
        for entry, text in zip(failed[::2], failed[1::2], strict=True):
            reply = ReplyError(text.decode(errors="replace"))
            errors[entry] = lease_lost() if code(reply) == "NOGROUP" else self._translated(reply)
        return [errors.get(entry) for entry, *_ in settlements[:processed]]

    def _translated(self, reply: ReplyError) -> AbeError:
        error = translate(reply, self._broker.settings.address)
        error.__cause__ = reply
        return error

    async def _run(
        self, script: str, keys: Sequence[bytes], args: Sequence[object], entries: Collection[bytes]
    ) -> Collection[bytes]:
        """Run a script that returns the lost entries: all, when the group was deleted."""
        try:
            return await self._broker.run(script, keys, args)  # type: ignore[no-any-return]
        except AbeError as exc:
            if _is_deleted(exc):
                return entries
            raise


def _is_missing(reply: ReplyError) -> bool:
    """Whether there is no group. (A server that becomes a replica also replies UNBLOCKED.)"""
    return code(reply) == "NOGROUP" or (code(reply) == "UNBLOCKED" and "no longer exists" in str(reply))


def _is_deleted(error: AbeError) -> bool:
    return isinstance(error.__cause__, ReplyError) and code(error.__cause__) == "NOGROUP"


if TYPE_CHECKING:
    _: type[ReceiverProtocol] = RedisReceiver
