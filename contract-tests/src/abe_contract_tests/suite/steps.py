"""What many of the tests do: take messages, wait until the broker says so, and cancel at a given await point."""

import asyncio
import types
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from abe.backends.message_queue.base import Message, Subscription
from abe.types import MessageQueuePayload
from abe_contract_tests.contract import Contract
from abe_contract_tests.harness import Oracle

if TYPE_CHECKING:
    from abe.backends.message_queue.engine import TransportBackend

LONG_LEASE: Final = "30"
"""For tests that prove that something comes back before a lease runs out: no test waits that long."""

CLOCKS: Final = 0.02
"""Seconds by which the broker's clock and ours may disagree on how long something took: each cuts off milliseconds."""

_POLL: Final = 0.005
"""Seconds between two questions to the broker. A broker has no event for "the count is now 0"."""


async def collect(subscription: Subscription, count: int) -> list[Message]:
    """Receive that many messages, and acknowledge them."""
    messages: list[Message] = []
    async with asyncio.TaskGroup() as acknowledgements:
        while len(messages) < count:
            messages.append(message := await subscription.receive())
            acknowledgements.create_task(message.ack())
    return messages


async def hold(subscription: Subscription, count: int) -> list[Message]:
    """Receive that many messages, and keep them."""
    return [await subscription.receive() for _ in range(count)]


async def collect_distinct(subscription: Subscription, wanted: Iterable[object], field: str = "n") -> Counter[object]:
    """Acknowledge messages until each wanted value of `field` has come, and count how often each came."""
    missing = set(wanted)
    seen: Counter[object] = Counter()
    while missing:
        message = await subscription.receive()
        seen[message[field]] += 1
        missing.discard(message[field])
        await message.ack()
    return seen


@asynccontextmanager
async def beside(*work: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    """Run coroutines beside the body, and cancel them at its end. The first one that fails ends the body with its error.

    Raises:
        ExceptionGroup: One of them failed, or the body did.
    """
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(each) for each in work]
        yield
        for task in running:
            task.cancel()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return when the broker says so. The caller bounds it."""
    while not await condition():  # noqa: ASYNC110 - no event crosses from the broker
        await asyncio.sleep(_POLL)


async def until_empty(oracle: Oracle, group: str) -> None:
    """Return when the broker has nothing of the group but dead letters: nothing can be delivered any more."""

    async def empty() -> bool:
        return (await oracle.counts(group)).total == 0

    await until(empty)


async def expect_counts(contract: Contract, oracle: Oracle, group: str, **expected: int) -> None:
    """Fail unless the broker counts that many messages (total, waiting, ...) now; before long, where its counts are approximate."""

    async def found() -> dict[str, int]:
        counts = await oracle.counts(group)
        return {name: getattr(counts, name) for name in expected}

    last = await found()
    with suppress(TimeoutError):
        async with contract.within(5):
            while last != expected and contract.harness.approximate:
                await asyncio.sleep(_POLL)
                last = await found()
    assert last == expected, f"group {group!r}"


async def expect_at_most(contract: Contract, oracle: Oracle, group: str, limit: int) -> None:
    """Fail unless consumers hold a message, and no more than that many, now; before long, where the broker is approximate."""

    async def within_limit() -> bool:
        return 0 < (await oracle.counts(group)).in_flight <= limit

    if not contract.harness.approximate:
        assert await within_limit(), f"group {group!r}: {await oracle.counts(group)}"
        return
    async with contract.within(5):
        await until(within_limit)


async def until_in_flight(oracle: Oracle, group: str, count: int) -> None:
    """Return when consumers hold exactly that many messages of the group."""

    async def held() -> bool:
        return (await oracle.counts(group)).in_flight == count

    await until(held)


async def until_dead(oracle: Oracle, group: str, count: int) -> None:
    """Return when the group has that many dead letters."""

    async def dead() -> bool:
        return (await oracle.counts(group)).dead >= count

    await until(dead)


async def assert_silent(subscription: Subscription, seconds: float) -> None:
    """Fail if a message is delivered within that time. Absence can only be waited for, so callers keep it short."""
    try:
        async with asyncio.timeout(seconds):
            message = await subscription.receive()
    except TimeoutError:
        return
    raise AssertionError(f"delivered, and should not have been: {message!r}, attempt {message.attempt}")


def numbered(count: int, *, start: int = 0, key: str = "numbered") -> list[tuple[str, MessageQueuePayload]]:
    """Return items for `publish_many` whose payloads are ``{"n": start}`` and so on."""
    return [(key, {"n": n}) for n in range(start, start + count)]


def numbers(messages: Iterable[Message]) -> list[int]:
    """Return the numbers of `numbered` messages."""
    return [message["n"] for message in messages]


def unreachable_backend(contract: Contract, **overrides: str) -> "TransportBackend":
    """Return a backend whose broker refuses connections."""
    return contract.backend(**contract.unreachable(), **overrides)


class CancelAt:
    """Runs a coroutine in a task of its own and cancels that task at its n-th await point (0: the first).

    `reached` tells whether the coroutine got that far; if not, it ended by itself.
    """

    def __init__(self, point: int) -> None:
        self._point = point
        self.reached = False

    async def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Return what the coroutine returned, or raise what it raised."""
        return await asyncio.create_task(self._task(coroutine))

    async def _task(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await self._drive(coroutine)

    @types.coroutine
    def _drive(self, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        suspensions = 0
        error: BaseException | None = None
        while True:
            try:
                # A future hands its result over by itself, so only exceptions have to be passed in.
                waited_for = coroutine.send(None) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            if suspensions == self._point:
                self.reached = True
                task = asyncio.current_task()
                assert task is not None
                # Seen by the task when the awaited future reaches it, two lines on: exactly this await is cancelled.
                task.cancel()
            suspensions += 1
            try:
                yield waited_for
            except BaseException as exc:
                error = exc
            else:
                error = None
