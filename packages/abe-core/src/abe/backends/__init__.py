"""Backends, and the application's shared one."""

import asyncio
from weakref import WeakKeyDictionary

from abe.backends.message_queue.base.protocol import FullBackend
from abe.backends.message_queue.loader import load_backend

__all__ = ["get_message_queue_backend"]

_shared: "WeakKeyDictionary[asyncio.AbstractEventLoop, FullBackend]" = WeakKeyDictionary()


def get_message_queue_backend() -> FullBackend:
    """Return the application's one backend in the running event loop, made by `load_backend` when first asked for.

    A call in a hot path opens no new connection. Close it once, where the application ends.

    Raises:
        RuntimeError: No event loop is running.
        BackendNotFoundError: See `load_backend`.
    """
    loop = asyncio.get_running_loop()
    backend = _shared.get(loop)
    if backend is None:
        # A backend refers to its event loop, so that the weak keys alone would let no loop go that was left without a disconnect.
        for closed in [other for other in _shared if other.is_closed()]:
            del _shared[closed]
        backend = _shared[loop] = load_backend()
    return backend
