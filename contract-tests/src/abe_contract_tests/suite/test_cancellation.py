"""C-CAN: what a cancellation leaves behind, at whichever await point it strikes."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import pytest

from abe.backends.message_queue.base import Message, Subscription
from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.errors import BackendClosedError
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.steps import (
    LONG_LEASE,
    CancelAt,
    collect,
    collect_distinct,
    expect_counts,
    numbered,
    numbers,
    until_empty,
    until_in_flight,
)

if TYPE_CHECKING:
    from abe.backends.message_queue.engine import TransportBackend

POINTS = 60
"""More await points than any of these calls has; the tests end at the first that is not reached."""


@clause("C-CAN-01")
async def test_cancelling_anext_at_any_await_point_loses_and_strands_nothing(contract: Contract) -> None:
    oracle = await contract.oracle()
    publisher = contract.backend()
    point = 0
    async with contract.within(30):
        await publisher.declare("g")
        for point in range(POINTS):
            # A subscription that was never asked: its await points are those of connecting, subscribing and waiting.
            backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
            await publisher.publish("order.created", {"n": point})
            subscription = backend.consume(group="g")
            cancel = CancelAt(point)
            try:
                await cancel.run(anext(subscription))
            except asyncio.CancelledError:
                assert cancel.reached
                # It still works, and what it may have fetched is at hand.
                assert (await anext(subscription)) == {"n": point}
            await subscription.aclose()
            async with backend.consume(group="g") as again, contract.within(2):
                (message,) = await collect(again, 1)
                assert (message["n"], message.attempt) == (point, 1)
            await backend.disconnect()
            await expect_counts(contract, oracle, "g", total=0)
            if not cancel.reached:
                break
    assert 0 < point < POINTS - 1


@clause("C-CAN-01")
async def test_cancelling_anext_while_its_message_arrives_loses_and_strands_nothing(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    publisher = contract.backend()
    oracle = await contract.oracle()
    seen: Counter[int] = Counter()
    cancelled = 0
    ticks = 0
    async with contract.within(30), backend.consume(group="g") as subscription:
        for n in range(300):
            waiting = asyncio.ensure_future(anext(subscription))
            await asyncio.sleep(0)
            publishing = asyncio.ensure_future(publisher.publish("order.created", {"n": n}))
            # Each time a turn of the loop later, until it is too late; then from the start.
            for _ in range(ticks):
                if waiting.done():
                    ticks = 0
                    break
                await asyncio.sleep(0)
            ticks += 1
            waiting.cancel()
            await asyncio.wait([waiting, publishing])
            if waiting.cancelled():
                cancelled += 1
                # It is still there, and at once, not after the lease.
                async with contract.within(2):
                    message = await anext(subscription)
            else:
                message = waiting.result()
            seen[message["n"]] += 1
        draining = asyncio.ensure_future(anext(subscription))
        await until_empty(oracle, "g")
        assert not draining.done()
        draining.cancel()
    assert cancelled > 10
    assert set(seen) == set(range(300))
    assert set(seen.values()) == {1}


@clause("C-CAN-01")
async def test_a_subscription_whose_anext_was_cancelled_strands_nothing_when_it_is_dropped(contract: Contract) -> None:
    backend = contract.backend(
        QUEUE_LEASE_SECONDS=LONG_LEASE
    )  # the broker may count what was on its way to one that left
    async with contract.within():
        await backend.declare("g")
        for n in range(10):
            waiting = asyncio.ensure_future(anext(backend.consume(group="g")))
            for _ in range(n * 3):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            del waiting
        await backend.publish_many(numbered(20))
        async with backend.consume(group="g") as subscription:
            seen = await collect_distinct(subscription, range(20))
        assert set(seen) == set(range(20))


@clause("C-CAN-03")
@pytest.mark.parametrize(
    "call",
    ["enter", "anext", "receive", "publish", "ack", "nack", "aclose", "connect", "disconnect", "declare", "stats"],
)
async def test_a_cancelled_call_raises_cancelled_error(contract: Contract, call: str) -> None:
    struck = 0
    async with contract.within(30):
        await contract.backend().declare("g")
        for point in range(POINTS):
            backend = contract.backend()
            subscription = backend.consume(group="g")
            cancel = CancelAt(point)
            coroutine = await _made(call, backend, subscription)
            waits_for_ever = call in ("anext", "receive")
            try:
                # Nothing is published where the call would wait for it: its last await point is the one that lasts.
                async with asyncio.timeout(0.3 * contract.harness.pace if waits_for_ever else None):
                    await cancel.run(coroutine)
            except asyncio.CancelledError:
                assert cancel.reached
                struck += 1
            except TimeoutError:
                assert waits_for_ever
                assert not cancel.reached
            else:
                assert not cancel.reached, (
                    f"{call} was cancelled at await point {point} and returned as if nothing had happened"
                )
            await subscription.aclose()
            await backend.disconnect()
            if not cancel.reached:
                break
    # Without a network, calls that wait for nothing have no await point to be cancelled at.
    assert struck > 0 or (not contract.harness.networked and call in ("publish", "connect", "declare", "stats"))


async def _made(call: str, backend: "TransportBackend", subscription: Subscription) -> Coroutine[Any, Any, Any]:
    """Return the call, made as far as nothing has run of it."""
    calls: dict[str, Callable[[], Any]] = {
        "enter": subscription.__aenter__,
        "anext": subscription.__anext__,
        "receive": subscription.receive,
        "publish": lambda: backend.publish("order.created", {}),
        "connect": backend.connect,
        "declare": lambda: backend.declare("g"),
        "stats": lambda: backend.stats("g"),
    }
    if call not in calls:
        await subscription.__aenter__()
        await backend.publish("order.created", {})
        message = await subscription.receive()
        calls |= {
            "ack": message.ack,
            "nack": lambda: message.nack(delay=0),
            "aclose": subscription.aclose,
            "disconnect": backend.disconnect,
        }
    made: Coroutine[Any, Any, Any] = calls[call]()
    return made


@clause("C-CAN-03")
async def test_cancelling_a_consumer_ends_it_with_cancelled_error(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    other = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    for busy in (False, True):
        first, handling = asyncio.Event(), asyncio.Event()
        handler_cancelled = False

        async def handler(message: Message) -> None:
            nonlocal handler_cancelled
            if message["n"] == 0:
                first.set()  # noqa: B023
                return
            handling.set()  # noqa: B023
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                handler_cancelled = True
                raise

        async with contract.within():
            await backend.declare("g")
            running = asyncio.create_task(AsyncLoopConsumer(backend, "g").run(handler))
            await backend.publish("order.created", {"n": 0})
            await first.wait()
            await until_empty(await contract.oracle(), "g")
            if busy:
                await backend.publish("order.created", {"n": 1})
                await handling.wait()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert handler_cancelled is busy
            if busy:
                async with other.consume(group="g") as others, contract.within(1):
                    assert numbers(await collect(others, 1)) == [1]


@clause("C-CAN-03")
async def test_cancelled_iteration_raises_cancelled_error(contract: Contract) -> None:
    backend = contract.backend()

    async def iterate() -> None:
        async with backend.consume(group="g") as subscription:
            async for _ in subscription:
                pass

    async with contract.within():
        await backend.declare("g")
        iterating = asyncio.create_task(iterate())
        await backend.publish("order.created", {})
        await until_empty(await contract.oracle(), "g")
        iterating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await iterating


@clause("C-CAN-04")
async def test_an_iterator_works_after_wait_for_has_timed_out(contract: Contract) -> None:
    backend, publisher = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE), contract.backend()
    oracle = await contract.oracle()
    async with contract.within(15), backend.consume(group="g") as subscription:
        for _ in range(100):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(subscription), 0.001)
        await publisher.publish_many(numbered(20))
        seen: list[int] = []
        while len(seen) < 20:
            try:
                seen.append((await asyncio.wait_for(anext(subscription), 0.001))["n"])
            except TimeoutError:
                continue
        assert sorted(seen) == list(range(20))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(subscription), 0.001)
        await until_empty(oracle, "g")


@clause("C-CAN-04")
async def test_two_anext_at_once_are_a_clear_error(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(), backend.consume(group="g") as subscription:
        first = asyncio.ensure_future(anext(subscription))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await anext(subscription)
        # The first one is none the worse for it.
        await backend.publish("order.created", {"n": 1})
        assert (await first) == {"n": 1}


@clause("C-CAN-04", "C-CLS-02")
async def test_aclose_works_while_anext_is_pending(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        subscription = backend.consume(group="g")
        await subscription.__aenter__()
        waiting = asyncio.ensure_future(anext(subscription))
        await asyncio.sleep(0)
        async with contract.within(1):
            await subscription.aclose()
            with pytest.raises(StopAsyncIteration):
                await waiting
        with pytest.raises(StopAsyncIteration):
            await anext(subscription)
        with pytest.raises(BackendClosedError):
            await subscription.receive()


@clause("C-CAN-04")
async def test_many_tasks_may_wait_in_receive_and_some_be_cancelled(contract: Contract) -> None:
    backend = contract.backend(QUEUE_LEASE_SECONDS=LONG_LEASE)
    oracle = await contract.oracle()
    async with contract.within(), backend.consume(group="g") as subscription:
        waiting = [asyncio.create_task(subscription.receive()) for _ in range(20)]
        await asyncio.sleep(0)
        await backend.publish_many(contract.apart(numbered(10)))
        await until_in_flight(oracle, "g", 10)
        for task in waiting[:5]:
            task.cancel()
        await backend.publish_many(contract.apart(numbered(10, start=10)))
        got = [message for message in await asyncio.gather(*waiting[5:]) if message]
        got += [task.result() for task in waiting[:5] if not task.cancelled()]
        got += [await subscription.receive() for _ in range(20 - len(got))]
        assert sorted(numbers(got)) == list(range(20))
        for message in got:
            await message.ack()
        await until_empty(oracle, "g")
