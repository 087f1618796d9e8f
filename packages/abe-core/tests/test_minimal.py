"""A provider with the protocol's three methods, as the full backend that `load_backend` returns."""

import asyncio
import copy
import gc
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Self

import pytest

from abe.backends import get_message_queue_backend
from abe.backends.message_queue import AsyncLoopConsumer, load_backend
from abe.backends.message_queue.base import FullBackend, Message, Publication
from abe.backends.message_queue.minimal import MinimalBackend, full
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import (
    ConfigurationError,
    PartialPublishError,
    PublishRejectedError,
    PublishUnknownError,
    UnsupportedCapabilityError,
)
from abe.testing import registered_backend
from abe_contract_tests.bounds import within


class Provider:
    """Keeps what is published, and delivers it."""

    def __init__(self) -> None:
        self.published: list[tuple[str, dict[str, Any]]] = []
        self.asked_for: list[str | None] = []
        self.silent = False

    async def publish(self, key: str, payload: dict[str, Any]) -> None:
        if self.silent:
            await asyncio.Event().wait()
        if key == "refused":
            raise PublishRejectedError("no")
        self.published.append((key, payload))

    async def consume(self, *, group: str | None = None) -> AsyncIterator[dict[str, Any]]:
        self.asked_for.append(group)
        for _, payload in self.published:
            yield payload

    @classmethod
    def from_env(cls) -> Self:
        return cls()


class Connecting(Provider):
    """Has a little more than it must."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    async def connect(self) -> None:
        self.calls.append("connect")

    async def disconnect(self) -> None:
        self.calls.append("disconnect")

    async def ping(self) -> None:
        self.calls.append("ping")


class Entered(Connecting):
    """Is a context manager of its own."""

    async def __aenter__(self) -> Self:
        self.calls.append("enter")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.calls.append("exit")


@dataclass
class Order:
    order_id: int


async def test_what_is_loaded_is_a_full_backend_and_the_providers() -> None:
    with registered_backend("three", Provider):
        for backend in (load_backend("three"), load_backend("three")):
            assert isinstance(backend, FullBackend)
            assert isinstance(backend, Provider)
            assert type(backend) is MinimalBackend
            assert backend.published == []


async def test_the_shared_backend_is_a_full_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE_BACKEND", "three")
    with registered_backend("three", Provider):
        backend = get_message_queue_backend()
        assert isinstance(backend, MinimalBackend)
        assert get_message_queue_backend() is backend


def test_a_full_backend_stays_what_it_is() -> None:
    backend = MemoryBackend()
    assert full(backend) is backend


async def test_publish_takes_what_becomes_a_json_object() -> None:
    provider = Provider()
    await full(provider).publish("order.created", {"order_id": 1})
    await full(provider).publish("order.created", Order(2))
    await full(provider).publish_many([("order.created", Order(3)), Publication("order.paid", {"order_id": 4})])
    assert provider.published == [
        ("order.created", {"order_id": 1}),
        ("order.created", {"order_id": 2}),
        ("order.created", {"order_id": 3}),
        ("order.paid", {"order_id": 4}),
    ]


@pytest.mark.parametrize(
    ("option", "value"), [("headers", {}), ("id", "x"), ("delay", 1.0), ("mandatory", True), ("group", "g")]
)
async def test_publish_refuses_what_the_protocol_has_no_word_for(option: str, value: Any) -> None:
    provider = Provider()
    with pytest.raises(UnsupportedCapabilityError, match=rf"^Provider has .* publish\({option}=\.\.\.\) needs more"):
        await full(provider).publish("k", {}, **{option: value})
    assert provider.published == []


async def test_options_that_the_provider_takes_are_passed_on() -> None:
    class WithMore(Provider):
        async def publish(self, key: str, payload: dict[str, Any], *, headers: Any = None, **more: Any) -> None:
            self.published.append((key, {"headers": headers, **more}))

        async def consume(self, *, group: str | None = None, prefetch: int = 1) -> AsyncIterator[dict[str, Any]]:
            yield {"group": group, "prefetch": prefetch}

    provider = WithMore()
    await full(provider).publish("k", {}, headers={"h": "v"}, delay=1.0)
    assert provider.published == [("k", {"headers": {"h": "v"}, "delay": 1.0})]
    async with full(provider).consume(group="g", prefetch=7) as subscription:
        assert await anext(subscription) == {"group": "g", "prefetch": 7}


async def test_a_publish_ends_in_its_time_and_its_outcome_is_unknown() -> None:
    provider = Provider()
    provider.silent = True
    with pytest.raises(PublishUnknownError, match=r"Provider did not confirm the message within 0\.01 s"):
        await full(provider).publish("k", {}, timeout=0.01)


async def test_a_time_out_of_the_providers_own_is_passed_on() -> None:
    class Impatient(Provider):
        async def publish(self, key: str, payload: dict[str, Any]) -> None:
            raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await full(Impatient()).publish("k", {}, timeout=60)


async def test_publish_many_says_which_were_refused() -> None:
    provider = Provider()
    with pytest.raises(PartialPublishError) as caught:
        await full(provider).publish_many([("k", {}), ("refused", {}), ("k", {"n": 2})])
    assert [index for index, _ in caught.value.failures] == [1]
    assert len(provider.published) == 2


async def test_messages_have_what_is_known_of_them_and_are_acknowledged_by_asking_for_the_next() -> None:
    provider = Provider()
    await provider.publish("k", {"n": 1})
    async with full(provider).consume(group="g") as subscription:
        message = await anext(subscription)
        assert isinstance(message, Message)
        assert message == {"n": 1}
        assert copy.deepcopy(message) == message
        await message.ack()
        for settle in (message.nack, message.reject, lambda: message.extend(1)):
            with pytest.raises(UnsupportedCapabilityError, match="this provider"):
                await settle()
        with pytest.raises(StopAsyncIteration):
            await anext(subscription)
    assert provider.asked_for == ["g"]


@pytest.mark.parametrize("option", ["keys", "prefetch", "max_attempts"])
def test_consume_refuses_what_the_protocol_has_no_word_for(option: str) -> None:
    options: dict[str, Any] = {option: ["k"] if option == "keys" else 1}
    with pytest.raises(UnsupportedCapabilityError, match=rf"consume\({option}=\.\.\.\) needs more"):
        full(Provider()).consume(**options)


CALLS: list[tuple[str, Callable[[FullBackend], Any]]] = [
    ("ping", lambda backend: backend.ping()),
    ("declare", lambda backend: backend.declare("g")),
    ("delete_group", lambda backend: backend.delete_group("g")),
    ("delete_namespace", lambda backend: backend.delete_namespace()),
    ("groups", lambda backend: backend.groups()),
    ("stats", lambda backend: backend.stats("g")),
]


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[name for name, _ in CALLS])
async def test_whatever_else_a_full_backend_does_is_refused(name: str, call: Callable[[FullBackend], Any]) -> None:
    with pytest.raises(UnsupportedCapabilityError, match=rf"Provider has only the three methods .* {name}\(\)"):
        await call(full(Provider()))


def test_dead_letters_are_refused() -> None:
    with pytest.raises(UnsupportedCapabilityError, match=r"dead_letters\(\)"):
        full(Provider()).dead_letters()


async def test_what_a_provider_has_beyond_the_three_is_used() -> None:
    connecting, entered = Connecting(), Entered()
    async with full(connecting) as backend:
        await backend.ping()
    async with full(entered):
        pass
    async with full(Provider()):
        pass  # has nothing to connect
    assert connecting.calls == ["connect", "ping", "disconnect"]
    assert entered.calls == ["enter", "exit"]


class Slow(Provider):
    """Delivers what is put into its queue, and tells who asks."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def consume(self, *, group: str | None = None) -> AsyncIterator[dict[str, Any]]:
        while True:
            yield await self.queue.get()


async def test_a_cancelled_loop_takes_nothing_with_it() -> None:
    provider = Slow()

    async def loop() -> None:
        async for _ in full(provider).consume():
            raise AssertionError("nothing is there")

    looping = asyncio.create_task(loop())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    looping.cancel()
    await asyncio.wait([looping])
    del looping
    gc.collect()
    for _ in range(5):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await provider.queue.put({"n": 1})
    async with within(10), full(provider).consume() as subscription:
        assert await anext(subscription) == {"n": 1}


async def test_a_wait_that_timed_out_has_taken_nothing() -> None:
    provider = Slow()
    async with within(10), full(provider).consume() as subscription:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(subscription), 0.01)
        await provider.queue.put({"n": 1})
        assert await anext(subscription) == {"n": 1}


async def test_two_that_ask_at_once_are_a_clear_error() -> None:
    provider = Slow()
    async with within(10), full(provider).consume() as subscription:
        first = asyncio.ensure_future(anext(subscription))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one at a time"):
            await anext(subscription)
        await provider.queue.put({"n": 1})
        assert await first == {"n": 1}


async def test_what_is_set_on_it_is_set_on_the_provider() -> None:
    provider = Provider()
    backend: Any = full(provider)
    backend.silent = True
    assert provider.silent


async def test_publish_many_goes_on_after_an_error_of_the_providers_own() -> None:
    class Failing(Provider):
        async def publish(self, key: str, payload: dict[str, Any]) -> None:
            if key == "odd":
                raise ConnectionError("gone")
            await super().publish(key, payload)

    provider = Failing()
    with pytest.raises(PartialPublishError) as caught:
        await full(provider).publish_many([("a", {}), ("odd", {}), ("b", {})])
    [(index, error)] = caught.value.failures
    assert index == 1
    assert isinstance(error, PublishUnknownError)
    assert isinstance(error.__cause__, ConnectionError)
    assert [key for key, _ in provider.published] == ["a", "b"]


async def test_a_provider_may_close_without_waiting() -> None:
    class Plain(Provider):
        closed = False

        def disconnect(self) -> None:
            self.closed = True

    provider = Plain()
    await full(provider).disconnect()
    assert provider.closed


async def test_the_consumer_runs_on_what_was_loaded() -> None:
    with registered_backend("three", Provider):
        backend = load_backend("three")
        await backend.publish("order.created", Order(7))
        handled = []

        async def handler(order: Order) -> None:
            handled.append(order)

        await AsyncLoopConsumer(backend).run(handler)
        assert handled == [Order(7)]
        with pytest.raises(UnsupportedCapabilityError, match=r"^Provider has only the three methods"):
            AsyncLoopConsumer(backend, concurrency=2)


def test_one_cannot_be_made_from_the_environment() -> None:
    with pytest.raises(ConfigurationError, match=r"use load_backend\(\)"):
        MinimalBackend.from_env()
