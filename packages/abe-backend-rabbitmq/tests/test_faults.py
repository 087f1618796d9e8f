"""What is left of a message when connections, queues and nodes break: nothing lost, and every second delivery has its reason."""

import asyncio
import gc
import json
import logging
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from abe.backends.message_queue.base import Publication
from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    LeaseLostError,
    PublishUnknownError,
)
from abe_backend_rabbitmq import RabbitMQBackend, _wire
from abe_backend_rabbitmq._channel import Outgoing
from abe_backend_rabbitmq._connection import Link
from abe_contract_tests import bounds
from abe_contract_tests.accounting import Accounting
from abe_contract_tests.services import RabbitMQShell, rabbitmq_service
from abe_contract_tests.services._process import ProcessService

pytestmark = pytest.mark.xdist_group("rabbitmq-faults")

PROCESSES = {"ABE_TEST_SERVICES": "processes"}

HOLDER = """
import asyncio, json, sys
import aio_pika

async def main(url, lock, dead):
    channel = await (await aio_pika.connect(url)).channel()
    await channel.declare_queue(lock, exclusive=True)
    taken = [await (await channel.get_queue(dead)).get() for _ in range(2)] if dead else []
    print(len(taken), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*json.loads(sys.argv[1])))
"""
"""Holds a lock, and two dead letters in its hands, until it is killed."""


@pytest.fixture(scope="module")
def victim() -> Iterator[ProcessService]:
    """A node that the tests here hurt, one after the other."""
    service = rabbitmq_service(environ=PROCESSES)
    assert isinstance(service, ProcessService)
    with service:
        yield service


@pytest.fixture(scope="module")
def shell(victim: ProcessService) -> Iterator[RabbitMQShell]:
    shell = RabbitMQShell(victim)
    yield shell
    shell.stop()


@pytest.fixture(autouse=True)
async def nothing_unretrieved() -> AsyncIterator[None]:
    """Fail on what only the event loop would complain of: exceptions that nobody looked at, tasks left pending."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
    yield
    gc.collect()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=5 * bounds.slowness())
    assert [task for task in left if not task.done()] == []
    assert complaints == []


@pytest.fixture
async def lab(victim: ProcessService, lab_at: Any) -> Any:
    return lab_at(victim.url)


@asynccontextmanager
async def frozen(service: ProcessService) -> AsyncIterator[None]:
    service.pause()
    try:
        yield
    finally:
        service.resume()


class Traffic:
    """Publishes and consumes until told to stop, and keeps the accounts."""

    def __init__(self, publisher: RabbitMQBackend, consumer: RabbitMQBackend) -> None:
        self.accounts = Accounting()
        self.finished = 0
        self._handled = asyncio.Event()
        self._publisher = publisher
        self._consumer = AsyncLoopConsumer(consumer, "g", concurrency=20)
        self._publishing = True

    async def run(self, faults: Callable[["Traffic"], Awaitable[None]], *, within: float = 60.0) -> None:
        consuming = asyncio.create_task(self._consumer.run(self._handle))
        publishing = [asyncio.create_task(self._publish()) for _ in range(20)]
        try:
            async with bounds.within(within):
                await faults(self)
                self._publishing = False
                await asyncio.gather(*publishing)
                while not self.accounts.complete:
                    await self._progress()
                await self._consumer.shutdown()
                await consuming
        finally:
            for task in (consuming, *publishing):
                task.cancel()
            await asyncio.gather(consuming, *publishing, return_exceptions=True)
        self.accounts.check(duplicates_allowed=True)

    async def some(self, more: int = 200) -> None:
        """Return when that many more messages were handled."""
        goal = self.finished + more
        while self.finished < goal:
            await self._progress()

    async def _progress(self) -> None:
        self._handled.clear()
        await self._handled.wait()

    async def _publish(self) -> None:
        while self._publishing:
            await self.accounts.publish(self._publisher, "k", {"x": "y" * 100})

    async def _handle(self, message: dict[str, Any]) -> None:
        self.accounts.delivered(message)
        self.finished += 1
        self._handled.set()


class TestClosedConnections:
    @pytest.mark.parametrize("name", ["abe-publish", "abe-consume", ""])
    async def test_each_may_be_closed_again_and_again_under_load(
        self, lab: Any, shell: RabbitMQShell, name: str
    ) -> None:
        closed = 0

        async def close(traffic: Traffic) -> None:
            nonlocal closed
            for _ in range(5):
                await traffic.some()
                closed += await shell.close_connections(name)
            await traffic.some()

        backend = await lab.backend(groups={"g": ()})
        traffic = Traffic(backend, backend)
        await traffic.run(close)
        assert closed >= 5
        stats = await backend.stats("g")
        assert (stats.waiting, stats.in_flight, stats.delayed, stats.dead) == (0, 0, 0, 0)

    async def test_a_message_in_a_handler_comes_again_and_its_settlement_says_so(
        self, lab: Any, shell: RabbitMQShell
    ) -> None:
        backend = await lab.backend(groups={"g": ()})
        await backend.publish("k", {"n": 1})
        async with backend.consume(group="g") as subscription, bounds.within(10):
            message = await subscription.receive()
            assert await shell.close_connections("abe-consume") == 1
            again = await subscription.receive()
            assert (again, again.id, again.attempt) == (message, message.id, 1)
            with pytest.raises(LeaseLostError):
                await message.nack()
            assert message.lease_lost
            await again.ack()
        assert [(found.ready, found.unacknowledged) for found in await shell.counts(lab.names.queue("g"))] == [(0, 0)]

    async def test_a_full_buffer_that_was_lost_makes_room_for_the_same_messages(
        self, lab: Any, shell: RabbitMQShell
    ) -> None:
        backend = await lab.backend(groups={"g": ()})
        await asyncio.gather(*(backend.publish("k", {"n": n}) for n in range(8)))
        async with backend.consume(group="g", prefetch=4) as subscription, bounds.within(10):
            while [found.unacknowledged for found in await shell.counts(lab.names.queue("g"))] != [4]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert await shell.close_connections("abe-consume") == 1
            done = set[int]()
            while len(done) < 8:
                message = await subscription.receive()
                with suppress(LeaseLostError):  # it was handed out before the end of the connection was seen
                    await message.ack()
                    done.add(message["n"])

    async def test_the_client_library_logs_nothing_of_it(
        self, lab: Any, shell: RabbitMQShell, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "abe")
        backend = await lab.backend(groups={"g": ()})
        async with backend.consume(group="g") as subscription, bounds.within(20):
            for number in range(3):
                await backend.publish("k", {"n": number}, delay=0.1)
                assert await anext(subscription) == {"n": number}
                for name in ("abe-publish", "abe-consume", "abe-control"):
                    await shell.close_connections(name)
                for queue in (lab.names.queue("g"), lab.names.waiting("g", 0)):
                    await (await lab.pika()).queue_delete(queue)
        theirs = [record for record in caplog.records if record.name.startswith(("aiormq", "pamqp"))]
        assert [record.getMessage() for record in theirs if record.levelno >= logging.WARNING] == []
        assert lab.url.partition("@")[0] not in caplog.text

    async def test_an_event_loop_that_ends_amid_requests_says_nothing_of_them(self, lab: Any) -> None:
        program = await asyncio.create_subprocess_exec(
            *(sys.executable, "-X", "dev", "-W", "ignore::ResourceWarning", "-c", ENDS_AMID_REQUESTS, lab.url),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await program.communicate()
        assert (program.returncode, output.split()) == (0, [b"under", b"way"] * 20), errors.decode()
        assert errors.decode() == ""

    async def test_the_address_that_lives_is_found_again(self, lab: Any, shell: RabbitMQShell) -> None:
        backend = await lab.backend(url=f"amqp://127.0.0.1:1,{lab.url}", groups={"g": ()})
        for number in range(3):
            await backend.publish("k", {"n": number})
            assert await shell.close_connections("abe-publish") == 1
        async with backend.consume(group="g") as subscription, bounds.within(10):
            assert [(await anext(subscription))["n"] for _ in range(3)] == [0, 1, 2]


ENDS_AMID_REQUESTS = """
import asyncio, sys
from abe_backend_rabbitmq._connection import Link
from abe_backend_rabbitmq._control import Control
from abe_backend_rabbitmq._settings import RabbitMQSettings

async def main():
    asyncio.get_running_loop().slow_callback_duration = float("inf")  # it speaks of a busy machine, not of requests
    control = Control(Link(RabbitMQSettings(url=sys.argv[1]), "ends"))
    await control.count("abe-no-such-queue")
    begun = asyncio.Event()

    async def request(channel):
        begun.set()
        return await channel.queue_declare("abe-no-such-queue", passive=True)

    asyncio.ensure_future(control.call(request))
    await begun.wait()
    await asyncio.sleep(0)
    print("under way")

for _ in range(20):
    asyncio.run(main())
"""


async def killed(victim: ProcessService, shell: RabbitMQShell) -> None:
    """Kill the node. What the queues are called on disk is written first, which RabbitMQ does every five seconds.

    RabbitMQ 3.10 never finds the leader again of a queue that was made after that; no client can do anything about it.
    """
    await shell.evaluate("[ok = dets:sync(Table) || Table <- dets:all()].")
    await asyncio.to_thread(victim.kill)


class TestRestartedNode:
    @pytest.mark.parametrize("crash", [True, False], ids=["killed", "in order"])
    async def test_publishing_and_consuming_go_on(
        self, lab: Any, victim: ProcessService, shell: RabbitMQShell, crash: bool
    ) -> None:
        async def restart(traffic: Traffic) -> None:
            await traffic.some()
            await (killed(victim, shell) if crash else asyncio.to_thread(victim.terminate))
            await asyncio.to_thread(victim.start)
            await traffic.some()

        backend = await lab.backend(groups={"g": ()})
        await Traffic(backend, backend).run(restart, within=90)

    async def test_what_waits_outlives_the_node(self, lab: Any, victim: ProcessService, shell: RabbitMQShell) -> None:
        backend = await lab.backend(groups={"g": ()}, publish_timeout=30.0)
        await asyncio.gather(*(backend.publish("k", {"n": n}) for n in range(100)))
        await killed(victim, shell)
        started = asyncio.create_task(asyncio.to_thread(victim.start))
        async with backend.consume(group="g") as subscription, bounds.within(60):
            assert [(await anext(subscription))["n"] for _ in range(100)] == list(range(100))
        await started

    @pytest.mark.parametrize("crash", [True, False], ids=["killed", "in order"])
    async def test_what_fell_due_meanwhile_comes_as_soon_as_there_is_a_node(
        self, lab: Any, victim: ProcessService, shell: RabbitMQShell, crash: bool
    ) -> None:
        backend = await lab.backend(groups={"g": ()}, publish_timeout=30.0)
        async with backend.consume(group="g", prefetch=100) as subscription:
            await backend.publish_many([Publication("k", {"n": n}, delay=1.0) for n in range(40)])
            await backend.publish("k", {"n": 40})
            async with bounds.within(10):
                await (await subscription.receive()).nack(2.0)
            await (killed(victim, shell) if crash else asyncio.to_thread(victim.terminate))
            await asyncio.to_thread(victim.start)
            async with bounds.within(20):
                seen = set[int]()
                while seen != set(range(41)):
                    message = await subscription.receive()
                    seen.add(message["n"])
                    await message.ack()
        assert (await backend.stats("g")).delayed == 0

    async def test_with_no_node_each_call_ends_in_time(
        self, lab: Any, victim: ProcessService, shell: RabbitMQShell
    ) -> None:
        backend = await lab.backend(groups={"g": ()}, publish_timeout=1.0, close_timeout=0.5)
        await killed(victim, shell)
        try:
            async with bounds.within(8):
                with pytest.raises(AbeError):
                    await backend.publish("k", {})
                for call in (backend.stats("g"), backend.declare("h"), backend.dead_letters("g").list()):
                    with pytest.raises(BackendConnectionError):
                        await call
                await backend.disconnect()
        finally:
            await asyncio.to_thread(victim.start)


class TestFrozenNode:
    async def test_publish_says_unknown_and_the_backend_lives_on(self, lab: Any, victim: ProcessService) -> None:
        backend = await lab.backend(groups={"g": ()}, publish_timeout=0.5, connect_timeout=0.5)
        await backend.publish("k", {"n": 0})
        async with frozen(victim):
            loop = asyncio.get_running_loop()
            started = loop.time()
            outcomes = await asyncio.gather(
                *(backend.publish("k", {"n": n}) for n in range(1, 4)), return_exceptions=True
            )
            limit = backend.settings.publish_timeout
            assert 0.8 * limit < loop.time() - started < limit + 1.0 * bounds.slowness(started), outcomes
            assert [type(outcome) for outcome in outcomes] == [PublishUnknownError] * 3
        async with bounds.within(10):
            while True:
                try:
                    await backend.publish("k", {"n": 4})
                except AbeError:
                    continue
                break
        patient = await lab.backend()
        async with patient.consume(group="g") as subscription, bounds.within(10):
            seen = set[int]()
            while seen != {0, 1, 2, 3, 4}:
                seen.add((await anext(subscription))["n"])

    async def test_no_message_is_lost_over_a_pause_under_load(self, lab: Any, victim: ProcessService) -> None:
        async def freeze(traffic: Traffic) -> None:
            for _ in range(2):
                await traffic.some()
                async with frozen(victim):
                    await asyncio.sleep(2.5 * backend.settings.publish_timeout)  # the fault itself
            await traffic.some()

        patient = await lab.backend(groups={"g": ()})
        backend = await lab.backend(publish_timeout=0.4, connect_timeout=0.4)
        await Traffic(backend, patient).run(freeze)

    async def test_a_missed_heartbeat_ends_the_connection(
        self, lab: Any, victim: ProcessService, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A node that thaws has given up its consumers meanwhile, too: what they held comes again."""
        caplog.set_level(logging.WARNING, "abe")
        backend = await lab.backend(groups={"g": ()}, heartbeat=1, publish_timeout=2.0)
        await backend.publish("k", {"n": 1})
        async with backend.consume(group="g") as subscription, bounds.within(30):
            message = await subscription.receive()
            async with frozen(victim):
                while not message.lease_lost:  # noqa: ASYNC110 - the engine notices, and sets no event of ours
                    await asyncio.sleep(0.05)
            again = await subscription.receive()
            assert (again, again.attempt) == (message, 1)

    async def test_connecting_is_bounded(self, lab: Any, victim: ProcessService) -> None:
        backend = RabbitMQBackend(lab.settings(connect_timeout=0.3, publish_timeout=1.0))
        async with frozen(victim), bounds.within(4):
            with pytest.raises(BackendConnectionError, match=r"timed out after [\d.]+ s"):
                await backend.connect()
            with pytest.raises(AbeError):
                await backend.publish("k", {})
            await backend.disconnect()

    async def test_closing_is_bounded(self, lab: Any, victim: ProcessService) -> None:
        backend = await lab.backend(close_timeout=0.5)
        await backend.publish("k", {})
        subscription = backend.consume(group="g")
        assert await anext(subscription) == {}
        async with frozen(victim), bounds.within(5):
            await backend.disconnect()


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


class TestDeletedUnderneath:
    @staticmethod
    async def published_until_it_comes(
        backend: RabbitMQBackend, subscription: Any, key: str, payload: dict[str, Any]
    ) -> Any:
        """Publish until the group is there again. (Meanwhile it wants nothing: that is what deleting its queue means.)"""

        async def publish() -> None:
            while True:
                with suppress(AbeError):
                    await backend.publish(key, payload)
                await asyncio.sleep(0.05)

        publishing = asyncio.create_task(publish())
        try:
            while (message := await subscription.receive()) != payload:
                await message.ack()
            return message
        finally:
            publishing.cancel()
            await asyncio.wait([publishing])

    async def test_a_queue_is_made_again_under_its_consumer(
        self, lab: Any, shell: RabbitMQShell, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "abe")
        backend = await lab.backend(groups={"g": ()})
        async with backend.consume(group="g") as subscription, bounds.within(20):
            await backend.publish("k", {"n": 1})
            message = await subscription.receive()
            await (await lab.pika()).queue_delete(lab.names.queue("g"))
            found = await self.published_until_it_comes(backend, subscription, "k", {"n": 2})
            await found.ack()
            with pytest.raises(LeaseLostError):
                await message.nack()
        assert any("deleted underneath" in text for text in caplog.messages), caplog.messages
        assert not [text for text in caplog.messages if "Traceback" in text]

    @pytest.mark.parametrize("deleted_by", ["an operator", "the application"])
    async def test_consumers_of_a_queue_that_another_process_makes_again_at_once_are_served(
        self, lab: Any, deleted_by: str
    ) -> None:
        """RabbitMQ puts them on the new queue by itself, and throws away what that one sends them."""
        backend, other = await lab.backend(groups={"g": ()}), await lab.backend()
        async with backend.consume(group="g") as subscription, bounds.within(20):
            for number in range(6):
                await other.publish("k", {"n": number})
                while (await anext(subscription))["n"] != number:
                    pass
                if deleted_by == "an operator":
                    await (await lab.pika()).queue_delete(lab.names.queue("g"))
                else:
                    await other.delete_group("g")
                await other.declare("g")

    async def test_what_waits_for_its_time_comes_to_the_queue_that_is_made_again(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        await backend.publish_many([Publication("k", {"n": n}, delay=1.0) for n in range(40)])
        await (await lab.pika()).queue_delete(lab.names.queue("g"))
        await asyncio.sleep(1.2)  # all of them fall due, and the queue is not there
        await backend.declare("g")
        async with bounds.within(3), backend.consume(group="g") as subscription:
            assert {(await anext(subscription))["n"] for _ in range(40)} == set(range(40))

    async def test_the_queue_is_deleted_under_a_consumer_while_messages_wait_for_their_time(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        async with backend.consume(group="g") as subscription, bounds.within(10):
            await backend.publish_many([Publication("k", {"n": n}, delay=1.0) for n in range(40)])
            await (await lab.pika()).queue_delete(lab.names.queue("g"))
            assert {(await anext(subscription))["n"] for _ in range(40)} == set(range(40))

    async def test_the_levels_are_deleted_under_a_consumer(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        async with backend.consume(group="g") as subscription, bounds.within(20):
            for number in range(2):
                await backend.publish("k", {"n": number}, delay=0.8)
                assert await anext(subscription) == {"n": number}
                for level in range(4):
                    await (await lab.pika()).queue_delete(lab.names.waiting("g", level))
            await backend.publish("k", {"n": 2}, delay=0.8)
            assert await anext(subscription) == {"n": 2}

    async def test_a_group_that_is_full_when_messages_fall_due_gets_them_when_there_is_room(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()}, max_backlog=5)
        for number in range(5):
            await backend.publish("k", {"n": number})
        for number in range(5, 10):
            await backend.publish("k", {"n": number}, delay=0.2)
        async with backend.consume(group="g", prefetch=1) as subscription, bounds.within(10):
            first = await subscription.receive()
            await asyncio.sleep(1.0)  # those that are due find no room
            await first.ack()
            assert {(await anext(subscription))["n"] for _ in range(9)} == set(range(1, 10))

    async def test_everything_is_made_again(self, lab: Any, shell: RabbitMQShell) -> None:
        backend = await lab.backend()
        async with backend.consume(group="g") as subscription, bounds.within(30):
            await backend.publish("k", {"n": 1})
            assert await subscription.receive() == {"n": 1}
            await shell.delete(f"abe:{lab.namespace}")
            await self.published_until_it_comes(backend, subscription, "k", {"n": 2})
            assert await backend.groups() == {"g": ("#",)}

    async def test_a_consumer_with_patterns_keeps_them(self, lab: Any, shell: RabbitMQShell) -> None:
        backend = await lab.backend()
        async with backend.consume(group="g", keys=["orders.*"]) as subscription, bounds.within(20):
            await (await lab.pika()).queue_delete(lab.names.queue("g"))
            await self.published_until_it_comes(backend, subscription, "orders.made", {"n": 1})
            assert await backend.groups() == {"g": ("orders.*",)}

    async def test_an_exchange_comes_back_with_its_bindings(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        await backend.publish("k", {"n": 1})
        await (await lab.pika()).exchange_delete(lab.names.exchange)
        for number in (2, 3):
            await backend.publish("k", {"n": number})
        async with backend.consume(group="g") as subscription, bounds.within(10):
            assert [(await anext(subscription))["n"] for _ in range(3)] == [1, 2, 3]

    @pytest.mark.parametrize("name", ["later", "delay"])
    async def test_the_exchanges_of_delays_come_back(self, lab: Any, name: str) -> None:
        backend = await lab.backend(groups={"g": ()}, publish_timeout=1.0)
        await backend.publish("k", {"n": 1}, delay=0.1)
        await (await lab.pika()).exchange_delete(getattr(lab.names, name))
        await backend.publish("k", {"n": 2}, delay=0.1)
        async with backend.consume(group="g") as subscription, bounds.within(10):
            while (await anext(subscription))["n"] != 2:
                pass


class TestLockHolder:
    """A process that holds the lock of a namespace, and dies."""

    @pytest.fixture
    async def hold(self, lab: Any) -> AsyncIterator[Callable[..., Awaitable[asyncio.subprocess.Process]]]:
        processes: list[asyncio.subprocess.Process] = []

        async def hold(dead: str = "") -> asyncio.subprocess.Process:
            lock = lab.names.look("g") if dead else lab.names.lock
            arguments = json.dumps([lab.url + "?heartbeat=1", lock, dead])
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", HOLDER, arguments, stdout=asyncio.subprocess.PIPE
            )
            processes.append(process)
            assert process.stdout is not None
            assert int(await process.stdout.readline()) == (2 if dead else 0)
            return process

        yield hold
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def test_a_killed_one_frees_it_at_once(self, lab: Any, hold: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        process = await hold()
        declaring = asyncio.create_task(backend.declare("h"))
        await asyncio.wait([declaring], timeout=0.3)
        assert not declaring.done()
        process.kill()
        async with bounds.within(3):
            await declaring

    async def test_a_frozen_one_keeps_it_until_its_heartbeat_is_missed(self, lab: Any, hold: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        process = await hold()
        os.kill(process.pid, signal.SIGSTOP)
        declaring = asyncio.create_task(backend.declare("h"))
        await asyncio.wait([declaring], timeout=0.5)
        assert not declaring.done(), "the lock is held"
        await backend.publish("k", {})
        declaring.cancel()
        async with bounds.within(15):
            while True:
                try:
                    await backend.declare("h")
                except BackendConnectionError:
                    continue
                break

    async def test_dead_letters_in_its_hands_are_there_again(self, lab: Any, hold: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        for number in range(5):
            await backend.publish("k", {"n": number})
        async with backend.consume(group="g") as subscription, bounds.within(10):
            for _ in range(5):
                await (await subscription.receive()).reject("no")
        process = await hold(lab.names.dead("g"))
        listing = asyncio.create_task(backend.dead_letters("g").list())
        await asyncio.wait([listing], timeout=0.3)
        assert not listing.done()
        process.kill()
        async with bounds.within(5):
            letters = await listing
            while len(letters) < 5:  # the queue may take back what it held a moment after the lock is free
                letters = await backend.dead_letters("g").list()
            assert sorted(json.loads(letter.body)["n"] for letter in letters) == [0, 1, 2, 3, 4]
            assert await backend.dead_letters("g").replay_all() == 5
            async with backend.consume(group="g") as subscription:
                assert sorted([(await anext(subscription))["n"] for _ in range(5)]) == [0, 1, 2, 3, 4]


class TestConsumerTimeout:
    @pytest.fixture
    async def impatient(self, shell: RabbitMQShell) -> AsyncIterator[None]:
        """The node gives consumers 1.5 s, and looks at the clock ten times a second."""
        get = "{ok, T} = application:get_env(rabbit, consumer_timeout), {ok, I} = application:get_env(rabbit, channel_tick_interval), "
        before = await shell.evaluate(f'{get} iolist_to_binary(io_lib:format("~w ~w", [T, I])).')
        put = (
            "application:set_env(rabbit, consumer_timeout, %s), application:set_env(rabbit, channel_tick_interval, %s)."
        )
        await shell.evaluate(put % (1500, 100))
        yield
        await shell.evaluate(put % tuple(before.split()))

    async def test_it_is_warned_of_once_before_the_broker_loses_patience(
        self, lab: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "abe.rabbitmq")
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        transport._broker.consumer_timeout = 1.0
        receiver = await transport.subscribe("g", 10)
        try:
            await transport.send(lab.envelopes(2))
            started = asyncio.get_running_loop().time()
            found: list[Any] = []
            async with bounds.within(5):
                while len(found) < 2:
                    found += await receiver.receive(2)
                for each in found:
                    each.begun = True
                while not caplog.messages:  # noqa: ASYNC110 - a log sets no event
                    await asyncio.sleep(0.01)
                assert 0.7 < asyncio.get_running_loop().time() - started < 2.0 * bounds.slowness(started)
                await asyncio.sleep(0.5)  # nothing more is said of it
            assert len(caplog.messages) == 1
            assert "consumer_timeout" in caplog.messages[0]
            assert "'g'" in caplog.messages[0]
            assert not any(await receiver.ack(found, verify=True))
        finally:
            await receiver.close()

    async def test_who_settles_in_time_is_not_warned(self, lab: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING, "abe.rabbitmq")
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        transport._broker.consumer_timeout = 0.5
        receiver = await transport.subscribe("g", 10)
        loop = asyncio.get_running_loop()
        until = loop.time() + 1.5
        try:
            while loop.time() < until:
                await transport.send(lab.envelopes(1))
                [delivery] = await receiver.receive(1)
                delivery.begun = True
                await asyncio.sleep(0.1)  # the handler
                await receiver.ack([delivery], verify=False)
        finally:
            await receiver.close()
        assert caplog.messages == []

    async def test_when_the_broker_loses_patience_the_message_comes_again_and_the_subscription_goes_on(
        self, lab: Any, impatient: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "abe")
        backend = await lab.backend(groups={"g": ()})
        for number in range(3):
            await backend.publish("k", {"n": number})
        async with backend.consume(group="g") as subscription, bounds.within(15):
            slow = await subscription.receive()
            async with bounds.within(8):
                while not slow.lease_lost:  # noqa: ASYNC110 - the engine notices, and sets no event of ours
                    await asyncio.sleep(0.02)
            with pytest.raises(LeaseLostError):
                await slow.nack()
            found = [await subscription.receive() for _ in range(3)]
            assert sorted((message["n"], message.attempt) for message in found) == [(0, 1), (1, 1), (2, 1)]
            for message in found:
                await message.ack()
        assert (await backend.stats("g")).waiting == 0
        assert any("timed out" in text for text in caplog.messages), caplog.messages

    async def test_what_waits_for_a_slow_handler_is_no_attempt_and_goes_to_it_in_the_end(
        self, lab: Any, impatient: None
    ) -> None:
        backend = await lab.backend(groups={"g": ()})
        await asyncio.gather(*(backend.publish("k", {"n": number}) for number in range(24)))
        handled: Counter[int] = Counter()
        attempts: set[int] = set()
        async with backend.consume(group="g") as subscription, bounds.within(60):
            while len(handled) < 24:
                message = await subscription.receive()
                attempts.add(message.attempt)
                await asyncio.sleep(0.2)  # the handler: twenty of them take longer than the node gives
                with suppress(LeaseLostError):
                    await message.ack()
                    handled[message["n"]] += 1
        assert attempts == {1}
        assert set(handled.values()) == {1}
        stats = await backend.stats("g")
        assert (stats.waiting, stats.dead) == (0, 0)

    async def test_a_handler_that_takes_longer_than_the_node_gives_handles_its_message_all_the_same(
        self, lab: Any, impatient: None, until: Callable[..., Awaitable[None]]
    ) -> None:
        backend = await lab.backend(groups={"g": ()})
        await backend.publish("k", {"n": 1})
        runs = 0
        async with backend.consume(group="g", max_attempts=2) as subscription, bounds.within(60):
            async for message in subscription:
                if message["n"] == 2:
                    break
                runs += 1
                await until(lambda message=message: message.lease_lost)
                if runs == 1:
                    await backend.publish("k", {"n": 2})
        assert runs <= 2  # the second was in the buffer when the first was done
        async with bounds.within(10):
            while (await backend.stats("g")).waiting != 1:  # noqa: ASYNC110 - the second message is given back
                await asyncio.sleep(0.05)
        assert (await backend.stats("g")).dead == 0
