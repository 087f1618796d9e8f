"""Each message has a context of its own: what its handler sets in a ContextVar ends with it."""

import asyncio
import contextvars
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from abe import AsyncLoopConsumer, ConstantBackoff, Message, Middleware, RetryPolicy
from abe.backends.message_queue.base.middleware import HandleNext
from abe.backends.message_queue.service.memory import MemoryBackend
from abe_contract_tests import bounds

TENANT: contextvars.ContextVar[Any] = contextvars.ContextVar("tenant")


class Odd:
    """A value that cannot be compared."""

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]


@asynccontextmanager
async def running(consumer: AsyncLoopConsumer, handler: Any) -> AsyncIterator[asyncio.Task[None]]:
    async with bounds.within(10):
        task = asyncio.create_task(consumer.run(handler))
        try:
            yield task
        finally:
            await consumer.shutdown()
            await asyncio.wait([task])
    task.result()


async def seen_by(backend: MemoryBackend, handler: Any, count: int, **options: Any) -> None:
    """Give the handler `count` messages of one key, and return when they are all settled."""
    await backend.declare()
    await backend.publish_many([("k", {"n": n}) for n in range(count)])
    async with running(AsyncLoopConsumer(backend, **options), handler):
        while (stats := await backend.stats()).waiting + stats.in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


OPTIONS: list[dict[str, Any]] = [{}, {"concurrency": 3}, {"timeout": 30}, {"ordered_by_key": True, "concurrency": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waiting"])
async def test_what_one_message_sets_the_next_does_not_see(
    memory_backend: MemoryBackend, options: dict[str, Any], waits: bool
) -> None:
    seen: list[object] = []

    async def handler(message: Message) -> None:
        seen.append(TENANT.get("nobody"))
        TENANT.set(message["n"])
        if waits:
            await asyncio.sleep(0)
        assert TENANT.get() == message["n"], "a handler keeps what it has set"

    await seen_by(memory_backend, handler, 10, **options)
    assert seen == ["nobody"] * 10


async def test_nor_if_the_handler_failed_or_was_given_up(memory_backend: MemoryBackend) -> None:
    seen: list[object] = []

    async def handler(message: Message) -> None:
        seen.append(TENANT.get("nobody"))
        TENANT.set(message["n"])
        if message["n"] == 0:
            raise ValueError
        if message["n"] == 1:
            await asyncio.Event().wait()
        if message["n"] == 2:
            raise SystemExit

    retry = RetryPolicy(max_attempts=1, backoff=ConstantBackoff(0))
    await seen_by(memory_backend, handler, 4, retry=retry, timeout=0.05)
    assert seen == ["nobody"] * 4


@pytest.mark.parametrize("value", [[], Odd(), None, float("nan")], ids=["a list", "odd", "None", "nan"])
async def test_whatever_the_value_is(memory_backend: MemoryBackend, value: Any) -> None:
    seen: list[object] = []

    async def handler(message: Message) -> None:
        seen.append(TENANT.get("nobody"))
        TENANT.set(value)

    await seen_by(memory_backend, handler, 3)
    assert seen == ["nobody"] * 3


async def test_what_middleware_sets_its_handler_and_its_tasks_see_and_the_next_message_does_not(
    memory_backend: MemoryBackend,
) -> None:
    before: list[object] = []
    within: list[object] = []

    class Tenancy(Middleware):
        async def handle(self, message: Message, forward: HandleNext) -> None:
            before.append(TENANT.get("nobody"))
            TENANT.set(message["n"])
            await forward(message)

    async def handler(message: Message) -> None:
        async with asyncio.TaskGroup() as group:
            within.append(await group.create_task(in_a_task()))

    async def in_a_task() -> Any:
        return TENANT.get()

    await seen_by(memory_backend, handler, 3, middleware=[Tenancy()])
    assert before == ["nobody"] * 3
    assert within == [0, 1, 2]


async def test_what_a_thread_sets_ends_with_its_message(memory_backend: MemoryBackend) -> None:
    seen: list[object] = []

    def handler(message: Message) -> None:
        seen.append(TENANT.get("nobody"))
        TENANT.set(message["n"])

    await seen_by(memory_backend, handler, 3)
    assert seen == ["nobody"] * 3


async def test_what_run_was_started_with_every_message_sees(memory_backend: MemoryBackend) -> None:
    seen: list[object] = []
    TENANT.set("acme")

    async def handler(message: Message) -> None:
        seen.append(TENANT.get())
        TENANT.set(message["n"])

    await seen_by(memory_backend, handler, 3, concurrency=2)
    assert seen == ["acme"] * 3


async def test_the_tools_of_asyncio_work_in_a_handler_that_sets_one(memory_backend: MemoryBackend) -> None:
    outcomes: list[str] = []

    async def handler(message: Message) -> None:
        TENANT.set(message["n"])
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(0.01):  # noqa: TID251 - as an application would
                await asyncio.Event().wait()
        except TimeoutError:
            outcomes.append("timeout")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())
                await asyncio.Event().wait()
        except* KeyError:
            outcomes.append("group")
        assert await asyncio.wait_for(asyncio.shield(asyncio.sleep(0, "shielded")), 5) == "shielded"
        assert asyncio.current_task() is task
        assert not task.cancelling()

    async def fails() -> None:
        raise KeyError

    await seen_by(memory_backend, handler, 3, timeout=30)
    assert outcomes == ["timeout", "group"] * 3
