"""What a broker's module says about its broker, and what a test may do to a running one."""

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
    """No broker can be had here; the text says what to install or what went wrong."""


class NotReadyError(Exception):
    """The broker does not serve yet."""


class FaultUnsupportedError(Exception):
    """A fault was asked of a broker that is not ours to hurt."""


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
            BrokenPipeError: It has ended. So does ConnectionResetError say.
        """

    def readline(self) -> bytes:
        """Return the next line of its standard output, empty when it has ended."""
        ...

    def close(self) -> None:
        """Close its standard input, at which it ends, and wait for that."""


class Broker(ABC):
    """How one kind of broker is started, addressed and greeted: all that a module for a new broker subclasses.

    A broker without an `image` is a private process, or at an address; it needs none of the attributes that begin with ``container``.
    """

    name: ClassVar[str]
    """The broker's name, for reports."""

    address_variable: ClassVar[str]
    """The environment variable whose address wins over everything."""

    shell_variable: ClassVar[str] = ""
    """The environment variable with the command that runs another one beside a broker at an address, where tests need that."""

    container_port: ClassVar[int] = 0
    """The port that the image serves on."""

    start_timeout: ClassVar[float] = 30.0
    """Seconds until a starting broker must serve."""

    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    """What tells the private process to shut down in order. A container is sent what its image says."""

    @property
    def image(self) -> str:
        """The container image; empty for none."""
        return ""

    @abstractmethod
    def url(self, port: int) -> str:
        """Return the address of a broker of ours that listens on that port of 127.0.0.1."""

    @abstractmethod
    def probe(self, url: str) -> str:
        """Greet the broker without its client library and return its name and version.

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
        """Return what the private process needs in its environment, beside ours."""
        return {}

    def started(self, log: str) -> bool:
        """Return whether the private process says that it serves: an answer on the port alone may be a stranger's."""
        return True

    def container_command(self) -> Sequence[str]:
        """Return the command inside the container; empty for the image's own."""
        return []

    def container_entrypoint(self) -> Sequence[str]:
        """Return what the command is given to, empty for what the image says."""
        return []

    def container_environment(self) -> Mapping[str, str]:
        """Return what the container needs in its environment."""
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
        """Let a frozen broker go on."""

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
    """Return a port of 127.0.0.1 that nobody listens on.

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
