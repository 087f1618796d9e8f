"""The simulated world: time, hosts, and their ends."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from abe.testing.simulation.world import DeadlockError, LivelockError, World


def run(world: World, work: Coroutine[Any, Any, Any]) -> Any:
    """Run something in a host of its own."""
    return world.run(world.host("main"), work)


def test_time_passes_without_waiting() -> None:
    world = World(0)

    async def sleeps() -> float:
        await asyncio.sleep(86400)
        return asyncio.get_running_loop().time()

    assert run(world, sleeps()) == pytest.approx(86400, abs=0.001)
    world.close()


def test_a_deadlock_is_told_from_a_wait() -> None:
    world = World(0)
    with pytest.raises(DeadlockError):
        run(world, asyncio.Event().wait())
    world.close()


def test_a_task_that_only_yields_does_not_stop_time_and_does_not_run_for_ever() -> None:
    async def yields() -> None:
        while True:
            await asyncio.sleep(0)

    world = World(0)
    with pytest.raises(LivelockError):
        world.run(world.host("main"), yields(), most=10_000)
    assert world.now > 0.01
    world.close()


def test_a_killed_host_runs_no_finally() -> None:
    world = World(0)
    victim = world.host("victim")
    done: list[str] = []

    async def works() -> None:
        try:
            await asyncio.sleep(1)
        finally:
            done.append("finally")

    async def kills() -> None:
        victim.start(works())
        await asyncio.sleep(0.5)
        world.kill(victim)
        await asyncio.sleep(10)
        done.append("survived")
        with pytest.raises(RuntimeError, match="closed"):
            victim.loop.call_soon_threadsafe(print)

    run(world, kills())
    assert done == ["survived"]
    world.close()


def test_a_frozen_host_is_late_and_loses_nothing() -> None:
    world = World(0)
    frozen = world.host("frozen", offset=1000.0)
    woke: list[float] = []

    async def wakes() -> None:
        await asyncio.sleep(1)
        woke.append(world.now)

    async def freezes() -> None:
        task = frozen.start(wakes())
        await asyncio.sleep(0.5)
        frozen.freeze(5)
        while not task.done():
            await asyncio.sleep(0.1)

    run(world, freezes())
    assert woke == [pytest.approx(5.5, abs=0.01)]
    world.close()


def test_clocks_run_at_their_own_rates() -> None:
    world = World(0)
    fast = world.host("fast", offset=7.0, rate=2.0)

    async def sleeps() -> None:
        await asyncio.sleep(10)

    task = fast.start(sleeps())

    async def waits() -> float:
        while not task.done():
            await asyncio.sleep(0.01)
        return world.now

    assert run(world, waits()) == pytest.approx(5, abs=0.05)
    assert fast.time() == pytest.approx(17, abs=0.1)
    world.close()


def schedule(seed: int, *, shuffled: bool = False) -> list[str]:
    """Return in which order the callbacks of two hosts run."""
    world = World(seed, shuffled=shuffled)
    ran: list[str] = []

    async def counts(name: str) -> None:
        await asyncio.gather(*(yields(f"{name}{number}") for number in range(6)))

    async def yields(name: str) -> None:
        ran.append(name)
        await asyncio.sleep(0)
        ran.append(name)

    other = world.host("other")
    task = other.start(counts("b"))

    async def both() -> None:
        await counts("a")
        while not task.done():
            await asyncio.sleep(0.001)

    run(world, both())
    world.close()
    return ran


def test_the_seed_decides_about_the_order() -> None:
    assert schedule(1) == schedule(1)
    assert len({tuple(schedule(seed)) for seed in range(5)}) > 1


def test_the_callbacks_of_a_host_run_in_their_order_unless_it_is_shuffled() -> None:
    order = [f"b{number}" for number in range(6)] * 2
    shuffled = [schedule(seed, shuffled=True) for seed in range(5)]
    assert all([name for name in schedule(seed) if name.startswith("b")] == order for seed in range(5))
    assert any([name for name in names if name.startswith("b")] != order for names in shuffled)


def test_what_nobody_retrieves_is_told() -> None:
    world = World(0)
    host = world.host("host")

    async def fails() -> None:
        raise ZeroDivisionError

    async def forgets() -> None:
        host.start(fails())
        await asyncio.sleep(1)

    run(world, forgets())
    assert len(host.troubles) == 1
    assert "ZeroDivisionError" in host.troubles[0]
    world.close()
