"""The Redis provider beside redis-py used the plain way."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast
from uuid import uuid4

import redis.asyncio as redis

from abe_backend_redis import RedisBackend, RedisSettings
from abe_contract_tests.services import redis_service
from benchmarks.ratios import CONCURRENCY, GROUP, IN_FLIGHT, PAYLOAD, Comparison, Cost, Meter, Ours, Side, Tally, run


class Plain(Side):
    """redis-py as its documentation shows it: one XADD a message; XREADGROUP, the handler, one XACK a message."""

    def __init__(self, url: str) -> None:
        pool = redis.BlockingConnectionPool.from_url(url, max_connections=50, timeout=None)
        self.redis = cast("Any", redis.Redis(connection_pool=pool))
        self.stream = f"plain-{uuid4().hex}"

    async def open(self) -> None:
        """It connects by itself."""

    async def publish(self, payload: Mapping[str, Any]) -> None:
        await self.redis.xadd(self.stream, {"d": json.dumps(payload)})

    async def waiting(self) -> int:
        return int(await self.redis.xlen(self.stream))

    async def drain(self, messages: int) -> Cost:
        async with self.redis.pipeline(transaction=False) as pipe:
            for number in range(messages):
                pipe.xadd(self.stream, {"d": json.dumps({**PAYLOAD, "n": number})})
            await pipe.execute()
        await self.redis.xgroup_create(self.stream, GROUP, id="0")
        tally, meter = Tally(messages), Meter()
        while tally.left:
            for _, entries in await self.redis.xreadgroup(
                GROUP, "c", {self.stream: ">"}, count=CONCURRENCY, block=1000
            ):
                for entry, fields in entries:
                    tally.add(json.loads(fields[b"d"])["n"])
                    await self.redis.xack(self.stream, GROUP, entry)
        cost = meter.stop(messages)
        tally.check()
        assert (await self.redis.xpending(self.stream, GROUP))["pending"] == 0
        return cost

    async def close(self) -> None:
        await self.redis.delete(self.stream)
        await self.redis.aclose()


COMPARISONS: Final = (
    Comparison(f"publish, {IN_FLIGHT} in flight", 10.0, 0.5, Plain.publish_at_once, Ours.publish_at_once),
    Comparison(f"drain, concurrency {CONCURRENCY}", 20.0, 1.0, Plain.drain, Ours.drain),
    Comparison("publish, one after the other", 1.0, 0.1, Plain.publish_in_turn, Ours.publish_in_turn),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; see `run`."""
    # It warns of the missing append-only file, which is on purpose here.
    logging.getLogger("abe.redis").setLevel(logging.ERROR)
    return run(
        arguments,
        program="redis_ratios",
        client="redis-py",
        comparisons=COMPARISONS,
        service=lambda options: redis_service(
            server=options.server, arguments=("--appendonly", "no"), environ={"ABE_TEST_SERVICES": "processes"}
        ),
        sides=lambda url: (Plain(url), Ours(RedisBackend(RedisSettings(url=url, namespace=f"ours-{uuid4().hex}")))),
        options=lambda parser: parser.add_argument(
            "--server", default="", help="system, redis8, valkey or a path; the first that is installed"
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
