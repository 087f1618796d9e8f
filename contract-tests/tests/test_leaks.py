"""A leak is what each round leaves anew; a pool that grows to its bound is none."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from abe_contract_tests.leaks import assert_no_leak

CYCLES = 20
SECONDS = 0.1


class Connections:
    """An oracle that knows of connections only."""

    def __init__(self) -> None:
        self.open = 0

    async def connections(self) -> int:
        return self.open


@pytest.fixture
def oracle() -> Any:
    return Connections()


@pytest.fixture
async def sleepers() -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks: list[asyncio.Task[None]] = []
    yield tasks
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_nothing_left_is_no_leak(oracle: Any) -> None:
    done: list[int] = []

    async def cycle(n: int) -> None:
        done.append(n)

    await assert_no_leak(cycle, oracle, cycles=CYCLES, seconds=SECONDS)
    assert done == list(range(CYCLES))


async def test_what_ends_a_moment_later_is_no_leak(oracle: Any) -> None:
    ending: set[asyncio.Task[None]] = set()

    async def cycle(n: int) -> None:
        ending.add(asyncio.create_task(asyncio.sleep(SECONDS / 10)))

    await assert_no_leak(cycle, oracle, cycles=CYCLES, seconds=SECONDS)


async def test_a_pool_that_grows_to_its_bound_is_no_leak(oracle: Any) -> None:
    async def cycle(n: int) -> None:
        oracle.open = min(n + 1, CYCLES // 4)

    await assert_no_leak(cycle, oracle, cycles=CYCLES, seconds=SECONDS)


@pytest.mark.parametrize("period", [1, CYCLES // 2, CYCLES - 1])
async def test_what_some_cycle_of_each_round_leaves_is_a_leak(oracle: Any, period: int) -> None:
    async def cycle(n: int) -> None:
        oracle.open += n % period == period - 1

    with pytest.raises(AssertionError, match=r"left behind: \d+ connections"):
        await assert_no_leak(cycle, oracle, cycles=CYCLES, seconds=SECONDS)


async def test_tasks_and_descriptors_count(oracle: Any, sleepers: list[asyncio.Task[None]]) -> None:
    descriptors: list[int] = []

    async def leave_a_task(n: int) -> None:
        sleepers.append(asyncio.create_task(asyncio.sleep(60)))

    async def leave_a_file(n: int) -> None:
        descriptors.append(os.open("/dev/null", os.O_RDONLY))

    with pytest.raises(AssertionError, match="10 tasks"):
        await assert_no_leak(leave_a_task, oracle, cycles=CYCLES, seconds=SECONDS)
    try:
        with pytest.raises(AssertionError, match="10 descriptors"):
            await assert_no_leak(leave_a_file, oracle, cycles=CYCLES, seconds=SECONDS)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
