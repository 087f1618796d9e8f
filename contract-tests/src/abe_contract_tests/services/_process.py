"""A broker as a private process on a free port."""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from abe_contract_tests.bounds import Deadline, slowness
from abe_contract_tests.services._base import Broker, NotReadyError, Service, ServiceUnavailable, free_port
from abe_contract_tests.services._companion import ProcessCompanion
from abe_contract_tests.services._watchdog import Watchdog

_ATTEMPTS: Final = 5
_POLL: Final = 0.02
_ORDERLY: Final = 10.0
_TAIL_LINES: Final = 20
_TAKEN: Final = ("already in use", "eaddrinuse")
"""The log lines of servers whose port is in use."""
_STANDING: Final = "TtZX"
"""States of a thread in which it does nothing any more (proc_pid_stat(5)): stopped, traced, or dead."""


class _PortTakenError(Exception):
    """Another program has taken the port."""


class ProcessService(Service):
    """A broker that this process started, in its own session, and that ends with this process at the latest."""

    evidence: ClassVar[str] = "private process"

    def __init__(self, broker: Broker) -> None:
        """Make the service; `start` starts it."""
        self._broker = broker
        self._directory: Path | None = None
        self._port = 0
        self._version = ""
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: Watchdog | None = None

    @property
    def url(self) -> str:
        """The broker's address, the same until `stop`."""
        if not self._port:
            raise RuntimeError(f"{self._broker.name} was not started: it has no address yet")
        return self._broker.url(self._port)

    @property
    def version(self) -> str:
        """The broker's name and version, empty before the first start."""
        return self._version

    @property
    def pid(self) -> int:
        """The process id of the running broker."""
        return self._running().pid

    @property
    def directory(self) -> Path:
        """The broker's data and logs, from the first start to `stop`."""
        if self._directory is None:
            raise RuntimeError(f"{self._broker.name} was not started: it has no directory yet")
        return self._directory

    def start(self) -> None:
        """Start the broker, on its previous port and data if it has any, and return when it serves."""
        if self._process is not None:
            raise RuntimeError(f"{self._broker.name} is running already, as process {self._process.pid}")
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix=f"abe-{self._broker.name.lower()}-"))
        self.note("starts")
        try:
            self._start_somewhere()
        except BaseException:
            if self._version:
                self.kill()
            else:
                self.stop()
            raise

    def stop(self) -> None:
        """Kill the broker, and delete its data."""
        self.kill()
        self.forget()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory, self._port, self._version = None, 0, ""

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        if self._process is None:
            return
        self.note("is killed")
        self._signal(signal.SIGKILL)
        self._reap()

    def terminate(self) -> None:
        """Send the broker's `stop_signal` and wait for the end, which is enforced after ten seconds."""
        if self._process is None:
            return
        self.note("is shut down")
        self._signal(self._broker.stop_signal)
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(_ORDERLY * slowness())
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
        self._reap()

    def pause(self) -> None:
        """Send SIGSTOP, and return when every thread has stopped: until then, threads on other processors still answer."""
        group = self._running().pid
        self._signal(signal.SIGSTOP)
        deadline = Deadline(_ORDERLY)
        while not _stopped(group):
            if deadline.passed:
                raise RuntimeError(f"{self._broker.name} did not stop within {_ORDERLY:g} s")
            time.sleep(_POLL)
        self.note("is frozen")

    def resume(self) -> None:
        """Send SIGCONT."""
        self._running()
        self.note("goes on")
        self._signal(signal.SIGCONT)

    def beside(self, command: Sequence[str]) -> ProcessCompanion:
        """Start a program on this machine, in the broker's directory."""
        return ProcessCompanion(command, environment=self._environment(), directory=self.directory)

    def log(self) -> str:
        """Return what the broker wrote since its last start."""
        try:
            return self._log_file.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def log_size(self) -> int:
        """Return the size of its logs, of all starts."""
        return sum(path.stat().st_size for path in self._log_files())

    def log_since(self, size: int) -> str:
        """Return what the logs of all starts have after that."""
        found = b"".join(path.read_bytes() for path in self._log_files())
        return found[size:].decode(errors="replace")

    def _log_files(self) -> list[Path]:
        files = (
            (self.directory / f"server-{start}.log" for start in range(1, self._starts + 1)) if self._directory else ()
        )
        return [file for file in files if file.exists()]

    @property
    def _log_file(self) -> Path:
        return self.directory / f"server-{self._starts}.log"

    def _start_somewhere(self) -> None:
        if self._port:
            self._launch()
            return
        for attempt in range(1, _ATTEMPTS + 1):
            self._port = free_port()
            try:
                self._launch()
            except _PortTakenError:
                self.kill()
                if attempt == _ATTEMPTS:
                    raise ServiceUnavailable(self._complaint(f"lost the race for a port {_ATTEMPTS} times")) from None
            else:
                return

    def _launch(self) -> None:
        self._starts += 1
        command = list(self._broker.command(self._port, self.directory))
        try:
            with self._log_file.open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                    cwd=self.directory,
                    start_new_session=True,
                )
        except OSError as exc:
            raise ServiceUnavailable(f"{self._broker.name} cannot be started as {command[0]}: {exc}") from exc
        pid, directory = self._process.pid, shlex.quote(str(self.directory))
        self._watchdog = Watchdog(f"kill -9 -{pid}; rm -rf -- {directory}")
        self._await_ready(self._process)

    def _environment(self) -> Mapping[str, str]:
        return {**os.environ, **self._broker.environment(self._port, self.directory)}

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = Deadline(self._broker.start_timeout)
        reason = "it says nothing"
        while not deadline.passed:
            if process.poll() is not None:
                log = self.log()
                if any(text in log.lower() for text in _TAKEN):
                    if not self._version:
                        raise _PortTakenError
                    raise ServiceUnavailable(
                        self._complaint(f"found its port {self._port} taken when it started again")
                    )
                raise ServiceUnavailable(self._complaint(f"ended at once with status {process.returncode}"))
            try:
                if self._broker.started(self.log()):
                    self._version = self._broker.probe(self.url)
                    self.note("serves")
                    return
            except (NotReadyError, OSError) as exc:
                reason = str(exc)
            try:
                process.wait(_POLL)
            except subprocess.TimeoutExpired:
                continue
        raise ServiceUnavailable(self._complaint(f"does not serve after {deadline.elapsed:g} s ({reason})"))

    def _complaint(self, what: str) -> str:
        tail = self.log().splitlines()[-_TAIL_LINES:]
        return "\n".join([f"{self._broker.name} {what}; the end of its log:", *(tail or ["(empty)"])])

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self._broker.name} is not running")
        return self._process

    def _signal(self, number: signal.Signals) -> None:
        # The whole session, which has only the broker: some servers are a script and its child.
        try:
            os.killpg(self._running().pid, number)
        except ProcessLookupError:
            return

    def _reap(self) -> None:
        process, watchdog = self._process, self._watchdog
        self._process, self._watchdog = None, None
        if process is not None:
            process.wait()
        if watchdog is not None:
            watchdog.dismiss()


def _stopped(group: int) -> bool:
    """Return whether every thread of a process group has stopped; true on systems other than Linux."""
    return all(state in _STANDING for process in Path("/proc").glob("[0-9]*") for state in _threads(process, group))


def _threads(process: Path, group: int) -> list[str]:
    """Return the states of a process's threads, if it is of that group."""
    try:
        _, _, its_group, *_ = (process / "stat").read_text().rpartition(")")[2].split()
        if int(its_group) != group:
            return []
        stats = [(thread / "stat").read_text() for thread in (process / "task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        # It, or a thread of it, ended meanwhile. Where threads come and go the group has not stopped: it is looked at again.
        return ["R"] if process.exists() and process.name == str(group) else []
    return [stat.rpartition(")")[2].split()[0] for stat in stats]
