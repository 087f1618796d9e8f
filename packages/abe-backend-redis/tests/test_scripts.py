"""The scripts: loaded again where they were forgotten, and legal in a cluster."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis_primitives import dead, release, retry, total

from abe.backends.message_queue.base import Delivery
from abe_backend_redis._scripts import NAMES
from abe_contract_tests import bounds

Collect = Callable[..., Awaitable[list[Delivery]]]
Until = Callable[..., Awaitable[None]]


class TestScripts:
    async def test_every_one_is_loaded_again_where_it_was_forgotten(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport)
        for operation in (
            lambda: transport.declare("g", None, change=True),
            lambda: transport.send(lab.envelopes(3)),
            lambda: collect(receiver, 3),
            lambda: transport.groups(),
            lambda: transport.stats("g"),
            lambda: receiver.renew([Delivery(b"", None, 1, b"1-1")]),
            lambda: receiver.settle([]),
            lambda: receiver.recover([]),
            lambda: receiver.join(),
            lambda: total(transport.replay("g", None)),
            lambda: transport.delete_group("g"),
        ):
            await lab.redis.script_flush()
            await operation()

    async def test_the_first_publish_after_a_flush_is_not_doubled(self, lab: Any) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        await transport.send(lab.envelopes(1))
        await lab.redis.script_flush()
        await transport.send(lab.envelopes(1))
        assert (await transport.stats("g")).waiting == 2

    async def test_they_touch_no_key_that_they_were_not_given(self, lab: Any, collect: Collect) -> None:
        seen: dict[bytes, set[str]] = {}
        ended = asyncio.Event()
        watching = asyncio.create_task(_watch(lab, seen, ended))
        try:
            async with bounds.within(10):
                while b"begin" not in seen:
                    await lab.redis.echo("begin")
                    await asyncio.sleep(0.01)
                await _everything(lab, collect)
                await lab.redis.echo("end")
                await ended.wait()
        finally:
            watching.cancel()
        del seen[b"begin"], seen[b"end"]
        assert len(seen) == len(NAMES)
        assert {sha: strange for sha, strange in seen.items() if strange} == {}

    async def test_they_are_legal_on_a_node_of_a_cluster(
        self, launch: Any, lab_at: Any, collect: Collect, until: Until, caplog: pytest.LogCaptureFixture
    ) -> None:
        service = launch("--cluster-enabled", "yes")
        lab = lab_at(service.url)
        await lab.redis.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

        async def ready() -> bool:
            return b"cluster_state:ok" in await lab.redis.execute_command("CLUSTER", "INFO")

        await until(ready)
        caplog.set_level(logging.WARNING)
        await _everything(lab, collect)
        assert caplog.messages == []


async def _everything(lab: Any, collect: Collect) -> None:
    """Use every script, on most of its paths."""
    transport = await lab.transport(max_backlog=1000, lease=0.3)
    await transport.send([lab.envelope("a"), lab.envelope("b"), lab.envelope("a", delay=0.1)])
    await transport.declare("g", ("a",), change=True)
    await transport.declare("rest", None, change=True)
    await transport.groups()
    receiver, other = await lab.receiver(transport), await lab.receiver(transport)
    await transport.send(lab.envelopes(5, "a"))
    held = await collect(receiver, 7)
    await receiver.renew(held)
    await receiver.settle([retry(held[0]), retry(held[1], 0.05), release(held[2]), dead(held[3])])
    await receiver.ack([held[4]], verify=True)
    await receiver.recover([held[5], held[6]])
    await transport.stats("g")
    await total(transport.replay("g", None))
    await receiver.settle([dead(held[6])])
    await total(transport.purge("g", None))
    await collect(other, 6)
    await receiver.close()
    await transport.delete_group("g")


async def _watch(lab: Any, seen: dict[bytes, set[str]], ended: asyncio.Event) -> None:
    """Note for each script what it touched beside its KEYS, in our namespace or out of it."""
    from redis.asyncio import Redis

    client = Redis.from_url(lab.url)
    try:
        async with client.monitor() as monitor:
            keys: list[str] = []
            sha = b""
            async for entry in monitor.listen():
                words = entry["command"].split(" ")  # keys come before anything that may hold a space
                name = words[0].upper()
                if name == "ECHO":
                    seen[words[1].encode()] = set()
                    if words[1] == "end":
                        ended.set()
                elif name == "EVALSHA":
                    sha, count = words[1].encode(), int(words[2])
                    keys = words[3 : 3 + count]
                    seen.setdefault(sha, set())
                elif entry["client_type"] == "lua" and name != "TIME":
                    key = words[2] if name in ("XGROUP", "XINFO") else words[1]
                    touched = words[1:3] if name == "RENAME" else words[1:] if name == "DEL" else [key]
                    seen[sha] |= {f"{name} {each}" for each in touched if each not in keys}
    finally:
        await client.aclose()
