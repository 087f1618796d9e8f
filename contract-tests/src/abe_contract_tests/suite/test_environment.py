"""C-ENV: configuration by environment variables, and the loader."""

import asyncio
import os
import socket
from importlib.metadata import entry_points
from typing import Any, Final
from unittest.mock import patch

import pytest

from abe.backends.message_queue.base import MessageQueueBackend
from abe.backends.message_queue.loader import load_backend
from abe.errors import BackendNotFoundError, ConfigurationError
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause

BAD: Final = {
    "QUEUE_NAMESPACE": ("no spaces", "-x", "a" * 65, "é", "a{b}", "a:b"),
    "QUEUE_GROUPS": ("a b", "good,b:d", "*"),
    "QUEUE_PREFETCH": ("0", "-1", "many", "1.5"),
    "QUEUE_LEASE_SECONDS": ("0", "-1", "soon", "nan", "inf"),
    "QUEUE_MAX_ATTEMPTS": ("0", "x"),
    "QUEUE_PUBLISH_TIMEOUT_SECONDS": ("0", "x", "inf"),
    "QUEUE_CLOSE_TIMEOUT_SECONDS": ("0", "x"),
    "QUEUE_MAX_BACKLOG": ("0", "x", "-5"),
    "QUEUE_MAX_UNCONFIRMED": ("0", "x"),
    "QUEUE_MAX_UNCONFIRMED_BYTES": ("0", "x"),
}


class IODoneError(AssertionError):
    """A socket was opened, or an address was looked up."""


def _no_io(*_: Any, **__: Any) -> Any:
    raise IODoneError("from_env() and the constructor must do no I/O")


async def loaded(name: str | None = None) -> MessageQueueBackend:
    """Load a backend; in a thread, as looking up what is installed reads files."""
    return await asyncio.to_thread(load_backend, name)


async def registered_name(contract: Contract) -> str:
    """Return the name under which the backend under test is installed."""

    def look() -> list[str]:
        groups = ("abe.backends.message_queue", "abe.backends.message_queue.service")
        return [
            entry.name
            for group in groups
            for entry in entry_points(group=group)
            if entry.load() is contract.backend_class
        ]

    names = await asyncio.to_thread(look)
    assert names, f"no entry point of the group 'abe.backends.message_queue' is {contract.backend_class.__qualname__}"
    return names[0]


@clause("C-ENV-01")
async def test_from_env_does_no_io_and_needs_no_event_loop(contract: Contract) -> None:
    environments = [contract.environment()]
    if contract.harness.networked:
        environments.append({**contract.environment(), **contract.unreachable()})

    def make() -> None:
        # In a thread there is no event loop to lean on.
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        for environment in environments:
            with patch.dict(os.environ, environment):
                before = dict(os.environ)
                first, second = contract.backend_class.from_env(), contract.backend_class.from_env()
                assert first is not second
                assert type(first) is contract.backend_class
                assert dict(os.environ) == before

    with (
        patch.object(socket.socket, "connect", _no_io),
        patch.object(socket.socket, "connect_ex", _no_io),
        patch.object(socket, "getaddrinfo", _no_io),
    ):
        await asyncio.to_thread(make)


@clause("C-ENV-01")
@pytest.mark.parametrize("variable", BAD)
async def test_a_bad_variable_is_named_with_what_it_should_be(contract: Contract, variable: str) -> None:
    for value in BAD[variable]:
        with pytest.raises(ConfigurationError) as caught:
            contract.backend(**{variable: value})
        text = str(caught.value)
        assert variable in text, value
        assert len(text) > len(variable) + len(value) + 10, "it does not say what would be right"
        assert not caught.value.retryable


@clause("C-ENV-01")
async def test_what_the_environment_says_is_what_holds(contract: Contract) -> None:
    backend = contract.backend(
        QUEUE_PREFETCH="7", QUEUE_MAX_ATTEMPTS="3", QUEUE_GROUPS=" a, b=x.#| y ,", QUEUE_MAX_BACKLOG=""
    )
    assert backend.settings.prefetch == 7
    assert backend.settings.max_attempts == 3
    assert backend.settings.groups == {"a": (), "b": ("x.#", "y")}
    assert backend.settings.max_backlog is None
    assert backend.settings.namespace == contract.namespace
    assert backend.settings.lease == contract.lease
    if contract.declares("lease"):
        assert backend.capabilities.lease == contract.lease


@clause("C-ENV-01")
async def test_the_loader_returns_the_backend_asked_for(contract: Contract) -> None:
    name = await registered_name(contract)
    with contract.environ(QUEUE_BACKEND="", MESSAGE_QUEUE_BACKEND=""):
        assert type(await loaded(name)) is contract.backend_class
    with contract.environ(QUEUE_BACKEND=name, MESSAGE_QUEUE_BACKEND=name):
        assert type(await loaded()) is contract.backend_class
    different = contract.environ(QUEUE_BACKEND=name, MESSAGE_QUEUE_BACKEND="no-such-provider")
    with different, pytest.raises(ConfigurationError, match="MESSAGE_QUEUE_BACKEND"):
        await loaded()
    with contract.environ(QUEUE_BACKEND="", MESSAGE_QUEUE_BACKEND=name):
        backend = await loaded()
        assert type(backend) is contract.backend_class
        assert backend is not await loaded()
    # An explicit name wins over the environment.
    with contract.environ(QUEUE_BACKEND="no-such-provider"):
        assert type(await loaded(name)) is contract.backend_class


@clause("C-ENV-01")
async def test_the_loader_never_falls_back_from_a_name(contract: Contract) -> None:
    with contract.environ(QUEUE_BACKEND="no-such-provider"), pytest.raises(BackendNotFoundError) as caught:
        await loaded()
    assert "no-such-provider" in str(caught.value)
    with contract.environ(QUEUE_BACKEND="memory"), pytest.raises(BackendNotFoundError):
        await loaded("no-such-provider")


@clause("C-ENV-01")
async def test_the_loader_lets_a_configuration_error_through(contract: Contract) -> None:
    name = await registered_name(contract)
    with (
        contract.environ(QUEUE_BACKEND=name, QUEUE_PREFETCH="many"),
        pytest.raises(ConfigurationError, match="QUEUE_PREFETCH"),
    ):
        await loaded()
