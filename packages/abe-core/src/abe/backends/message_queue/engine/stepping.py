"""Runs the first step of a coroutine by hand: one that returns in it needs no task and no timer."""

from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Begun(Generic[_T]):
    """The rest of a coroutine that waits for something, or its failure. Await it once, in any task."""

    __slots__ = ("_coroutine", "_error", "_waits_for")

    def __init__(self, coroutine: Coroutine[Any, Any, _T], waits_for: object, error: Exception | None = None) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for
        self._error = error

    def __await__(self) -> Generator[Any, Any, _T]:
        if self._error is not None:
            raise self._error
        waits_for = self._waits_for
        while True:
            try:
                yield waits_for
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as exc:  # noqa: BLE001 - a cancellation above all: the coroutine ends by it, or waits again
                try:
                    waits_for = self._coroutine.throw(exc)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
            else:
                return (yield from self._coroutine.__await__())


def begin(coroutine: Coroutine[Any, Any, _T]) -> _T | Begun[_T]:
    """Run a coroutine until it first waits, in the caller's task, or outside of any. Nothing else runs meanwhile.

    Returns:
        What the coroutine returned, if it waited for nothing; else the rest of it.
    """
    try:
        return Begun(coroutine, coroutine.send(None))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    except Exception as exc:  # noqa: BLE001 - it is raised where the rest is awaited
        return Begun(coroutine, None, exc)
