"""Subscriptions: the inboxes that follow one another, and a suspect that is tried alone."""

import asyncio
import gc
import weakref
from typing import Any

import pytest
from engine_doubles import ScriptedReceiver, delivery, inbox_on, turns, within

from abe.backends.message_queue.base import Disposition
from abe.backends.message_queue.engine.inbox import Inbox
from abe.backends.message_queue.engine.subscription import GroupSubscription
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import BackendClosedError, BackendConnectionError, PermissionDeniedError
from abe.testing import ManualClock
from abe_contract_tests import bounds


async def consumed_with_a_suspect(backend: MemoryBackend, clock: ManualClock) -> GroupSubscription:
    """Return a consumer that has begun; a suspect comes to it once the lease of a consumer that died has run out."""
    await backend.declare("g", ["a"])
    await backend.publish("a", {})
    dead = await backend.make_transport().subscribe("g", 1)
    await dead.receive(1)
    subscription = backend.consume(group="g", keys=["a"], max_attempts=1)
    await subscription.__aenter__()
    return subscription


class TestGroupSubscription:
    async def test_a_start_that_failed_with_nobody_waiting_is_begun_anew(self, manual_clock: ManualClock) -> None:
        inbox = inbox_on(ScriptedReceiver(delivery(1)), manual_clock)
        fails, starts = asyncio.Event(), 0

        async def start(_: bool) -> Inbox:
            nonlocal starts
            starts += 1
            if starts == 1:
                await fails.wait()
                raise BackendConnectionError("gone")
            return inbox

        subscription = GroupSubscription(start)
        waiting = asyncio.create_task(subscription.receive())
        await turns()
        waiting.cancel()
        await asyncio.wait([waiting])
        fails.set()
        await turns()
        assert (await within(subscription.receive())).attempt == 1
        await subscription.aclose()

    async def test_a_suspect_is_tried_alone_and_what_was_beside_it_comes_back(self, manual_clock: ManualClock) -> None:
        made: list[tuple[bool, ScriptedReceiver]] = []
        scripts = [
            [delivery(1), delivery(2, attempt=4), delivery(3)],
            [delivery(2, attempt=4), delivery(3)],
            [delivery(4)],
        ]

        async def start(alone: bool) -> Inbox:
            receiver = ScriptedReceiver(*scripts[len(made)])
            made.append((alone, receiver))
            return inbox_on(receiver, manual_clock, alone=alone, prefetch=1 if alone else 8)

        subscription = GroupSubscription(start)
        first = await within(subscription.receive())
        waiting = asyncio.create_task(subscription.receive())
        await turns()
        assert not waiting.done(), "something is in hand still"
        assert [(item.delivery.native, item.disposition) for item in made[0][1].settled] == [
            (2, Disposition.RELEASE),
            (3, Disposition.RELEASE),
        ]
        await within(first.ack())
        suspect = await within(waiting)
        assert (suspect.id, suspect.attempt) == ("2", 4)
        await within(suspect.ack())
        third = await within(subscription.receive())
        fourth = await within(subscription.receive())
        assert (third.id, fourth.id) == ("3", "4")
        assert [alone for alone, _ in made] == [False, True, False]
        await within(third.ack())
        await within(subscription.aclose())

    async def test_a_suspect_waits_no_longer_than_a_lease_for_what_is_in_hand(self, manual_clock: ManualClock) -> None:
        scripts = [[delivery(1), delivery(2, attempt=4)], [delivery(2, attempt=4)]]

        async def start(alone: bool) -> Inbox:
            return inbox_on(ScriptedReceiver(*scripts.pop(0)), manual_clock, alone=alone, prefetch=1 if alone else 8)

        subscription = GroupSubscription(start)
        first = await within(subscription.receive())
        waiting = asyncio.create_task(subscription.receive())
        await turns()
        await manual_clock.advance(31)
        assert (await within(waiting)).id == "2"
        await within(first.ack())
        await within(subscription.aclose())

    async def test_one_that_is_stopped_between_two_inboxes_ends_and_subscribes_no_more(
        self, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("abe.backends.message_queue.engine.subscription._RESUBSCRIBE", lambda _: 3600.0)
        receiver, starts = ScriptedReceiver(delivery(1), delivery(2, attempt=4)), 0

        async def start(_: bool) -> Inbox:
            nonlocal starts
            starts += 1
            if starts == 1:
                return inbox_on(receiver, manual_clock)
            raise BackendConnectionError("away")

        for in_hand in (True, False):
            starts = 0
            receiver = ScriptedReceiver(delivery(1), delivery(2, attempt=4))
            subscription = GroupSubscription(start)
            message = await within(subscription.receive())
            if not in_hand:
                await within(message.ack())
            waiting = asyncio.create_task(subscription.receive())
            await turns(60)
            assert starts == (1 if in_hand else 2)
            await within(subscription.stop())
            for task in (waiting, asyncio.create_task(subscription.receive())):
                with pytest.raises(BackendClosedError):
                    await within(task)
            if in_hand:
                await within(message.ack())
            await turns(60)
            assert starts == (1 if in_hand else 2)
            await within(subscription.aclose())

    async def test_inboxes_that_were_followed_are_not_kept(self, manual_clock: ManualClock) -> None:
        made: list[weakref.ref[Inbox]] = []

        async def start(alone: bool) -> Inbox:
            receiver = ScriptedReceiver(delivery(len(made), attempt=1 if alone else 4))
            inbox = inbox_on(receiver, manual_clock, alone=alone, prefetch=1)
            made.append(weakref.ref(inbox))
            return inbox

        subscription = GroupSubscription(start)
        for _ in range(6):
            await within((await within(subscription.receive())).ack())
        await turns(60)
        gc.collect()
        assert len(made) > 10
        assert sum(inbox() is not None for inbox in made) <= 3
        await within(subscription.aclose())

    async def test_a_change_that_failed_is_begun_anew_and_the_first_inbox_still_closes(
        self, manual_clock: ManualClock
    ) -> None:
        made: list[Inbox] = []

        async def start(_: bool) -> Inbox:
            if made:
                raise PermissionDeniedError("no")
            made.append(inbox_on(ScriptedReceiver(delivery(1), delivery(2, attempt=4)), manual_clock))
            return made[0]

        subscription = GroupSubscription(start)
        message = await within(subscription.receive())
        for _ in range(2):
            waiting = asyncio.create_task(subscription.receive())
            await turns()
            await manual_clock.advance(31)
            with pytest.raises(PermissionDeniedError):
                await within(waiting)
        await within(message.ack())
        while not made[0].closed:  # noqa: ASYNC110 - an inbox tells nobody
            await asyncio.sleep(0)
        await turns()
        assert not [task for task in asyncio.all_tasks() if "_retire" in repr(task)]
        await within(subscription.aclose())

    async def test_a_change_does_not_wait_for_a_message_that_the_transport_saw_go(
        self, manual_clock: ManualClock
    ) -> None:
        lost = delivery(1)
        scripts = [[delivery(2, attempt=4), lost], [delivery(2, attempt=4)]]

        async def start(alone: bool) -> Inbox:
            return inbox_on(ScriptedReceiver(*scripts.pop(0)), manual_clock, alone=alone, prefetch=1 if alone else 8)

        subscription = GroupSubscription(start)
        await subscription.__aenter__()
        await turns()
        lost.lost = True
        assert (await within(subscription.receive())).id == "2"
        await within(subscription.aclose())

    async def test_patterns_that_are_changed_under_a_consumer_do_not_end_it(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        subscription = await consumed_with_a_suspect(memory_backend, manual_clock)
        await memory_backend.declare("g", ["#"])
        await manual_clock.advance(31)
        await within((await within(subscription.receive())).ack())
        await within(subscription.aclose())

    async def test_a_subscription_ends_with_its_session_also_between_two_inboxes(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subscription = await consumed_with_a_suspect(memory_backend, manual_clock)
        session = memory_backend._calls.session
        assert session is not None
        pausing = asyncio.Event()

        async def away(*_: Any) -> Any:
            raise BackendConnectionError("away")

        def pause(_: int) -> float:
            pausing.set()
            return 0.5

        monkeypatch.setattr(session.transport, "subscribe", away)
        monkeypatch.setattr("abe.backends.message_queue.engine.subscription._RESUBSCRIBE", pause)
        object.__setattr__(memory_backend.settings, "publish_timeout", 0.1)
        await manual_clock.advance(31)
        waiting = asyncio.create_task(subscription.receive())
        await within(pausing.wait())
        await within(memory_backend.disconnect())
        await within(memory_backend.connect())
        with pytest.raises(BackendClosedError):
            await within(waiting)
        await within(subscription.aclose())

    async def test_one_that_is_dropped_after_it_was_stopped_gives_its_message_back(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.publish("k", {})
        subscription = memory_backend.consume(group="g")
        await within(subscription.receive())
        await subscription.stop()
        del subscription
        gc.collect()
        async with bounds.within(5):
            while (await memory_backend.stats("g")).waiting != 1:  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0)
