"""What an application's tests need: a clock they move, a backend that records, test entry points.

The same as fixtures is in `abe.testing.plugin`, which pytest finds by itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from abe.testing.clock import ManualClock
    from abe.testing.entry_points import registered_backend
    from abe.testing.memory import fresh_memory_backend
    from abe.testing.recording import RecordingBackend

__all__ = ["ManualClock", "RecordingBackend", "fresh_memory_backend", "registered_backend"]

# Imported when asked for: pytest imports this package in every run, for the plugin.
_HOMES: Final = {
    "ManualClock": "abe.testing.clock",
    "RecordingBackend": "abe.testing.recording",
    "fresh_memory_backend": "abe.testing.memory",
    "registered_backend": "abe.testing.entry_points",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
