"""The Redis provider beside redis-py used the plain way, as ratios within one run on one private server.

Absolute numbers say more about the machine than about the code: each repetition measures one side right after the other, and what
counts is their ratio. Every run also checks that nothing was lost, doubled or left behind.
"""

import argparse
import asyncio
import json
import logging
import resource
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast
from uuid import uuid4

import redis.asyncio as redis

from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe_backend_redis import RedisBackend, RedisSettings
from abe_contract_tests.services import redis_service

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
    """What is compared, and how much faster ours has to be."""

    name: str
    goal: float
    plain: Callable[["Plain", int], Awaitable[Cost]]
    ours: Callable[["Ours", int], Awaitable[Cost]]


class Meter:
    """Measures from its making."""

    def __init__(self) -> None:
        self._cpu = _cpu()
        self._started = time.perf_counter()

    def stop(self, messages: int) -> Cost:
        return Cost(messages, time.perf_counter() - self._started, _cpu() - self._cpu)


class Plain:
    """redis-py as its documentation shows it: one XADD a message; XREADGROUP, the handler, one XACK a message."""

    def __init__(self, url: str) -> None:
        pool = redis.BlockingConnectionPool.from_url(url, max_connections=50, timeout=None)
        self.redis = cast("Any", redis.Redis(connection_pool=pool))
        self.stream = f"plain-{uuid4().hex}"

    async def publish(self, payload: Mapping[str, Any]) -> None:
        await self.redis.xadd(self.stream, {"d": json.dumps(payload)})

    async def publish_at_once(self, messages: int) -> Cost:
        cost = await _at_once(lambda: self.publish(PAYLOAD), messages)
        assert await self.redis.xlen(self.stream) == messages
        return cost

    async def publish_in_turn(self, messages: int) -> Cost:
        await self.publish(PAYLOAD)
        cost = await _in_turn(lambda: self.publish(PAYLOAD), messages)
        assert await self.redis.xlen(self.stream) == messages + 1
        return cost

    async def drain(self, messages: int) -> Cost:
        async with self.redis.pipeline(transaction=False) as pipe:
            for number in range(messages):
                pipe.xadd(self.stream, {"d": json.dumps({**PAYLOAD, "n": number})})
            await pipe.execute()
        await self.redis.xgroup_create(self.stream, GROUP, id="0")
        seen = bytearray(messages)
        left, meter = messages, Meter()
        while left:
            for _, entries in await self.redis.xreadgroup(
                GROUP, "c", {self.stream: ">"}, count=CONCURRENCY, block=1000
            ):
                for entry, fields in entries:
                    seen[json.loads(fields[b"d"])["n"]] += 1
                    await self.redis.xack(self.stream, GROUP, entry)
                    left -= 1
        cost = meter.stop(messages)
        assert set(seen) == {1}
        assert (await self.redis.xpending(self.stream, GROUP))["pending"] == 0
        return cost

    async def close(self) -> None:
        await self.redis.delete(self.stream)
        await self.redis.aclose()


class Ours:
    """The same through the provider, at its defaults."""

    def __init__(self, url: str) -> None:
        self.namespace = f"ours-{uuid4().hex}"
        self.backend = RedisBackend(RedisSettings(url=url, namespace=self.namespace))
        self.redis = cast("Any", redis.Redis.from_url(url))

    @property
    def stream(self) -> str:
        return f"{{{self.namespace}}}:queue:{GROUP}"

    async def publish_at_once(self, messages: int) -> Cost:
        await self.backend.declare(GROUP)
        cost = await _at_once(lambda: self.backend.publish("order.created", dict(PAYLOAD)), messages)
        assert await self.redis.xlen(self.stream) == messages
        return cost

    async def publish_in_turn(self, messages: int) -> Cost:
        await self.backend.declare(GROUP)
        await self.backend.publish("order.created", dict(PAYLOAD))
        cost = await _in_turn(lambda: self.backend.publish("order.created", dict(PAYLOAD)), messages)
        assert await self.redis.xlen(self.stream) == messages + 1
        return cost

    async def drain(self, messages: int) -> Cost:
        await self.backend.declare(GROUP)
        await self.backend.publish_many(("order.created", {**PAYLOAD, "n": number}) for number in range(messages))
        seen, left, done = bytearray(messages), messages, asyncio.Event()

        async def handle(message: dict[str, Any]) -> None:
            nonlocal left
            seen[message["n"]] += 1
            left -= 1
            if not left:
                done.set()

        meter = Meter()
        async with AsyncLoopConsumer(self.backend, GROUP, concurrency=CONCURRENCY) as consumer:
            running = asyncio.create_task(consumer.run(handle))
            await done.wait()
            while (await self.backend.stats(GROUP)).in_flight:
                pass  # the acknowledgements are part of the price
            cost = meter.stop(messages)
            await consumer.shutdown()
            await running
        assert set(seen) == {1}
        assert await self.redis.xlen(self.stream) == 0
        assert (await self.redis.xpending(self.stream, "group"))["pending"] == 0
        return cost

    async def close(self) -> None:
        await self.backend.delete_group(GROUP)
        await self.backend.disconnect()
        await self.redis.aclose()


COMPARISONS: Final = (
    Comparison(f"publish, {IN_FLIGHT} in flight", 10.0, Plain.publish_at_once, Ours.publish_at_once),
    Comparison(f"drain, concurrency {CONCURRENCY}", 20.0, Plain.drain, Ours.drain),
    Comparison("publish, one after the other", 1.0, Plain.publish_in_turn, Ours.publish_in_turn),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and with ``--check`` return 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="redis_ratios", description=__doc__)
    parser.add_argument(
        "--messages", type=int, default=30_000, help="messages drained; half as many are published at once"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--server", default="", help="system, redis8, valkey or a path; the first that is installed")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    options = parser.parse_args(arguments)
    logging.getLogger("abe.redis").setLevel(
        logging.ERROR
    )  # it warns of the missing append-only file, which is on purpose here
    counts = (options.messages // 2, options.messages, options.messages // 10)
    assert len(json.dumps(PAYLOAD)) == 200
    with redis_service(
        server=options.server, arguments=("--appendonly", "no"), environ={"ABE_TEST_SERVICES": "processes"}
    ) as service:
        print(f"{service.version}, {options.repetitions} repetitions, 200-byte payloads; median (min-max)")
        results = asyncio.run(_measure(service.url, counts, options.repetitions))
    missed = [
        comparison.name
        for comparison, costs in zip(COMPARISONS, results, strict=True)
        if not _report(comparison, costs)
    ]
    if missed:
        print(f"missed: {', '.join(missed)}")
    return 1 if missed and options.check else 0


async def _measure(url: str, counts: tuple[int, ...], repetitions: int) -> list[list[tuple[Cost, Cost]]]:
    results: list[list[tuple[Cost, Cost]]] = [[] for _ in COMPARISONS]
    for repetition in range(repetitions):
        for comparison, count, costs in zip(COMPARISONS, counts, results, strict=True):
            plain, ours = Plain(url), Ours(url)
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


def _report(comparison: Comparison, costs: list[tuple[Cost, Cost]]) -> bool:
    """Print a comparison's rows, and return whether its goal was reached."""
    ratios = [ours.rate / plain.rate for plain, ours in costs]
    savings = [(plain.cpu / plain.messages) / (ours.cpu / ours.messages) for plain, ours in costs]
    reached = statistics.median(ratios) >= comparison.goal
    print(f"\n{comparison.name}: goal {comparison.goal:g}x, {'reached' if reached else 'MISSED'}")
    for name, side in (("redis-py", [plain for plain, _ in costs]), ("ours", [ours for _, ours in costs])):
        rates = _spread([cost.rate for cost in side], "7,.0f")
        print(
            f"  {name:9} {rates} msg/s   {_spread([cost.cpu / cost.messages * 1e6 for cost in side], '6.1f')} us CPU/msg"
        )
    print(f"  ratio     {_spread(ratios, '.1f')}x in msg/s   {_spread(savings, '.1f')}x in CPU")
    return reached


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})".replace("( ", "(").replace(
        "- ", "-"
    )


async def _at_once(publish: Callable[[], Awaitable[None]], messages: int) -> Cost:
    """Publish with a fixed number of tasks, each awaiting its own confirmations."""

    async def worker(share: int) -> None:
        for _ in range(share):
            await publish()

    await asyncio.gather(*(worker(0) for _ in range(IN_FLIGHT)))
    meter = Meter()
    await asyncio.gather(*(worker(messages // IN_FLIGHT) for _ in range(IN_FLIGHT)))
    return meter.stop(messages)


async def _in_turn(publish: Callable[[], Awaitable[None]], messages: int) -> Cost:
    meter = Meter()
    for _ in range(messages):
        await publish()
    return meter.stop(messages)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
