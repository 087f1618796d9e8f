"""Shared tasks: who waits for what, and what a cancellation leaves behind, at each place where one may come."""

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

import pytest

from abe.backends.message_queue.base.tasks import Background, SharedTask, gather_all, result_of, run_to_completion
from abe.errors import BackendClosedError, BackendConnectionError


class Attempts:
    """Work that ends when it is told to, and counts how often it began and how often it was cancelled."""

    def __init__(self) -> None:
        self.began = 0
        self.cancelled = 0
        self.finished = 0
        self.open = asyncio.Event()
        self.error: BaseException | None = None

    async def __call__(self) -> int:
        self.began += 1
        mine = self.began
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        self.finished += 1
        return mine


async def _until_blocked() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def _cancelled(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def _reported() -> list[dict[str, Any]]:
    """Return a list of what asyncio reports from now on, such as exceptions that nobody looked at."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    return reported


async def test_gather_all_returns_results_in_order() -> None:
    async def value(number: int) -> int:
        for _ in range(3 - number):
            await asyncio.sleep(0)
        return number

    assert await gather_all(*(value(number) for number in range(4))) == [0, 1, 2, 3]
    assert await gather_all(value(1)) == [1]
    nothing: list[Coroutine[Any, Any, int]] = []
    assert await gather_all(*nothing) == []


async def test_gather_all_raises_the_first_failure_once_all_have_ended() -> None:
    slow = Attempts()
    slow.error = BackendConnectionError("slow")

    async def fail() -> int:
        raise BackendConnectionError("quick")

    task = asyncio.ensure_future(gather_all(slow(), fail()))
    await _until_blocked()
    assert not task.done()
    slow.open.set()
    with pytest.raises(BackendConnectionError, match="slow"):
        await task


@pytest.mark.parametrize("count", [1, 3])
async def test_gather_all_that_is_cancelled_cancels_all_and_waits_for_them(count: int) -> None:
    work, cleaning = Attempts(), asyncio.Event()

    async def with_cleanup() -> int:
        try:
            return await work()
        finally:
            await cleaning.wait()

    gathering = gather_all(*(with_cleanup() for _ in range(count)))
    task = asyncio.ensure_future(gathering)
    await _until_blocked()
    task.cancel()
    await _until_blocked()
    assert work.cancelled == count
    assert not task.done()
    cleaning.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_run_to_completion_goes_on_when_its_caller_is_cancelled() -> None:
    work = Attempts()
    caller = asyncio.ensure_future(run_to_completion(work()))
    await _until_blocked()
    await _cancelled(caller)
    gc.collect()  # nobody but the helper holds the operation now
    work.open.set()
    await _until_blocked()
    assert (work.finished, work.cancelled) == (1, 0)


async def test_a_caller_cancelled_as_the_operation_ends_is_cancelled() -> None:
    work = Attempts()
    caller = asyncio.ensure_future(run_to_completion(work()))
    await _until_blocked()
    work.open.set()
    await asyncio.sleep(0)  # the operation ends in this round; the caller is only to be woken
    await _cancelled(caller)
    assert work.finished == 1


async def test_a_caller_cancelled_before_it_runs_begins_nothing() -> None:
    work = Attempts()

    async def call() -> int:
        return await run_to_completion(work())

    await _cancelled(asyncio.ensure_future(call()))
    assert work.began == 0


async def test_a_timeout_ends_the_wait_alone() -> None:
    work = Attempts()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):  # noqa: TID251 - over at once, so no bound on anything
            await run_to_completion(work())
    work.open.set()
    await _until_blocked()
    assert work.cancelled == 0
    assert (task := asyncio.current_task()) is not None
    assert task.cancelling() == 0


async def test_an_operation_cancelled_from_within_is_no_cancelled_caller() -> None:
    async def inside() -> int:
        raise asyncio.CancelledError

    with pytest.raises(BackendConnectionError, match="the connection was closed"):
        await run_to_completion(inside())
    with pytest.raises(BackendClosedError, match="over"):
        await run_to_completion(inside(), lambda: BackendClosedError("over"))


async def test_run_to_completion_raises_what_the_operation_fails_with() -> None:
    work = Attempts()
    work.error = ValueError("bug")
    work.open.set()
    with pytest.raises(ValueError, match="bug"):
        await run_to_completion(work())


async def test_a_failure_that_no_caller_is_left_to_see_is_not_reported() -> None:
    reported, work = _reported(), Attempts()
    work.error = BackendConnectionError("lost")
    shared = SharedTask(work)
    callers = [asyncio.ensure_future(run_to_completion(work())), asyncio.ensure_future(shared.join())]
    await _until_blocked()
    for caller in callers:
        await _cancelled(caller)
    work.open.set()
    await _until_blocked()
    assert work.began == 2
    del shared, callers[:]
    gc.collect()
    assert not reported


async def test_result_of_leaves_the_task_to_its_other_callers() -> None:
    work = Attempts()
    task = asyncio.ensure_future(work())
    first, second = (asyncio.ensure_future(result_of(task)) for _ in range(2))
    await _until_blocked()
    await _cancelled(first)
    work.open.set()
    assert await second == 1


async def test_callers_share_one_attempt() -> None:
    work = Attempts()
    shared = SharedTask(work)
    assert not shared.running
    callers = [asyncio.ensure_future(shared.join()) for _ in range(3)]
    await _until_blocked()
    assert shared.running
    await _cancelled(callers.pop(0))  # the one that began it
    work.open.set()
    assert await asyncio.gather(*callers) == [1, 1]
    assert (work.began, work.cancelled, shared.running) == (1, 0, False)


async def test_callers_share_a_failure_and_the_next_call_tries_again() -> None:
    work = Attempts()
    work.error = BackendConnectionError("refused")
    shared = SharedTask(work)
    callers = [asyncio.ensure_future(shared.join()) for _ in range(2)]
    await _until_blocked()
    work.open.set()
    for caller in callers:
        with pytest.raises(BackendConnectionError, match="refused"):
            await caller
    work.error = None
    assert await shared.join() == 2


async def test_an_attempt_that_all_callers_left_is_joined_by_the_next() -> None:
    work = Attempts()
    shared = SharedTask(work)
    caller = asyncio.ensure_future(shared.join())
    await _until_blocked()
    await _cancelled(caller)
    work.open.set()
    assert await shared.join() == 1
    assert work.began == 1


async def test_closing_cancels_the_attempt_and_tells_those_who_wait() -> None:
    work = Attempts()
    shared = SharedTask(work, lambda: BackendClosedError("the end"))
    callers = [asyncio.ensure_future(shared.join()) for _ in range(2)]
    await _until_blocked()
    await shared.close()
    assert work.cancelled == 1
    for caller in callers:
        with pytest.raises(BackendClosedError, match="the end"):
            await caller
    with pytest.raises(BackendClosedError, match="the end"):
        await shared.join()
    await shared.close()
    assert work.began == 1


async def test_an_attempt_that_was_cancelled_may_be_followed_by_another() -> None:
    work = Attempts()
    shared = SharedTask(work)
    await shared.cancel()
    caller = asyncio.ensure_future(shared.join())
    await _until_blocked()
    await shared.cancel()
    with pytest.raises(BackendConnectionError):
        await caller
    work.open.set()
    assert await shared.join() == 2


async def test_closing_waits_for_the_attempts_cleanup_and_may_be_bounded() -> None:
    cleaning = asyncio.Event()

    async def attempt() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await cleaning.wait()

    shared = SharedTask(attempt)
    task = shared.start()
    await _until_blocked()
    await shared.close(0)
    assert not task.done()
    cleaning.set()
    await _until_blocked()
    assert task.cancelled()


async def test_background_tasks_go_on_until_they_are_drained() -> None:
    background, work = Background(), Attempts()

    async def chain() -> None:
        await work()
        background.start(work())

    background.start(chain())
    draining = asyncio.ensure_future(background.drain())
    await _until_blocked()
    await _cancelled(draining)
    assert (len(background), work.cancelled) == (1, 0)
    work.open.set()
    await background.drain()
    assert (len(background), work.finished) == (0, 2)


async def test_cancelling_background_tasks_waits_for_them() -> None:
    background, work = Background(), Attempts()
    await background.cancel()
    background.start(work())
    await _until_blocked()
    await background.cancel()
    assert (len(background), work.cancelled) == (0, 1)


async def test_a_failing_background_task_is_reported() -> None:
    reported, background, work = _reported(), Background(), Attempts()
    work.error = ValueError("bug")
    work.open.set()
    background.start(work())
    await background.drain()
    gc.collect()
    assert [str(context["exception"]) for context in reported] == ["bug"]
