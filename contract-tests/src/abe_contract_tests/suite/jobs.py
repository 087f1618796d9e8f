"""What the suite's worker processes run: ``async def function(backend, report, receive, **arguments)``."""

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

from abe.errors import AbeError
from abe_contract_tests.worker import Receive, Report

if TYPE_CHECKING:
    from abe.backends.message_queue.engine import TransportBackend

_MORE_THAN_ANY_TEST_READS: Final = 5_000


async def publish_for_ever(backend: "TransportBackend", report: Report, receive: Receive, *, key: str) -> None:
    """Publish numbered messages, and report each number once its publish has returned."""
    for n in range(_MORE_THAN_ANY_TEST_READS):
        await backend.publish(key, {"n": n})
        report(n)
    await receive()


async def publish_on_request(backend: "TransportBackend", report: Report, receive: Receive) -> None:
    """Publish each ``[key, payload]`` that the test sends, and report when that is done."""
    while True:
        key, payload = await receive()
        await backend.publish(key, payload)
        report("published")


async def hold(
    backend: "TransportBackend",
    report: Report,
    receive: Receive,
    *,
    group: str,
    prefetch: int | None = None,
    max_attempts: int | None = None,
    poison: bool = False,
) -> None:
    """Report the first message from inside the body of ``async for``, and never leave the body.

    With `poison`, messages that are not marked ``{"poison": true}`` are done and skipped.
    """
    async with backend.consume(group=group, prefetch=prefetch, max_attempts=max_attempts) as subscription:
        report("subscribed")
        async for message in subscription:
            if poison and "poison" not in message:
                continue
            report({"n": message.get("n"), "id": message.id, "attempt": message.attempt})
            await receive()


async def hold_all(
    backend: "TransportBackend", report: Report, receive: Receive, *, group: str, count: int, max_attempts: int
) -> None:
    """Take `count` messages, report the attempt of each, and settle none."""
    async with backend.consume(group=group, prefetch=2 * count, max_attempts=max_attempts) as subscription:
        held = [await subscription.receive() for _ in range(count)]
        for message in held:
            report(message.attempt)
        await receive()


async def settle_on_request(backend: "TransportBackend", report: Report, receive: Receive, *, group: str) -> None:
    """Receive one message and report it; settle it with the method that the test sends, and report the error's type, or "done"."""
    async with backend.consume(group=group, prefetch=1) as subscription:
        message = await subscription.receive()
        report({"n": message["n"], "attempt": message.attempt})
        while True:
            method = await receive()
            try:
                await getattr(message, method)()
            except AbeError as exc:
                report(type(exc).__name__)
            else:
                report("done")
            report(message.lease_lost)


async def receive_one(backend: "TransportBackend", report: Report, receive: Receive, *, group: str) -> None:
    """Report when subscribed, then the first message that is not a warm-up, which is acknowledged."""
    async with backend.consume(group=group) as subscription:
        report("subscribed")
        message = await subscription.receive()
        await message.ack()
        report(dict(message))
        await receive()


async def consume_all(backend: "TransportBackend", report: Report, receive: Receive, *, group: str) -> None:
    """Acknowledge messages one after the other; report each number once that is done."""
    async with backend.consume(group=group) as subscription:
        report("subscribed")
        while True:
            message = await subscription.receive()
            await message.ack()
            report(message["n"])


async def reject_all(backend: "TransportBackend", report: Report, receive: Receive, *, group: str, count: int) -> None:
    """Take that many messages, then reject them one by one; report each number once that is done."""
    async with backend.consume(group=group, prefetch=count) as subscription:
        messages = [await subscription.receive() for _ in range(count)]
        for message in messages:
            await message.reject("rejected by the worker")
            report(message["n"])
        await receive()


async def exchange(backend: "TransportBackend", report: Report, receive: Receive, *, group: str) -> None:
    """Report each message's payload, headers and key as read here, and publish them again under the key ``back``."""
    async with backend.consume(group=group) as subscription:
        report("subscribed")
        async for message in subscription:
            report({"payload": dict(message), "headers": dict(message.headers), "id": message.id, "key": message.key})
            await backend.publish("back", dict(message), headers=message.headers, id=message.id)


async def stall(backend: "TransportBackend", report: Report, receive: Receive, *, group: str, prefetch: int) -> None:
    """Hold the first message of the group, and report this process's memory in bytes whenever the test asks."""
    async with backend.consume(group=group, prefetch=prefetch) as subscription:
        await subscription.receive()
        report("stalled")
        while True:
            await receive()
            report(resident_bytes())


async def wait_for_nothing(backend: "TransportBackend", report: Report, receive: Receive, *, group: str) -> None:
    """Wait for a message, and report the processor time that this process has used whenever the test asks."""

    async def answer() -> None:
        while True:
            await receive()
            report(sum(os.times()[:2]))

    async with backend.consume(group=group) as subscription:
        answering = asyncio.create_task(answer())
        try:
            report("subscribed")
            message: dict[str, Any] = dict(await subscription.receive())
        finally:
            answering.cancel()
        report(message)
        await receive()


def resident_bytes() -> int:
    """Return this process's resident memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
