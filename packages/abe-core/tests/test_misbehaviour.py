"""Whatever a handler, a policy, middleware or a codec does is the failure of that one message: `run` goes on, the others are handled."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Self

import pytest

from abe import AsyncLoopConsumer, ConfigurationError, ConstantBackoff, Message, Middleware, Reject, Retry, RetryPolicy
from abe.backends.message_queue import minimal
from abe.backends.message_queue.base.middleware import HandleNext, Publication, PublishNext
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.settings import QueueSettings
from abe.testing import ManualClock, RecordingBackend
from abe.testing.memory import fresh_namespace
from abe_contract_tests import bounds
from abe_contract_tests.bounds import within

ONCE = RetryPolicy(max_attempts=1)
TWICE = RetryPolicy(max_attempts=2, backoff=ConstantBackoff(1))


@asynccontextmanager
async def running(consumer: AsyncLoopConsumer, handler: Any) -> AsyncIterator[asyncio.Task[None]]:
    """Run a consumer in the background, shut it down at the end, and let its error out."""
    async with bounds.within(10):
        task = asyncio.create_task(consumer.run(handler))
        try:
            yield task
        finally:
            await consumer.shutdown()
            await asyncio.wait([task])
    task.result()


async def dead_and_handled(backend: MemoryBackend, bad: Any, **options: Any) -> list[str]:
    """Give a bad handler message 0 and a good one 1 to 3; return the reasons of the dead letters when all are settled."""
    handled: list[int] = []
    options = {"retry": ONCE, "concurrency": 2, **options}
    synchronous = not asyncio.iscoroutinefunction(bad)

    async def handler(message: Message) -> None:
        if message["n"] == 0:
            await bad(message)
        else:
            handled.append(message["n"])

    def in_thread(message: Message) -> None:
        if message["n"] == 0:
            bad(message)
        else:
            handled.append(message["n"])

    await backend.declare()
    await backend.publish_many([("k", {"n": n}) for n in range(4)])
    async with running(AsyncLoopConsumer(backend, **options), in_thread if synchronous else handler):
        while (stats := await backend.stats()).waiting + stats.in_flight + stats.delayed:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert sorted(handled) == [1, 2, 3]
    return [letter.reason for letter in await backend.dead_letters().list()]


class Wordless(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


class Poisonous(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise SystemExit(3)


class Liar(Exception):  # noqa: N818
    __notes__ = property(lambda self: 1 / 0)  # type: ignore[assignment]


class Causeless(Exception):  # noqa: N818
    __cause__ = property(lambda self: 1 / 0)  # type: ignore[assignment]


def raising(exc: BaseException | type[BaseException]) -> Any:
    async def handler(message: Message) -> None:
        raise exc

    return handler


async def cancels_itself(message: Message) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def cancels_itself_and_returns(message: Message) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def cancels_itself_many_times(message: Message) -> None:
    task = asyncio.current_task()
    assert task is not None
    for _ in range(3):
        task.cancel()
    await asyncio.Event().wait()


async def is_cancelled_later(message: Message) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.Event().wait()


async def in_a_task_group(message: Message) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(raising(Reject("a member rejects"))(message))
        group.create_task(asyncio.Event().wait())


async def exits_in_a_task_group(message: Message) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(raising(GeneratorExit())(message))


ASYNC = {
    "SystemExit: 1": raising(SystemExit(1)),
    "BaseException: odd": raising(BaseException("odd")),
    "GeneratorExit: odd": raising(GeneratorExit("odd")),
    "Wordless: (its text cannot be shown: ZeroDivisionError)": raising(Wordless()),
    "Poisonous: (its text cannot be shown: SystemExit)": raising(Poisonous()),
    "Liar: ": raising(Liar()),
    "Causeless: (its text cannot be shown: ZeroDivisionError)": raising(Causeless()),
    "ValueError: no": raising(Reject(ValueError("no"))),  # type: ignore[arg-type, unused-ignore]
    "None": raising(Reject(None)),  # type: ignore[arg-type, unused-ignore]
    "RuntimeError: coroutine raised StopIteration": raising(StopIteration),
    "StopAsyncIteration: ": raising(StopAsyncIteration),
    "a member rejects": in_a_task_group,
    "RuntimeError: the handler cancelled its own task": cancels_itself,
}


@pytest.mark.parametrize("reason", ASYNC)
async def test_whatever_a_handler_raises_is_its_messages_failure(memory_backend: MemoryBackend, reason: str) -> None:
    assert await dead_and_handled(memory_backend, ASYNC[reason]) == [reason]


@pytest.mark.parametrize(
    "handler", [cancels_itself, cancels_itself_and_returns, cancels_itself_many_times, is_cancelled_later]
)
async def test_a_handler_whose_task_is_cancelled_and_no_consumer_is_has_failed(
    memory_backend: MemoryBackend, handler: Any
) -> None:
    (reason,) = await dead_and_handled(memory_backend, handler)
    assert reason == "RuntimeError: the handler cancelled its own task"


@pytest.mark.parametrize("options", [{"concurrency": 1}, {"timeout": 30}, {"ordered_by_key": True}], ids=str)
@pytest.mark.parametrize("handler", [cancels_itself, raising(SystemExit(1)), raising(GeneratorExit())], ids=range(3))
async def test_nor_does_it_with_other_options(
    memory_backend: MemoryBackend, options: dict[str, Any], handler: Any
) -> None:
    assert len(await dead_and_handled(memory_backend, handler, **options)) == 1


def exits(message: Message) -> None:
    raise SystemExit(1)


def ends_its_iterator(message: Message) -> None:
    next(iter([]))


def interrupts(message: Message) -> None:
    raise KeyboardInterrupt


def says_nothing(message: Message) -> None:
    raise Wordless


SYNC: dict[str, Callable[[Message], None]] = {
    "SystemExit: 1": exits,
    "RuntimeError: the handler raised StopIteration": ends_its_iterator,
    "RuntimeError: the handler raised KeyboardInterrupt": interrupts,
    "Wordless: (its text cannot be shown: ZeroDivisionError)": says_nothing,
}


@pytest.mark.parametrize("reason", SYNC)
async def test_nor_does_what_a_thread_raises(memory_backend: MemoryBackend, reason: str) -> None:
    assert await dead_and_handled(memory_backend, SYNC[reason]) == [reason]


async def test_a_message_that_exits_is_counted_and_given_up_in_the_end(
    memory_backend: MemoryBackend, manual_clock: ManualClock
) -> None:
    attempts: list[int] = []

    async def handler(message: Message) -> None:
        attempts.append(message.attempt)
        raise SystemExit(1)

    await memory_backend.publish("k", {})
    async with running(AsyncLoopConsumer(memory_backend, retry=TWICE), handler):
        await manual_clock.advance(2)
    assert attempts == [1, 2]
    assert (await memory_backend.stats()).dead == 1


async def test_a_keyboard_interrupt_ends_the_process_when_its_message_is_settled(memory_backend: MemoryBackend) -> None:
    async def handler(message: Message) -> None:
        raise KeyboardInterrupt

    await memory_backend.publish("k", {})
    namespace = memory_backend.settings

    def process() -> None:
        async def main() -> None:
            await AsyncLoopConsumer(MemoryBackend(namespace), retry=ONCE).run(handler)

        asyncio.run(main())

    with pytest.raises(KeyboardInterrupt):
        await asyncio.to_thread(process)
    (letter,) = await memory_backend.dead_letters().list()
    assert letter.reason == "KeyboardInterrupt: "


RETRIES = {
    "words": Retry(after="x"),  # type: ignore[arg-type]
    "not a number": Retry(after=float("nan")),
    "negative": Retry(after=-1),
    "endless": Retry(after=float("inf")),
    "no reason": Retry(reason=None),  # type: ignore[arg-type]
    "in a group": ExceptionGroup("tasks", [Retry(after=0), ValueError("no")]),
}


@pytest.mark.parametrize("kind", RETRIES)
async def test_a_retry_that_says_nonsense_is_a_retry(
    memory_backend: MemoryBackend, manual_clock: ManualClock, kind: str
) -> None:
    attempts: list[int] = []

    async def handler(message: Message) -> None:
        attempts.append(message.attempt)
        if message.attempt == 1:
            raise RETRIES[kind]

    await memory_backend.publish("k", {})
    async with running(AsyncLoopConsumer(memory_backend), handler):
        await manual_clock.advance(2)
    assert attempts == [1, 2]


def broken(*arguments: object) -> Any:
    raise RuntimeError("broken policy")


POLICIES = {
    "backoff raises": RetryPolicy(backoff=broken),
    "backoff returns text": RetryPolicy(backoff=lambda attempt: "x"),  # type: ignore[arg-type, return-value]
    "backoff returns nothing": RetryPolicy(backoff=lambda attempt: None),  # type: ignore[arg-type, return-value]
    "backoff returns nan": RetryPolicy(backoff=lambda attempt: float("nan")),
    "backoff returns less than nothing": RetryPolicy(backoff=lambda attempt: -5),
    "classifier raises": RetryPolicy(classify=broken),
    "classifier returns a bool": RetryPolicy(classify=lambda exc: True),  # type: ignore[arg-type, return-value]
    "classifier exits": RetryPolicy(classify=lambda exc: exec("raise SystemExit")),
}


@pytest.mark.parametrize("kind", POLICIES)
async def test_a_policy_that_fails_is_logged_and_the_default_is_taken(
    memory_backend: MemoryBackend, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    attempts: list[int] = []

    async def handler(message: Message) -> None:
        attempts.append(message.attempt)
        if message.attempt == 1:
            raise ValueError("no")

    await memory_backend.publish("k", {}, id="seven")
    async with running(AsyncLoopConsumer(memory_backend, retry=POLICIES[kind]), handler):
        await manual_clock.advance(1)
    assert attempts == [1, 2]
    assert "message 'seven'" in caplog.text
    assert "using the default backoff" in caplog.text or "limiting it to" in caplog.text


@pytest.mark.parametrize("exc", [ValueError("no"), SystemExit(1), StopIteration()], ids=repr)
async def test_middleware_that_raises_fails_the_message(memory_backend: MemoryBackend, exc: BaseException) -> None:
    class Bad(Middleware):
        async def handle(self, message: Message, forward: HandleNext) -> None:
            if message["n"] == 0:
                raise exc
            await forward(message)

    await memory_backend.declare()
    await memory_backend.publish_many([("k", {"n": n}) for n in range(3)])
    seen: list[int] = []

    async def keeps(message: Message) -> None:
        seen.append(message["n"])

    async with running(AsyncLoopConsumer(memory_backend, retry=ONCE, middleware=[Bad()]), keeps):
        while (stats := await memory_backend.stats()).waiting + stats.in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert seen == [1, 2]
    assert (await memory_backend.stats()).dead == 1


async def test_a_handler_that_outlives_its_cancellation_settles_its_message_and_run_is_cancelled(
    memory_backend: MemoryBackend,
) -> None:
    at_work = asyncio.Event()

    async def handler(message: Message) -> None:
        try:
            at_work.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    await memory_backend.publish("k", {})
    task = asyncio.create_task(AsyncLoopConsumer(memory_backend).run(handler))
    async with bounds.within(5):
        await at_work.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    stats = await memory_backend.stats()
    assert (stats.waiting, stats.in_flight, stats.dead) == (0, 0, 0)


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_cancellation_that_a_handler_leaves_behind_does_not_end_the_consumer(
    memory_backend: MemoryBackend, ordered: bool
) -> None:
    tasks: list[asyncio.Task[Any]] = []
    handled = asyncio.Queue[int]()

    async def handler(message: Message) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        await handled.put(message["n"])

    await memory_backend.declare()
    async with running(AsyncLoopConsumer(memory_backend, ordered_by_key=ordered), handler) as task:
        for n in range(3):
            await memory_backend.publish("k", {"n": n})
            assert await handled.get() == n
            for _ in range(10):
                await asyncio.sleep(0)
            tasks[-1].cancel()
            for _ in range(10):
                await asyncio.sleep(0)
            assert not task.done()
    assert (await memory_backend.stats()).dead == 0


async def test_a_handler_that_cancels_the_consumers_task_ends_it(memory_backend: MemoryBackend) -> None:
    async def handler(message: Message) -> None:
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.Event().wait()

    await memory_backend.publish("k", {})
    task = asyncio.create_task(AsyncLoopConsumer(memory_backend, retry=ONCE).run(handler))
    async with bounds.within(5):
        with pytest.raises(asyncio.CancelledError):
            await task
    stats = await memory_backend.stats()
    assert (stats.waiting, stats.dead) == (1, 0)


async def test_the_end_of_the_event_loop_gives_the_messages_back(memory_backend: MemoryBackend) -> None:
    settings = memory_backend.settings
    await memory_backend.publish("k", {})

    def process() -> None:
        async def main() -> None:
            at_work = asyncio.Event()

            async def handler(message: Message) -> None:
                at_work.set()
                await asyncio.Event().wait()

            running = asyncio.create_task(AsyncLoopConsumer(MemoryBackend(settings), retry=ONCE).run(handler))
            await at_work.wait()
            del running  # asyncio.run cancels every task at once

        asyncio.run(main())

    await asyncio.to_thread(process)
    stats = await memory_backend.stats()
    assert (stats.waiting, stats.in_flight, stats.dead) == (1, 0, 0)


async def test_a_group_that_holds_a_base_exception_is_a_failure(memory_backend: MemoryBackend) -> None:
    (reason,) = await dead_and_handled(memory_backend, exits_in_a_task_group)
    assert reason.startswith("BaseExceptionGroup")


async def test_a_log_handler_that_is_given_the_exception_can_print_it(
    memory_backend: MemoryBackend, caplog: pytest.LogCaptureFixture
) -> None:
    await dead_and_handled(memory_backend, raising(Poisonous()))
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage().startswith("the handler failed on message")


@pytest.mark.parametrize(
    ("exc", "attempt"),
    [
        (SystemExit(1), 2),
        (Wordless(), 2),
        (Poisonous(), 2),
        (BaseException("odd"), 2),
        (KeyboardInterrupt(), 1),
        (GeneratorExit(), 1),
        (asyncio.CancelledError(), 1),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_leaves_the_block_of_a_plain_loop_fails_the_message_unless_it_ends_the_task_or_process(
    memory_backend: MemoryBackend, manual_clock: ManualClock, exc: BaseException, attempt: int
) -> None:
    await memory_backend.publish("k", {})
    with pytest.raises(type(exc)):
        async with within(5), memory_backend.consume() as messages:
            async for _ in messages:
                raise exc
    await manual_clock.advance(2)
    async with within(5), memory_backend.consume() as messages:
        assert (await anext(messages)).attempt == attempt


class Minimal:
    """A provider with the three methods of the protocol, and three messages."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault

    async def publish(self, key: str, payload: dict[str, Any]) -> None: ...

    async def consume(self, *, group: str | None = None) -> AsyncIterator[dict[str, Any]]:
        for n in range(3):
            yield {"n": n}
        if self.fault is not None:
            raise self.fault

    @classmethod
    def from_env(cls) -> Self:
        return cls()


BAD: list[Any] = [cancels_itself, cancels_itself_and_returns, in_a_task_group]
RAISED = [SystemExit(1), GeneratorExit(), Wordless(), Reject("no"), StopAsyncIteration(), BaseException()]


@pytest.mark.parametrize("bad", [*BAD, *map(raising, RAISED)], ids=range(len(BAD) + len(RAISED)))
async def test_with_a_minimal_provider_it_is_logged_and_the_others_are_handled(
    caplog: pytest.LogCaptureFixture, bad: Any
) -> None:
    handled: list[int] = []

    async def handler(message: dict[str, Any]) -> None:
        if message["n"] == 1:
            await bad(message)
        handled.append(message["n"])

    async with within(5):
        await AsyncLoopConsumer(Minimal()).run(handler)
    assert {0, 2} <= set(handled)
    assert caplog.text.count("the handler failed, and the message is not retried") == 1


async def test_a_minimal_provider_that_fails_ends_run_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(message: dict[str, Any]) -> None: ...

    async with within(5):
        with pytest.raises(ZeroDivisionError):
            await AsyncLoopConsumer(Minimal(ZeroDivisionError())).run(handler)
    assert "the consumer of group 'default' has ended: ZeroDivisionError" in caplog.text


async def test_a_minimal_provider_whose_consume_is_no_async_iterator_is_told_so() -> None:
    class Wrong(Minimal):
        async def consume(self, *, group: str | None = None) -> Any:  # type: ignore[override]
            return [{}]

    async def handler(message: dict[str, Any]) -> None: ...

    async with within(5):
        with pytest.raises(ConfigurationError, match="must return an async iterator, not a coroutine"):
            await AsyncLoopConsumer(Wrong()).run(handler)


async def test_a_minimal_provider_that_ignores_its_cancellation_does_not_keep_shutdown_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(minimal, "_CLOSING", 0.01)
    release = asyncio.Event()

    class Stubborn(Minimal):
        async def consume(self, *, group: str | None = None) -> AsyncIterator[dict[str, Any]]:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            yield {}

    async def handler(message: dict[str, Any]) -> None: ...

    consumer = AsyncLoopConsumer(Stubborn(), grace=0.01)
    async with within(5):
        running = asyncio.create_task(consumer.run(handler))
        await consumer.started
        for _ in range(10):
            await asyncio.sleep(0)
        await consumer.shutdown()
        await running
        release.set()
        for _ in range(10):
            await asyncio.sleep(0)
    assert "is abandoned" in caplog.text


async def test_a_log_filter_that_raises_keeps_no_message_from_being_settled(memory_backend: MemoryBackend) -> None:
    class Bad(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if "the handler failed" in record.getMessage():
                raise ZeroDivisionError
            return True

    bad = Bad()
    logger = logging.getLogger("abe.consumer")
    logger.addFilter(bad)
    try:
        assert await dead_and_handled(memory_backend, raising(ValueError("no"))) == ["ValueError: no"]
    finally:
        logger.removeFilter(bad)


TERMINATED = """
import asyncio, signal, sys
from abe import AsyncLoopConsumer, RetryPolicy
from abe.backends.message_queue.service.memory import MemoryBackend

class Ends:
    def __call__(self, number, frame):
        sys.exit(7)

async def handler(message):
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(0)

async def consume():
    backend = MemoryBackend()
    await backend.publish("k", {})
    await AsyncLoopConsumer(backend, retry=RetryPolicy(max_attempts=1)).run(handler)

async def look():
    async with asyncio.timeout(60), MemoryBackend().consume() as messages:
        print("attempt", (await anext(messages)).attempt)

signal.signal(signal.SIGTERM, HOW)
try:
    asyncio.run(consume())
except SystemExit as exc:
    print("exit", exc.code)
asyncio.run(look())
"""


@pytest.mark.parametrize("how", ["lambda number, frame: sys.exit(7)", "Ends()", "Ends().__call__"])
async def test_sys_exit_out_of_a_signal_ends_the_process_and_gives_the_message_back(how: str) -> None:
    async with within(60):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", TERMINATED.replace("HOW", how), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
    assert output.decode().split("\n") == ["exit 7", "attempt 1", ""]


class Forgetful(Middleware):
    async def publish(self, publication: Publication, forward: PublishNext) -> Any:
        return forward(publication)

    async def handle(self, message: Message, forward: HandleNext) -> Any:
        return forward(message)


async def handle_soon(message: Message) -> Any:
    return asyncio.sleep(0)


@pytest.mark.parametrize("where", ["handler", "handler below middleware", "middleware"])
async def test_work_that_was_not_awaited_was_not_done(memory_backend: MemoryBackend, where: str) -> None:
    async def bad(message: Message) -> Any:
        return handle_soon(message) if where != "middleware" else None

    async def handler(message: Message) -> Any:
        return await bad(message)

    layers = {"handler": [], "handler below middleware": [Middleware()], "middleware": [Forgetful()]}[where]
    await memory_backend.declare()
    await memory_backend.publish("k", {"n": 0})
    async with running(AsyncLoopConsumer(memory_backend, retry=ONCE, middleware=layers), handler):
        while not (await memory_backend.stats()).dead:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    (letter,) = await memory_backend.dead_letters().list()
    assert "is an await missing?" in letter.reason


async def test_a_publish_that_middleware_did_not_await_is_no_success() -> None:
    namespace = QueueSettings(namespace=fresh_namespace())
    for backend in (MemoryBackend(namespace, middleware=[Forgetful()]), RecordingBackend(middleware=[Forgetful()])):
        await backend.declare("g")
        with pytest.raises(TypeError, match=r"Forgetful\.publish\(\) returned a coroutine that is never run"):
            await backend.publish("k", {})
        assert (await backend.stats("g")).waiting == 0
        await backend.disconnect()
