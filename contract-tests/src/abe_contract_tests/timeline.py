"""What happened in a test, moment by moment: kept for the one that fails."""

import time
from collections import deque
from typing import Final

_MOST: Final = 5_000
"""Entries that are kept of a test, the last ones: a test that publishes for ever notes a lot."""

_entries: Final[deque[tuple[float, str]]] = deque(maxlen=_MOST)


def note(text: str) -> None:
    """Write down that this happened now. Any thread may."""
    _entries.append((time.time(), text))


def begin() -> None:
    """Forget the test before."""
    _entries.clear()


def entries() -> list[tuple[float, str]]:
    """Return what was noted since then: moments by ``time.time()``, and texts."""
    return list(_entries)
