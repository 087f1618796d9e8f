"""What the library takes from its process, and a simulation gives it: random numbers, the time of day, the prefix of ids.

The modules' own names are replaced, for as long as a world runs; nothing outside of the library sees it.
"""

import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import count
from random import Random
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

from abe.backends.message_queue import threads as pool
from abe.backends.message_queue.base import backoff
from abe.backends.message_queue.engine import inbox, outgoing
from abe.backends.message_queue.service import namespaces
from abe.errors import ConfigurationError
from abe.testing.simulation.world import World

EPOCH: Final = 1_800_000_000.0
"""The time of day when a world begins, in seconds since the epoch."""

_GREENLET: Final = find_spec("greenlet")


@contextmanager
def seams(
    world: World,
    seed: object,
    *,
    queue: type[namespaces.Queue] = namespaces.Queue,
    settling_timeout: float = inbox._UNRENEWED_TIMEOUT,  # pyright: ignore[reportPrivateUsage]
) -> Generator[None]:
    """Have the library take everything from a world, until the block ends.

    Args:
        world: Whose time it is.
        seed: What jitter is drawn from.
        queue: The class of the broker's queues.
        settling_timeout: Seconds for which settlements are tried where there are no leases.
    """

    def today() -> float:
        return EPOCH + (world.running.time() if world.running is not None else world.now)

    replaced: dict[Any, dict[str, Any]] = {
        backoff: {"random": Random(f"{seed}/jitter")},
        outgoing: {"time": SimpleNamespace(time_ns=lambda: int(today() * 1e9)), "next_id": _ids()},
        namespaces: {"time": today, "Queue": queue},
        inbox: {"_UNRENEWED_TIMEOUT": settling_timeout},
        pool: {
            "time": SimpleNamespace(time=today, monotonic=today, strftime=time.strftime, localtime=time.gmtime),
            **_threads(),
        },
    }
    with ExitStack() as stack:
        for module, names in replaced.items():
            for name, value in names.items():
                stack.enter_context(patch.object(module, name, value))
        yield


def _threads() -> dict[str, Any]:
    """Return what stands for threads and their queues."""
    if _GREENLET is None:
        return {"SimpleQueue": _refused}
    from abe.testing.simulation.threads import Queue, Thread

    return {"threading": SimpleNamespace(Thread=Thread), "SimpleQueue": Queue}


def _refused() -> None:
    raise ConfigurationError(
        "a synchronous handler runs in a thread, which a simulation needs greenlet for: pip install 'abe-core[simulation]'"
    )


def _ids() -> Callable[[], str]:
    numbers = count(1)
    return lambda: f"id{next(numbers)}"
