"""The transport of a provider that has a store, and its receivers."""

import math
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from abe.backends.message_queue.base.capabilities import Capabilities, Durability
from abe.backends.message_queue.base.envelope import Header, HeaderDecoder, dead_letter, encode_header, metadata_of
from abe.backends.message_queue.base.groups import DeadLetter, GroupStats
from abe.backends.message_queue.base.names import EVERYTHING
from abe.backends.message_queue.base.polling import PollingReceiver, Taken
from abe.backends.message_queue.base.routing import fan_out, group_missing, lease_lost
from abe.backends.message_queue.base.transport import (
    Batching,
    Delivery,
    Disposition,
    Envelope,
    Metadata,
    Outcomes,
    Receiver,
    Receiving,
    Settlement,
    Settling,
    Transport,
)
from abe.backends.message_queue.stored.store import Change, Claim, Copy, Groups, Row, Span, Store
from abe.errors import DecodeError
from abe.settings import QueueSettings

_decode: Final = HeaderDecoder(Header)
_PAGE_BYTES: Final = 4 << 20


def store_capabilities(
    *,
    lease: float,
    redelivery_bound: float,
    silence_bound: float | None,
    max_payload_bytes: int,
    durability: Durability,
) -> Capabilities:
    """Return the capabilities of a backend with a `StoreTransport` whose store fulfils the contract of `Store`.

    Args:
        lease: Seconds, by default; see `Capabilities`, also for the others, which depend on the store.
        redelivery_bound: Seconds. More than the transport's interval.
        silence_bound: Seconds. None where there is no connection.
        max_payload_bytes: Bytes.
        durability: What a stored message survives.
    """
    return Capabilities(
        groups=True,
        key_patterns=True,
        ordered=True,
        ordered_per_key=False,
        spurious_duplicates=False,
        dead_letter=True,
        max_delay=math.inf,
        lease=lease,
        redelivery_bound=redelivery_bound,
        silence_bound=silence_bound,
        publish_dedup=None,
        max_payload_bytes=max_payload_bytes,
        durability=durability,
    )


class StoreTransport:
    """The transport of a provider that has a `Store`.

    Args:
        store: The messages of the settings' namespace.
        settings: The backend's settings.
        interval: Seconds after which consumers see, at the latest, what other processes stored, delayed or gave back; see
            `PollingReceiver`. A store that is notified of that calls `ring`.
    """

    batching: Batching = Batching(messages=500, bytes=1 << 20, max_concurrent=1)
    receiving: Receiving = Receiving()
    settling: Settling = Settling()

    def __init__(self, store: Store, settings: QueueSettings, *, interval: float) -> None:
        self._store = store
        self._settings = settings
        self._interval = interval
        self._receivers: WeakSet[_StoreReceiver] = WeakSet()

    def ring(self, groups: Collection[str] | None = None) -> None:
        """Ring the receivers of these groups; None: of all groups. See `PollingReceiver.ring`."""
        for receiver in self._receivers:
            if groups is None or receiver.group in groups:
                receiver.ring()

    async def open(self) -> None:
        """See `Transport.open`."""
        await self._store.open()

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._store.close()

    async def ping(self) -> None:
        """See `Transport.ping`."""
        await self._store.open()

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        """See `Transport.send`."""
        most = self._settings.max_backlog
        outcomes: Outcomes = ()
        stored: set[str] = set()

        def choose(groups: Groups, waiting: Mapping[str, int]) -> Sequence[Copy]:
            nonlocal outcomes, stored
            room = None if most is None else {group: most - waiting.get(group, 0) for group in groups}
            outcomes, copies = fan_out(envelopes, groups, room)
            stored = {group for group, _ in copies}
            return [Copy(group, each.key, encode_header(each), each.body, each.delay) for group, each in copies]

        await self._store.put(choose, counted=most is not None)
        self.ring(stored)
        return outcomes

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """See `Transport.declare`."""
        declared = await self._store.declare(group, patterns or EVERYTHING, change=change and patterns is not None)
        self.ring({group})
        return declared

    async def delete_group(self, group: str) -> None:
        """See `Transport.delete_group`."""
        await self._store.delete(group)

    async def delete_namespace(self) -> None:
        """See `Transport.delete_namespace`."""
        await self._store.delete(None)

    async def groups(self) -> Groups:
        """See `Transport.groups`."""
        return await self._store.groups()

    async def subscribe(self, group: str, prefetch: int) -> "_StoreReceiver":
        """See `Transport.subscribe`."""
        await self._check(group)
        ring = partial(self.ring, {group})
        receiver = _StoreReceiver(self._store, group, self._settings.lease, self._interval, ring)
        self._receivers.add(receiver)
        return receiver

    async def stats(self, group: str) -> GroupStats:
        """See `Transport.stats`."""
        await self._check(group)
        return await self._store.count(group)

    async def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        """See `Transport.dead_letters`."""
        async with aclosing(self._pages(group)) as pages:
            async for rows in pages:
                yield [_dead_letter(row) for row in rows]

    async def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """See `Transport.replay`."""
        async with aclosing(self._pages(group)) as pages:
            async for rows in pages:
                moved = await self._store.revive(_serials(rows, ids))
                self.ring({group})
                yield moved

    async def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """See `Transport.purge`."""
        async with aclosing(self._pages(group)) as pages:
            async for rows in pages:
                yield await self._store.purge(_serials(rows, ids))

    async def _pages(self, group: str) -> AsyncGenerator[Sequence[Row]]:
        """Yield what is dead when the first page is read: a message that is replayed and becomes dead again has a later `dead_at`."""
        await self._check(group)
        rows, began = await self._store.dead(group, Span(), _PAGE_BYTES)
        while rows:
            yield rows
            rows, _ = await self._store.dead(group, Span(rows[-1].dead_at, rows[-1].serial, began), _PAGE_BYTES)

    async def _check(self, group: str) -> None:
        if group not in await self._store.groups():
            raise group_missing(group)


class _StoreReceiver(PollingReceiver):
    def __init__(self, store: Store, group: str, lease: float, interval: float, ring_all: Callable[[], object]) -> None:
        super().__init__(interval)
        self._ring_all = ring_all
        self.group = group
        self._store = store
        self._lease = lease

    async def take(self, limit: int) -> Taken:
        rows, due_in = await self._store.take(self.group, self.consumer, limit, self._lease)
        return Taken([self._delivery(row) for row in rows], due_in)

    def metadata(self, delivery: Delivery) -> Metadata:
        assert isinstance(delivery.header, Metadata)  # of `_delivery`
        return delivery.header

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        # A claim holds for this one delivery: `verify` needs no more.
        return _outcomes(await self._store.remove([delivery.native for delivery in deliveries]))

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        done = await self._store.settle([_change(settlement) for settlement in settlements])
        self._ring_all()  # a message may be waiting now, or be due earlier
        return _outcomes(done)

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        held = await self._store.renew([delivery.native for delivery in deliveries], self._lease)
        return [delivery for delivery, ours in zip(deliveries, held, strict=True) if not ours]

    async def give_back(self, keep: Collection[Delivery]) -> None:
        await self._store.give_back(self.consumer, [delivery.native.serial for delivery in keep])
        self._ring_all()

    def _delivery(self, row: Row) -> Delivery:
        metadata, fault = _read(row)
        return Delivery(row.body, metadata, row.attempts, Claim(row.serial, row.delivery, self.consumer), fault=fault)


def _change(settlement: Settlement) -> Change:
    disposition = settlement.disposition
    claim: Claim = settlement.delivery.native
    return Change(
        *claim,
        delay=settlement.delay,
        uncounted=int(disposition is Disposition.RELEASE),
        dead=disposition is Disposition.DEAD,
        reason=settlement.reason,
        error=settlement.error,
    )


def _outcomes(done: Sequence[bool]) -> Outcomes:
    return [None if each else lease_lost() for each in done]


def _read(row: Row) -> tuple[Metadata, str | None]:
    """Return a row's metadata, and why it cannot be read (None: it can)."""
    fault: str | None = None
    if row.header:
        try:
            return metadata_of(_decode(row.header)), None
        except DecodeError as exc:
            fault = str(exc)
    return Metadata(str(row.serial), row.key), fault


def _dead_letter(row: Row) -> DeadLetter:
    metadata, _ = _read(row)
    return dead_letter(
        metadata, row.body, attempts=row.attempts, reason=row.reason, error=row.error, dead_at=row.dead_at
    )


def _serials(rows: Sequence[Row], ids: Collection[str] | None) -> Sequence[int]:
    return [row.serial for row in rows if ids is None or _read(row)[0].id in ids]


if TYPE_CHECKING:
    _: type[Transport] = StoreTransport
    __: type[Receiver] = _StoreReceiver
