"""Connections that go silent without a word of their end, as behind a firewall that has forgotten them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from abe_contract_tests import bounds


class Hole:
    """A way to a server that can swallow everything, on the connections that there are or on new ones too."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = parts.hostname, parts.port
        self._passing: list[asyncio.Event] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.open = True
        self.url = ""

    def swallow(self, *, new: bool) -> None:
        """Pass nothing on any more over the connections that there are; with `new`, over later ones neither."""
        self.open = not new
        for passing in self._passing:
            passing.clear()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passing = asyncio.Event()
        if self.open:
            passing.set()
        self._passing.append(passing)
        theirs = await asyncio.open_connection(*self._upstream)
        self._writers += [writer, theirs[1]]
        ways = [self._pass(reader, theirs[1], passing), self._pass(theirs[0], writer, passing)]
        self._tasks.update(map(asyncio.ensure_future, ways))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passing: asyncio.Event) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                if not passing.is_set():
                    await asyncio.Event().wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for writer in self._writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@asynccontextmanager
async def hole(upstream: str) -> AsyncIterator[Hole]:
    found = Hole(upstream)
    async with await asyncio.start_server(found.handle, "127.0.0.1", 0) as server:
        found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield found
        finally:
            await found.close()


async def test_a_publish_has_a_second_try_over_another_connection(lab: Any) -> None:
    async with bounds.within(30), hole(lab.server.url) as way:
        backend = await lab.backend(endpoint_url=way.url, publish_timeout=8.0)
        await backend.declare("g")
        await backend.publish("k", {"n": 1})
        way.swallow(new=False)
        await backend.publish("k", {"n": 2})
        assert (await backend.stats("g")).waiting == 2


async def test_a_consumer_goes_on_over_another_connection(lab: Any) -> None:
    async with bounds.within(30), hole(lab.server.url) as way:
        # What SQS put into the answer that nobody got comes when its lease has run out.
        backend, publisher = await lab.backend(endpoint_url=way.url, lease=2.0), await lab.backend()
        async with backend.consume(group="g") as messages:
            await publisher.publish("k", {"n": 1})
            await (await messages.receive()).ack()
            way.swallow(new=False)
            await publisher.publish("k", {"n": 2})
            async with bounds.within(15):
                assert (await messages.receive())["n"] == 2


async def test_closing_where_nothing_is_answered_takes_no_longer_than_it_may(lab: Any) -> None:
    async with bounds.within(40), hole(lab.server.url) as way:
        backend = await lab.backend(endpoint_url=way.url, close_timeout=2.0)
        messages = backend.consume(group="g", prefetch=20)
        async with messages:
            for n in range(15):
                await backend.publish("k", {"n": n})
            await messages.receive()
            way.swallow(new=True)
            async with bounds.within(4):
                await backend.disconnect()
