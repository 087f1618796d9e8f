"""The registry: known to every publisher, however often it changes, is throttled, or loses a queue."""

import asyncio
import time
from collections import deque
from typing import Any

import pytest
from aiohttp import web

from abe.backends.message_queue.base import Envelope
from abe.errors import AbeError, BackendConnectionError, GroupMissingError, UnroutableError
from abe_backend_sqs import _registry
from abe_backend_sqs._errors import QueueMissingError
from abe_backend_sqs._queue import Queue
from abe_backend_sqs._transport import SqsTransport
from abe_contract_tests import bounds


def envelope(key: str = "k", id: str = "id") -> Envelope:
    return Envelope(id, key, b"{}", time.time_ns() // 1_000_000, None, 0)


class TestKnowing:
    async def test_who_makes_a_group_waits_for_a_whole_turn_after_it_is_made(self, lab: Any) -> None:
        """Whoever read the groups while the request was on its way relies on that for a turn."""
        async with bounds.within(20):
            maker, publisher = await lab.transport(registry_ttl=1.0), await lab.transport(registry_ttl=1.0)
            await maker.declare("other", None, change=False)
            arrived, let_through = asyncio.Event(), asyncio.Event()
            create = maker.broker.groups._create

            async def slow(name: str, *arguments: Any, **more: Any) -> Queue:
                if name.endswith("-group-g"):
                    arrived.set()
                    await let_through.wait()
                return await create(name, *arguments, **more)

            maker.broker.groups._create = slow  # type: ignore[method-assign]
            declaring = asyncio.create_task(maker.declare("g", None, change=False))
            await arrived.wait()
            assert "g" not in (await publisher.broker.groups.keeper.registry(time.monotonic())).groups
            let_through.set()
            await declaring
            assert await publisher.send([envelope()]) == ()
            assert (await publisher.stats("g")).waiting == 1

    async def test_who_has_waited_does_not_wait_again(self, lab: Any) -> None:
        async with bounds.within(20):
            maker, other = await lab.transport(registry_ttl=2.0), await lab.transport(registry_ttl=2.0)
            for transport in (maker, other):
                first = (await transport.broker.groups.declare("g", None, change=False)).propagation
                assert 1.5 < first <= 2.0
                again = (await transport.broker.groups.declare("g", None, change=False)).propagation
                assert again < first  # the same moment, seen from later

    async def test_what_was_read_before_a_change_is_not_relied_on_after_it(self, lab: Any) -> None:
        async with bounds.within(15):
            transport: SqsTransport = await lab.transport(registry_ttl=60, publish_timeout=120)
            await transport.broker.groups.keeper.registry()
            reader = transport.broker.groups.keeper
            listed, go_on = asyncio.Event(), asyncio.Event()
            listing = reader.list

            async def slow() -> Any:
                found = await listing()
                listed.set()
                await go_on.wait()
                return found

            reader.list = slow  # type: ignore[method-assign]
            reading = reader._reading.start()
            await listed.wait()
            transport.broker.groups.forget()
            reader.list = listing  # type: ignore[method-assign]
            go_on.set()
            await reading
            assert reader._registry is None

    async def test_tags_that_are_not_there_yet_are_read_again(self, lab: Any, refusal: Any) -> None:
        """SQS may list a queue before it answers for it."""
        async with bounds.within(15):
            maker, publisher = await lab.transport(), await lab.transport()
            await maker.declare("a", None, change=False)
            lab.gate.times(1, "ListQueueTags", lambda _: refusal("QueueDoesNotExist"))
            keeper = publisher.broker.groups.keeper
            assert (await keeper.registry(time.monotonic())).groups == {}
            assert (await keeper.registry(time.monotonic())).groups == {"a": ("#",)}

    async def test_who_has_made_a_group_does_not_publish_by_what_was_read_before(self, lab: Any) -> None:
        async with bounds.within(15):
            other, maker = await lab.transport(), await lab.transport(groups={"new": ()}, registry_ttl=60)
            await other.declare("other", None, change=False)
            await maker.broker.groups.declare("new", None, change=False)
            assert "new" in (await maker.broker.groups.keeper.registry()).groups

    async def test_tags_are_read_when_something_changed_and_not_otherwise(self, lab: Any) -> None:
        async with bounds.within(15):
            maker, publisher = await lab.transport(), await lab.transport()
            for group in ("a", "b"):
                await maker.declare(group, None, change=False)
            registry = await publisher.broker.groups.keeper.registry(time.monotonic())
            lab.gate.seen.clear()
            again = await publisher.broker.groups.keeper.registry(time.monotonic())
            assert [name for name, _ in lab.gate.seen] == ["ListQueues"]
            assert again.groups == registry.groups == {"a": ("#",), "b": ("#",)}
            await maker.declare("a", ("x",), change=True)
            lab.gate.seen.clear()
            changed = await publisher.broker.groups.keeper.registry(time.monotonic())
            assert changed.groups == {"a": ("x",), "b": ("#",)}
            asked = {each["QueueUrl"] for each in lab.gate.requests("ListQueueTags")}
            assert asked == {await lab.url("group", "a")}, "those of the group that was changed, and of no other"

    async def test_a_change_that_was_interrupted_is_known_all_the_same_and_tidied_up_by_the_next(
        self, lab: Any
    ) -> None:
        async with bounds.within(20):
            maker, publisher = await lab.transport(), await lab.transport()
            await maker.declare("a", None, change=False)
            lab.gate.times(1, "DeleteQueue", lambda _: web.Response(status=500))
            with pytest.raises(AbeError):
                await maker.declare("a", ("x",), change=True)  # ended after the tags, before the old revision went
            for _ in range(2):
                registry = await publisher.broker.groups.keeper.registry(time.monotonic())
                assert registry.groups == {"a": ("x",)}
                assert len(revisions(publisher, registry, "a")) > 1
            await maker.declare("a", None, change=False)
            tidy = await publisher.broker.groups.keeper.registry(time.monotonic())
            assert len(revisions(publisher, tidy, "a")) == 1

    async def test_nobody_misses_a_change(self, lab: Any) -> None:
        """Who looks while tags are on their way relies on nothing."""
        async with bounds.within(20):
            maker, publisher = await lab.transport(), await lab.transport()
            await maker.declare("a", None, change=False)
            groups, changed = maker.broker.groups, 0

            async def change() -> None:
                nonlocal changed
                changed += 1
                registry = await publisher.broker.groups.keeper.registry(time.monotonic())
                assert len(revisions(publisher, registry, "a")) > 1

            before = await publisher.broker.groups.keeper.registry(time.monotonic())
            await groups.keeper.change(groups.names.queue("a"), change)
            after = await publisher.broker.groups.keeper.registry(time.monotonic())
            assert changed == 1
            assert len(revisions(publisher, after, "a")) == 1
            assert revisions(publisher, before, "a").isdisjoint(revisions(publisher, after, "a"))

    async def test_many_who_make_a_group_at_once_make_one_with_the_patterns_of_one_of_them(self, lab: Any) -> None:
        async with bounds.within(30):
            makers = [await lab.transport(registry_ttl=0.5) for _ in range(4)]
            found = await asyncio.gather(
                *(maker.declare("g", (f"k{n}",), change=False) for n, maker in enumerate(makers))
            )
            await makers[0].declare("g", None, change=False)  # where they were in each other's way for too long
            registry = await makers[0].broker.groups.keeper.registry(time.monotonic())
            assert set(found) == {registry.groups["g"]}
            assert len(revisions(makers[0], registry, "g")) == 1

    async def test_a_foreign_queue_is_no_revision(self, lab: Any) -> None:
        async with bounds.within(20):
            name = f"{lab.namespace.replace('-', '--')}-groupware"
            url = (await lab.ask("create_queue", QueueName=name))["QueueUrl"]
            transport = await lab.transport()
            await transport.declare("g", None, change=False)
            await transport.declare("g", ("x",), change=True)
            await transport.delete_namespace()
            await lab.ask("get_queue_attributes", QueueUrl=url)

    async def test_who_may_not_tidy_up_uses_the_group_all_the_same(self, lab: Any, refusal: Any) -> None:
        async with bounds.within(20):
            maker, consumer = await lab.transport(), await lab.transport()
            await maker.declare("g", None, change=False)
            await maker.broker.groups.keeper.revise(
                maker.broker.groups.names.queue("g")
            )  # as one who is ended in between leaves it
            lab.gate.times(1, "CreateQueue", lambda _: refusal("AccessDenied"))
            assert await consumer.declare("g", None, change=False) == ("#",)
            assert set(await consumer.groups()) == {"g"}

    async def test_patterns_of_an_existing_group_change_when_that_is_asked_for_and_not_otherwise(
        self, lab: Any
    ) -> None:
        async with bounds.within(20):
            one, other = await lab.transport(), await lab.transport()
            assert await one.declare("g", ("a",), change=False) == ("a",)
            assert await other.declare("g", ("b",), change=False) == ("a",)
            assert await other.declare("g", None, change=True) == ("a",)
            assert await other.declare("g", ("b",), change=True) == ("b",)
            assert await one.groups() == {"g": ("b",)}


def revisions(transport: SqsTransport, registry: Any, group: str) -> frozenset[Queue]:
    names = transport.broker.groups.names
    found: frozenset[Queue] = registry.listing.of(names.queue(group))
    return found


class Throttle:
    """Answers a number of requests for tags a second, as SQS does in an account."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._answered: deque[float] = deque()

    def __call__(self, name: str, body: dict[str, Any]) -> web.Response | None:
        if name != "ListQueueTags":
            return None
        now = time.monotonic()
        while self._answered and self._answered[0] < now - 1:
            self._answered.popleft()
        if len(self._answered) >= self._most:
            return web.json_response({"__type": "com.amazonaws.sqs#RequestThrottled", "message": "m"}, status=400)
        self._answered.append(now)
        return None


class TestThrottling:
    GROUPS = tuple(f"g{n}" for n in range(12))

    async def test_publishers_start_together_however_slowly_tags_are_answered(self, lab: Any) -> None:
        """They kept nothing of what was answered, and asked for all of it again: neither ever started."""
        async with bounds.within(60):
            maker = await lab.transport()
            await asyncio.gather(*(maker.declare(group, None, change=False) for group in self.GROUPS))
            lab.gate.rules.append(Throttle(5))
            publishers = await asyncio.gather(*(lab.backend(registry_ttl=5.0) for _ in range(2)))
            await asyncio.gather(*(each.publish("k", {"n": 1}) for each in publishers))
            assert [(await maker.stats(group)).waiting for group in self.GROUPS] == [2] * len(self.GROUPS)

    async def test_publishing_goes_on_while_a_group_changes(self, lab: Any) -> None:
        async with bounds.within(60):
            maker = await lab.transport(registry_ttl=2.0)
            await asyncio.gather(*(maker.declare(group, None, change=False) for group in self.GROUPS))
            publishers = [await lab.backend(registry_ttl=2.0) for _ in range(2)]
            await asyncio.gather(*(each.publish("k", {"n": 0}) for each in publishers))
            lab.gate.rules.append(Throttle(5))
            lab.gate.seen.clear()
            changing = asyncio.create_task(maker.declare("g0", ("other",), change=True))
            published = 0
            while not changing.done():
                await asyncio.gather(*(each.publish("k", {"n": 1}) for each in publishers))
                published += 2
            await changing
            before = (await maker.stats("g0")).waiting
            await asyncio.gather(*(each.publish("k", {"n": 2}) for each in publishers))
            assert (await maker.stats("g0")).waiting == before, "its new patterns are known"
            assert (await maker.stats("g1")).waiting == published + 4
            asked = {each["QueueUrl"].rpartition("-")[2] for each in lab.gate.requests("ListQueueTags")}
            assert asked == {"g0"}

    async def test_tags_that_cannot_be_had_do_not_keep_what_is_known_from_being_used(self, lab: Any) -> None:
        async with bounds.within(30):
            maker = await lab.transport()
            await maker.declare("a", None, change=False)
            publisher: SqsTransport = await lab.transport(registry_ttl=10.0)
            known = await publisher.broker.groups.keeper.registry()
            lab.gate.rules.append(Throttle(0))
            known = publisher.broker.groups.keeper._registry = known._replace(looked_at=known.looked_at - 6)
            await maker.broker.groups.keeper.revise(maker.broker.groups.names.queue("a"))
            assert await publisher.send([envelope()]) == ()
            assert not publisher.broker.groups.keeper._reading.start().done(), "it is being read beside that"


class TestDeletedUnderneath:
    async def test_a_publish_does_not_pass_by_a_group_whose_queue_was_deleted(self, lab: Any) -> None:
        """Its consumers make it again; until then a publish returned without having reached it."""
        async with bounds.within(30):
            maker, publisher = await lab.transport(), await lab.backend()
            await maker.declare("g", ("k.#",), change=False)
            await maker.declare("other", None, change=False)
            await publisher.publish("k.1", {"n": 1})
            await lab.ask("delete_queue", QueueUrl=await lab.url("group", "g"))
            publishing = asyncio.create_task(publisher.publish("k.2", {"n": 2}))
            while not await _missing(publisher):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.02)
            await publisher.publish("k.3", {"n": 3}, group="other")
            assert not publishing.done()
            assert set(await publisher.groups()) == {"other"}
            with pytest.raises(BackendConnectionError):  # the address that it knew is found out to be wrong
                await maker.declare("g", ("k.#",), change=False)
            await maker.declare("g", ("k.#",), change=False)
            await publishing
            assert await maker.groups() == {"g": ("k.#",), "other": ("#",)}
            assert (await maker.stats("g")).waiting == 1

    async def test_a_queue_that_stays_missing_does_not_have_the_groups_read_at_each_try(self, lab: Any) -> None:
        async with bounds.within(20):
            maker, publisher = await lab.transport(), await lab.transport(registry_ttl=600.0, publish_timeout=1200.0)
            await maker.declare("gone", None, change=False)
            await publisher.send([envelope()])
            await lab.ask("delete_queue", QueueUrl=await lab.url("group", "gone"))
            await publisher.send([envelope()])  # the address that it knew is found out to be wrong
            lab.gate.seen.clear()
            for _ in range(5):
                (error,) = await publisher.send([envelope()])
                assert error.retryable
            assert len(lab.gate.requests("ListQueues")) <= 1

    async def test_one_that_does_not_come_back_is_gone_after_a_while(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_registry, "_MISSED", 0.3)
        async with bounds.within(30):
            maker, publisher = await lab.transport(), await lab.backend()
            await maker.declare("g", None, change=False)
            await maker.declare("other", None, change=False)
            await publisher.publish("k", {"n": 1})
            await lab.ask("delete_queue", QueueUrl=await lab.url("group", "g"))
            await publisher.publish("k", {"n": 2})
            assert (await maker.stats("other")).waiting == 2

    async def test_a_group_that_was_deleted_as_groups_are_is_gone_at_once(self, lab: Any) -> None:
        async with bounds.within(30):
            maker, publisher = await lab.transport(), await lab.backend()
            await maker.declare("g", None, change=False)
            await maker.declare("other", None, change=False)
            await publisher.publish("k", {"n": 1})
            await maker.delete_group("g")
            await publisher.publish("k", {"n": 2})
            assert (await maker.stats("other")).waiting == 2
            with pytest.raises(GroupMissingError):
                await maker.stats("g")

    async def test_that_is_known_at_once_too_where_it_was_never_published_to(self, lab: Any) -> None:
        async with bounds.within(20):
            maker, publisher = await lab.transport(), await lab.transport(registry_ttl=600.0, publish_timeout=1200.0)
            await maker.declare("g", ("g",), change=False)
            await maker.declare("other", ("other",), change=False)
            assert await publisher.send([envelope("other")]) == ()
            await maker.delete_group("g")
            assert [type(each) for each in await publisher.send([envelope("g")])] == [QueueMissingError]
            assert [type(each) for each in await publisher.send([envelope("g")])] == [UnroutableError]


async def _missing(backend: Any) -> bool:
    reader = backend._calls.session.transport.broker.groups.keeper
    await reader.registry(time.monotonic())
    return bool(reader._missing)
