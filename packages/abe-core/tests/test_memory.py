"""The memory backend: what it shares, with whom, and on whose clock."""

import asyncio
import threading
from typing import Any

import pytest

from abe.backends.message_queue.base.transport import Transport
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import (
    BackendClosedError,
    BackpressureError,
    EventLoopError,
    InvalidNameError,
    LeaseLostError,
    PartialPublishError,
    UnroutableError,
)
from abe.settings import QueueSettings
from abe.testing import ManualClock, fresh_memory_backend
from abe_contract_tests import bounds


def sibling(backend: MemoryBackend) -> MemoryBackend:
    """Return another backend on the same namespace and clock."""
    return MemoryBackend(backend.settings, clock=backend._clock)


def settings(**options: Any) -> QueueSettings:
    return QueueSettings(namespace=fresh_memory_backend().settings.namespace, **options)


async def first(backend: MemoryBackend, count: int = 1, **options: Any) -> list[dict[str, Any]]:
    """Take and acknowledge that many messages."""
    async with bounds.within(5), backend.consume(**options) as messages:
        taken = []
        for _ in range(count):
            message = await anext(messages)
            taken.append(dict(message))
            await message.ack()
        return taken


class TestSharing:
    async def test_instances_of_one_namespace_share_what_they_hold(self, memory_backend: MemoryBackend) -> None:
        other = sibling(memory_backend)
        await other.publish("a", {"n": 1})
        await other.disconnect()
        assert await first(memory_backend) == [{"n": 1}]

    async def test_namespaces_share_nothing(self, memory_backend: MemoryBackend) -> None:
        other = fresh_memory_backend()
        await memory_backend.declare("g")
        await memory_backend.publish("a", {"n": 1})
        await other.declare("g")
        assert (await other.stats("g")).waiting == 0
        assert (await memory_backend.stats("g")).waiting == 1
        await other.disconnect()

    async def test_a_waiting_consumer_learns_of_delayed_messages_that_its_group_begins_to_want(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        await memory_backend.publish("b.x", {"n": 1}, delay=5)
        async with bounds.within(5), memory_backend.consume(group="g", keys=["a.#"]) as messages:
            waiting = asyncio.create_task(anext(messages))
            await asyncio.sleep(0)
            await memory_backend.declare("g", ["#"])
            await manual_clock.advance(6)
            assert await waiting == {"n": 1}

    async def test_what_was_published_before_any_group_goes_to_the_first_that_wants_it(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.publish("order.created", {"n": 1})
        await memory_backend.declare("invoices", ["invoice.#"])
        await memory_backend.declare("orders", ["order.#"])
        await memory_backend.declare("late", ["order.#"])
        waiting = [(await memory_backend.stats(group)).waiting for group in ("invoices", "orders", "late")]
        assert waiting == [0, 1, 0]

    async def test_a_key_that_no_group_wants_is_counted_and_raises_when_mandatory(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.declare("orders", ["order.#"])
        await memory_backend.publish("invoice.sent", {})
        assert memory_backend.unroutable == 1
        with pytest.raises(UnroutableError, match=r"invoice\.sent"):
            await memory_backend.publish("invoice.sent", {}, mandatory=True)


class TestLoopsAndThreads:
    def test_one_backend_serves_event_loops_one_after_the_other(self) -> None:
        backend = fresh_memory_backend()
        asyncio.run(backend.publish("a", {"n": 1}))
        assert asyncio.run(first(backend)) == [{"n": 1}]
        asyncio.run(backend.disconnect())

    def test_it_belongs_to_the_event_loop_that_uses_it(self) -> None:
        backend = fresh_memory_backend()

        async def use_elsewhere() -> None:
            await backend.ping()
            with pytest.raises(EventLoopError):
                await asyncio.to_thread(asyncio.run, backend.ping())
            with pytest.raises(EventLoopError):
                await asyncio.to_thread(asyncio.run, backend.disconnect())
            await backend.disconnect()

        asyncio.run(use_elsewhere())

    def test_a_publish_in_one_thread_wakes_a_consumer_in_another(self) -> None:
        backend = fresh_memory_backend()
        waiting = threading.Event()
        taken: list[dict[str, Any]] = []

        async def consume() -> None:
            mine = sibling(backend)
            async with mine, mine.consume() as messages:
                coming = asyncio.ensure_future(anext(messages))
                for _ in range(20):
                    await asyncio.sleep(0)
                waiting.set()
                async with bounds.within(5):
                    taken.append(await coming)

        consumer = threading.Thread(target=asyncio.run, args=(consume(),))
        consumer.start()
        assert waiting.wait(5 * bounds.slowness())
        asyncio.run(backend.publish("a", {"n": 1}))
        consumer.join(5 * bounds.slowness())
        assert taken == [{"n": 1}]

    def test_a_consumer_whose_event_loop_was_closed_under_it_keeps_no_message_from_the_others(self) -> None:
        backend = fresh_memory_backend()
        abandoned = asyncio.new_event_loop()

        async def wait_in_vain() -> "asyncio.Task[object]":
            transport = sibling(backend).make_transport()
            await transport.declare("default", None, change=False)
            receiver = await transport.subscribe("default", 1)
            task: asyncio.Task[object] = asyncio.ensure_future(receiver.receive(1))  # type: ignore[arg-type]
            for _ in range(5):
                await asyncio.sleep(0)
            return task

        async def consume() -> None:
            async with backend.consume() as messages:
                coming = asyncio.ensure_future(anext(messages))
                for _ in range(20):
                    await asyncio.sleep(0)
                await backend.publish("a", {"n": 1})
                async with bounds.within(2):
                    assert await coming == {"n": 1}

        pending = abandoned.run_until_complete(wait_in_vain())
        abandoned.close()
        pending._log_destroy_pending = False  # type: ignore[attr-defined]
        asyncio.run(consume())

    async def test_closing_ends_it_and_connect_opens_it_again(self, memory_backend: MemoryBackend) -> None:
        await memory_backend.publish("a", {"n": 1})
        await memory_backend.disconnect()
        await memory_backend.disconnect()
        with pytest.raises(BackendClosedError):
            await memory_backend.publish("a", {})
        with pytest.raises(BackendClosedError):
            memory_backend.consume()
        await memory_backend.connect()
        assert await first(memory_backend) == [{"n": 1}]


class TestBacklog:
    async def test_a_full_group_refuses_a_message_and_no_group_gets_it(self) -> None:
        backend = MemoryBackend(settings(max_backlog=2))
        async with backend:
            await backend.declare("slow", ["a"])
            await backend.declare("fast", ["#"])
            await backend.publish("a", {"n": 1})
            await backend.publish("a", {"n": 2}, delay=60)
            with pytest.raises(BackpressureError, match="max_backlog") as caught:
                await backend.publish("a", {"n": 3})
            assert caught.value.retryable
            assert not caught.value.maybe_accepted
            fast = await backend.stats("fast")
            assert (fast.waiting, fast.delayed) == (1, 1)
            assert await first(backend, group="slow") == [{"n": 1}]
            assert await first(backend, group="fast") == [{"n": 1}]
            await backend.publish("a", {"n": 3})

    async def test_publish_many_says_which_were_refused(self) -> None:
        backend = MemoryBackend(settings(max_backlog=2))
        async with backend:
            await backend.declare("g")
            with pytest.raises(PartialPublishError) as caught:
                await backend.publish_many([("a", {"n": n}) for n in range(5)])
        assert [index for index, _ in caught.value.failures] == [2, 3, 4]
        assert caught.value.total == 5


class TestTime:
    async def test_a_delayed_message_comes_when_its_time_has_come(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        await memory_backend.publish("a", {"n": 1}, delay=10)
        await memory_backend.publish("a", {"n": 2}, delay=5)
        await memory_backend.publish("a", {"n": 3})
        taken: list[dict[str, Any]] = []

        async def consume() -> None:
            async for message in memory_backend.consume():
                taken.append(dict(message))
                if len(taken) == 3:
                    return

        task = asyncio.create_task(consume())
        await manual_clock.advance(4.9)
        assert taken == [{"n": 3}]
        await manual_clock.advance(0.1)
        assert taken == [{"n": 3}, {"n": 2}]
        await manual_clock.advance(5)
        assert taken == [{"n": 3}, {"n": 2}, {"n": 1}]
        await task

    async def test_stats_count_what_waits_and_for_how_long(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        await memory_backend.declare("g")
        assert (await memory_backend.stats("g")).oldest is None
        await memory_backend.publish("a", {"n": 1})
        await memory_backend.publish("a", {"n": 2}, delay=100)
        await manual_clock.advance(30)
        stats = await memory_backend.stats("g")
        assert (stats.waiting, stats.in_flight, stats.delayed, stats.dead, stats.oldest) == (1, 0, 1, 0, 30)

    async def test_a_live_consumer_keeps_its_message_for_many_leases(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        await memory_backend.publish("a", {"n": 1})
        async with memory_backend.consume() as messages:
            message = await anext(messages)
            await manual_clock.advance(500)
            assert not message.lease_lost
            await message.ack()


class TestGroups:
    async def test_a_deleted_group_is_gone_with_all_it_held(self, memory_backend: MemoryBackend) -> None:
        await memory_backend.declare("g", ["a", "b.*"])
        await memory_backend.publish("a", {})
        assert await memory_backend.groups() == {"g": ("a", "b.*")}
        await memory_backend.delete_group("g")
        await memory_backend.delete_group("g")
        assert await memory_backend.groups() == {}
        await memory_backend.declare("g")
        assert (await memory_backend.stats("g")).waiting == 0

    async def test_declaring_again_replaces_the_patterns_and_none_leaves_them(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.declare("g", ["a"])
        await memory_backend.declare("g")
        assert await memory_backend.groups() == {"g": ("a",)}
        await memory_backend.declare("g", ["b"])
        assert await memory_backend.groups() == {"g": ("b",)}

    async def test_a_name_that_no_broker_could_carry_is_refused(self, memory_backend: MemoryBackend) -> None:
        with pytest.raises(InvalidNameError):
            await memory_backend.declare("a/b")
        with pytest.raises(InvalidNameError):
            await memory_backend.declare("g", [])

    async def test_what_is_given_back_comes_before_what_was_published_after_it(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.publish_many([("a", {"n": n}) for n in range(5)])
        async with memory_backend.consume(prefetch=3) as messages:
            assert await anext(messages) == {"n": 0}
        assert await first(memory_backend, 5) == [{"n": n} for n in range(5)]

    async def test_what_was_delivered_before_its_group_was_deleted_settles_nothing_of_the_new_one(
        self, memory_backend: MemoryBackend
    ) -> None:
        async with bounds.within(5):
            await memory_backend.publish("a", {"n": 1})
            async with memory_backend.consume(group="g") as old, memory_backend.consume(group="g") as other:
                before = await old.receive()
                await old.stop()
                await memory_backend.delete_group("g")
                await memory_backend.declare("g")
                await memory_backend.publish("a", {"n": 2})
                message = await other.receive()
                with pytest.raises(LeaseLostError):
                    await before.ack()
                assert (await memory_backend.stats("g")).in_flight == 1
                await message.ack()

    async def test_replaying_many_dead_letters_lets_others_work(self, memory_backend: MemoryBackend) -> None:
        async with memory_backend.consume() as messages:
            await memory_backend.publish_many([("a", {})] * 500)
            for _ in range(500):
                await (await messages.receive()).reject()
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(others())
        assert await memory_backend.dead_letters().replay_all() == 500
        beside.cancel()
        assert turns >= 4

    async def test_dead_letters_are_found_replayed_and_purged_by_id(self, memory_backend: MemoryBackend) -> None:
        async with memory_backend.consume() as messages:
            for id in ("one", "two", "three"):
                await memory_backend.publish("a", {}, id=id)
                await (await anext(messages)).reject("because")
        letters = memory_backend.dead_letters()
        assert [letter.id for letter in await letters.list()] == ["one", "two", "three"]
        assert [letter.id for letter in await letters.list(1)] == ["one"]
        found = await letters.get("two")
        assert found is not None
        assert found.reason == "because"
        assert await letters.get("four") is None
        assert await letters.purge("two", "four") == 1
        assert await letters.replay("one") == 1
        assert await letters.purge_all() == 1
        assert await letters.list() == []
        assert (await memory_backend.stats()).waiting == 1


def test_from_env_reads_the_queue_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE_NAMESPACE", "mine")
    monkeypatch.setenv("QUEUE_LEASE_SECONDS", "7.5")
    backend = MemoryBackend.from_env()
    assert (backend.settings.namespace, backend.settings.lease, backend.capabilities.lease) == ("mine", 7.5, 7.5)
    assert MemoryBackend.capabilities.lease == 30


def test_the_memory_transport_is_a_transport() -> None:
    async def make() -> Transport:
        return MemoryBackend().make_transport()

    assert asyncio.run(make()).batching.messages > 1
