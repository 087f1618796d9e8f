"""The backends as fixtures without pytest-asyncio: a test closes the backend that it has used."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from abe.backends.message_queue.service.memory import MemoryBackend
    from abe.testing.clock import ManualClock
    from abe.testing.recording import RecordingBackend


@pytest.fixture
def memory_backend(manual_clock: "ManualClock") -> "MemoryBackend":
    """An empty memory backend on `manual_clock`."""
    from abe.testing.memory import fresh_memory_backend

    return fresh_memory_backend(manual_clock)


@pytest.fixture
def recording_backend(manual_clock: "ManualClock") -> "RecordingBackend":
    """A backend that records what is published, on `manual_clock`."""
    from abe.testing.recording import RecordingBackend

    return RecordingBackend(clock=manual_clock)
