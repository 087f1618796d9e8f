"""Groups and their queues: made whole, known to every publisher, and mended when others delete or change them."""

import asyncio
import json
import time
from collections import deque
from typing import Any

import pytest
from aiohttp import web

from abe.backends.message_queue.base import Envelope
from abe.errors import AbeError, BackendConnectionError, GroupMissingError
from abe_backend_sqs import _reader, _transport
from abe_backend_sqs._transport import SqsTransport
from abe_contract_tests import bounds

_DAYS_14 = str(14 * 86_400)


def envelope(key: str = "k", id: str = "id") -> Envelope:
    return Envelope(id, key, b"{}", time.time_ns() // 1_000_000, None, 0)


def gone() -> web.Response:
    """Return what SNS answers where there is no such topic."""
    return web.Response(
        status=404,
        content_type="text/xml",
        text="<ErrorResponse><Error><Type>Sender</Type><Code>NotFound</Code>"
        "<Message>Topic does not exist</Message></Error></ErrorResponse>",
    )


async def until(holds: Any) -> None:
    while not await holds():  # noqa: ASYNC110
        await asyncio.sleep(0.02)


class TestMaking:
    async def test_a_queue_has_its_attributes_from_the_beginning(self, lab: Any) -> None:
        """One that is made, and not described because the process ends there, would lose messages after four days."""
        async with bounds.within(15):
            await (await lab.transport()).declare("g", None, change=False)
        made = {request["QueueName"]: request.get("Attributes", {}) for request in lab.gate.requests("CreateQueue")}
        queue = next(attributes for name, attributes in made.items() if "-group-g" in name)
        dead = next(attributes for name, attributes in made.items() if "-dead-g" in name)
        assert queue["MessageRetentionPeriod"] == dead["MessageRetentionPeriod"] == _DAYS_14
        assert json.loads(queue["RedrivePolicy"])["maxReceiveCount"] == 1000
        assert not lab.gate.requests("SetQueueAttributes")

    async def test_one_that_another_process_made_with_another_lease_is_used(self, lab: Any) -> None:
        async with bounds.within(15):
            first, second = await lab.transport(lease=30), await lab.transport(lease=60)
            hurry = asyncio.gather(first.declare("g", None, change=False), second.declare("g", None, change=False))
            await hurry
            assert set(await first.groups()) == set(await second.groups()) == {"g"}

    async def test_a_lost_queue_of_dead_letters_is_made_again(self, lab: Any) -> None:
        async with bounds.within(20):
            backend = await lab.backend()
            async with backend.consume(group="g") as messages:
                await lab.ask("delete_queue", QueueUrl=await lab.url("dead", "g"))
                await backend.publish("k", {"n": 1})
                await (await messages.receive()).reject("no")
            assert [letter.reason for letter in await backend.dead_letters("g").list()] == ["no"]

    async def test_a_group_that_another_process_deleted_is_made_again(self, lab: Any) -> None:
        async with bounds.within(20):
            one, other = await lab.backend(), await lab.backend()
            await one.declare("g")
            await other.declare("g")
            await other.delete_group("g")
            await one.declare("g")
            await one.publish("k", {"n": 1})
            assert (await other.stats("g")).waiting == 1

    async def test_a_group_that_is_made_again_keeps_its_patterns(self, lab: Any) -> None:
        async with bounds.within(20):
            transport: SqsTransport = await lab.transport()
            await transport.declare("g", ("order.#",), change=True)
            await lab.ask("delete_queue", QueueUrl=await lab.url("group", "g"))
            transport.queues.forget()
            with pytest.raises(BackendConnectionError):  # the address that it knew is found out to be wrong
                await transport.declare("g", ("stale",), change=False)
            await transport.declare("g", ("stale",), change=False)
            assert await transport.groups() == {"g": ("order.#",)}

    async def test_a_group_that_others_made_again_keeps_their_patterns(self, lab: Any) -> None:
        async with bounds.within(20):
            one, other = await lab.transport(), await lab.transport()
            await one.declare("g", ("a.#",), change=True)
            await other.declare("g", ("c.#",), change=True)
            await one.declare("g", ("a.#",), change=False)
            assert await one.groups() == {"g": ("c.#",)}

    async def test_pinned_groups_do_not_keep_open_from_finding_out_that_nobody_answers(self, lab: Any) -> None:
        transport = SqsTransport(lab.settings(endpoint_url="http://127.0.0.1:1", pinned=(("g", ("#",)),)))
        async with bounds.within(15):
            with pytest.raises(BackendConnectionError):
                await transport.open()
            await transport.close()


class TestKnowing:
    async def test_who_makes_a_group_waits_for_a_whole_turn_after_it_is_made(self, lab: Any) -> None:
        """Whoever read the groups while the request was on its way relies on that for a turn."""
        async with bounds.within(20):
            maker, publisher = await lab.transport(registry_ttl=1.0), await lab.transport(registry_ttl=1.0)
            await maker.declare("other", None, change=False)
            arrived, let_through = asyncio.Event(), asyncio.Event()
            create = maker.queues._create

            async def slow(name: str, *arguments: Any, **more: Any) -> None:
                if name.endswith("-group-g"):
                    arrived.set()
                    await let_through.wait()
                await create(name, *arguments, **more)

            maker.queues._create = slow  # type: ignore[method-assign]
            declaring = asyncio.create_task(maker.declare("g", None, change=False))
            await arrived.wait()
            assert "g" not in (await publisher.queues.registry(since=time.monotonic())).groups
            let_through.set()
            await declaring
            assert await publisher.send([envelope()]) == ()
            assert (await publisher.stats("g")).waiting == 1

    async def test_who_has_waited_does_not_wait_again(self, lab: Any) -> None:
        async with bounds.within(20):
            maker, other = await lab.transport(registry_ttl=2.0), await lab.transport(registry_ttl=2.0)
            for transport in (maker, other):
                first = (await transport.queues.declare("g", None, change=False)).propagation
                assert 1.5 < first <= 2.0
                again = (await transport.queues.declare("g", None, change=False)).propagation
                assert again < first  # the same moment, seen from later

    async def test_what_was_read_before_a_change_is_not_relied_on_after_it(self, lab: Any) -> None:
        async with bounds.within(15):
            transport: SqsTransport = await lab.transport(registry_ttl=60, publish_timeout=120)
            await transport.queues.registry()
            reader = transport.queues.reader
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
            transport.queues.forget()
            reader.list = listing  # type: ignore[method-assign]
            go_on.set()
            await reading
            assert reader._registry is None

    async def test_tags_are_read_when_something_changed_and_not_otherwise(self, lab: Any) -> None:
        async with bounds.within(15):
            maker, publisher = await lab.transport(), await lab.transport()
            for group in ("a", "b"):
                await maker.declare(group, None, change=False)
            registry = await publisher.queues.registry(since=time.monotonic())
            lab.gate.seen.clear()
            again = await publisher.queues.registry(since=time.monotonic())
            assert [name for name, _ in lab.gate.seen] == ["ListQueues"]
            assert again.groups == registry.groups == {"a": ("#",), "b": ("#",)}
            await maker.declare("a", ("x",), change=True)
            lab.gate.seen.clear()
            changed = await publisher.queues.registry(since=time.monotonic())
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
                registry = await publisher.queues.registry(since=time.monotonic())
                assert registry.groups == {"a": ("x",)}
                assert len(revisions(publisher, registry, "a")) > 1
            await maker.declare("a", None, change=False)
            tidy = await publisher.queues.registry(since=time.monotonic())
            assert len(revisions(publisher, tidy, "a")) == 1

    async def test_nobody_misses_a_change(self, lab: Any) -> None:
        """Who looks while tags are on their way relies on nothing."""
        async with bounds.within(20):
            maker, publisher = await lab.transport(), await lab.transport()
            await maker.declare("a", None, change=False)
            queues, changed = maker.queues, 0

            async def change() -> None:
                nonlocal changed
                changed += 1
                registry = await publisher.queues.registry(since=time.monotonic())
                assert len(revisions(publisher, registry, "a")) > 1

            before = await publisher.queues.registry(since=time.monotonic())
            await queues._change(queues.names.queue("a"), change)
            after = await publisher.queues.registry(since=time.monotonic())
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
            registry = await makers[0].queues.registry(since=time.monotonic())
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
            await maker.queues._revise(maker.queues.names.queue("g"))  # as one who is ended in between leaves it
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


def revisions(transport: SqsTransport, registry: Any, group: str) -> frozenset[str]:
    found: frozenset[str] = registry.listing.of(transport.queues.names.mark_of(transport.queues.names.queue(group)))
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
            known = await publisher.queues.registry()
            lab.gate.rules.append(Throttle(0))
            known = publisher.queues.reader._registry = known._replace(looked_at=known.looked_at - 6)
            await maker.queues._revise(maker.queues.names.queue("a"))
            assert await publisher.send([envelope()]) == ()
            assert not publisher.queues.reader._reading.start().done(), "it is being read beside that"


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

    async def test_one_that_does_not_come_back_is_gone_after_a_while(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_reader, "_MISSED", 0.3)
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


async def _missing(backend: Any) -> bool:
    reader = backend._calls.session.transport.queues.reader
    await reader.registry(time.monotonic())
    return bool(reader._missing)


class TestHeld:
    async def test_held_messages_are_found_whatever_sqs_counts(self, lab: Any) -> None:
        """Its counts may be a minute old."""
        async with bounds.within(20):
            transport: SqsTransport = await lab.transport(registry_ttl=1.0)
            assert await transport.send([envelope()]) == ()
            attributes = {f"ApproximateNumberOfMessages{each}": "0" for each in ("", "NotVisible", "Delayed")}
            lab.gate.times(
                1,
                "GetQueueAttributes",
                lambda body: None if "held" not in body["QueueUrl"] else web.json_response({"Attributes": attributes}),
            )
            await transport.declare("g", None, change=False)
            assert (await transport.stats("g")).waiting == 1

    async def test_dead_letters_are_found_whatever_sqs_counts(self, lab: Any) -> None:
        async with bounds.within(20):
            backend = await lab.backend(registry_ttl=1.0)
            async with backend.consume(group="g") as messages:
                await backend.publish("k", {"n": 1})
                await (await messages.receive()).reject("no")
            attributes = {f"ApproximateNumberOfMessages{each}": "0" for each in ("", "NotVisible", "Delayed")}
            lab.gate.times(1, "GetQueueAttributes", lambda _: web.json_response({"Attributes": attributes}))
            assert len(await backend.dead_letters("g").list()) == 1

    async def test_a_message_that_was_held_beside_a_new_group_is_handed_over_however_often_that_fails(
        self, lab: Any, refusal: Any
    ) -> None:
        async with bounds.within(20):
            maker, publisher = await lab.transport(), await lab.transport(registry_ttl=5.0)
            assert not (await publisher.queues.registry()).groups
            await maker.declare("g", None, change=False)
            lab.gate.times(2, "ReceiveMessage", lambda _: refusal("RequestThrottled"))
            await publisher.send([envelope()])  # it does not know the group yet

            async def there() -> bool:
                return (await maker.stats("g")).waiting == 1

            await until(there)

    async def test_a_held_message_that_cannot_be_moved_now_is_moved_by_the_next_try(
        self, lab: Any, refusal: Any
    ) -> None:
        async with bounds.within(20):
            backend = await lab.backend()
            await backend.publish("k", {"n": 1})
            lab.gate.times(
                1,
                "SendMessageBatch",
                lambda body: refusal("RequestThrottled") if "-group-" in body["QueueUrl"] else None,
            )
            await backend.declare("g")
            assert (await backend.stats("g")).waiting == 1

    async def test_a_publish_returns_when_a_group_that_was_made_meanwhile_has_its_message(self, lab: Any) -> None:
        """The process may end after it, and nobody else would look."""
        async with bounds.within(20):
            maker, publisher = await lab.transport(), await lab.transport(registry_ttl=5.0)
            assert not (await publisher.queues.registry()).groups
            await maker.declare("g", None, change=False)
            await publisher.send([envelope()])
            assert (await maker.stats("g")).waiting == 1

    async def test_what_no_group_wants_is_not_in_the_way_of_what_one_does(self, lab: Any) -> None:
        """In a FIFO queue a message that is looked at keeps back those behind it in its message group."""
        async with bounds.within(20):
            transport: SqsTransport = await lab.transport(fifo=True, message_group="all")
            await transport.send([envelope("other", f"o{n}") for n in range(11)])
            await transport.send([envelope("wanted", "w")])
            await transport.declare("g", ("wanted",), change=True)
            assert (await transport.stats("g")).waiting == 1


class TestTopics:
    async def test_a_topic_is_used_when_the_groups_have_been_there_for_long_enough(self, lab: Any) -> None:
        async with bounds.within(20):
            backend = await lab.backend(fanout="sns", topic_after=60)
            await backend.declare("g")
            await backend.publish("k", {"n": 1})
            assert not lab.gate.requests("PublishBatch")
            assert (await backend.stats("g")).waiting == 1

    async def test_a_group_whose_deletion_was_interrupted_still_gets_everything(self, lab: Any, refusal: Any) -> None:
        async with bounds.within(20):
            one, other = await lab.backend(fanout="sns"), await lab.backend(fanout="sns")
            await one.declare("a")
            await one.declare("b")
            lab.gate.times(1, "DeleteQueue", lambda _: refusal("AccessDenied"))
            with pytest.raises(AbeError):
                await one.delete_group("a")
            await other.declare("a")
            await other.publish("k", {"n": 1})
            assert [(await other.stats(group)).waiting for group in ("a", "b")] == [1, 1]

    async def test_a_topic_that_was_deleted_is_done_without(self, lab: Any) -> None:
        async with bounds.within(20):
            backend = await lab.backend(fanout="sns")
            await backend.declare("a")
            lab.gate.times(1, "PublishBatch", lambda _: gone())
            await backend.publish("k", {"n": 1})
            await backend.publish("k", {"n": 2})
            assert len(lab.gate.requests("PublishBatch")) == 1
            assert (await backend.stats("a")).waiting == 2
            lab.gate.times(1, "Subscribe", lambda _: gone())
            await (await lab.backend(fanout="sns")).declare("b")
            assert len(lab.gate.requests("CreateTopic")) == 1  # nobody takes himself for subscribed to a new one
            await backend.publish("k", {"n": 3})
            assert [(await backend.stats(group)).waiting for group in ("a", "b")] == [3, 1]


class TestParked:
    async def test_what_nobody_wants_is_not_gone_through_by_every_consumer_that_starts(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_transport, "_SHORT_LOOK", 20)
        async with bounds.within(30):
            backend = await lab.backend()
            await backend.publish_many([("unwanted", {"n": n}) for n in range(60)])
            await backend.publish("wanted", {"n": 60})
            await backend.declare("g", ["wanted"])
            assert (await backend.stats("g")).waiting == 1, "a new group finds what it wants, wherever it is"
            lab.gate.seen.clear()
            other = await lab.transport()
            monkeypatch.setattr(other.queues, "_propagation", lambda *_: 0.0)  # as if it had been there for long
            await other.declare("g", None, change=False)
            assert other._handing_over is not None
            await other._handing_over
            looks = [each for each in lab.gate.requests("ReceiveMessage") if "-held" in each["QueueUrl"]]
            assert 1 <= len(looks) <= 3
