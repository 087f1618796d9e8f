"""The timeline of the running test, which is reported if it fails."""

import time
from collections import deque
from typing import Final

_MOST: Final = 5_000
"""The number of entries that are kept, the last ones, which bounds the memory of long tests."""

_entries: Final[deque[tuple[float, str]]] = deque(maxlen=_MOST)


def note(text: str) -> None:
    """Add an entry with the current time. Safe in any thread."""
    _entries.append((time.time(), text))


def begin() -> None:
    """Clear the timeline for the next test."""
    _entries.clear()


def entries() -> list[tuple[float, str]]:
    """Return the entries since `begin`: times by ``time.time()``, and texts."""
    return list(_entries)
