"""Groups and their queues: made whole, known to every publisher, and mended when others delete or change them."""

import asyncio
import json
import time
from typing import Any

import pytest
from aiohttp import web

from abe.backends.message_queue.base import Envelope
from abe.errors import AbeError, BackendConnectionError
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
            await (await lab.transport()).declare("g", None)
        made = {request["QueueName"]: request.get("Attributes", {}) for request in lab.gate.requests("CreateQueue")}
        queue = next(attributes for name, attributes in made.items() if "-group-g" in name)
        dead = next(attributes for name, attributes in made.items() if "-dead-g" in name)
        assert queue["MessageRetentionPeriod"] == dead["MessageRetentionPeriod"] == _DAYS_14
        assert json.loads(queue["RedrivePolicy"])["maxReceiveCount"] == 1000
        assert not lab.gate.requests("SetQueueAttributes")

    async def test_one_that_another_process_made_with_another_lease_is_used(self, lab: Any) -> None:
        async with bounds.within(15):
            first, second = await lab.transport(lease=30), await lab.transport(lease=60)
            hurry = asyncio.gather(first.declare("g", None), second.declare("g", None))
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
            await transport.declare("g", ("order.#",))
            await lab.ask("delete_queue", QueueUrl=await lab.url("group", "g"))
            transport.queues.forget()
            with pytest.raises(BackendConnectionError):  # the address that it knew is found out to be wrong
                await transport.restore("g")
            await transport.restore("g")
            assert await transport.groups() == {"g": ("order.#",)}

    async def test_a_group_that_others_made_again_keeps_their_patterns(self, lab: Any) -> None:
        async with bounds.within(20):
            one, other = await lab.transport(), await lab.transport()
            await one.declare("g", ("a.#",))
            await other.declare("g", ("c.#",))
            await one.restore("g")
            assert await one.groups() == {"g": ("c.#",)}

    async def test_pinned_groups_do_not_keep_open_from_finding_out_that_nobody_answers(self, lab: Any) -> None:
        transport = SqsTransport(lab.settings(endpoint_url="http://127.0.0.1:1", pinned=(("g", ("#",)),)))
        async with bounds.within(15):
            with pytest.raises(BackendConnectionError):
                await transport.open()
            await transport.close()


class TestKnowing:
    async def test_who_makes_a_group_waits_for_a_whole_turn_after_the_tags_are_set(self, lab: Any) -> None:
        """Whoever read the groups while the request was on its way relies on that for a turn."""
        async with bounds.within(20):
            maker, publisher = await lab.transport(registry_ttl=1.0), await lab.transport(registry_ttl=1.0)
            await maker.declare("other", None)
            arrived, let_through = asyncio.Event(), asyncio.Event()
            tagging = maker.queues._clients.calls

            class Slow:
                def __init__(self, client: Any) -> None:
                    self._client = client

                def __getattr__(self, name: str) -> Any:
                    return getattr(self._client, name)

                async def tag_queue(self, **arguments: Any) -> Any:
                    arrived.set()
                    await let_through.wait()
                    return await self._client.tag_queue(**arguments)

            async def slow() -> Any:
                return Slow(await tagging())

            maker.queues._clients.calls = slow  # type: ignore[method-assign]
            declaring = asyncio.create_task(maker.declare("g", None))
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
                first = await transport.queues.declare("g", None)
                assert 1.5 < first <= 2.0
                assert await transport.queues.declare("g", None) < first  # the same moment, seen from later

    async def test_what_was_read_before_a_change_is_not_relied_on_after_it(self, lab: Any) -> None:
        async with bounds.within(15):
            transport: SqsTransport = await lab.transport(registry_ttl=60, publish_timeout=120)
            queues = transport.queues
            listed, go_on = asyncio.Event(), asyncio.Event()
            listing = queues._list

            async def slow() -> Any:
                found = await listing()
                listed.set()
                await go_on.wait()
                return found

            queues._list = slow  # type: ignore[method-assign]
            reading = asyncio.create_task(queues.registry(since=time.monotonic()))
            await listed.wait()
            queues.forget()
            queues._list = listing  # type: ignore[method-assign]
            go_on.set()
            await reading
            assert queues._registry is None

    async def test_tags_are_read_when_something_changed_and_not_otherwise(self, lab: Any) -> None:
        async with bounds.within(15):
            maker, publisher = await lab.transport(), await lab.transport()
            for group in ("a", "b"):
                await maker.declare(group, None)
            registry = await publisher.queues.registry(since=time.monotonic())
            lab.gate.seen.clear()
            again = await publisher.queues.registry(since=time.monotonic())
            assert [name for name, _ in lab.gate.seen] == ["ListQueues"]
            assert again.groups == registry.groups == {"a": ("#",), "b": ("#",)}
            await maker.declare("a", ("x",))
            changed = await publisher.queues.registry(since=time.monotonic())
            assert changed.groups == {"a": ("x",), "b": ("#",)}

    async def test_a_change_that_was_interrupted_is_known_all_the_same_and_tidied_up_by_the_next(
        self, lab: Any
    ) -> None:
        async with bounds.within(20):
            maker, publisher = await lab.transport(), await lab.transport()
            await maker.declare("a", None)
            lab.gate.times(1, "DeleteQueue", lambda _: web.Response(status=500))
            with pytest.raises(AbeError):
                await maker.declare("a", ("x",))  # ended after the tags, before the old revision went
            for _ in range(2):
                registry = await publisher.queues.registry(since=time.monotonic())
                assert registry.groups == {"a": ("x",)}
                assert registry.listing is not None
                assert not registry.listing.settled
            await maker.declare("a", ("x",))
            tidy = await publisher.queues.registry(since=time.monotonic())
            assert tidy.listing is not None
            assert tidy.listing.settled

    async def test_nobody_misses_the_first_group(self, lab: Any) -> None:
        """Who looks while its tags are on their way relies on nothing."""
        async with bounds.within(20):
            maker, publisher = await lab.transport(), await lab.transport()
            queues, changed = maker.queues, 0

            async def change() -> None:
                nonlocal changed
                changed += 1
                registry = await publisher.queues.registry(since=time.monotonic())
                assert registry.listing is not None
                assert not registry.listing.settled

            await queues._change(change)
            assert changed == 1
            before = await publisher.queues.registry(since=time.monotonic())
            await queues._change(change)
            after = await publisher.queues.registry(since=time.monotonic())
            assert before.listing is not None
            assert after.listing is not None
            assert after.listing.settled
            assert before.listing.revisions.isdisjoint(after.listing.revisions)

    async def test_many_who_change_at_once_leave_one_revision(self, lab: Any) -> None:
        async with bounds.within(30):
            makers = [await lab.transport() for _ in range(4)]
            await asyncio.gather(*(maker.declare(f"g{n}", None) for n, maker in enumerate(makers)))
            registry = await makers[0].queues.registry(since=time.monotonic())
            assert set(registry.groups) == {"g0", "g1", "g2", "g3"}
            assert registry.listing is not None
            assert registry.listing.settled

    async def test_a_stranger_s_queue_is_no_revision(self, lab: Any) -> None:
        async with bounds.within(20):
            name = f"{lab.namespace.replace('-', '--')}-groupware"
            url = (await lab.ask("create_queue", QueueName=name))["QueueUrl"]
            await (await lab.transport()).declare("g", None)
            await lab.ask("get_queue_attributes", QueueUrl=url)

    async def test_who_may_not_tidy_up_uses_the_group_all_the_same(self, lab: Any, refusal: Any) -> None:
        async with bounds.within(20):
            maker, consumer = await lab.transport(), await lab.transport()
            await maker.declare("g", None)
            await maker.queues._revise()  # as one who is ended in between leaves it
            lab.gate.times(1, "CreateQueue", lambda _: refusal("AccessDenied"))
            await consumer.declare("g", None)
            assert set(await consumer.groups()) == {"g"}

    async def test_tags_that_sqs_answers_too_many_requests_for_are_asked_for_again(
        self, lab: Any, refusal: Any
    ) -> None:
        async with bounds.within(15):
            maker, publisher = await lab.transport(), await lab.transport()
            await maker.declare("a", None)
            lab.gate.times(2, "ListQueueTags", lambda _: refusal("RequestThrottled"))
            assert set((await publisher.queues.registry(since=time.monotonic())).groups) == {"a"}


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
            await transport.declare("g", None)
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
            await maker.declare("g", None)
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
            await maker.declare("g", None)
            await publisher.send([envelope()])
            assert (await maker.stats("g")).waiting == 1

    async def test_what_no_group_wants_is_not_in_the_way_of_what_one_does(self, lab: Any) -> None:
        """In a FIFO queue a message that is looked at keeps back those behind it in its message group."""
        async with bounds.within(20):
            transport: SqsTransport = await lab.transport(fifo=True, message_group="all")
            await transport.send([envelope("other", f"o{n}") for n in range(11)])
            await transport.send([envelope("wanted", "w")])
            await transport.declare("g", ("wanted",))
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
