"""Who holds the registry's lock, or dead letters, may die or stand still."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from abe.errors import BackendConnectionError
from abe_contract_tests import bounds

pytestmark = pytest.mark.xdist_group("rabbitmq-faults")

HOLDER = """
import asyncio, json, sys
import aio_pika

async def main(url, lock, dead):
    channel = await (await aio_pika.connect(url)).channel()
    await channel.declare_queue(lock, exclusive=True)
    taken = [await (await channel.get_queue(dead)).get() for _ in range(2)] if dead else []
    print(len(taken), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*json.loads(sys.argv[1])))
"""
"""Holds a lock, and two dead letters in its hands, until it is killed."""


class TestLockHolder:
    """A process that holds the lock of a namespace, and dies."""

    @pytest.fixture
    async def hold(self, lab: Any) -> AsyncIterator[Callable[..., Awaitable[asyncio.subprocess.Process]]]:
        processes: list[asyncio.subprocess.Process] = []

        async def hold(dead: str = "") -> asyncio.subprocess.Process:
            lock = lab.names.look("g") if dead else lab.names.lock
            arguments = json.dumps([lab.url + "?heartbeat=1", lock, dead])
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", HOLDER, arguments, stdout=asyncio.subprocess.PIPE
            )
            processes.append(process)
            assert process.stdout is not None
            assert int(await process.stdout.readline()) == (2 if dead else 0)
            return process

        yield hold
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def test_a_killed_one_frees_it_at_once(self, lab: Any, hold: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        process = await hold()
        declaring = asyncio.create_task(backend.declare("h"))
        await asyncio.wait([declaring], timeout=0.3)
        assert not declaring.done()
        process.kill()
        async with bounds.within(3):
            await declaring

    async def test_a_frozen_one_keeps_it_until_its_heartbeat_is_missed(self, lab: Any, hold: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        process = await hold()
        os.kill(process.pid, signal.SIGSTOP)
        declaring = asyncio.create_task(backend.declare("h"))
        await asyncio.wait([declaring], timeout=0.5)
        assert not declaring.done(), "the lock is held"
        await backend.publish("k", {})
        declaring.cancel()
        async with bounds.within(15):
            while True:
                try:
                    await backend.declare("h")
                except BackendConnectionError:
                    continue
                break

    async def test_dead_letters_in_its_hands_are_there_again(self, lab: Any, hold: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        for number in range(5):
            await backend.publish("k", {"n": number})
        async with backend.consume(group="g") as subscription, bounds.within(10):
            for _ in range(5):
                await (await subscription.receive()).reject("no")
        process = await hold(lab.names.dead("g"))
        listing = asyncio.create_task(backend.dead_letters("g").list())
        await asyncio.wait([listing], timeout=0.3)
        assert not listing.done()
        process.kill()
        async with bounds.within(5):
            letters = await listing
            while len(letters) < 5:  # the queue may take back what it held a moment after the lock is free
                letters = await backend.dead_letters("g").list()
            assert sorted(json.loads(letter.body)["n"] for letter in letters) == [0, 1, 2, 3, 4]
            assert await backend.dead_letters("g").replay_all() == 5
            async with backend.consume(group="g") as subscription:
                assert sorted([(await anext(subscription))["n"] for _ in range(5)]) == [0, 1, 2, 3, 4]
