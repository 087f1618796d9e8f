"""The pytest plugin: fixtures for the tests of an application.

Every pytest run loads it where abe-core is installed, so it imports nothing of the library until a fixture is requested.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from abe.backends.message_queue.base.protocol import MessageQueueBackend
    from abe.testing.clock import ManualClock
    from abe.testing.recording import RecordingBackend


class RegisterBackend(Protocol):
    """The type of the fixture `register_backend`."""

    def __call__(self, name: str, backend: "type[MessageQueueBackend] | MessageQueueBackend") -> None:
        """Register a backend under `name` until the test ends; see `abe.testing.registered_backend`."""
        ...


def pytest_configure(config: pytest.Config) -> None:
    # Closing a backend is async: without pytest-asyncio the fixtures cannot do it, and the test has to.
    kind = "asyncio" if config.pluginmanager.hasplugin("asyncio") else "sync"
    config.pluginmanager.register(import_module(f"abe.testing.backends_{kind}"), "abe-backends")


@pytest.fixture
def manual_clock() -> "ManualClock":
    """A clock that stands still until the test calls ``await manual_clock.advance(seconds)``."""
    from abe.testing.clock import ManualClock

    return ManualClock()


@pytest.fixture
def register_backend() -> "Iterator[RegisterBackend]":
    """A function that registers a backend under a name, like an installed provider, until the test ends."""
    from abe.testing.entry_points import registered_backend

    with ExitStack() as stack:

        def register(name: str, backend: "type[MessageQueueBackend] | MessageQueueBackend") -> None:
            stack.enter_context(registered_backend(name, backend))

        yield register


@pytest.fixture
def patched_load_backend(
    recording_backend: "RecordingBackend", register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch
) -> "RecordingBackend":
    """The recording backend. `load_backend` and `get_message_queue_backend` return it in this test, whatever name they get.

    Backends that the application creates from their classes are not affected.
    """
    import abe.backends
    from abe.backends.message_queue.loader import VARIABLES, installed_backends

    for name in (*installed_backends(), "recording"):
        register_backend(name, recording_backend)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(VARIABLES[0], "recording")
    monkeypatch.setattr(abe.backends, "_shared", type(abe.backends._shared)())  # pyright: ignore[reportPrivateUsage]
    return recording_backend
