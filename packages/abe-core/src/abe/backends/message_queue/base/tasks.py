"""Tasks that several callers share, or that outlive a cancelled caller."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Generic, TypeVar

from abe.errors import AbeError, BackendConnectionError

_T = TypeVar("_T")


def _connection_closed() -> BackendConnectionError:
    return BackendConnectionError("the connection was closed")


async def gather_all(*awaitables: Awaitable[_T]) -> list[_T]:
    """Run awaitables concurrently, wait until all of them have ended, and return their results in order.

    If this is cancelled, all of them are cancelled, and waited for.

    Raises:
        BaseException: The first failure in the order of the arguments, once none of them is running any more.
    """
    if len(awaitables) == 1:  # spares a task
        return [await awaitables[0]]
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


async def result_of(task: "asyncio.Future[_T]", closed: Callable[[], AbeError] = _connection_closed) -> _T:
    """Wait for a task, and return its result. Cancelling the caller does not cancel the task.

    Unlike `asyncio.shield`, this tells a cancelled task from a cancelled caller, and a failure is not reported if all callers were
    cancelled.

    Args:
        task: The task.
        closed: Makes the error that is raised if the task itself was cancelled.

    Raises:
        AbeError: As `closed`; or what the task failed with.
    """
    task.add_done_callback(ignore_failure)
    await asyncio.wait([task])
    if task.cancelled():
        raise closed()
    return task.result()


async def run_to_completion(work: Coroutine[Any, Any, _T], closed: Callable[[], AbeError] = _connection_closed) -> _T:
    """Run an operation that must not be interrupted half-way: cancelling the caller ends the wait, and not the operation.

    Args:
        work: The operation.
        closed: Makes the error that is raised if the operation was cancelled from within, as clients do when they are closed.

    Raises:
        AbeError: As `closed`; or what the operation failed with.
    """
    return await result_of(_completing.start(work), closed)


def ignore_failure(task: "asyncio.Future[Any]") -> None:
    """Keep asyncio from logging a failure that no caller retrieves. A callback for tasks whose callers may have been cancelled."""
    if not task.cancelled():
        task.exception()


class Background:
    """A set of tasks that run to completion, whichever callers are cancelled; the event loop alone would not keep them alive."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Start a task. asyncio logs a failure that no caller retrieves, unless `ignore_failure` is added."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self) -> None:
        """Wait until no task is left, including those that are started meanwhile."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def cancel(self, timeout: float | None = None) -> None:
        """Cancel all tasks, and wait for them.

        Args:
            timeout: Seconds to wait at most. None: until they have ended.
        """
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)


_completing: Final = Background()


class SharedTask(Generic[_T]):
    """One attempt at something that concurrent callers share.

    Cancelling a caller does not cancel the attempt. Once it has ended, however it ended, the next call makes a new one.

    Args:
        work: Makes an attempt.
        closed: Makes the error of calls after `close`, and of callers that wait while the attempt is cancelled.
    """

    def __init__(
        self, work: Callable[[], Coroutine[Any, Any, _T]], closed: Callable[[], AbeError] = _connection_closed
    ) -> None:
        self._work = work
        self._closing_error = closed
        self._task: asyncio.Task[_T] | None = None
        self._closed = False

    @property
    def running(self) -> bool:
        """Whether an attempt is in progress."""
        return self._task is not None and not self._task.done()

    def start(self) -> "asyncio.Task[_T]":
        """Start an attempt unless one is in progress, and return it. A failure that no caller retrieves is not logged.

        Raises:
            AbeError: It was closed.
        """
        if self._closed:
            raise self._closing_error()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())
            self._task.add_done_callback(ignore_failure)
        return self._task

    async def join(self) -> _T:
        """Return the result of the attempt in progress, or of a new one.

        Raises:
            AbeError: It was closed; or what the attempt failed with.
        """
        return await result_of(self.start(), self._closing_error)

    async def cancel(self, timeout: float | None = None) -> None:
        """Cancel the attempt in progress, and wait for its end.

        Args:
            timeout: Seconds to wait at most. None: until it has ended.
        """
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=timeout)

    async def close(self, timeout: float | None = None) -> None:
        """Cancel the attempt in progress as `cancel` does, and allow no other. Idempotent."""
        self._closed = True
        await self.cancel(timeout)
