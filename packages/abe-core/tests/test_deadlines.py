"""Deadlines: whom the one timer ends, and what becomes of a cancellation that comes beside it."""

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest

from abe.backends.message_queue.engine.deadlines import Deadlines
from abe_contract_tests.bounds import within


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def bounded(deadlines: Deadlines, seconds: float, work: Callable[[], Awaitable[object]] | None = None) -> None:
    with deadlines.until(deadlines.loop.time() + seconds):
        await (asyncio.Event().wait() if work is None else work())


@pytest.fixture
async def deadlines() -> Deadlines:
    return Deadlines(asyncio.get_running_loop())


async def test_what_is_over_ends_with_a_timeout(deadlines: Deadlines) -> None:
    async with within(5):
        with pytest.raises(TimeoutError) as caught:
            await bounded(deadlines, 0.001)
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert not deadlines.open


async def test_what_ends_in_time_is_left_alone_and_schedules_nothing_more(deadlines: Deadlines) -> None:
    await bounded(deadlines, 50, turns)
    due = deadlines.due
    await bounded(deadlines, 60, turns)
    assert deadlines.due == due < math.inf, "one timer for both"
    assert not deadlines.open


async def test_each_is_ended_at_its_own_time(deadlines: Deadlines) -> None:
    tasks = [asyncio.create_task(bounded(deadlines, seconds)) for seconds in (60, 0.02, 0.001, 50)]
    async with within(5):
        for number in (2, 1):
            with pytest.raises(TimeoutError):
                await tasks[number]
    assert [task.done() for task in tasks] == [False, True, True, False]
    assert deadlines.due == min(bound.when for bound in deadlines.open), "the timer is for the earliest that is left"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_timer_that_finds_nothing_over_looks_again(deadlines: Deadlines) -> None:
    await bounded(deadlines, 0.01, turns)  # its timer stays
    async with within(5):
        with pytest.raises(TimeoutError):
            await bounded(deadlines, 0.03)


async def test_a_deadline_that_is_over_already_ends_the_first_wait(deadlines: Deadlines) -> None:
    async with within(5):
        with pytest.raises(TimeoutError):
            await bounded(deadlines, -1)


async def test_a_cancelled_task_is_cancelled(deadlines: Deadlines) -> None:
    task = asyncio.create_task(bounded(deadlines, 60))
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not deadlines.open


@pytest.mark.parametrize("first", ["cancelled", "expired"])
async def test_a_task_that_is_cancelled_as_its_time_ends_is_cancelled(deadlines: Deadlines, first: str) -> None:
    task = asyncio.create_task(bounded(deadlines, 60))
    await turns()
    steps: list[Callable[[], object]] = [task.cancel, deadlines.expire]
    for step in steps if first == "cancelled" else steps[::-1]:
        step()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_an_error_is_not_mistaken_for_the_end_of_the_time(deadlines: Deadlines) -> None:
    async def fails() -> None:
        deadlines.expire()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("no") from None

    task = asyncio.create_task(bounded(deadlines, 60, fails))
    with pytest.raises(ValueError, match="no"):
        await task
    assert task.cancelling() == 0


async def test_expiring_ends_all_at_once_and_only_once(deadlines: Deadlines) -> None:
    tasks = [asyncio.create_task(bounded(deadlines, 60)) for _ in range(3)]
    await turns()
    deadlines.expire()
    deadlines.expire()
    assert [task.cancelling() for task in tasks] == [1, 1, 1]
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [TimeoutError] * 3


async def test_bounds_may_be_nested(deadlines: Deadlines) -> None:
    async def inner() -> None:
        with pytest.raises(TimeoutError):
            await bounded(deadlines, 0.001)

    async with within(5):
        await bounded(deadlines, 60, inner)


async def test_closing_gives_the_timer_back(deadlines: Deadlines) -> None:
    await bounded(deadlines, 0.01, turns)
    deadlines.close()
    deadlines.close()
    assert deadlines.due == math.inf
