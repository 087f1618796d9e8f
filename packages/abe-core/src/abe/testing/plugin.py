"""The pytest plugin: fixtures for the tests of an application.

It is part of every pytest run where abe-core is installed, so it imports nothing of the library until a fixture is
asked for.
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
    """What the fixture `register_backend` is."""

    def __call__(self, name: str, backend: "type[MessageQueueBackend] | MessageQueueBackend") -> None:
        """Register a backend under `name` until the test ends; see `abe.testing.registered_backend`."""
        ...


def pytest_configure(config: pytest.Config) -> None:
    # Closing a backend is async; without pytest-asyncio nobody could run that, and the fixtures leave it to the test.
    kind = "asyncio" if config.pluginmanager.hasplugin("asyncio") else "sync"
    config.pluginmanager.register(import_module(f"abe.testing.backends_{kind}"), "abe-backends")


@pytest.fixture
def manual_clock() -> "ManualClock":
    """A clock that stands still until the test calls ``await manual_clock.advance(seconds)``."""
    from abe.testing.clock import ManualClock

    return ManualClock()


@pytest.fixture
def register_backend() -> "Iterator[RegisterBackend]":
    """A function that registers a backend under a name, as an installed provider would be, until the test ends."""
    from abe.testing.entry_points import registered_backend

    with ExitStack() as stack:

        def register(name: str, backend: "type[MessageQueueBackend] | MessageQueueBackend") -> None:
            stack.enter_context(registered_backend(name, backend))

        yield register


@pytest.fixture
def patched_load_backend(
    recording_backend: "RecordingBackend", register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch
) -> "RecordingBackend":
    """The recording backend, which `load_backend` returns in this test whatever it is asked for.

    `get_message_queue_backend` does too; what is made elsewhere, by a class of its own, is not touched.
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
