"""The backends as fixtures that close them when the test ends. Used where pytest-asyncio runs async fixtures."""

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest_asyncio

if TYPE_CHECKING:
    from abe.backends.message_queue.service.memory import MemoryBackend
    from abe.testing.clock import ManualClock
    from abe.testing.recording import RecordingBackend


@pytest_asyncio.fixture
async def memory_backend(manual_clock: "ManualClock") -> "AsyncIterator[MemoryBackend]":
    """An empty memory backend on `manual_clock`."""
    from abe.errors import EventLoopError
    from abe.testing.memory import fresh_memory_backend

    backend = fresh_memory_backend(manual_clock)
    yield backend
    with suppress(EventLoopError):  # the test has a loop of its own, by its loop_scope: nothing can be closed from here
        await backend.disconnect()


@pytest_asyncio.fixture
async def recording_backend(manual_clock: "ManualClock") -> "AsyncIterator[RecordingBackend]":
    """A backend that records what is published, on `manual_clock`."""
    from abe.errors import EventLoopError
    from abe.testing.recording import RecordingBackend

    backend = RecordingBackend(clock=manual_clock)
    yield backend
    with suppress(EventLoopError):  # the test has a loop of its own, by its loop_scope: nothing can be closed from here
        await backend.disconnect()
