"""What is left of a message when connections and nodes break: nothing lost, and every second delivery has its reason."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from abe.backends.message_queue.base import Publication
from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.errors import AbeError, BackendConnectionError, LeaseLostError, PublishUnknownError
from abe_backend_rabbitmq import RabbitMQBackend
from abe_contract_tests import bounds
from abe_contract_tests.accounting import Accounting
from abe_contract_tests.services import RabbitMQShell
from abe_contract_tests.services._process import ProcessService

pytestmark = pytest.mark.xdist_group("rabbitmq-faults")


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
