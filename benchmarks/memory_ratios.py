"""The memory backend beside an asyncio.Queue that encodes and checks its payloads in the same way."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any, Final
from uuid import uuid4

from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.codec import JSONCodec
from abe.settings import QueueSettings
from benchmarks.ratios import CONCURRENCY, GROUP, PAYLOAD, Comparison, Cost, Meter, Ours, Side, Tally, run


class Plain(Side):
    """A queue, and workers that take from it. It has no groups, leases, attempts or acknowledgements."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._codec = JSONCodec()

    async def open(self) -> None:
        """There is nothing to make."""

    async def publish(self, payload: Mapping[str, Any]) -> None:
        await self._queue.put(self._codec.encode(payload))

    async def waiting(self) -> int:
        return self._queue.qsize()

    @asynccontextmanager
    async def consuming(self, tally: Tally) -> AsyncIterator[None]:
        """Take messages from the queue, and count them."""

        async def work() -> None:
            while True:
                tally.add(self._codec.decode(await self._queue.get())["n"])

        workers = [asyncio.create_task(work()) for _ in range(CONCURRENCY)]
        yield
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    async def drain(self, messages: int) -> Cost:
        for number in range(messages):
            await self.publish({**PAYLOAD, "n": number})
        tally, meter = Tally(messages), Meter()
        async with self.consuming(tally):
            await tally.done.wait()
            cost = meter.stop(messages)
        tally.check()
        return cost

    async def close(self) -> None:
        """There is nothing to remove."""


class Memory(Ours):
    """Ours, which the benchmark of both at once can consume from."""

    @asynccontextmanager
    async def consuming(self, tally: Tally) -> AsyncIterator[None]:
        """Handle messages by a consumer, and count them."""

        async def handle(message: dict[str, Any]) -> None:
            tally.add(message["n"])

        async with AsyncLoopConsumer(self.backend, GROUP, concurrency=CONCURRENCY) as consumer:
            running = asyncio.create_task(consumer.run(handle))
            yield
            await consumer.shutdown()
            await running


async def both_at_once(side: Plain | Memory, messages: int) -> Cost:
    """Measure publishing one after the other, while the messages are consumed, until all are handled."""
    tally, meter = Tally(messages), Meter()
    async with side.consuming(tally):
        for number in range(messages):
            await side.publish({**PAYLOAD, "n": number})
        await tally.done.wait()
        cost = meter.stop(messages)
    tally.check()
    return cost


@contextmanager
def _no_broker() -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(version="memory", url="")


COMPARISONS: Final = (
    Comparison("both at once", 0.25, 1.0, both_at_once, both_at_once),
    Comparison(f"drain, concurrency {CONCURRENCY}", 0.2, 1.0, Plain.drain, Memory.drain),
    Comparison("publish, one after the other", 0.25, 1.0, Plain.publish_in_turn, Memory.publish_in_turn),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; see `run`."""
    return run(
        arguments,
        program="memory_ratios",
        client="Queue",
        comparisons=COMPARISONS,
        service=lambda _: _no_broker(),
        sides=lambda _: (Plain(), Memory(MemoryBackend(QueueSettings(namespace=uuid4().hex)))),
    )


if __name__ == "__main__":
    sys.exit(main())
