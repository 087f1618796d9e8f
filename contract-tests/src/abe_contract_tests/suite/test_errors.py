"""C-ERR: errors that can be acted upon, and that keep secrets."""

import asyncio
import inspect
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import pytest

from abe import errors
from abe.backends.message_queue.base import Message
from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.backends.message_queue.loader import load_backend
from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackendNotFoundError,
    ConfigurationError,
    InvalidNameError,
    PayloadError,
    PermissionDeniedError,
)
from abe_contract_tests.bounds import allowance
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.steps import collect, numbered, unreachable_backend, until_empty

if TYPE_CHECKING:
    from abe.backends.message_queue.engine import TransportBackend

RETRYABLE: Final = {
    "BackendConnectionError",
    "PublishUnknownError",
    "PublishRejectedError",
    "BackpressureError",
    "PartialPublishError",
}


@clause("C-ERR-01")
async def test_every_error_is_of_one_tree_and_says_whether_a_retry_can_help(contract: Contract) -> None:
    module = inspect.getmodule(contract.backend_class)
    package = {name: value for part in (errors, module) for name, value in vars(part).items() if inspect.isclass(value)}
    ours = {
        name: value
        for name, value in package.items()
        if issubclass(value, Exception) and value.__module__.startswith("abe")
    }
    assert len(ours) >= 15
    for name, error in ours.items():
        assert issubclass(error, AbeError), name
        assert isinstance(error.maybe_accepted, bool), name
        if name not in ("PublishRejectedError", "BackpressureError", "PartialPublishError", "UnroutableError"):
            assert error.retryable is (name in RETRYABLE), name


@clause("C-ERR-01")
async def test_misuse_raises_errors_of_the_tree(contract: Contract) -> None:
    backend = contract.backend()
    calls: list[tuple[type[AbeError], Callable[[], Awaitable[object]]]] = [
        (PayloadError, lambda: backend.publish("k", {"x": {1, 2}})),
        (InvalidNameError, lambda: backend.publish("", {})),
        (InvalidNameError, lambda: backend.declare("no spaces, please")),
        (ConfigurationError, lambda: backend.dead_letters("g").list(limit=0)),
    ]
    async with contract.within():
        for expected, call in calls:
            with pytest.raises(expected) as caught:
                await call()
            assert not caught.value.retryable
            assert len(str(caught.value)) > 10
        for arguments in ({"prefetch": 0}, {"max_attempts": 0}, {"group": "a b"}):
            with pytest.raises(ConfigurationError):
                backend.consume(**arguments)  # pyright: ignore[reportArgumentType]


@clause("C-ERR-01")
async def test_a_broker_that_cannot_be_reached_is_an_error_with_its_cause(contract: Contract) -> None:
    if not contract.harness.networked:
        return
    uses: list[Callable[[], Awaitable[object]]] = []
    backend = unreachable_backend(contract, QUEUE_PUBLISH_TIMEOUT_SECONDS=f"{allowance():.3f}")
    uses += [
        backend.connect,
        backend.ping,
        lambda: backend.publish("k", {}),
        lambda: backend.stats("g"),
        backend.groups,
    ]
    async with contract.within():
        for use in uses:
            with pytest.raises(AbeError) as caught:
                await use()
            assert caught.value.retryable
            assert not caught.value.maybe_accepted
            causes = list(_causes(caught.value))
            assert any(not isinstance(cause, AbeError) for cause in causes), f"no native error behind {caught.value!r}"
            assert any(isinstance(cause, BackendConnectionError) for cause in (caught.value, *causes))


async def _publish(backend: "TransportBackend") -> None:
    await backend.publish("order.created", {"n": 1})


async def _consume(backend: "TransportBackend") -> None:
    async with backend.consume(group="g"):
        pass


async def _run(backend: "TransportBackend") -> None:
    await AsyncLoopConsumer(backend, "g").run(print)


async def _connect(backend: "TransportBackend") -> None:
    await backend.connect()


USES: Final = {"connect": _connect, "publish": _publish, "consume": _consume, "run": _run}


@clause("C-ERR-01")
async def test_refused_credentials_raise_at_once_and_are_shown_nowhere(contract: Contract) -> None:
    wrong = contract.wrong_credentials()
    if wrong is None:
        return
    environment, secret = wrong
    async with contract.within():
        for name, use in USES.items():
            backend = contract.backend(**environment)
            async with contract.within(3):
                with pytest.raises(PermissionDeniedError) as caught:
                    await use(backend)
            assert not caught.value.retryable
            assert isinstance(caught.value, ConfigurationError)
            shown = [str(caught.value), repr(caught.value), *traceback.format_exception(caught.value)]
            shown += [repr(backend), str(backend), repr(backend.settings), str(vars(backend))]
            shown += [
                text
                for record in contract.logs
                for text in (record.getMessage(), str(record.args), record.exc_text or "")
            ]
            assert not [text for text in shown if secret in text], f"{name} gives the credentials away"


@clause("C-ERR-01")
async def test_a_malformed_address_keeps_its_secret(contract: Contract) -> None:
    wrong = contract.wrong_credentials()
    if wrong is None:
        return
    environment, secret = wrong
    variables = [name for name, value in environment.items() if secret in value]
    assert variables
    for variable in variables:
        # A scheme that no provider has, around the same secret.
        mangled = "nonsense" + environment[variable]
        with pytest.raises(ConfigurationError) as caught:
            contract.backend(**{**environment, variable: mangled})
        assert variable in str(caught.value)
        assert secret not in "".join(traceback.format_exception(caught.value))


@clause("C-ERR-01")
async def test_a_clean_run_logs_nothing_at_warning_or_above(contract: Contract) -> None:
    backend, other = contract.backend(), contract.backend()
    oracle = await contract.oracle()
    handled = 0
    done = asyncio.Event()

    async def handler(message: Message) -> None:
        nonlocal handled
        handled += 1
        if handled == 50:
            done.set()

    async with contract.within(15):
        await backend.connect()
        await backend.ping()
        await backend.declare("g")
        await backend.publish_many(numbered(50))
        consumer = AsyncLoopConsumer(backend, "g", concurrency=4)
        running = asyncio.create_task(consumer.run(handler))
        await done.wait()
        await until_empty(oracle, "g")
        await consumer.shutdown()
        await running
        await backend.publish(
            "order.created", {"n": 50}, headers={"h": "1"}, delay=0.1 if contract.declares("max_delay") else None
        )
        async with other.consume(group="g") as subscription:
            async for message in subscription:
                assert message == {"n": 50}
                break
        async with other.consume(group="g") as subscription:
            await (await subscription.receive()).nack(delay=0)
            await collect(subscription, 1)
            waiting = asyncio.ensure_future(anext(subscription))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        await backend.stats("g")
        await backend.delete_group("g")
        await backend.disconnect()
        await other.disconnect()
    loud = [
        f"{record.levelname} {record.name}: {record.getMessage()}"
        for record in contract.logs
        if record.levelno >= logging.WARNING
    ]
    assert loud == []


@clause("C-ERR-01")
async def test_no_log_record_holds_a_payload(contract: Contract) -> None:
    backend = contract.backend()
    secret = "4111-1111-1111-1111"
    async with contract.within(), backend.consume(group="g", max_attempts=1) as subscription:
        await backend.publish("order.created", {"card": secret}, headers={"card": secret})
        await (await subscription.receive()).nack(delay=0)
        if contract.declares("dead_letter"):
            await (await contract.oracle()).inject("g", f'{{"card": "{secret}"'.encode())
        await backend.publish("order.created", {"n": 1})
        await collect(subscription, 1)
    for record in contract.logs:
        assert secret not in record.getMessage()
        assert secret not in str(record.args)


def _causes(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = []
    cause = error.__cause__
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    return causes


@clause("C-ERR-01")
async def test_a_missing_backend_is_an_error_of_the_tree(contract: Contract) -> None:
    with pytest.raises(AbeError) as caught:
        await asyncio.to_thread(load_backend, "no-such-provider")
    assert isinstance(caught.value, BackendNotFoundError)
    assert not caught.value.retryable
