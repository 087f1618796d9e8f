"""The memory backend as tests want it: nothing in it, and time under control."""

from uuid import uuid4

from abe.backends.message_queue.base.clock import Clock
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.settings import QueueSettings


def fresh_namespace() -> str:
    """Return a namespace that nobody else uses."""
    return f"test-{uuid4().hex}"


def fresh_memory_backend(clock: Clock | None = None) -> MemoryBackend:
    """Return a memory backend that shares what it holds with no other.

    Args:
        clock: What leases, delays and backoffs are measured by, a `ManualClock` for example; None: real time.
    """
    return MemoryBackend(QueueSettings(namespace=fresh_namespace()), clock=clock)
