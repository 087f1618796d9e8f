"""What is left of a message when connections and servers break: nothing lost, and every second delivery has its reason."""

import asyncio
import gc
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.errors import AbeError, BackendConnectionError, LeaseLostError, PublishUnknownError
from abe_backend_redis import RedisBackend
from abe_contract_tests import bounds
from abe_contract_tests.accounting import Accounting

Until = Callable[..., Awaitable[None]]


@pytest.fixture(autouse=True)
async def nothing_unretrieved() -> AsyncIterator[None]:
    """Fail on what only the event loop would complain of: exceptions that nobody looked at, tasks left pending."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
    yield
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


class Traffic:
    """Publishes and consumes until told to stop, and keeps the accounts."""

    def __init__(self, publisher: RedisBackend, consumer: RedisBackend) -> None:
        self.accounts = Accounting()
        self.finished = 0
        self._handled = asyncio.Event()
        self._publisher = publisher
        self._consumer = AsyncLoopConsumer(consumer, "g", concurrency=20)
        self._publishing = True

    async def run(self, faults: Callable[["Traffic"], Awaitable[None]], *, within: float = 20.0) -> None:
        await self._publisher.declare("g")
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


class TestKilledConnections:
    @pytest.mark.parametrize("name", ["abe-publish", "abe-control", "abe-read-g"])
    async def test_each_may_be_cut_again_and_again_under_load(self, lab: Any, name: str) -> None:
        async def cut(traffic: Traffic) -> None:
            for _ in range(8):
                await traffic.some()
                for client in await lab.redis.client_list():
                    if client["name"] == name:
                        await lab.redis.client_kill_filter(_id=client["id"])

        backend = await lab.backend()
        traffic = Traffic(backend, backend)
        await traffic.run(cut)
        stats = await backend.stats("g")
        unknown = len(traffic.accounts.published("unknown"))
        assert (stats.waiting, stats.in_flight, stats.delayed, stats.dead) == (0, 0, 0, 0), f"{unknown} unknown"

    async def test_a_message_in_a_handler_is_settled_on_a_new_connection(self, lab: Any, until: Until) -> None:
        backend = await lab.backend(groups={"g": ()})
        await backend.publish("k", {"n": 1})
        async with backend.consume(group="g") as subscription, bounds.within(5):
            message = await subscription.receive()
            for name in ("abe-control", "abe-read-g"):
                [client] = [each for each in await lab.redis.client_list() if each["name"] == name] or [None]
                if client is not None:
                    await lab.redis.client_kill_filter(_id=client["id"])
            await message.ack()
            await backend.publish("k", {"n": 2})
            assert await subscription.receive() == {"n": 2}
        assert await lab.redis.xlen(lab.names.queue("g")) == 1


class TestFrozenServer:
    async def test_publish_says_unknown_and_the_backend_lives_on(self, launch: Any, lab_at: Any) -> None:
        service = launch()
        lab = lab_at(service.url)
        backend = await lab.backend(groups={"g": ()}, publish_timeout=0.5, connect_timeout=0.5)
        await backend.publish("k", {"n": 0})
        service.pause()
        loop = asyncio.get_running_loop()
        started = loop.time()
        outcomes = await asyncio.gather(*(backend.publish("k", {"n": n}) for n in range(1, 4)), return_exceptions=True)
        limit = backend.settings.publish_timeout
        assert 0.8 * limit < loop.time() - started < limit + 1.0 * bounds.slowness(started)
        assert [type(outcome) for outcome in outcomes] == [PublishUnknownError] * 3
        service.resume()
        async with bounds.within(5):
            while True:
                try:
                    await backend.publish("k", {"n": 4})
                except AbeError:
                    continue
                break
        async with backend.consume(group="g") as subscription, bounds.within(5):
            seen = set()
            while 4 not in seen:
                seen.add((await anext(subscription))["n"])
        assert {0, 4} <= seen

    async def test_closing_a_consumer_meanwhile_doubles_nothing_that_is_being_published(
        self, launch: Any, lab_at: Any, until: Until
    ) -> None:
        service = launch()
        backend = await lab_at(service.url).backend(groups={"orders": (), "g": ()}, publish_timeout=20.0)
        subscription: Any = backend.consume(group="g")
        await subscription.__aenter__()
        link = subscription._inbox._receiver._link
        await link.get()
        await backend.publish("k", {"n": 0})
        service.pause()
        publishing = asyncio.gather(*(backend.publish("k", {"n": n}) for n in range(1, 10)))
        closing = asyncio.create_task(subscription.aclose())

        async def given_up() -> bool:
            return not link._wire.alive

        try:
            await until(given_up)
        finally:
            service.resume()
        await asyncio.gather(publishing, closing)
        assert (await backend.stats("orders")).waiting == 10

    async def test_no_message_is_lost_over_a_pause_under_load(self, launch: Any, lab_at: Any) -> None:
        service = launch()

        async def freeze(traffic: Traffic) -> None:
            for _ in range(2):
                await traffic.some()
                service.pause()
                try:
                    await asyncio.sleep(2.5 * backend.settings.publish_timeout)  # the fault itself
                finally:
                    service.resume()
            await traffic.some()

        backend = await lab_at(service.url).backend(publish_timeout=0.4, connect_timeout=0.4)
        await Traffic(backend, backend).run(freeze)

    async def test_closing_is_bounded(self, launch: Any, lab_at: Any) -> None:
        service = launch()
        backend = await lab_at(service.url).backend(close_timeout=0.5)
        await backend.publish("k", {})
        subscription = backend.consume(group="g")
        message = await anext(subscription)
        assert message == {}
        service.pause()
        async with bounds.within(4):
            await backend.disconnect()
        service.resume()


class TestRestartedServer:
    @pytest.mark.parametrize("crash", [True, False], ids=["killed", "in order"])
    async def test_publishing_and_consuming_go_on(self, launch: Any, lab_at: Any, crash: bool) -> None:
        service = launch("--appendfsync", "always")

        async def restart(traffic: Traffic) -> None:
            for _ in range(2):
                await traffic.some()
                await asyncio.to_thread(service.kill if crash else service.terminate)
                await asyncio.to_thread(service.start)
            await traffic.some()

        lab = lab_at(service.url)
        await lab.redis.aclose()
        backend = await lab.backend()
        await Traffic(backend, backend).run(restart)

    async def test_what_waits_outlives_the_server(self, launch: Any, lab_at: Any) -> None:
        service = launch("--appendfsync", "always", server="redis8")
        lab = lab_at(service.url)
        backend = await lab.backend(groups={"g": ()})
        await asyncio.gather(*(backend.publish("k", {"n": n}) for n in range(100)))
        await backend.publish("k", {"n": 100}, delay=0.2)
        await asyncio.to_thread(service.kill)
        await asyncio.to_thread(service.start)
        async with backend.consume(group="g") as subscription, bounds.within(10):
            assert [(await anext(subscription))["n"] for _ in range(101)] == list(range(101))

    async def test_a_replica_is_left_for_the_server_that_took_over(
        self, launch: Any, lab_at: Any, until: Until
    ) -> None:
        """As after a failover behind one address: the old server is read-only and keeps its connections."""
        lab = lab_at(launch().url)
        backend = await lab.backend(groups={"g": ()})
        await backend.publish("k", {"n": 1})
        before = {client["id"] for client in await lab.redis.client_list() if client["name"] == "abe-publish"}
        await lab.redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        publishing = asyncio.create_task(backend.publish("k", {"n": 2}))

        async def left() -> bool:
            return not before & {client["id"] for client in await lab.redis.client_list()}

        async with bounds.within(5):
            await until(left)
            await lab.redis.execute_command("REPLICAOF", "NO", "ONE")
            await publishing
        assert (await backend.stats("g")).waiting == 2


class TestDeletedUnderneath:
    @pytest.mark.parametrize("what", ["stream", "everything", "group"])
    async def test_it_is_made_again(
        self, launch: Any, lab_at: Any, what: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        lab = lab_at(launch().url)
        caplog.set_level(logging.WARNING)
        backend = await lab.backend(groups={"g": ()})
        async with backend.consume(group="g") as subscription, bounds.within(10):
            await backend.publish("k", {"n": 1})
            message = await subscription.receive()
            if what == "stream":
                await lab.redis.delete(lab.names.queue("g"))
            elif what == "everything":
                await lab.redis.flushall()
            else:
                await lab.redis.xgroup_destroy(lab.names.queue("g"), "group")
            await backend.publish("k", {"n": 2})
            found = await subscription.receive()
            while found != {"n": 2}:
                found = await subscription.receive()
            await found.ack()
            try:
                await message.ack()
            except LeaseLostError:
                assert message.lease_lost
        assert any("deleted underneath" in text for text in caplog.messages)
        assert not [text for text in caplog.messages if re.search("Traceback|ERR ", text)]

    async def test_a_consumer_with_patterns_keeps_them(self, launch: Any, lab_at: Any, until: Until) -> None:
        lab = lab_at(launch().url)
        backend = await lab.backend()
        async with backend.consume(group="g", keys=["orders.*"]):
            await lab.redis.flushall()

            async def made_again() -> bool:
                return bool(await lab.redis.hexists(lab.names.groups, "g"))

            await until(made_again)
            assert await backend.groups() == {"g": ("orders.*",)}


class TestClosing:
    async def test_nothing_is_left_of_a_backend(self, lab: Any, until: Until) -> None:
        before = {client["id"] for client in await lab.redis.client_list()}
        for _ in range(5):
            backend = RedisBackend(lab.settings())
            async with backend, backend.consume(group="g") as subscription:
                await backend.publish("k", {"n": 1})
                await anext(subscription)

        async def gone() -> bool:
            return {client["id"] for client in await lab.redis.client_list()} <= before

        await until(gone)
        names = {consumer["name"] for consumer in await lab.redis.xinfo_consumers(lab.names.queue("g"), "group")}
        assert names <= {b"released"}

    async def test_who_waits_for_a_connection_may_leave(self, one_lab: Any) -> None:
        backend = RedisBackend(one_lab.settings(url="redis://127.0.0.1:1/0"))
        for turns in range(6):
            pinging = asyncio.create_task(backend.ping())
            for _ in range(turns):
                await asyncio.sleep(0)
            pinging.cancel()
            with pytest.raises((asyncio.CancelledError, BackendConnectionError)):
                await pinging
        await backend.disconnect()
