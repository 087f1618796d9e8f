"""Dead letters, step by step, on a transport whose steps go as a test says."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from abe.backends.message_queue.base import DeadLetter
from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import BackendClosedError, BackendConnectionError, GroupMissingError
from abe_contract_tests import bounds


def letter(number: int) -> DeadLetter:
    return DeadLetter(
        id=str(number), key="k", body=b"{}", headers={}, attempts=1, reason="r", error="", published_at=0.0, dead_at=0.0
    )


class Scripted:
    """What a generator of the transport yields or raises, one entry a step; notes when it is closed."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)
        self.begun = 0
        self.closed = 0

    async def __call__(self, *_: Any) -> AsyncGenerator[Any]:
        self.begun += 1
        try:
            while self.steps:
                step = self.steps.pop(0)
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            self.closed += 1


async def scripted(backend: MemoryBackend, name: str, *steps: Any) -> Scripted:
    await backend.connect()
    session = backend._calls.session
    assert session is not None
    script = Scripted(*steps)
    setattr(session.transport, name, script)
    return script


async def test_a_listing_takes_no_more_pages_than_it_needs(memory_backend: MemoryBackend) -> None:
    script = await scripted(memory_backend, "dead_letters", [letter(1), letter(2)], [letter(3)], [letter(4)])
    letters = await memory_backend.dead_letters().list(3)
    assert [each.id for each in letters] == ["1", "2", "3"]
    assert (len(script.steps), script.closed) == (1, 1)


async def test_a_loop_over_all_of_them_that_is_left_closes_the_transports_generator(
    memory_backend: MemoryBackend,
) -> None:
    script = await scripted(memory_backend, "dead_letters", [letter(1)], [letter(2)], [letter(3)])
    letters = aiter(memory_backend.dead_letters())
    assert (await anext(letters)).id == "1"
    assert [each.id async for each in letters] == ["2", "3"]
    assert script.closed == 1


async def test_one_is_looked_for_page_by_page(memory_backend: MemoryBackend) -> None:
    script = await scripted(memory_backend, "dead_letters", [letter(1)], [letter(2)], [letter(3)])
    found = await memory_backend.dead_letters().get("2")
    assert found is not None
    assert (found.id, len(script.steps)) == ("2", 1)


@pytest.mark.parametrize("name", ["replay", "purge"])
async def test_progress_is_told_after_each_step(memory_backend: MemoryBackend, name: str) -> None:
    await scripted(memory_backend, name, 100, 0, 50)
    told: list[int] = []
    assert await getattr(memory_backend.dead_letters(), f"{name}_all")(progress=told.append) == 150
    assert told == [100, 100, 150]


@pytest.mark.parametrize("name", ["replay", "purge"])
async def test_no_ids_are_none_of_them(memory_backend: MemoryBackend, name: str) -> None:
    script = await scripted(memory_backend, name, 100)
    assert await getattr(memory_backend.dead_letters(), name)(*[]) == 0
    assert script.begun == 0


async def test_a_lost_connection_before_the_first_step_is_tried_again(memory_backend: MemoryBackend) -> None:
    script = await scripted(memory_backend, "replay", BackendConnectionError("gone"), 7)
    assert await memory_backend.dead_letters().replay_all() == 7
    assert script.begun == 2


async def test_a_lost_connection_in_the_middle_says_how_many_were_done(memory_backend: MemoryBackend) -> None:
    script = await scripted(memory_backend, "replay", 7, 8, BackendConnectionError("gone"), 9)
    with pytest.raises(BackendConnectionError, match=r"gone.*15 dead letters were replayed"):
        await memory_backend.dead_letters().replay_all()
    assert script.closed == 1


async def test_each_step_has_the_time_of_one_request_and_the_whole_has_more(memory_backend: MemoryBackend) -> None:
    await memory_backend.connect()
    session = memory_backend._calls.session
    assert session is not None
    object.__setattr__(memory_backend.settings, "publish_timeout", 1.0)

    async def slow(*_: Any) -> AsyncGenerator[int]:
        for _ in range(3):
            await pause(asyncio.Event(), 0.4)  # three of these are longer than one step may be
            yield 1
        await asyncio.Event().wait()

    session.transport.replay = slow  # type: ignore[method-assign, assignment]
    with pytest.raises(BackendConnectionError, match="3 dead letters were replayed"):
        await memory_backend.dead_letters().replay_all()


async def test_what_was_begun_before_the_backend_was_closed_does_not_go_on_after_it_was_opened_again(
    memory_backend: MemoryBackend,
) -> None:
    script = await scripted(memory_backend, "dead_letters", [letter(1)], [letter(2)])
    letters = aiter(memory_backend.dead_letters())
    await anext(letters)
    await memory_backend.disconnect()
    await memory_backend.connect()
    with pytest.raises(BackendClosedError):
        await anext(letters)
    assert (len(script.steps), script.closed) == (1, 1)


@pytest.mark.parametrize("ending", [BackendConnectionError("gone"), None])
async def test_a_broker_that_does_not_let_go_of_what_was_looked_through_keeps_nobody(
    memory_backend: MemoryBackend, ending: Exception | None
) -> None:
    await memory_backend.connect()
    session = memory_backend._calls.session
    assert session is not None
    object.__setattr__(memory_backend.settings, "publish_timeout", 0.2)

    async def pages(_: str) -> AsyncGenerator[Any]:
        try:
            yield [letter(1)]
            yield [letter(2)]
        finally:
            if ending is not None:
                raise ending
            await asyncio.Event().wait()

    session.transport.dead_letters = pages  # type: ignore[method-assign]
    async with bounds.within(5):
        assert [each.id for each in await memory_backend.dead_letters().list(1)] == ["1"]


async def test_a_group_that_is_deleted_between_declaration_and_subscription_is_declared_again(
    memory_backend: MemoryBackend,
) -> None:
    await memory_backend.connect()
    session = memory_backend._calls.session
    assert session is not None
    transport: Any = session.transport
    subscribe, missed = transport.subscribe, 0

    async def deleted_first(group: str, prefetch: int) -> Any:
        nonlocal missed
        if missed < 2:
            missed += 1
            await transport.delete_group(group)
        return await subscribe(group, prefetch)

    transport.subscribe = deleted_first
    async with bounds.within(5), memory_backend.consume(group="g") as messages:
        await memory_backend.publish("k", {"n": 1})
        assert await anext(messages) == {"n": 1}
    assert missed == 2


async def test_what_is_asked_of_a_missing_group_raises(memory_backend: MemoryBackend) -> None:
    for call in (
        memory_backend.stats("missing"),
        memory_backend.dead_letters("missing").list(),
        memory_backend.dead_letters("missing").replay_all(),
    ):
        with pytest.raises(GroupMissingError, match="missing"):
            await call


async def test_a_key_that_nobody_wants_is_warned_of_once_and_counted(
    memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture
) -> None:
    await memory_backend.declare("g", keys=["order.*"])
    for _ in range(3):
        await memory_backend.publish("user.created", {})
    await memory_backend.publish_many([("user.deleted", {}), ("order.created", {})])
    assert memory_backend.unroutable == 4
    warned = [record.getMessage() for record in caplog.records if "no group wants" in record.getMessage()]
    assert [("user.created" in text, "user.deleted" in text) for text in warned] == [(True, False), (False, True)]
