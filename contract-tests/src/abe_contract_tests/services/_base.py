"""The interface of a broker for tests: how it is started, and the faults that a test may inject."""

import secrets
import signal
import socket
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Protocol, Self

from abe_contract_tests import timeline

_PORTS: Final = range(20_000, 32_000)
_PORT_ATTEMPTS: Final = 100


class ServiceUnavailable(Exception):  # noqa: N818 - an outcome of looking for a broker, reported as INCOMPLETE
    """No broker is available; the text says what to install or what went wrong."""


class NotReadyError(Exception):
    """The broker does not serve yet."""


class FaultUnsupportedError(Exception):
    """A fault was requested of a broker that the tests did not start."""


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """The files of a server that speaks TLS only."""

    certificate: Path
    key: Path
    authority: Path


class Companion(Protocol):
    """A program that runs beside a broker, and reads and writes lines."""

    def write(self, line: bytes) -> None:
        """Write to its standard input.

        Raises:
            BrokenPipeError: It has ended. ConnectionResetError means the same.
        """

    def readline(self) -> bytes:
        """Return the next line of its standard output, empty when it has ended."""
        ...

    def close(self) -> None:
        """Close its standard input, which ends it, and wait for its end."""


class Broker(ABC):
    """How one kind of broker is started, addressed and probed: the base class for each kind.

    A broker without an `image` is a private process, or at an address; it needs none of the attributes that begin with ``container``.
    """

    name: ClassVar[str]
    """The broker's name, for reports."""

    address_variable: ClassVar[str]
    """The environment variable with an address, which takes precedence over everything."""

    shell_variable: ClassVar[str] = ""
    """The environment variable with the command that runs a program beside a broker at an address, where tests need one."""

    container_port: ClassVar[int] = 0
    """The port that the image serves on."""

    start_timeout: ClassVar[float] = 30.0
    """Seconds until a starting broker must serve."""

    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    """The signal for an orderly shutdown of the private process. A container gets the signal of its image."""

    @property
    def image(self) -> str:
        """The container image; empty for none."""
        return ""

    @abstractmethod
    def url(self, port: int) -> str:
        """Return the address of a broker that listens on that port of 127.0.0.1."""

    @abstractmethod
    def probe(self, url: str) -> str:
        """Probe the broker without its client library, and return its name and version.

        Raises:
            NotReadyError: It answers, but does not serve yet.
            OSError: It cannot be reached.
        """

    @abstractmethod
    def command(self, port: int, directory: Path) -> Sequence[str]:
        """Return the command of a private process.

        It stays in the foreground, listens on 127.0.0.1 only and keeps its data in the directory.

        Raises:
            ServiceUnavailable: No server is installed; the text says what to install.
        """

    def environment(self, port: int, directory: Path) -> Mapping[str, str]:
        """Return environment variables for the private process, in addition to this process's."""
        return {}

    def started(self, log: str) -> bool:
        """Return whether the private process's log says that it serves: an answer on the port may be another program's."""
        return True

    def container_command(self) -> Sequence[str]:
        """Return the command inside the container; empty for the image's own."""
        return []

    def container_entrypoint(self) -> Sequence[str]:
        """Return the container's entrypoint; empty for the image's own."""
        return []

    def container_environment(self) -> Mapping[str, str]:
        """Return environment variables for the container."""
        return {}


_running: Final[weakref.WeakSet["Service"]] = weakref.WeakSet()


def running_services() -> "list[Service]":
    """Return the brokers of this process that were started and not stopped."""
    return list(_running)


class Service(ABC):
    """One broker of a test run. The methods block, and are for one caller at a time.

    Data live from the first `start` to `stop`: a killed or terminated broker starts again on the same address with
    what it had. An emulator, which keeps everything in memory, starts again there without it.
    """

    evidence: ClassVar[str]
    """Where the broker runs, for reports."""

    faults: ClassVar[bool] = True
    """Whether `kill`, `terminate`, `restart`, `pause` and `resume` work; else they raise `FaultUnsupportedError`."""

    @property
    @abstractmethod
    def url(self) -> str:
        """The broker's address, the same until `stop`."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The broker's name and version."""

    @abstractmethod
    def start(self) -> None:
        """Start the broker and return when it serves.

        Raises:
            ServiceUnavailable: It does not serve in time; the text shows the end of its log.
        """

    @abstractmethod
    def stop(self) -> None:
        """End the broker and delete its data. Harmless when there is nothing to end."""

    @abstractmethod
    def kill(self) -> None:
        """End the broker as a crash would (SIGKILL); the data stay as they are."""

    @abstractmethod
    def terminate(self) -> None:
        """Shut the broker down in order; the data stay."""

    @abstractmethod
    def pause(self) -> None:
        """Freeze the broker: its connections stay open and nothing answers."""

    @abstractmethod
    def resume(self) -> None:
        """Resume a frozen broker."""

    @abstractmethod
    def beside(self, command: Sequence[str]) -> Companion:
        """Start a program where the broker runs, with the broker's environment.

        Raises:
            ServiceUnavailable: It cannot be started; the text says what is needed.
        """

    def log_size(self) -> int:
        """Return where its log ends now, for `log_since`; 0 where there is none to be had."""
        return 0

    def log_since(self, size: int) -> str:
        """Return what it wrote after `log_size` returned that, over all of its starts."""
        return ""

    def note(self, what: str) -> None:
        """Write what happens to it into the timeline of the test that runs."""
        _running.add(self)
        timeline.note(f"{type(self).__name__} {self.version or 'new'}: it {what}")

    def forget(self) -> None:
        """Take it out of `running_services`."""
        _running.discard(self)

    def restart(self) -> None:
        """Shut the broker down in order and start it again."""
        self.terminate()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """Return a free port of 127.0.0.1.

    It lies below the range from which Linux takes the local ports of outgoing connections: a client that retries the
    address of a killed server could otherwise be given that very port, and talk to itself.
    """
    for _ in range(_PORT_ATTEMPTS):
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise ServiceUnavailable(f"no free port among {_PORTS.start} to {_PORTS.stop - 1}")
