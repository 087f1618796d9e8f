"""Fails a test in which the library or the provider blocks the event loop, if blockbuster is installed."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType
from typing import Any, Final, cast

from abe_contract_tests.harness import Harness

_LIBRARY: Final = "abe"

_trusted: Final = ContextVar("abe_contract_trusted", default=False)


@contextmanager
def trusted() -> Generator[None]:
    """Allow blocking in the body, which calls the harness or its oracle, not the provider."""
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


@contextmanager
def policed(harness: Harness) -> Generator[None]:
    """Make a blocking call of the library or the provider raise ``BlockingError`` while an event loop runs.

    Raises:
        ValueError: `Harness.may_block` names a function that does not exist.
    """
    try:
        from blockbuster import BlockBuster
    except ImportError:
        yield
        return
    detector = BlockBuster([part for name in _packages(harness) for part in _exactly(name)])
    # Locks that guard a few lines do not matter.
    for name in [name for name in detector.functions if "Lock" in name]:
        del detector.functions[name]
    exceptions = [_located(harness, name) for name in harness.may_block]
    for function in detector.functions.values():
        function.can_block_predicate = _or_trusted(function.can_block_predicate)
        for file, name in exceptions:
            function.can_block_in(file, name)
    detector.activate()
    try:
        yield
    finally:
        detector.deactivate()


def explain(error: BaseException, harness: Harness) -> None:
    """Add a note to each ``BlockingError`` in an exception: the calling function, and how to allow it."""
    try:
        from blockbuster import BlockingError
    except ImportError:
        return
    places = tuple(str(part.__file__) for name in _packages(harness) for part in _exactly(name))
    for found in _all_of(error, set()):
        if isinstance(found, BlockingError) and not getattr(found, "__notes__", ()):
            found.add_note(
                f"It blocks the event loop: run it in a thread. If it is meant to block, list its function in "
                f"{type(harness).__qualname__}.may_block: {_caller(found, places)!r}"
            )


def _packages(harness: Harness) -> tuple[str, str]:
    return _LIBRARY, harness.backend.__module__.partition(".")[0]


def _exactly(name: str) -> Iterator[ModuleType]:
    # blockbuster compares prefixes of paths, by which `abe` would include `abe_contract_tests`.
    module = import_module(name)
    for place in [os.path.join(path, "") for path in getattr(module, "__path__", ())] or [str(module.__file__)]:
        part = ModuleType(name)
        part.__file__ = place
        yield part


def _located(harness: Harness, name: str) -> tuple[str, str]:
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
        file = str(found.__file__)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ValueError(
            f"{type(harness).__qualname__}.may_block: {name!r} is not an existing 'module:function' ({exc})"
        ) from exc
    return file.replace("\\", "/"), path.rpartition(".")[2]


def _or_trusted(predicate: Callable[..., bool]) -> Callable[..., bool]:
    def allowed(*args: Any, **kwargs: Any) -> bool:
        return _trusted.get() or predicate(*args, **kwargs)

    return allowed


def _all_of(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    grouped = isinstance(error, BaseExceptionGroup)
    inner = cast("BaseExceptionGroup[BaseException]", error).exceptions if grouped else ()
    for other in (*inner, error.__cause__, error.__context__):
        yield from _all_of(other, seen)


def _caller(error: BaseException, places: tuple[str, ...]) -> str:
    """Return the innermost function of the library or the provider, as `Harness.may_block` takes it."""
    caller, traceback = "module:function", error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_filename.startswith(places):
            caller = f"{frame.f_globals['__name__']}:{frame.f_code.co_qualname.partition('.<locals>')[0]}"
        traceback = traceback.tb_next
    return caller
