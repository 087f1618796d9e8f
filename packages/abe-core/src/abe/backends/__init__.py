"""Backends, and the application's shared one."""

import asyncio
import threading
from weakref import WeakKeyDictionary

from abe.backends.message_queue.base.protocol import FullBackend
from abe.backends.message_queue.loader import load_backend

__all__ = ["get_message_queue_backend"]

_shared: "WeakKeyDictionary[asyncio.AbstractEventLoop, FullBackend]" = WeakKeyDictionary()
_sharing = threading.Lock()


def get_message_queue_backend() -> FullBackend:
    """Return the application's backend for the running event loop; the first call creates it with `load_backend`.

    So calls in a hot path share one connection. Close it once, when the application ends.

    Raises:
        RuntimeError: No event loop is running.
        BackendNotFoundError: See `load_backend`.
    """
    loop = asyncio.get_running_loop()
    backend = _shared.get(loop)
    if backend is None:
        backend = load_backend()
        with _sharing:  # other threads have event loops of their own
            # A backend refers to its event loop, so weak keys alone would keep every loop that ended without a disconnect.
            for closed in [other for other in list(_shared) if other.is_closed()]:
                del _shared[closed]
            _shared[loop] = backend
    return backend
