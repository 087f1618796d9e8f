"""Connections that go silent without a word, as behind a firewall that forgot them: noticed, left, and made anew."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from abe.backends.message_queue.base import Delivery
from abe.errors import AbeError, BackendConnectionError
from abe_backend_redis import RedisBackend, _broker, _connection, _protocol, _receiver
from abe_backend_redis._login import connect
from abe_contract_tests import bounds

Collect = Callable[..., Awaitable[list[Delivery]]]
Until = Callable[..., Awaitable[None]]

REPLY_TIMEOUT, IDLE = 0.6, 0.3


class Tunnel:
    """A way to the server that can lose connections without telling anybody."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = asyncio.Event()
        self._open.set()
        self._lost: list[asyncio.Event] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._ended = asyncio.Event()
        self.made = 0

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    def forget(self) -> None:
        """Swallow whatever the connections of now send, both ways, also that they are closed; new ones work."""
        for lost in self._lost:
            lost.set()
        self._lost.clear()

    def shut(self) -> None:
        """Swallow everything, of new connections too."""
        self._open.clear()
        self.forget()

    def reopen(self) -> None:
        self._open.set()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self._ended.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.made += 1
        lost = asyncio.Event()
        self._lost.append(lost)
        if not self._open.is_set():
            lost.set()
        back, forth = await asyncio.open_connection("127.0.0.1", self._port)
        for source, target in ((reader, forth), (back, writer)):
            task = asyncio.create_task(self._pump(source, target, lost))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, lost: asyncio.Event) -> None:
        try:
            while data := await source.read(65536):
                if not lost.is_set():
                    target.write(data)
            if lost.is_set():
                await self._ended.wait()
        except ConnectionError:
            pass
        finally:
            target.close()


@pytest.fixture
async def tunnel(one_server: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Tunnel]:
    slowness = bounds.allowance()
    for module in (_broker, _connection, _receiver):
        monkeypatch.setattr(module, "REPLY_TIMEOUT", REPLY_TIMEOUT * slowness)
    monkeypatch.setattr(_protocol, "IDLE", IDLE * slowness)
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
    tunnel = Tunnel(int(one_server.url.rpartition(":")[2].partition("/")[0]))
    yield tunnel
    await tunnel.stop()
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_an_idle_connection_that_was_forgotten_is_replaced_before_it_is_needed(
    tunnel: Tunnel, one_lab: Any, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    transport = await one_lab.transport(url=await tunnel.start(), publish_timeout=60.0)
    await transport.declare("g", None, change=False)
    await transport.send(one_lab.envelopes(1))
    tunnel.forget()

    async def noticed() -> bool:
        return sum("has not answered" in text for text in caplog.messages) >= 2  # to publish, and to control

    await until(noticed, within=10)
    before = tunnel.made
    assert await transport.send(one_lab.envelopes(1)) == ()
    assert tunnel.made == before + 1
    assert (await transport.stats("g")).waiting == 2


async def test_a_publish_into_silence_has_time_for_a_second_try(tunnel: Tunnel, one_lab: Any) -> None:
    backend = await one_lab.backend(url=await tunnel.start(), groups={"g": ()})
    await backend.publish("k", {"n": 1})
    tunnel.forget()
    await backend.publish("k", {"n": 2})
    assert (await backend.stats("g")).waiting == 2


async def test_what_the_read_of_a_lost_connection_takes_is_given_back(
    tunnel: Tunnel, one_lab: Any, collect: Collect, until: Until
) -> None:
    transport, sender = await one_lab.transport(url=await tunnel.start(), lease=60.0), await one_lab.transport()
    await transport.declare("g", None, change=False)
    receiver = await one_lab.receiver(transport)
    await receiver._link.get()
    receiver._next_tick = asyncio.get_running_loop().time() + 1.0 * bounds.allowance()
    reading = asyncio.create_task(receiver.receive(10))

    async def waits() -> bool:
        return any(
            client["name"] == "abe-read-g" and "b" in client["flags"] for client in await one_lab.redis.client_list()
        )

    await until(waits)
    tunnel.forget()
    for link in (receiver._link, transport._broker.controlling):
        link.drop()
    with pytest.raises(BackendConnectionError):
        await reading
    recovering = asyncio.create_task(receiver.recover([]))
    await asyncio.wait([recovering], timeout=0.3 * bounds.allowance())
    await sender.send(one_lab.envelopes(1))  # to the read that waits still, if nobody waits for its end
    await recovering
    [delivery] = await collect(receiver, 1)
    assert delivery.attempt == 1


async def test_publishers_and_consumers_go_on(tunnel: Tunnel, one_lab: Any) -> None:
    # A settlement is tried for as long as the lease lasts: on a busy machine the reply timeout is stretched to nearly the usual one.
    backend = await one_lab.backend(url=await tunnel.start(), lease=60.0)
    async with backend.consume(group="g") as subscription, bounds.within(15):
        for number in range(2):
            await backend.publish("k", {"n": number})
            message = await subscription.receive()
            tunnel.forget()
            await message.ack()
            assert message == {"n": number}
    stats = await backend.stats("g")
    assert (stats.waiting, stats.in_flight) == (0, 0)


async def test_what_a_lost_reply_brought_comes_again_before_its_lease_is_over(tunnel: Tunnel, one_lab: Any) -> None:
    backend = await one_lab.backend(url=await tunnel.start(), lease=60.0)
    near = await one_lab.backend()
    async with backend.consume(group="g") as subscription, bounds.within(15):
        receiving = asyncio.create_task(subscription.receive())
        await asyncio.sleep(0)
        tunnel.forget()
        await near.publish("k", {"n": 1})
        assert await receiving == {"n": 1}


async def test_a_hole_that_lasts_ends_by_itself(tunnel: Tunnel, one_lab: Any) -> None:
    backend = await one_lab.backend(url=await tunnel.start(), connect_timeout=0.3, groups={"g": ()})
    async with backend.consume(group="g") as subscription, bounds.within(20):
        tunnel.shut()
        publishing = asyncio.create_task(backend.publish("k", {"n": 1}))
        await asyncio.sleep(1.5)  # the fault itself
        assert not publishing.done()
        tunnel.reopen()
        await publishing
        assert await subscription.receive() == {"n": 1}


async def test_closing_within_a_hole_takes_the_time_that_it_may(tunnel: Tunnel, one_lab: Any) -> None:
    backend = await one_lab.backend(url=await tunnel.start(), close_timeout=1.0)
    subscription = backend.consume(group="g")
    await backend.publish("k", {"n": 1})
    assert await anext(subscription) == {"n": 1}
    tunnel.shut()
    began = time.monotonic()
    await backend.disconnect()
    assert time.monotonic() - began < 3.0 * bounds.slowness(began)


async def test_closing_carries_out_what_was_decided_over_connections_that_answer(
    tunnel: Tunnel, one_lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has less time than a reply may take."""
    for module in (_broker, _connection, _receiver):
        monkeypatch.setattr(module, "REPLY_TIMEOUT", 60.0)
    backend = await one_lab.backend(
        url=await tunnel.start(), lease=120.0, publish_timeout=120.0, close_timeout=30.0, groups={"g": ()}
    )
    near = await one_lab.transport()
    subscription = backend.consume(group="g", prefetch=2)
    for number in range(4):
        await backend.publish("k", {"n": number})
    message = await anext(subscription)
    tunnel.forget()
    acknowledging = asyncio.create_task(message.ack())
    await asyncio.sleep(0)
    async with bounds.within(10):
        await subscription.aclose()
        await acknowledging
        await backend.disconnect()
    stats = await near.stats("g")
    assert (stats.waiting, stats.in_flight) == (3, 0)


async def test_a_receiver_is_stopped_and_closed_within_a_hole(tunnel: Tunnel, one_lab: Any) -> None:
    transport = await one_lab.transport(url=await tunnel.start(), connect_timeout=0.3)
    await transport.declare("g", None, change=False)
    receiver = await transport.subscribe("g", 10)
    await receiver.receive(1)
    reading = asyncio.create_task(receiver.receive(1))
    await asyncio.sleep(0)
    tunnel.shut()
    async with bounds.within(2 * _receiver.TICK + 1):
        await receiver.stop()
        with pytest.raises(BackendConnectionError):
            await reading
    with pytest.raises(BackendConnectionError):
        async with bounds.within(10):
            await receiver.close()


async def test_connecting_into_a_hole_takes_the_time_that_it_may(tunnel: Tunnel, one_lab: Any) -> None:
    url = await tunnel.start()
    tunnel.shut()
    for _ in range(3):
        with pytest.raises(BackendConnectionError, match=r"timed out after [\d.]+ s"):
            async with bounds.within(1):
                await one_lab.transport(url=url, connect_timeout=0.3)


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_closing_while_connecting_into_a_hole_takes_the_time_that_it_may(
    tunnel: Tunnel, one_lab: Any, scheme: str
) -> None:
    url = (await tunnel.start()).replace("redis", scheme)
    tunnel.shut()
    backend = RedisBackend(one_lab.settings(url=url, close_timeout=0.5))
    calls = [asyncio.create_task(call) for call in (backend.publish("k", {}), backend.ping(), backend.stats("g"))]
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await backend.disconnect()
    assert time.monotonic() - began < 3.0 * bounds.slowness(began)  # connecting alone may take 5 s
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, AbeError) for outcome in outcomes)


async def test_a_loop_that_was_busy_takes_no_server_for_silent(one_lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = await connect(one_lab.settings(), "test", 0.3)
    try:
        for _ in range(3):
            pending = wire.call(b"ECHO", b"x")
            await asyncio.sleep(0)
            _block(0.6)
            assert await pending == b"x"
        wire._check(asyncio.get_running_loop().time() - 5.0)  # as where timers come before what was received
        assert wire.alive
    finally:
        wire.close()


async def test_what_leaves_slowly_is_not_silence(one_lab: Any) -> None:
    """A body that takes longer to send than the server may stay silent."""
    slow, port = await _slow_server()
    wire = await connect(one_lab.settings(url=f"redis://127.0.0.1:{port}"), "test", 1.0)
    try:
        began = time.monotonic()
        async with bounds.within(20):
            assert await wire.call(b"ECHO", b"x" * 32_000_000) == b"OK"
        assert time.monotonic() - began > 1.0
    finally:
        wire.close()
        slow.close()
        await slow.wait_closed()


async def _slow_server() -> tuple[asyncio.Server, int]:
    """One that reads a megabyte each 60 ms, and says OK to everything."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = 0
        while data := await reader.read(1_000_000):
            size += len(data)
            if len(data) == 1_000_000 or size > 1_000_000:
                await asyncio.sleep(0.06)
            if data.endswith(b"\r\n"):
                writer.write(b"+OK\r\n" * data.count(b"*") if size < 1_000_000 else b"+OK\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1_000_000)
    return server, server.sockets[0].getsockname()[1]


def _block(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
