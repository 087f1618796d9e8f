"""Coroutines that begin where they stand: what answers without waiting needs no task and no timer."""

from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Begun(Generic[_T]):
    """A coroutine that waits for something, or that failed. Awaiting this, once and in any task, goes on from there."""

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
            except BaseException as exc:  # noqa: BLE001 - a cancellation most of all: by it the coroutine ends, or waits again
                try:
                    waits_for = self._coroutine.throw(exc)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
            else:
                return (yield from self._coroutine.__await__())


def begin(coroutine: Coroutine[Any, Any, _T]) -> _T | Begun[_T]:
    """Run a coroutine to where it first waits, in the caller's task, or outside of any.

    Nothing else runs meanwhile: what has returned by then took no time that anybody could see.

    Returns:
        What the coroutine returned, if it waited for nothing; else the rest of it.
    """
    try:
        return Begun(coroutine, coroutine.send(None))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    except Exception as exc:  # noqa: BLE001 - it is raised where the rest is awaited
        return Begun(coroutine, None, exc)
