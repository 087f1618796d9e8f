"""Helpers for an application's tests: a manual clock, a recording backend, simulated processes, test entry points.

`abe.testing.plugin`, which pytest finds by itself, has the same as fixtures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from abe.testing.clock import ManualClock
    from abe.testing.entry_points import registered_backend
    from abe.testing.memory import fresh_memory_backend
    from abe.testing.recording import RecordingBackend
    from abe.testing.simulation import Simulation, simulate

__all__ = [
    "ManualClock",
    "RecordingBackend",
    "Simulation",
    "fresh_memory_backend",
    "registered_backend",
    "simulate",
]

# Imported on first use: pytest imports this package in every run, for the plugin.
_MODULES: Final = {
    "ManualClock": "abe.testing.clock",
    "RecordingBackend": "abe.testing.recording",
    "Simulation": "abe.testing.simulation",
    "fresh_memory_backend": "abe.testing.memory",
    "registered_backend": "abe.testing.entry_points",
    "simulate": "abe.testing.simulation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
