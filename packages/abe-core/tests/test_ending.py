"""How a consumer ends: within its bounds when the broker answers nothing, and loudly when the broker refuses what it needs."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from abe import AsyncLoopConsumer, ConstantBackoff, Message, RetryPolicy
from abe.backends.message_queue.base.transport import Receiver
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import BackendConnectionError, PermissionDeniedError
from abe.settings import QueueSettings
from abe.testing import fresh_memory_backend
from abe_contract_tests.bounds import within

Change = Callable[[Receiver], None]


def changed(change: Change, **settings: Any) -> MemoryBackend:
    """Return a backend whose receivers are changed before they are used."""

    class Changed(MemoryBackend):
        def make_transport(self) -> Any:
            transport = super().make_transport()
            subscribe = transport.subscribe

            async def subscribed(group: str, prefetch: int) -> Receiver:
                receiver = await subscribe(group, prefetch)
                change(receiver)
                return receiver

            transport.subscribe = subscribed  # type: ignore[method-assign]
            return transport

    return Changed(QueueSettings(namespace=fresh_memory_backend().settings.namespace, **settings))


def raising(error: Exception, *methods: str) -> Change:
    async def refuse(*arguments: Any, **options: Any) -> Any:
        raise error

    def change(receiver: Receiver) -> None:
        for name in methods:
            setattr(receiver, name, refuse)

    return change


def silent(*methods: str) -> Change:
    async def nothing(*arguments: Any, **options: Any) -> Any:
        await asyncio.Event().wait()

    def change(receiver: Receiver) -> None:
        for name in methods:
            setattr(receiver, name, nothing)

    return change


REFUSED = PermissionDeniedError("this user may not acknowledge")


async def succeeds(message: Message) -> None: ...


async def fails(message: Message) -> None:
    raise ValueError("no")


async def acknowledges(message: Message) -> None:
    await message.ack()


async def rejects(message: Message) -> None:
    await message.reject("no")


@pytest.mark.parametrize("handler", [succeeds, fails, acknowledges, rejects], ids=lambda handler: handler.__name__)
@pytest.mark.parametrize("options", [{}, {"concurrency": 4}, {"ordered_by_key": True, "concurrency": 2}], ids=str)
async def test_a_settlement_that_is_refused_for_good_ends_run_and_is_logged(
    caplog: pytest.LogCaptureFixture, handler: Any, options: dict[str, Any]
) -> None:
    backend = changed(raising(REFUSED, "ack", "settle"))
    await backend.declare()
    await backend.publish_many([(f"k{n}", {"n": n}) for n in range(10)])
    async with within(10):
        with pytest.raises(PermissionDeniedError):
            await AsyncLoopConsumer(backend, **options).run(handler)
    ended = [record for record in caplog.records if "has ended" in record.getMessage()]
    assert [(record.levelno, record.name) for record in ended] == [(logging.ERROR, "abe.consumer")]
    assert "this user may not acknowledge" in ended[0].getMessage()
    await backend.disconnect()


async def test_a_fault_of_the_receiver_ends_run_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    backend = changed(raising(PermissionDeniedError("this user may not read"), "receive"))
    async with within(10):
        with pytest.raises(PermissionDeniedError):
            await AsyncLoopConsumer(backend).run(succeeds)
    assert "has ended: PermissionDeniedError: this user may not read" in caplog.text
    await backend.disconnect()


BLACK_HOLES = {
    "idle": ((), ("receive", "stop", "close", "settle", "ack")),
    "with failed messages to settle": (("settle",), ("stop", "close", "ack")),
    "with messages to acknowledge": (("ack",), ("settle", "stop", "close")),
}


@pytest.mark.parametrize("kind", BLACK_HOLES)
@pytest.mark.parametrize("handler", [succeeds, fails], ids=lambda handler: handler.__name__)
async def test_shutdown_in_a_black_hole_takes_the_close_timeout_and_not_the_grace(kind: str, handler: Any) -> None:
    """The grace is for handlers: none runs here."""
    first, others = BLACK_HOLES[kind]
    backend = changed(silent(*first, *others), close_timeout=0.1, lease=300.0)
    await backend.declare()
    await backend.publish_many([("k", {"n": n}) for n in range(3)])
    consumer = AsyncLoopConsumer(backend, grace=3000, retry=RetryPolicy(backoff=ConstantBackoff(0)))
    async with within(10):
        running = asyncio.create_task(consumer.run(handler))
        await consumer.started
        for _ in range(50):
            await asyncio.sleep(0)
        await consumer.shutdown()
        await running
        await backend.disconnect()


async def test_shutdown_while_the_broker_does_not_answer_the_subscription_takes_no_grace() -> None:
    class Silent(MemoryBackend):
        def make_transport(self) -> Any:
            transport = super().make_transport()

            async def nothing(group: str, prefetch: int) -> Any:
                await asyncio.Event().wait()

            transport.subscribe = nothing  # type: ignore[method-assign]
            return transport

    consumer = AsyncLoopConsumer(Silent(fresh_memory_backend().settings), grace=3000)
    async with within(10):
        running = asyncio.create_task(consumer.run(succeeds))
        for _ in range(10):
            await asyncio.sleep(0)
        await consumer.shutdown()
        await running


async def test_a_settlement_that_fails_for_now_is_logged_with_its_message_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = changed(raising(BackendConnectionError("no broker"), "settle"), lease=0.2)
    await backend.declare()
    await backend.publish("k", {}, id="seven")
    consumer = AsyncLoopConsumer(backend, retry=RetryPolicy(max_attempts=1))
    async with within(10):
        running = asyncio.create_task(consumer.run(fails))
        while "could not be settled" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert not running.done()
        assert "message 'seven' (key 'k') of group 'default' failed and could not be settled" in caplog.text
        await consumer.shutdown()
        await running
    await backend.disconnect()


class Odd:
    """A codec with errors of its own."""

    def encode(self, payload: Any) -> bytes:
        return str(payload["n"]).encode()

    def decode(self, body: bytes) -> Any:
        if body == b"0":
            raise ZeroDivisionError
        return {"n": int(body)}


async def test_an_error_of_the_codecs_own_buries_its_message_and_the_others_are_handled() -> None:
    backend = MemoryBackend(QueueSettings(namespace=fresh_memory_backend().settings.namespace), codec=Odd())
    handled: list[int] = []
    done = asyncio.Event()

    async def handler(message: Message) -> None:
        handled.append(message["n"])
        if len(handled) == 2:
            done.set()

    await backend.declare()
    await backend.publish_many([("k", {"n": n}) for n in range(3)])
    consumer = AsyncLoopConsumer(backend)
    async with within(5), asyncio.TaskGroup() as group:
        group.create_task(consumer.run(handler))
        await done.wait()
        await consumer.shutdown()
    assert handled == [1, 2]
    assert (await backend.stats()).dead == 1
    await backend.disconnect()
