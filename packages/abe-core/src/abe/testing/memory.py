"""An empty memory backend for tests, with an optional manual clock."""

from uuid import uuid4

from abe.backends.message_queue.base.clock import Clock
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.settings import QueueSettings


def fresh_namespace() -> str:
    """Return a unique namespace."""
    return f"test-{uuid4().hex}"


def fresh_memory_backend(clock: Clock | None = None) -> MemoryBackend:
    """Return a memory backend in a unique namespace.

    Args:
        clock: The clock of leases, delays and backoffs, such as a `ManualClock`; None: real time.
    """
    return MemoryBackend(QueueSettings(namespace=fresh_namespace()), clock=clock)
