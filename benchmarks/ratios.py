"""What every benchmark shares: one side measured right after the other, and only their ratio counts.

Absolute numbers say more about the machine than about the code. Every run also checks that nothing was lost, doubled or left behind.
"""

import argparse
import asyncio
import json
import resource
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from abe.backends.message_queue.base import FullBackend
from abe.backends.message_queue.consumer import AsyncLoopConsumer

_MEMORY: Final = Path("/dev/shm")
IN_FLIGHT: Final = 1_000
CONCURRENCY: Final = 100
GROUP: Final = "g"
PAYLOAD: Final[Mapping[str, Any]] = {
    "id": "5f1c9a52-7f0e-4c1b-9a3e-2f1f6f0f8c11",
    "type": "order.created",
    "user": 123456,
    "tags": ["a", "b"],
    "data": {"sku": "AB-1234", "qty": 3, "price": 19.99, "note": "x" * 27},
}
"""200 bytes of JSON."""


@dataclass(frozen=True)
class Cost:
    """What one side of one repetition took."""

    messages: int
    seconds: float
    cpu: float
    """Seconds of this process's processor time, user and system."""

    @property
    def rate(self) -> float:
        return self.messages / self.seconds


@dataclass(frozen=True)
class Comparison:
    """What is compared, how many messages of a run's it takes, and how much faster ours has to be."""

    name: str
    goal: float
    share: float
    plain: Callable[[Any, int], Awaitable[Cost]]
    ours: Callable[[Any, int], Awaitable[Cost]]


class Meter:
    """Measures from its making."""

    def __init__(self) -> None:
        self._cpu = _cpu()
        self._started = time.perf_counter()

    def stop(self, messages: int) -> Cost:
        return Cost(messages, time.perf_counter() - self._started, _cpu() - self._cpu)


class Tally:
    """Which of the numbered messages were handled, and when all were."""

    def __init__(self, messages: int) -> None:
        self._seen = bytearray(messages)
        self.left = messages
        self.done = asyncio.Event()

    def add(self, number: int) -> None:
        self._seen[number] += 1
        self.left -= 1
        if not self.left:
            self.done.set()

    def check(self) -> None:
        assert set(self._seen) == {1}, "a message was lost or doubled"


class Side(ABC):
    """One of the two that are compared, on a broker of the run's own."""

    @abstractmethod
    async def open(self) -> None:
        """Make what is needed."""

    @abstractmethod
    async def close(self) -> None:
        """Remove it again."""

    @abstractmethod
    async def publish(self, payload: Mapping[str, Any]) -> None:
        """Publish one message, and return when the broker has it."""

    @abstractmethod
    async def waiting(self) -> int:
        """Return how many messages nobody has taken yet."""

    @abstractmethod
    async def drain(self, messages: int) -> Cost:
        """Publish so many, numbered from 0, and measure how they are handled, until the broker holds nothing of them."""

    async def publish_at_once(self, messages: int) -> Cost:
        """Measure publishing with a fixed number of tasks, each awaiting its own confirmations."""

        async def worker(share: int) -> None:
            for _ in range(share):
                await self.publish(PAYLOAD)

        await asyncio.gather(*(worker(0) for _ in range(IN_FLIGHT)))
        meter = Meter()
        await asyncio.gather(*(worker(messages // IN_FLIGHT) for _ in range(IN_FLIGHT)))
        cost = meter.stop(messages)
        assert await self.waiting() == messages
        return cost

    async def publish_in_turn(self, messages: int) -> Cost:
        """Measure publishing one message after the other, once everything is warm."""
        await self.publish(PAYLOAD)
        meter = Meter()
        for _ in range(messages):
            await self.publish(PAYLOAD)
        cost = meter.stop(messages)
        assert await self.waiting() == messages + 1
        return cost


class Ours(Side):
    """A backend of ours, in a namespace of its own."""

    def __init__(self, backend: FullBackend) -> None:
        self.backend = backend

    async def open(self) -> None:
        await self.backend.declare(GROUP)

    async def publish(self, payload: Mapping[str, Any]) -> None:
        await self.backend.publish("order.created", dict(payload))

    async def waiting(self) -> int:
        return (await self.backend.stats(GROUP)).waiting

    async def drain(self, messages: int, *, prefetch: int | None = None) -> Cost:
        await self.backend.publish_many(("order.created", {**PAYLOAD, "n": number}) for number in range(messages))
        tally = Tally(messages)

        async def handle(message: dict[str, Any]) -> None:
            tally.add(message["n"])

        meter = Meter()
        async with AsyncLoopConsumer(self.backend, GROUP, concurrency=CONCURRENCY, prefetch=prefetch) as consumer:
            running = asyncio.create_task(consumer.run(handle))
            await tally.done.wait()
            while (await self.backend.stats(GROUP)).in_flight:
                pass  # the acknowledgements are part of the price
            cost = meter.stop(messages)
            await consumer.shutdown()
            await running
        tally.check()
        assert await self.waiting() == 0
        return cost

    async def close(self) -> None:
        await self.backend.delete_group(GROUP)
        await self.backend.disconnect()


def run(
    arguments: Sequence[str] | None,
    *,
    program: str,
    client: str,
    comparisons: Sequence[Comparison],
    service: Callable[[argparse.Namespace], AbstractContextManager[Any]],
    sides: Callable[[str], tuple[Side, Side]],
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    messages: int = 30_000,
) -> int:
    """Measure, print, and with ``--check`` return 1 when a goal is missed.

    Args:
        arguments: Of the command line; None: those of the process.
        program: Its name.
        client: What the other side is called.
        comparisons: What is compared.
        service: Returns the broker, not started yet, for the parsed arguments.
        sides: Returns the plain side and ours for the broker's address.
        options: Adds arguments.
        messages: How many of them, if the arguments say nothing.
    """
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument("--messages", type=int, default=messages, help="messages drained; the others are shares of it")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    parser.add_argument(
        "--directory",
        default=_MEMORY if _MEMORY.is_dir() else tempfile.gettempdir(),
        help="where the broker keeps its data; by default in memory, as a disk would bound both sides alike (%(default)s)",
    )
    options(parser)
    chosen = parser.parse_args(arguments)
    assert len(json.dumps(PAYLOAD)) == 200
    tempfile.tempdir = str(chosen.directory)  # the broker is a process of ours
    with service(chosen) as broker:
        print(
            f"{broker.version}, {chosen.repetitions} repetitions, 200-byte payloads, data in {chosen.directory}; median (min-max)"
        )
        results = asyncio.run(_measure(lambda: sides(broker.url), comparisons, chosen.messages, chosen.repetitions))
    missed = [
        comparison.name
        for comparison, costs in zip(comparisons, results, strict=True)
        if not _report(comparison, client, costs)
    ]
    if missed:
        print(f"missed: {', '.join(missed)}")
    return 1 if missed and chosen.check else 0


async def _measure(
    sides: Callable[[], tuple[Side, Side]], comparisons: Sequence[Comparison], messages: int, repetitions: int
) -> list[list[tuple[Cost, Cost]]]:
    results: list[list[tuple[Cost, Cost]]] = [[] for _ in comparisons]
    for repetition in range(repetitions):
        for comparison, costs in zip(comparisons, results, strict=True):
            plain, ours = sides()
            await plain.open()
            await ours.open()
            count = int(messages * comparison.share)
            try:
                if repetition % 2:  # neither side always runs on what the other has warmed up
                    second = await comparison.ours(ours, count)
                    costs.append((await comparison.plain(plain, count), second))
                else:
                    costs.append((await comparison.plain(plain, count), await comparison.ours(ours, count)))
            finally:
                await plain.close()
                await ours.close()
    return results


def _report(comparison: Comparison, client: str, costs: list[tuple[Cost, Cost]]) -> bool:
    """Print a comparison's rows, and return whether its goal was reached."""
    ratios = [ours.rate / plain.rate for plain, ours in costs]
    savings = [(plain.cpu / plain.messages) / (ours.cpu / ours.messages) for plain, ours in costs]
    reached = statistics.median(ratios) >= comparison.goal
    print(f"\n{comparison.name}: goal {comparison.goal:g}x, {'reached' if reached else 'MISSED'}")
    for name, side in ((client, [plain for plain, _ in costs]), ("ours", [ours for _, ours in costs])):
        rates = _spread([cost.rate for cost in side], "7,.0f")
        cpu = _spread([cost.cpu / cost.messages * 1e6 for cost in side], "6.1f")
        print(f"  {name:9} {rates} msg/s   {cpu} us CPU/msg")
    print(f"  ratio     {_spread(ratios, '.1f')}x in msg/s   {_spread(savings, '.1f')}x in CPU")
    return reached


def _spread(values: list[float], form: str) -> str:
    text = f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"
    return text.replace("( ", "(").replace("- ", "-")


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
