"""A broker that is short of memory stops reading from those that publish."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.errors import AbeError, BackendConnectionError, BackpressureError, PublishUnknownError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Outgoing
from abe_backend_rabbitmq._connection import Link
from abe_contract_tests import bounds
from abe_contract_tests.accounting import Accounting
from abe_contract_tests.services import RabbitMQShell

pytestmark = pytest.mark.xdist_group("rabbitmq-faults")


class TestMemoryAlarm:
    @pytest.fixture
    async def alarm(self, shell: RabbitMQShell) -> AsyncIterator[Callable[[bool], Awaitable[None]]]:
        """Raise a real alarm, or end it."""

        async def alarm(on: bool) -> None:
            limit = "0.000001" if on else "0.4"
            await shell.evaluate(f"vm_memory_monitor:set_vm_memory_high_watermark({limit}).")
            async with bounds.within(10):
                while (await shell.evaluate("rabbit_alarm:get_alarms().") != "[]") is not on:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

        yield alarm
        await alarm(False)

    async def test_publishers_wait_and_are_told_the_truth_while_consumers_go_on(
        self, lab: Any, shell: RabbitMQShell, alarm: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "abe.rabbitmq")
        accounts = Accounting()
        backend = await lab.backend(groups={"g": ()}, publish_timeout=1.0)
        for _ in range(5):
            await accounts.publish(backend, "k", {})
        async with backend.consume(group="g") as subscription, bounds.within(30):
            first = await subscription.receive()
            await alarm(True)
            # The broker does not read on once it has seen the first.
            assert await accounts.publish(backend, "k", {}) == "unknown"
            for _ in range(3):
                assert await accounts.publish(backend, "k", {}) == "rejected"
            refusals = [error for error in accounts.errors.values() if isinstance(error, BackpressureError)]
            assert len(refusals) == 3
            assert "short of memory or disk" in str(refusals[0])
            accounts.delivered(first)
            await first.ack()
            for _ in range(4):
                message = await subscription.receive()
                accounts.delivered(message)
                await message.ack()
            async with bounds.within(5):
                while [(q.ready, q.unacknowledged) for q in await shell.counts(lab.names.queue("g"))] != [(0, 0)]:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            waiting = asyncio.create_task(accounts.publish(backend, "k", {}))
            await alarm(False)
            await waiting
            assert await accounts.publish(backend, "k", {}) == "ok"
            while not accounts.complete or accounts.published("unknown") - accounts.deliveries.keys():
                message = await subscription.receive()
                accounts.delivered(message)
                await message.ack()
        accounts.check()
        ours = [record.getMessage() for record in caplog.records if record.name == "abe.rabbitmq"]
        assert [re.sub("at .* takes", "takes", text) for text in ours] == [
            "rabbitmq takes no messages now (low on memory): publishers wait",
            "rabbitmq takes messages again",
        ]

    async def test_who_waits_when_it_ends_is_let_through(self, lab: Any, alarm: Any) -> None:
        backend = await lab.backend(groups={"g": ()}, publish_timeout=20.0)
        await alarm(True)
        publishing = [asyncio.create_task(backend.publish("k", {"n": n})) for n in range(300)]
        await asyncio.wait(publishing, timeout=0.3)
        assert not any(task.done() for task in publishing)
        publishing += [asyncio.create_task(backend.publish("k", {"n": n})) for n in range(300, 600)]
        await alarm(False)
        async with bounds.within(10):
            await asyncio.gather(*publishing)
            async with backend.consume(group="g") as subscription:
                numbers = [(await anext(subscription))["n"] for _ in range(600)]
                assert (await backend.stats("g")).waiting == 0
        assert sorted(numbers) == list(range(600))

    async def test_a_settlement_that_needs_to_publish_waits_and_is_carried_out(self, lab: Any, alarm: Any) -> None:
        backend = await lab.backend(groups={"g": ()}, publish_timeout=10.0)
        for number in range(3):
            await backend.publish("k", {"n": number})
        async with backend.consume(group="g") as subscription, bounds.within(30):
            messages = [await subscription.receive() for _ in range(3)]
            await alarm(True)
            settlements = [asyncio.create_task(messages[0].nack(0.1)), asyncio.create_task(messages[1].reject("no"))]
            await messages[2].ack()
            await asyncio.wait(settlements, timeout=0.3)
            await alarm(False)
            await asyncio.gather(*settlements)
            again = await subscription.receive()
            assert (again["n"], again.attempt) == (0, 2)
            await again.ack()
        assert [letter.reason for letter in await backend.dead_letters("g").list()] == ["no"]
        assert (await backend.stats("g")).waiting == 0

    async def test_a_backlog_is_drained_although_one_handler_in_ten_fails(
        self, lab: Any, shell: RabbitMQShell, alarm: Any
    ) -> None:
        publisher = await lab.backend(groups={"g": ()})
        await publisher.publish_many([("k", {"n": n}) for n in range(300)])
        consumer = await lab.backend(publish_timeout=3.0)
        done: set[int] = set()
        failed = 0
        some = asyncio.Event()

        async def handle(message: dict[str, Any]) -> None:
            nonlocal failed
            if message["n"] % 10 == 0 and message["n"] not in first:
                first.add(message["n"])
                failed += 1
                raise ConnectionError("not yet")
            done.add(message["n"])
            some.set()

        first: set[int] = set()
        await alarm(True)
        async with AsyncLoopConsumer(consumer, "g", concurrency=5) as worker:
            running = asyncio.create_task(worker.run(handle))
            async with bounds.within(30):
                while len(done) < 300:
                    some.clear()
                    await some.wait()
            async with bounds.within(8):
                await worker.shutdown()
                await running
        assert failed == 30
        async with bounds.within(10):
            while [(q.ready, q.unacknowledged) for q in await shell.counts(lab.names.queue("g"))] != [(0, 0)]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def test_what_is_given_up_goes_to_the_dead_letters_and_holds_nobody_up(self, lab: Any, alarm: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        await backend.publish_many([("k", {"n": n}) for n in range(60)])
        await alarm(True)
        async with backend.consume(group="g", prefetch=10) as subscription, bounds.within(40):
            rejecting: list[asyncio.Task[None]] = []
            for _ in range(60):
                message = await subscription.receive()
                if message["n"] % 2:
                    rejecting.append(asyncio.create_task(message.reject("no")))
                else:
                    await message.ack()
            await asyncio.gather(*rejecting)
            while (await backend.stats("g")).dead < 30:  # noqa: ASYNC110 - RabbitMQ moves them by itself
                await asyncio.sleep(0.05)
            letters = await backend.dead_letters("g").list()
        assert sorted(json.loads(letter.body)["n"] for letter in letters) == list(range(1, 60, 2))

    async def test_requests_and_consumers_that_come_meanwhile_are_answered(self, lab: Any, alarm: Any) -> None:
        backend = await lab.backend(groups={"g": ()}, publish_timeout=2.0)
        await backend.publish("k", {"n": 1})
        await alarm(True)
        with suppress(AbeError):
            await backend.publish("k", {"n": 2})  # the connection to publish is blocked from now on
        for here in (backend, await lab.backend(publish_timeout=2.0)):
            async with bounds.within(6):
                assert await here.groups() == {"g": ("#",)}
                await here.ping()
                assert (await here.stats("g")).dead == 0
                with pytest.raises((BackpressureError, BackendConnectionError)):
                    await here.declare("h")
                assert await here.dead_letters("g").list() == []
        async with bounds.within(10):
            second = await lab.backend(publish_timeout=2.0)
            async with second.consume(group="g") as subscription:
                assert (await anext(subscription))["n"] in {1, 2}
            await second.disconnect()

    async def test_a_channel_asked_for_meanwhile_is_had_or_fails_with_its_connection(
        self, lab: Any, alarm: Any, until: Callable[..., Awaitable[None]]
    ) -> None:
        """An event of aiormq's, which the end of a connection does not set, would keep it waiting for ever."""
        link = Link(lab.settings(), "test")
        try:
            connection = await link.get()
            channel = await connection.channel()
            await alarm(True)
            publishing = channel.publish([Outgoing("", "nobody", _wire.NEWS, b"body", "")])
            await until(lambda: connection.blocked)
            asking = [asyncio.create_task(connection.channel()) for _ in range(3)]
            await asyncio.sleep(0)  # they have asked, and nothing was answered yet
            connection._abort()  # as where the node is killed, or the path to it is cut
            async with bounds.within(5):
                outcomes = await asyncio.gather(*asking, return_exceptions=True)
                assert [type(each) for each in await publishing] == [PublishUnknownError]
            assert [type(each) for each in outcomes] == [BackendConnectionError] * 3
        finally:
            async with bounds.within(5):
                await link.close()

    async def test_closing_is_bounded_and_gives_back_what_is_held(
        self, lab: Any, shell: RabbitMQShell, alarm: Any
    ) -> None:
        backend = await lab.backend(groups={"g": ()}, publish_timeout=1.0, close_timeout=0.5)
        for number in range(10):
            await backend.publish("k", {"n": number})
        subscription = backend.consume(group="g")
        await anext(subscription)
        await alarm(True)
        with pytest.raises(PublishUnknownError):
            await backend.publish("k", {"n": 10})
        async with bounds.within(6):
            await backend.disconnect()
        await alarm(False)
        again = await lab.backend()
        async with again.consume(group="g") as subscription, bounds.within(10):
            numbers = {(await anext(subscription))["n"] for _ in range(10)}
        assert numbers - {10} >= set(range(9))
