"""What the tests of consumers share: a handler that keeps what it gets, and a consumer that runs for as long as a block."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from abe import AsyncLoopConsumer, ConstantBackoff, Message, RetryPolicy
from abe.backends.message_queue.service.memory import MemoryBackend
from abe_contract_tests import bounds

ONCE = RetryPolicy(max_attempts=1)
PATIENT = RetryPolicy(max_attempts=3, backoff=ConstantBackoff(100))


@asynccontextmanager
async def running(consumer: AsyncLoopConsumer, handler: Any) -> AsyncIterator[asyncio.Task[None]]:
    """Run a consumer in the background, shut it down at the end, and let its error out."""
    async with bounds.within(10):
        task = asyncio.create_task(consumer.run(handler))
        try:
            yield task
        finally:
            await consumer.shutdown()
            await asyncio.wait([task])
    task.result()


class Collector:
    """A handler that keeps what it got, and fails as often as it is told."""

    def __init__(self, *failures: Exception, wanted: int = 1) -> None:
        self.seen: list[Message] = []
        self.failures = list(failures)
        self.done = asyncio.Event()
        self.wanted = wanted

    async def __call__(self, message: Message) -> None:
        self.seen.append(message)
        if self.failures:
            raise self.failures.pop(0)
        if len(self.seen) >= self.wanted:
            self.done.set()

    @property
    def attempts(self) -> list[int]:
        return [message.attempt for message in self.seen]


async def publish(backend: MemoryBackend, count: int, key: str = "order.created") -> None:
    await backend.declare()
    await backend.publish_many([(key, {"n": number}) for number in range(count)])


async def drained(backend: MemoryBackend, group: str = "default") -> None:
    """Return when the acknowledgements have left."""
    async with bounds.within(5):
        while (stats := await backend.stats(group)).waiting + stats.in_flight + stats.delayed:  # noqa: ASYNC110
            await asyncio.sleep(0)
