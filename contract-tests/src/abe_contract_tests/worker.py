"""Workers: other members of the application, which a test can pause, resume and kill.

If the broker is in another process, a worker is a process too. If it is in this process, a worker is a thread with its own event loop,
which `kill` abandons like SIGKILL: its tasks never run again, and nothing is cleaned up.
"""

import asyncio
import atexit
import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Protocol, TypeAlias, cast
from unittest.mock import patch

from abe.types import MessageQueueBackendProtocol
from abe_contract_tests import timeline
from abe_contract_tests.bounds import slowness
from abe_contract_tests.harness import Harness
from abe_contract_tests.loops import new_event_loop

Report: TypeAlias = Callable[[Any], None]
Receive: TypeAlias = Callable[[], Awaitable[Any]]
WorkerFunction: TypeAlias = Callable[..., Awaitable[object]]

_LINE_LIMIT: Final = 16 * 1024 * 1024
_KILL_TIMEOUT: Final = 10.0
_NOTED: Final = 300
"""The longest text of a value in the timeline, in characters."""


class WorkerFailed(AssertionError):  # noqa: N818 - names the event
    """The worker's function raised, or the worker ended too early."""


class Worker(Protocol):
    """A running worker. The caller bounds every wait with ``contract.within()``."""

    pid: int | None
    """The process's id; None for a thread."""

    async def next_report(self) -> Any:
        """Wait for the next value that the function reported.

        Raises:
            WorkerFailed: The function raised (its traceback is in the text), or ended without a report.
        """
        ...

    async def send(self, value: Any) -> None:
        """Send a JSON value to the function's ``receive()``."""
        ...

    async def finished(self) -> None:
        """Wait until the function has returned and its backend is closed. Pending reports are dropped.

        Raises:
            WorkerFailed: The function raised.
        """
        ...

    async def kill(self) -> None:
        """Kill it without any cleanup, and wait until it has ended. May be called repeatedly."""
        ...

    async def pause(self) -> None:
        """Suspend it, and return once it is suspended."""
        ...

    async def resume(self) -> None:
        """Resume it."""
        ...


async def start_worker(
    harness: Harness, environment: Mapping[str, str], function: WorkerFunction, arguments: Mapping[str, Any]
) -> Worker:
    """Start `function` in a process, or in a thread if the broker is in this process."""
    if harness.networked:
        return await ProcessWorker.start(harness.backend, environment, function, arguments)
    return ThreadWorker(harness.backend, environment, function, arguments)


class ProcessWorker:
    """A worker in its own process, which reads and writes JSON lines on its standard streams."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid: int | None = process.pid

    @classmethod
    async def start(
        cls,
        backend: type[MessageQueueBackendProtocol],
        environment: Mapping[str, str],
        function: WorkerFunction,
        arguments: Mapping[str, Any],
    ) -> "ProcessWorker":
        """Start the process. Its first report shows that it is running."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "abe_contract_tests.worker_process"),
            *(_path(function), _path(backend), json.dumps(arguments)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
            # The worker needs this process's sys.path: pytest added the tests' folders to it.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        )
        timeline.note(f"worker {process.pid} starts: {function.__name__} {json.dumps(arguments)}")
        return cls(process)

    async def next_report(self) -> Any:
        line = await self._read()
        if line is None or "report" not in line:
            raise WorkerFailed("the worker ended without another report")
        timeline.note(f"worker {self.pid} reports {line['report']}"[:_NOTED])
        return line["report"]

    async def send(self, value: Any) -> None:
        assert self._process.stdin is not None
        timeline.note(f"worker {self.pid} is sent {value}"[:_NOTED])
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        await self._process.stdin.drain()

    async def finished(self) -> None:
        while await self._read() is not None:
            pass
        if (status := await self._process.wait()) != 0:
            raise WorkerFailed(f"the worker ended with status {status}")

    async def kill(self) -> None:
        if self._process.returncode is None:
            timeline.note(f"worker {self.pid} is killed")
            with suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        # The signal is delivered asynchronously; until then the worker could still renew a lease.
        while await asyncio.to_thread(_state, self._process.pid) not in "TtZ":  # noqa: ASYNC110 - it has no event for us
            await asyncio.sleep(0.001)
        timeline.note(f"worker {self.pid} is frozen")

    async def resume(self) -> None:
        timeline.note(f"worker {self.pid} goes on")
        self._process.send_signal(signal.SIGCONT)

    async def _read(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            return None
        message = cast("dict[str, Any]", json.loads(line))
        if "error" in message:
            raise WorkerFailed(f"the worker failed:\n{message['error']}")
        return message


class ThreadWorker:
    """A worker in a thread, for brokers in this process."""

    pid: int | None = None

    def __init__(
        self,
        backend: type[MessageQueueBackendProtocol],
        environment: Mapping[str, str],
        function: WorkerFunction,
        arguments: Mapping[str, Any],
    ) -> None:
        with patch.dict(os.environ, environment):
            self._backend = backend.from_env()
        self._home = asyncio.get_running_loop()
        self._reports: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._ended = asyncio.Event()
        self._failure: str | None = None
        self._loop = new_event_loop()
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._go_on: threading.Event | None = None
        self._killed = False
        self._thread = threading.Thread(
            target=self._run, args=(function, json.dumps(arguments)), name="contract-worker", daemon=True
        )
        self._thread.start()

    async def next_report(self) -> Any:
        getting = asyncio.ensure_future(self._reports.get())
        ending = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({getting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()["report"]
            raise WorkerFailed(self._failure or "the worker ended without another report")
        finally:
            getting.cancel()
            ending.cancel()

    async def send(self, value: Any) -> None:
        self._loop.call_soon_threadsafe(self._inbox.put_nowait, json.loads(json.dumps(value)))

    async def finished(self) -> None:
        await self._ended.wait()
        if self._failure is not None:
            raise WorkerFailed(self._failure)

    async def kill(self) -> None:
        if not self._killed and self._thread.is_alive():
            self._killed = True
            with suppress(RuntimeError):  # its loop has already ended
                self._loop.call_soon_threadsafe(self._loop.stop)
            await self.resume()
        await asyncio.to_thread(self._thread.join, _KILL_TIMEOUT * slowness())
        if self._thread.is_alive():
            raise WorkerFailed("the worker blocks its event loop, so it cannot be stopped")

    async def pause(self) -> None:
        standing, self._go_on = asyncio.Event(), threading.Event()

        def stand(go_on: threading.Event) -> None:
            self._home.call_soon_threadsafe(standing.set)
            go_on.wait()

        self._loop.call_soon_threadsafe(stand, self._go_on)
        await standing.wait()

    async def resume(self) -> None:
        if self._go_on is not None:
            self._go_on.set()

    def _run(self, function: WorkerFunction, arguments: str) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        work = loop.create_task(serve(self._backend, function, self._report, self._inbox.get, json.loads(arguments)))
        work.add_done_callback(lambda _: loop.stop())
        loop.run_forever()
        if not work.done():
            _abandon(loop)
        else:
            if not work.cancelled() and (error := work.exception()) is not None:
                self._failure = "the worker failed:\n" + "".join(traceback.format_exception(error))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
        with suppress(RuntimeError):  # the test's own loop may be gone
            self._home.call_soon_threadsafe(self._ended.set)

    def _report(self, value: Any) -> None:
        # Through JSON, so that a function behaves alike in a thread and in a process.
        message = {"report": json.loads(json.dumps(value))}
        self._home.call_soon_threadsafe(self._reports.put_nowait, message)


async def serve(
    backend: MessageQueueBackendProtocol,
    function: WorkerFunction,
    report: Report,
    receive: Receive,
    arguments: Mapping[str, Any],
) -> None:
    """Run a worker's function, and close its backend."""
    try:
        await function(backend, report, receive, **arguments)
    finally:
        if (disconnect := getattr(backend, "disconnect", None)) is not None:
            await disconnect()


_abandoned: Final[list[asyncio.AbstractEventLoop]] = []


def _abandon(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        # asyncio would report a task destroyed while pending.
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        # A collected coroutine runs its `finally` blocks, which a killed process would not. Only a leaked reference keeps an object alive
        # until after the interpreter's shutdown.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(task))
    _abandoned.append(loop)


@atexit.register
def _close_abandoned() -> None:
    for loop in _abandoned:
        loop.close()


def _path(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
