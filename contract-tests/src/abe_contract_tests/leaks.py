"""Finds leaks of opening, using and closing: tasks, threads, file descriptors, connections."""

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeAlias

from abe_contract_tests.bounds import Deadline
from abe_contract_tests.harness import Oracle

_STEP: Final = 0.02

_Found: TypeAlias = Mapping[str, set[Any]]


async def assert_no_leak(
    cycle: Callable[[int], Awaitable[object]], oracle: Oracle, *, cycles: int, seconds: float = 5.0
) -> None:
    """Run two equal rounds of cycles, and assert that the second one leaks nothing.

    The first round may fill pools up to their bounds; resources that the second adds are a leak.

    Args:
        cycle: The repeated operation, called with its number.
        oracle: Counts the connections.
        cycles: The number of cycles in both rounds together.
        seconds: The time after a round by which its resources must be released.
    """
    before = await _resources(oracle)
    for numbers in (range(cycles // 2), range(cycles // 2, cycles)):
        for n in numbers:
            await cycle(n)
        left, now = await _left_after(before, oracle, seconds)
        if numbers.start:
            assert not left, f"left behind: {'; '.join(left)}"
        before = now


async def _left_after(before: _Found, oracle: Oracle, seconds: float) -> tuple[list[str], _Found]:
    deadline = Deadline(seconds)
    while left := _more(before, now := await _resources(oracle)):
        if deadline.passed:
            break
        await asyncio.sleep(_STEP)
    return left, now


async def _resources(oracle: Oracle) -> _Found:
    current = asyncio.current_task()
    # Connections and descriptors have no stable names, so only their number counts.
    found: dict[str, set[Any]] = {"connections": set(range(await oracle.connections()))}
    found["tasks"] = {task for task in asyncio.all_tasks() if task is not current}
    found["threads"] = set(threading.enumerate())
    if sys.platform == "linux":
        found["descriptors"] = set(range(len(os.listdir("/proc/self/fd"))))
    return found


def _more(before: _Found, now: _Found) -> list[str]:
    left = {kind: now[kind] - before[kind] for kind in now}
    return [f"{len(extra)} {kind} {sorted(map(str, extra))[:5]}" for kind, extra in left.items() if extra]
