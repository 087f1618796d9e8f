"""Room for what is on its way: who waits, who is woken, and what a cancellation or a deadline leaves behind."""

import asyncio
from collections.abc import Sequence

import pytest

from abe.backends.message_queue.engine.room import Room
from abe_contract_tests.bounds import within


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def later(seconds: float = 60) -> float:
    return asyncio.get_running_loop().time() + seconds


async def waiting(room: Room, count: int) -> Sequence["asyncio.Task[bool]"]:
    """Return so many tasks that wait for room and take it."""

    async def take() -> bool:
        taken = await room.wait(later())
        if taken:
            room.enter(1)
        return taken

    tasks = [asyncio.create_task(take()) for _ in range(count)]
    await turns()
    return tasks


@pytest.fixture
async def room() -> Room:
    room = Room(max_count=2, max_bytes=10)
    room.enter(5)
    room.enter(4)
    return room


async def test_the_bound_is_of_messages_and_of_bytes() -> None:
    for count, sizes in ((2, (1, 1)), (9, (4, 6))):
        room = Room(max_count=count, max_bytes=10)
        for size in sizes:
            assert not room.full()
            room.enter(size)
        assert room.full()
        room.leave(1, sizes[0])
        assert not room.full()


async def test_as_many_as_leave_come_in_in_their_order(room: Room) -> None:
    tasks = await waiting(room, 3)
    room.leave(1, 5)
    await turns()
    assert [task.done() for task in tasks] == [True, False, False]
    assert room.count == 2
    room.leave(2, 5)
    async with within(5):
        assert await asyncio.gather(*tasks) == [True] * 3


async def test_a_large_one_that_leaves_makes_room_for_all_that_fit() -> None:
    room = Room(max_count=100, max_bytes=10)
    room.enter(10)
    tasks = await waiting(room, 9)
    room.leave(1, 10)
    async with within(5):
        assert await asyncio.gather(*tasks) == [True] * 9


async def test_a_deadline_ends_the_wait_and_nothing_else(room: Room) -> None:
    async with within(5):
        assert not await room.wait(later(0.001))
    (task,) = await waiting(room, 1)
    room.leave(1, 5)
    async with within(5):
        assert await task


async def test_one_that_is_cancelled_while_it_waits_takes_no_place(room: Room) -> None:
    first, second = await waiting(room, 2)
    first.cancel()
    await turns()
    room.leave(1, 5)
    async with within(5):
        assert await second
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_one_that_is_woken_and_cancelled_at_once_hands_its_place_on(room: Room) -> None:
    first, second = await waiting(room, 2)
    room.leave(1, 5)
    first.cancel()
    async with within(5):
        assert await second
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_closed_it_lets_everybody_through(room: Room) -> None:
    tasks = await waiting(room, 3)
    room.closed = True
    room.release()
    async with within(5):
        assert await asyncio.gather(*tasks) == [True] * 3
    assert not room.full()


async def test_the_wait_for_emptiness_ends_when_the_last_one_has_left(room: Room) -> None:
    task = asyncio.create_task(room.empty(60))
    await turns()
    room.leave(1, 5)
    await turns()
    assert not task.done()
    room.leave(1, 4)
    async with within(5):
        await task
        await room.empty(60)


@pytest.mark.parametrize("how", ["time", "cancelled"])
async def test_the_wait_for_emptiness_may_end_before(room: Room, how: str) -> None:
    task = asyncio.create_task(room.empty(0.001 if how == "time" else 60))
    await turns()
    if how == "cancelled":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with within(5):
            await task
    room.leave(2, 9)
    assert room.count == 0
