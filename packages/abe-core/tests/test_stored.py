"""The transport over a store: what it makes of envelopes, rows and settlements, and what a cancellation leaves behind at each wait."""

import asyncio
import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pytest

from abe.backends.message_queue.base import Delivery, Disposition, Durability, Envelope, GroupStats, Settlement
from abe.backends.message_queue.base.envelope import UNKNOWN_VERSION, encode_header
from abe.backends.message_queue.stored import (
    Change,
    Choose,
    Claim,
    Copy,
    Row,
    Span,
    Store,
    StoreTransport,
    store_capabilities,
)
from abe.errors import BackendConnectionError, GroupMissingError, LeaseLostError
from abe.settings import QueueSettings
from abe_contract_tests.bounds import within

STATS = GroupStats(waiting=1, in_flight=2, delayed=3, dead=4, oldest=5.0)
SENT = Envelope("id", "order.created", b"body", 1_500, {"tenant": "acme"})


class Stored(Store):
    """A store that remembers what it was asked for, and answers what the test has set."""

    def __init__(self, **patterns: tuple[str, ...]) -> None:
        self.patterns = patterns
        self.waiting: dict[str, int] = {}
        self.copies: list[Copy] = []
        self.rows: list[Row] = []
        self.due_in: float | None = None
        self.pages: list[list[Row]] = []
        self.holds = True
        self.calls: list[tuple[Any, ...]] = []
        self.answers = asyncio.Event()
        self.answers.set()
        self.error: Exception | None = None

    async def _asked(self, *call: Any) -> None:
        self.calls.append(call)
        await self.answers.wait()
        if self.error is not None:
            raise self.error

    async def open(self) -> None:
        await self._asked("open")

    async def close(self) -> None:
        await self._asked("close")

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        await self._asked("groups")
        return self.patterns

    async def put(self, choose: Choose, *, counted: bool) -> None:
        await self._asked("put", counted)
        self.copies += choose(self.patterns, self.waiting if counted else {})

    async def declare(self, group: str, patterns: tuple[str, ...], *, change: bool) -> tuple[str, ...]:
        await self._asked("declare", group, patterns, change)
        return patterns

    async def delete(self, group: str | None) -> None:
        await self._asked("delete", group)

    async def count(self, group: str) -> GroupStats:
        await self._asked("count", group)
        return STATS

    async def take(self, group: str, consumer: str, limit: int, lease: float) -> tuple[Sequence[Row], float | None]:
        await self._asked("take", group, consumer, limit, lease)
        rows, self.rows = self.rows, []
        return rows, self.due_in

    async def remove(self, claims: Sequence[Claim]) -> Sequence[bool]:
        await self._asked("remove", claims)
        return [self.holds] * len(claims)

    async def settle(self, changes: Sequence[Change]) -> Sequence[bool]:
        await self._asked("settle", changes)
        return [self.holds] * len(changes)

    async def renew(self, claims: Sequence[Claim], lease: float) -> Sequence[bool]:
        await self._asked("renew", claims, lease)
        return [self.holds] * len(claims)

    async def give_back(self, consumer: str, keep: Collection[int]) -> None:
        await self._asked("give_back", consumer, keep)

    async def dead(self, group: str, span: Span, size: int) -> tuple[Sequence[Row], float]:
        await self._asked("dead", group, span)
        return (self.pages.pop(0) if self.pages else []), 77.0

    async def revive(self, serials: Collection[int]) -> int:
        await self._asked("revive", serials)
        return len(serials)

    async def purge(self, serials: Collection[int]) -> int:
        await self._asked("purge", serials)
        return len(serials)


def transport(store: Store, **settings: Any) -> StoreTransport:
    return StoreTransport(store, QueueSettings(lease=9.0, **settings), interval=3600.0)


def row(serial: int, envelope: Envelope = SENT, **more: Any) -> Row:
    return Row(serial, envelope.key, encode_header(envelope), envelope.body, 1, 4, **more)


async def taken(store: Stored, *rows: Row) -> tuple[Any, Sequence[Delivery]]:
    """Return a receiver that has taken these, and its deliveries."""
    store.rows = list(rows)
    receiver = await transport(store).subscribe("g", 10)
    deliveries = await receiver.receive(10)
    store.calls.clear()
    return receiver, deliveries


async def asleep() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_message_is_stored_for_each_group_that_wants_it() -> None:
    store = Stored(a=("order.#",), b=("#",), c=("user",))
    assert await transport(store).send([Envelope("id", "order.created", b"body", 1_500, {"tenant": "acme"}, 2.5)]) == [
        None
    ]
    header = encode_header(SENT)
    assert store.copies == [Copy(group, "order.created", header, b"body", 2.5) for group in ("a", "b")]
    assert store.calls == [("put", False)]


async def test_a_backlog_is_counted_only_where_it_is_bounded() -> None:
    store = Stored(a=("#",), b=("#",))
    store.waiting = {"a": 4}
    outcomes = await transport(store, max_backlog=5).send([SENT, SENT])
    assert [type(outcome).__name__ for outcome in outcomes] == ["NoneType", "BackpressureError"]
    assert [copy.group for copy in store.copies] == ["a", "b"]
    assert store.calls == [("put", True)]


async def test_a_transaction_that_is_repeated_chooses_anew() -> None:
    class Repeating(Stored):
        async def put(self, choose: Choose, *, counted: bool) -> None:
            choose({"x": ("#",)}, {})
            await super().put(choose, counted=counted)

    store = Repeating(a=("user",))
    (outcome,) = await transport(store).send([SENT])
    assert type(outcome).__name__ == "UnroutableError"
    assert store.copies == []


async def test_consumers_of_the_groups_that_got_a_message_look_at_once() -> None:
    store = Stored(a=("order.#",), b=("user.#",))
    over = transport(store)
    receivers = {group: await over.subscribe(group, 1) for group in "ab"}
    waiting = {group: asyncio.create_task(receiver.receive(1)) for group, receiver in receivers.items()}
    await asleep()
    store.calls.clear()
    await over.send([SENT])
    await asleep()
    assert [call[:2] for call in store.calls] == [("put", False), ("take", "a")]
    over.ring()
    await asleep()
    assert [call[1] for call in store.calls[2:]] in (["a", "b"], ["b", "a"])
    for task in waiting.values():
        task.cancel()
    await asyncio.wait(waiting.values())


@pytest.mark.parametrize("patterns", [None, ("x",)])
@pytest.mark.parametrize("change", [False, True])
async def test_a_group_that_is_declared_without_patterns_keeps_those_that_it_has(
    patterns: tuple[str, ...] | None, change: bool
) -> None:
    store = Stored()
    declared = await transport(store).declare("g", patterns, change=change)
    assert declared == (patterns or ("#",))
    assert store.calls == [("declare", "g", declared, change and patterns is not None)]


async def test_what_is_asked_of_a_missing_group_says_so() -> None:
    over = transport(Stored(a=("#",)))
    for attempt in (over.subscribe("g", 1), over.stats("g"), anext(over.dead_letters("g"))):
        with pytest.raises(GroupMissingError):
            await attempt
    assert await over.stats("a") is STATS


async def test_groups_and_the_namespace_are_deleted() -> None:
    store = Stored()
    over = transport(store)
    await over.delete_group("g")
    await over.delete_namespace()
    assert store.calls == [("delete", "g"), ("delete", None)]


async def test_a_delivery_has_what_was_stored() -> None:
    receiver, (delivery,) = await taken(Stored(g=("#",)), row(7))
    assert (delivery.body, delivery.attempt, delivery.fault) == (b"body", 1, None)
    assert delivery.native == Claim(7, 4, receiver.consumer)
    assert receiver.metadata(delivery) == ("id", "order.created", 1_500, {"tenant": "acme"})


async def test_a_foreign_message_has_its_place_for_an_id() -> None:
    receiver, (delivery,) = await taken(Stored(g=("#",)), Row(7, "k", b"", b"{}", 2, 2))
    assert receiver.metadata(delivery) == ("7", "k", 0, None)
    assert delivery.fault is None


async def test_a_header_that_cannot_be_read_is_a_fault() -> None:
    headers = [b'[9,"i","k",0]', b"[1,2", b"\xff"]
    receiver, deliveries = await taken(Stored(g=("#",)), *(Row(1, "k", header, b"", 1, 1) for header in headers))
    assert deliveries[0].fault == UNKNOWN_VERSION
    assert all(delivery.fault for delivery in deliveries)
    assert [receiver.metadata(delivery).id for delivery in deliveries] == ["1"] * 3


async def test_a_receiver_takes_in_its_own_name_with_its_lease() -> None:
    store = Stored(g=("#",))
    store.rows = [row(1)]
    receiver = await transport(store).subscribe("g", 10)
    await receiver.receive(3)
    assert store.calls[-1] == ("take", "g", receiver.consumer, 3, 9.0)


@pytest.mark.parametrize(
    ("disposition", "uncounted", "dead"),
    [(Disposition.RETRY, 0, False), (Disposition.RELEASE, 1, False), (Disposition.DEAD, 0, True)],
)
async def test_a_settlement_says_what_becomes_of_the_row(disposition: Disposition, uncounted: int, dead: bool) -> None:
    store = Stored(g=("#",))
    receiver, (delivery,) = await taken(store, row(7))
    settlement = Settlement(delivery, disposition, delay=1.5, reason="why", error="trace")
    assert await receiver.settle([settlement]) == [None]
    ((_, (change,)),) = store.calls
    assert change == (7, 4, receiver.consumer, 1.5, uncounted, dead, "why", "trace")


async def test_what_a_claim_does_not_fit_is_lost() -> None:
    store = Stored(g=("#",))
    receiver, deliveries = await taken(store, row(1), row(2))
    assert await receiver.ack(deliveries, verify=False) == [None, None]
    assert await receiver.renew(deliveries) == []
    store.holds = False
    outcomes = [
        *await receiver.ack(deliveries, verify=True),
        *await receiver.settle([Settlement(delivery, Disposition.RETRY) for delivery in deliveries]),
    ]
    assert [type(outcome) for outcome in outcomes] == [LeaseLostError] * 4
    assert await receiver.renew(deliveries) == deliveries


async def test_recovering_keeps_what_is_held_and_closing_nothing() -> None:
    store = Stored(g=("#",))
    receiver, deliveries = await taken(store, row(1), row(2))
    await receiver.recover(deliveries)
    await receiver.close()
    claims = [Claim(serial, 4, receiver.consumer) for serial in (1, 2)]
    name = receiver.consumer
    assert store.calls == [("give_back", name, [1, 2]), ("renew", claims, 9.0), ("give_back", name, [])]


def dead(serial: int, died: float, id: str = "id") -> Row:
    message = Envelope(id, "order.created", b"body", 1_500, {"tenant": "acme"})
    return row(serial, message, dead_at=died, reason="why", error="trace")


async def test_dead_letters_are_read_page_by_page_up_to_the_time_of_the_first() -> None:
    store = Stored(g=("#",))
    store.pages = [[dead(5, 10.0), dead(3, 11.0)], [dead(9, 11.0)]]
    pages = [page async for page in transport(store).dead_letters("g")]
    assert [len(page) for page in pages] == [2, 1]
    spans = [call[2] for call in store.calls if call[0] == "dead"]
    assert spans == [Span(), Span(11.0, 3, 77.0), Span(11.0, 9, 77.0)]
    letter = pages[0][0]
    assert (letter.id, letter.key, letter.body, letter.headers) == ("id", "order.created", b"body", {"tenant": "acme"})
    assert (letter.attempts, letter.reason, letter.error) == (1, "why", "trace")
    assert (letter.published_at, letter.dead_at) == (1.5, 10.0)


@pytest.mark.parametrize("name", ["revive", "purge"])
@pytest.mark.parametrize(("ids", "chosen"), [(None, [[1, 2], [3]]), ({"b"}, [[2], []])])
async def test_dead_letters_with_these_ids_are_replayed_or_purged(
    name: str, ids: set[str] | None, chosen: list[list[int]]
) -> None:
    store = Stored(g=("#",))
    store.pages = [[dead(1, 1.0, "a"), dead(2, 1.0, "b")], [dead(3, 2.0, "c")]]
    over = transport(store)
    steps = over.replay("g", ids) if name == "revive" else over.purge("g", ids)
    assert [count async for count in steps] == [len(serials) for serials in chosen]
    assert [call[1] for call in store.calls if call[0] == name] == chosen


CALLS: dict[str, Callable[[StoreTransport, Any, Sequence[Delivery]], Any]] = {
    "open": lambda over, it, held: over.open(),
    "ping": lambda over, it, held: over.ping(),
    "close": lambda over, it, held: over.close(),
    "send": lambda over, it, held: over.send([SENT]),
    "declare": lambda over, it, held: over.declare("g", None, change=False),
    "delete_group": lambda over, it, held: over.delete_group("g"),
    "groups": lambda over, it, held: over.groups(),
    "subscribe": lambda over, it, held: over.subscribe("g", 1),
    "stats": lambda over, it, held: over.stats("g"),
    "dead_letters": lambda over, it, held: anext(over.dead_letters("g")),
    "replay": lambda over, it, held: anext(over.replay("g", None)),
    "purge": lambda over, it, held: anext(over.purge("g", None)),
    "receive": lambda over, it, held: it.receive(1),
    "ack": lambda over, it, held: it.ack(held, verify=True),
    "settle": lambda over, it, held: it.settle([Settlement(held[0], Disposition.RETRY)]),
    "renew": lambda over, it, held: it.renew(held),
    "recover": lambda over, it, held: it.recover(held),
    "leave": lambda over, it, held: it.close(),
}


async def made() -> tuple[Stored, StoreTransport, Any, Sequence[Delivery]]:
    store = Stored(g=("#",))
    over = transport(store)
    store.rows = [row(1)]
    receiver = await over.subscribe("g", 10)
    deliveries = await receiver.receive(1)
    store.rows, store.pages = [row(2)], [[dead(3, 1.0)]]
    store.calls.clear()
    return store, over, receiver, deliveries


@pytest.mark.parametrize("name", ["replay", "declare", "settle", "recover", "leave"])
async def test_consumers_look_at_once_when_something_can_be_taken_again(name: str) -> None:
    store, over, receiver, deliveries = await made()
    store.rows = []
    receiving = asyncio.create_task((await over.subscribe("g", 1)).receive(1))
    await asleep()
    store.rows = [row(2)]
    await CALLS[name](over, receiver, deliveries)
    async with within(5):
        assert [delivery.native.serial for delivery in await receiving] == [2]


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_cancelled_at_any_of_its_waits_leaves_a_transport_that_works(name: str) -> None:
    store, over, receiver, deliveries = await made()
    await CALLS[name](over, receiver, deliveries)
    waits = len(store.calls)
    assert waits
    for wait in range(waits):
        store, over, receiver, deliveries = await made()
        store.answers.clear()
        task = asyncio.ensure_future(CALLS[name](over, receiver, deliveries))
        for _ in range(wait):  # lets the store answer once
            await asleep()
            store.answers.set()
            store.answers.clear()
        await asleep()
        assert len(store.calls) == wait + 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        store.answers.set()
        store.rows, store.pages = [row(2)], [[dead(3, 1.0)]]
        await CALLS[name](over, receiver, deliveries)
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("name", CALLS)
async def test_a_failure_of_the_store_is_raised_as_it_is(name: str) -> None:
    store, over, receiver, deliveries = await made()
    store.error = BackendConnectionError("gone")
    with pytest.raises(BackendConnectionError, match="gone"):
        await CALLS[name](over, receiver, deliveries)


async def test_a_receiver_that_nobody_holds_is_not_kept() -> None:
    store = Stored(g=("#",))
    over = transport(store)
    await over.subscribe("g", 1)
    gc.collect()
    assert not over._receivers  # pyright: ignore[reportPrivateUsage]


def test_the_capabilities_are_those_of_every_store_and_the_providers_own() -> None:
    told = store_capabilities(
        lease=3.0, redelivery_bound=2.0, silence_bound=None, max_payload_bytes=9, durability=Durability.NONE
    )
    assert (told.lease, told.redelivery_bound, told.max_payload_bytes) == (3.0, 2.0, 9)
    assert (told.groups, told.dead_letter, told.ordered_per_key) == (True, True, False)
