"""Programs beside a broker."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abe_contract_tests.services._base import ServiceUnavailable


class ProcessCompanion:
    """A program on this machine. It ends with this process at the latest, as its standard input does."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        """Start it.

        Raises:
            ServiceUnavailable: It is not there.
        """
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd=directory,
            )
        except OSError as exc:
            raise ServiceUnavailable(f"{command[0]} cannot be started: {exc}") from exc

    def write(self, line: bytes) -> None:
        """Write to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def readline(self) -> bytes:
        """Return the next line of its standard output, empty when it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        """Close its standard input, and wait for the end."""
        self._process.communicate()


class ContainerCompanion:
    """A program in a container, by the engine's API.

    The engine sends the program's output in frames: a kind, three zeros, four bytes of length, and as many bytes.
    """

    def __init__(self, container: Any, command: Sequence[str], *, timeout: float) -> None:
        """Start it.

        Args:
            container: The engine's client's.
            command: The program.
            timeout: Seconds after which a silent program counts as failed.
        """
        api = container.client.api
        identity = api.exec_create(container.id, list(command), stdin=True, stderr=False)["Id"]
        self._response = api.exec_start(identity, socket=True)
        self._socket = self._response._sock
        self._socket.settimeout(timeout)
        self._frames = b""
        self._output = b""

    def write(self, line: bytes) -> None:
        """Write to its standard input."""
        self._socket.sendall(line)

    def readline(self) -> bytes:
        """Return the next line of its standard output, empty when it has ended."""
        while b"\n" not in self._output:
            received = self._socket.recv(65_536)
            if not received:
                return b""
            self._frames += received
            while len(self._frames) >= 8 and len(self._frames) >= 8 + (
                size := int.from_bytes(self._frames[4:8], "big")
            ):
                self._output += self._frames[8 : 8 + size]
                self._frames = self._frames[8 + size :]
        line, _, self._output = self._output.partition(b"\n")
        return line + b"\n"

    def close(self) -> None:
        """Close its standard input, which ends it."""
        self._response.close()
        self._socket.close()
