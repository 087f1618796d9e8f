"""Chooses the event loop of the tests, their workers and their programs: asyncio's or uvloop's."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Any, Final, TypeAlias, TypeVar, cast

LoopFactory: TypeAlias = Callable[[], asyncio.AbstractEventLoop]

LOOP_VARIABLE: Final = "ABE_CONTRACT_LOOP"
"""The environment variable that names it, which a test's processes inherit."""

LOOPS: Final = ("asyncio", "uvloop")

_T = TypeVar("_T")


def chosen_loop() -> str:
    """Return the name of the event loop.

    Raises:
        ValueError: The name is unknown.
    """
    name = os.environ.get(LOOP_VARIABLE) or LOOPS[0]
    if name not in LOOPS:
        raise ValueError(f"{LOOP_VARIABLE} must be {' or '.join(LOOPS)}, not {name!r}")
    return name


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Make an event loop of the chosen kind."""
    make = asyncio.new_event_loop if chosen_loop() == "asyncio" else import_module("uvloop").new_event_loop
    return cast("asyncio.AbstractEventLoop", make())


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Like ``asyncio.run``, on the chosen event loop."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
