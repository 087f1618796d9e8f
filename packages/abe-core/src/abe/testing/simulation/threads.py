"""Threads of simulated hosts: greenlets, which the event loop of their host resumes. They wait for a queue or for time, as threads do."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet


class Thread:
    """What ``threading.Thread`` is to the library.

    Args:
        target: What it runs.
        name: Its name.
        daemon: Whether the process may end without it.
    """

    def __init__(self, target: Callable[[], object], name: str = "", *, daemon: bool = False) -> None:
        self.name = name
        self._run = greenlet(target)

    def start(self) -> None:
        """Begin it, soon."""
        _resume(self._run)


class Queue:
    """What ``queue.SimpleQueue`` is to the library."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiting: deque[greenlet] = deque()

    def put(self, item: object) -> None:
        """Add an item."""
        self._items.append(item)
        if self._waiting:
            _resume(self._waiting.popleft())

    def get(self) -> Any:
        """Wait for an item, in a thread."""
        while not self._items:
            self._waiting.append(getcurrent())
            _wait()
        return self._items.popleft()


def sleep(seconds: float) -> None:
    """Wait in a thread, for so many seconds of the host's time."""
    asyncio.get_running_loop().call_later(seconds, getcurrent().switch)
    _wait()


def _resume(thread: greenlet) -> None:
    asyncio.get_running_loop().call_soon(thread.switch)


def _wait() -> None:
    """Let the event loop run until this thread is resumed."""
    hub = getcurrent().parent
    assert hub is not None
    hub.switch()
