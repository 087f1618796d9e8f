"""Coroutines that are begun by hand: what they return, what they raise, and what a cancellation does at each await."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from abe.backends.message_queue.engine.stepping import Begun, begin


async def finish(work: Coroutine[Any, Any, Any]) -> Any:
    begun = begin(work)
    return (await begun) if isinstance(begun, Begun) else begun


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Work:
    """Waits `waits` times, each for an event of its own, and notes how it goes on."""

    def __init__(self, waits: int) -> None:
        self.events = [asyncio.Event() for _ in range(waits)]
        self.notes: list[str] = []

    async def __call__(self, *, cleaning: asyncio.Event | None = None, swallow: bool = False) -> str:
        task = asyncio.current_task()
        for number, event in enumerate(self.events):
            try:
                await event.wait()
            except asyncio.CancelledError:
                self.notes.append(f"cancelled at {number}")
                if cleaning is not None:
                    await cleaning.wait()
                    self.notes.append("cleaned")
                if not swallow:
                    raise
            assert asyncio.current_task() is task
        self.notes.append("returned")
        return "result"


async def test_what_waits_for_nothing_returns_at_once() -> None:
    assert begin(Work(0)()) == "result"


async def test_what_returns_nothing_is_told_from_what_waits() -> None:
    async def nothing() -> None: ...

    assert begin(nothing()) is None


def test_outside_of_an_event_loop_it_begins_too() -> None:
    async def value() -> int:
        return 1

    assert begin(value()) == 1


async def test_what_fails_fails_where_it_is_awaited() -> None:
    async def fails() -> None:
        raise ValueError("no")

    begun = begin(fails())
    assert isinstance(begun, Begun)
    with pytest.raises(ValueError, match="no"):
        await begun


async def test_what_ends_the_process_is_not_kept_for_later() -> None:
    async def ends() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(ends())


@pytest.mark.parametrize("waits", [1, 2, 3])
async def test_what_waits_goes_on_where_it_is_awaited(waits: int) -> None:
    work = Work(waits)
    task = asyncio.create_task(finish(work()))
    for event in work.events:
        await turns()
        assert not task.done()
        event.set()
    assert await task == "result"


async def test_what_began_outside_of_a_task_goes_on_in_one() -> None:
    event = asyncio.Event()

    async def waits() -> str:
        await event.wait()
        await asyncio.sleep(0)
        return "result"

    begun: list[Any] = []
    asyncio.get_running_loop().call_soon(lambda: begun.append(begin(waits())))
    await turns()

    async def rest() -> Any:
        return await begun[0]

    task = asyncio.create_task(rest())
    await turns()
    event.set()
    assert await task == "result"


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_a_cancellation_reaches_it_at_each_await(place: int) -> None:
    work = Work(3)
    task = asyncio.create_task(finish(work()))
    for event in work.events[:place]:
        event.set()
        await turns()
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.notes == [f"cancelled at {place}"]


@pytest.mark.parametrize("place", [0, 1])
async def test_a_cancelled_one_may_wait_again_and_be_cancelled_again(place: int) -> None:
    work, cleaning = Work(2), asyncio.Event()
    task = asyncio.create_task(finish(work(cleaning=cleaning)))
    for event in work.events[:place]:
        event.set()
    await turns()
    task.cancel()
    await turns()
    assert not task.done()
    if place:
        task.cancel()
    else:
        cleaning.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.notes == [f"cancelled at {place}", *(() if place else ("cleaned",))]


@pytest.mark.parametrize("place", [0, 1])
async def test_one_that_swallows_its_cancellation_returns(place: int) -> None:
    work = Work(2)
    task = asyncio.create_task(finish(work(swallow=True)))
    work.events[1 - place].set()
    await turns()
    task.cancel()
    assert await task == "result"
    assert work.notes == [f"cancelled at {place}", "returned"]


async def test_a_failure_of_what_it_waits_for_reaches_it() -> None:
    future = asyncio.get_running_loop().create_future()

    async def waits() -> str:
        try:
            await future
        except ValueError as exc:
            return str(exc)
        return ""

    task = asyncio.create_task(finish(waits()))
    await turns()
    future.set_exception(ValueError("no"))
    assert await task == "no"


async def test_a_closed_one_cleans_up() -> None:
    notes: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            notes.append("closed")

    outer = finish(waits())
    outer.send(None)
    outer.close()
    assert notes == ["closed"]
