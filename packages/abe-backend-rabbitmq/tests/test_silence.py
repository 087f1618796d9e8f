"""Connections that went silent: no end, no reset, and nothing comes through any more, as behind a firewall that forgot them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.errors import AbeError
from abe_backend_rabbitmq import RabbitMQBackend
from abe_backend_rabbitmq._watch import Watch
from abe_contract_tests import bounds
from abe_contract_tests.services._process import ProcessService

pytestmark = pytest.mark.xdist_group("rabbitmq")


class BlackHole:
    """A proxy that forwards until it is told to swallow what its connections carry; those made later are forwarded again.

    Args:
        url: The broker's.
    """

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._dark: set[str] = set()
        self._generation = 0
        self._swallowed: dict[int, set[str]] = {}

    async def __aenter__(self) -> "BlackHole":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"amqp://guest:guest@127.0.0.1:{port}/"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def swallow(self, *directions: str, new: bool = False) -> None:
        """Swallow what goes these directions, ``out`` and ``in``, on the connections there are; `new`: on those made from now on too."""
        for generation in self._swallowed:
            self._swallowed[generation] |= set(directions)
        self._dark = set(directions) if new else set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._generation += 1
        mine = self._swallowed[self._generation] = set(self._dark)
        there, back = await asyncio.open_connection(self._target.hostname, self._target.port)
        self._writers += [writer, back]
        for pair in ((reader, back, "out"), (there, writer, "in")):
            task = asyncio.create_task(self._pump(*pair, mine))
            self._tasks.add(task)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: str, swallowed: set[str]
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if direction not in swallowed:
                    sink.write(data)
                    await sink.drain()
        if not swallowed:  # or the end is swallowed too
            sink.close()


@pytest.fixture
async def hole(node: ProcessService) -> AsyncIterator[BlackHole]:
    async with BlackHole(node.url) as hole:
        yield hole


async def again(call: Any) -> None:
    """Repeat a call until it succeeds."""
    while True:
        try:
            await call()
        except AbeError:
            await asyncio.sleep(0.05)
        else:
            return


@pytest.mark.parametrize("directions", [("in", "out"), ("out",)], ids=["both ways", "ours alone"])
async def test_at_defaults_everything_works_again_within_the_declared_bound(
    lab: Any, hole: BlackHole, directions: tuple[str, ...]
) -> None:
    beside = await lab.backend(groups={"g": ()})
    backend = await lab.backend(url=hole.url, publish_timeout=10.0)
    silence = RabbitMQBackend.capabilities.silence_bound
    assert silence == 15.0
    seen: set[int] = set()
    some = asyncio.Event()

    async def handle(message: dict[str, Any]) -> None:
        seen.add(message["n"])
        some.set()

    async with AsyncLoopConsumer(backend, "g", concurrency=5) as consumer:
        running = asyncio.create_task(consumer.run(handle))
        await backend.publish("k", {"n": 0})
        async with bounds.within(10):
            await some.wait()
        hole.swallow(*directions)
        for number in range(1, 20):
            await beside.publish("k", {"n": number})
        async with bounds.within(silence):
            await asyncio.gather(again(lambda: backend.publish("k", {"n": 20})), again(backend.groups))
            while not seen >= set(range(21)):
                some.clear()
                await some.wait()
        await consumer.shutdown()
        await running


@pytest.mark.parametrize("directions", [("in", "out"), ("out",)], ids=["both ways", "ours alone"])
async def test_closing_takes_its_time_and_no_more(lab: Any, hole: BlackHole, directions: tuple[str, ...]) -> None:
    backend = await lab.backend(url=hole.url, close_timeout=2.0, groups={"g": ()})
    subscription = backend.consume(group="g")
    await backend.publish_many([("k", {"n": number}) for number in range(5)])
    async with bounds.within(5):
        assert await anext(subscription) == {"n": 0}
    hole.swallow(*directions, new=True)
    async with bounds.within(3):
        await backend.disconnect()


async def test_a_receiver_whose_goodbye_is_not_answered_waits_no_second_time(lab: Any, hole: BlackHole) -> None:
    transport = await lab.transport(url=hole.url)
    await transport.declare("g", None, change=False)
    receiver = await transport.subscribe("g", 10)
    hole.swallow("in", "out", new=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):  # noqa: TID251 - a caller gives up
            await receiver.stop()
    async with bounds.within(0.5):
        await receiver.close()
    async with bounds.within(2.5):
        await transport.close()


async def test_a_question_that_is_taken_back_before_it_was_asked_leaves_no_warning() -> None:
    class Silent:
        heard = answered = 0.0

    async def ask() -> None:
        raise AssertionError("asked after all")

    watch = Watch(Silent(), 0.04, ask, lambda: True, lambda _: None)
    async with bounds.within(5):
        while watch._question is None:  # noqa: ASYNC110 - it makes one by its own timer
            await asyncio.sleep(0)
    watch.stop()
    await asyncio.wait([watch._question])
    assert watch._question.cancelled()
