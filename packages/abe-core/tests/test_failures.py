"""What is logged and kept of a failure: which message, what becomes of it, and no value of its payload."""

import asyncio
import enum
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic
import pytest

from abe import (
    AsyncLoopConsumer,
    ConstantBackoff,
    Message,
    Middleware,
    Reject,
    Retry,
    RetryPolicy,
)
from abe.backends.message_queue.base.groups import DeadLetter
from abe.backends.message_queue.base.middleware import HandleNext
from abe.backends.message_queue.report import reason_of, shown
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.settings import QueueSettings
from abe.testing import ManualClock, fresh_memory_backend
from abe_contract_tests.bounds import within

MARKER = "4111-1111-1111-1111"
ONCE = RetryPolicy(max_attempts=1)


@asynccontextmanager
async def running(consumer: AsyncLoopConsumer, handler: Any) -> AsyncIterator[asyncio.Task[None]]:
    async with within(10):
        task = asyncio.create_task(consumer.run(handler))
        try:
            yield task
        finally:
            await consumer.shutdown()
            await asyncio.wait([task])
    task.result()


class Order(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    card: int


class Struct(msgspec.Struct):
    card: int


class Kind(enum.Enum):
    A = "a"


class Enumerated(msgspec.Struct):
    card: Kind


class Keys(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    cards: dict[str, int]


@dataclass
class Data:
    card: int


def records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


class TestWhichMessage:
    async def test_it_is_a_warning_while_it_is_tried_again_and_an_error_when_it_is_given_up(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def handler(message: Message) -> None:
            raise ValueError("the bank is gone")

        await memory_backend.declare("billing")
        await memory_backend.publish("order.created", {}, id="seven")
        retry = RetryPolicy(max_attempts=2, backoff=ConstantBackoff(3))
        async with running(AsyncLoopConsumer(memory_backend, "billing", retry=retry), handler):
            await manual_clock.advance(5)
        first, last = records(caplog)
        message = "the handler failed on message 'seven' (key 'order.created') of group 'billing', attempt"
        assert first.levelno == logging.WARNING
        assert first.getMessage() == f"{message} 1 of 2: ValueError: the bank is gone (retrying in 3 s)"
        assert last.levelno == logging.ERROR
        assert last.getMessage() == f"{message} 2 of 2: ValueError: the bank is gone (moved to the dead letters)"
        for attempt, record in enumerate((first, last), start=1):
            fields = [getattr(record, name) for name in ("message_id", "key", "group", "attempt")]
            assert fields == ["seven", "order.created", "billing", attempt]
            assert record.exc_info is not None

    async def test_a_rejected_one_is_an_error_at_once(
        self, memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def handler(message: Message) -> None:
            raise Reject("no such customer")

        await memory_backend.publish("order.created", {}, id="seven")
        async with running(AsyncLoopConsumer(memory_backend), handler):
            while not caplog.records or not (await memory_backend.stats()).dead:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        (record,) = records(caplog)
        assert record.levelno == logging.ERROR
        assert "the handler rejected message 'seven'" in record.getMessage()
        assert "attempt 1 of 5: no such customer (moved to the dead letters)" in record.getMessage()

    async def test_a_failure_after_the_handler_has_settled_the_message_says_so(
        self, memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def handler(message: Message) -> None:
            await message.ack()
            raise ValueError("afterwards")

        await memory_backend.publish("order.created", {}, id="seven")
        async with running(AsyncLoopConsumer(memory_backend), handler):
            while not records(caplog):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        (record,) = records(caplog)
        assert record.getMessage().startswith("the handler settled message 'seven'")
        assert record.levelno == logging.WARNING


class TestNumberOfAttempts:
    @pytest.mark.parametrize(
        ("setting", "policy", "expected"), [(1, None, 1), (3, RetryPolicy(), 3), (3, RetryPolicy(max_attempts=2), 2)]
    )
    async def test_the_policy_says_it_and_else_the_backends_setting(
        self,
        manual_clock: ManualClock,
        caplog: pytest.LogCaptureFixture,
        setting: int,
        policy: RetryPolicy | None,
        expected: int,
    ) -> None:
        attempts: list[int] = []

        async def handler(message: Message) -> None:
            attempts.append(message.attempt)
            raise ValueError

        namespace = fresh_memory_backend().settings.namespace
        backend = MemoryBackend(QueueSettings(namespace=namespace, max_attempts=setting), clock=manual_clock)
        await backend.publish("k", {})
        async with running(AsyncLoopConsumer(backend, retry=policy), handler):
            await manual_clock.advance(20)
        assert attempts == list(range(1, expected + 1))
        assert f"attempt {expected} of {expected}" in caplog.text
        assert (await backend.stats()).dead == 1
        await backend.disconnect()


def convert_pydantic(message: Message) -> None:
    Order.model_validate(dict(message))


def convert_msgspec(message: Message) -> None:
    msgspec.convert(dict(message), Enumerated)


def unknown_keys(message: Message) -> None:
    Keys.model_validate({"cards": {MARKER: MARKER}, MARKER: 1})


def chained(message: Message) -> None:
    try:
        convert_pydantic(message)
    except ValueError as exc:
        raise RuntimeError(f"not an order: {exc}") from exc


def in_context(message: Message) -> None:
    try:
        convert_pydantic(message)
    except ValueError:
        raise KeyError("card")  # noqa: B904 - as people write it


def rejected(message: Message) -> None:
    try:
        convert_pydantic(message)
    except ValueError as exc:
        raise Reject(exc) from exc


def quoted(message: Message) -> None:
    try:
        convert_pydantic(message)
    except ValueError as exc:
        raise Reject(f"not an order: {exc}") from None


def noted(message: Message) -> None:
    try:
        convert_pydantic(message)
    except ValueError as exc:
        error = RuntimeError("not an order")
        error.add_note(str(exc))
        raise error from exc


def retried(message: Message) -> None:
    try:
        convert_pydantic(message)
    except ValueError as exc:
        raise Retry(reason=exc) from exc  # type: ignore[arg-type]


def grouped(message: Message) -> None:
    errors: list[Exception] = []
    for convert in (convert_pydantic, chained):
        try:
            convert(message)
        except Exception as exc:
            errors.append(exc)
    raise ExceptionGroup("two", [ExceptionGroup("inner", errors), ValueError("else")])


async def typed_model(order: Order) -> None: ...
async def typed_struct(order: Struct) -> None: ...
async def typed_data(order: Data) -> None: ...


def with_note(message: Message) -> None:
    try:
        convert_pydantic(message)
    except ValueError as exc:
        exc.add_note("while billing")
        raise


VALIDATING: list[Any] = [convert_pydantic, convert_msgspec, unknown_keys, rejected, retried]
PATHS: list[Any] = [*VALIDATING, chained, in_context, grouped, with_note, quoted, noted]


@pytest.mark.parametrize("handler", [*PATHS, typed_model, typed_struct, typed_data], ids=lambda f: f.__name__)
async def test_no_value_of_a_payload_reaches_a_log_or_a_dead_letter_by_a_validation_error(
    memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture, handler: Any
) -> None:
    letter = await failed(memory_backend, handler, {"card": MARKER})
    assert MARKER not in caplog.text + letter.reason + letter.error
    assert "4111" not in caplog.text + letter.reason + letter.error
    for record in caplog.records:
        assert MARKER not in repr(record.__dict__)
    assert letter.error.startswith(("Traceback", "  + Exception Group Traceback"))
    assert "card" in letter.error


async def failed(backend: MemoryBackend, handler: Any, payload: dict[str, Any], **options: Any) -> DeadLetter:
    await backend.declare()
    await backend.publish("k", payload)
    async with running(AsyncLoopConsumer(backend, retry=ONCE, **options), handler):
        while not (await backend.stats()).dead:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    (letter,) = await backend.dead_letters().list()
    return letter


async def test_nor_by_one_that_middleware_or_the_policy_raises(caplog: pytest.LogCaptureFixture) -> None:
    class Validating(Middleware):
        async def handle(self, message: Message, forward: HandleNext) -> None:
            convert_pydantic(message)

    def classify(exc: Exception) -> Retry | Reject | None:
        if "quoted" in str(exc):
            convert_pydantic(Message({"card": MARKER}))
        return Reject(str(exc))

    async def fails(message: Message) -> None:
        raise ValueError("quoted")

    payload = {"card": MARKER}
    backend = fresh_memory_backend()
    by_middleware = await failed(backend, typed_model, payload, middleware=[Validating()])
    await backend.dead_letters().purge(by_middleware.id)
    await backend.publish("k", payload)
    policy = RetryPolicy(max_attempts=1, classify=classify)
    async with running(AsyncLoopConsumer(backend, retry=policy), fails):
        while not (await backend.stats()).dead:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    (by_policy,) = await backend.dead_letters().list()
    await backend.dead_letters().purge(by_policy.id)
    await backend.publish("k", payload)
    async with running(AsyncLoopConsumer(backend, retry=policy), typed_model):
        while not (await backend.stats()).dead:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    (by_its_text,) = await backend.dead_letters().list()
    for letter in (by_middleware, by_policy, by_its_text):
        assert MARKER not in letter.reason + letter.error
    assert MARKER not in caplog.text
    await backend.disconnect()


def test_the_likeness_of_an_exception_looks_like_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        chained(Message({"card": MARKER}))
    likeness, text = shown(caught.value)
    assert reason_of(caught.value) == "RuntimeError: not an order: card: int_parsing"
    assert type(likeness).__name__ == "RuntimeError"
    assert likeness.__traceback__ is caught.value.__traceback__
    assert "pydantic_core._pydantic_core.ValidationError: card: int_parsing" in text
    assert "The above exception was the direct cause" in text


def test_an_exception_without_validation_errors_is_shown_as_it_is() -> None:
    error = ValueError(MARKER)
    assert shown(error)[0] is error
    assert reason_of(error) == f"ValueError: {MARKER}"


def test_a_chain_that_is_a_circle_or_very_long_can_be_shown() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert "first" in shown(first)[1]
    error = ValueError("last")
    for n in range(5000):
        following = ValueError(str(n))
        following.__context__ = error
        error = following
    assert shown(error)[1]
