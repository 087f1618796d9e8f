"""RabbitMQ for tests: the system's, or a container's."""

import os
import shutil
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import urlsplit

from abe_contract_tests.services._base import (
    Broker,
    NotReadyError,
    Service,
    ServiceUnavailable,
    TlsFiles,
    free_port,
)
from abe_contract_tests.services._choice import choose

IMAGE_VARIABLE: Final = "ABE_TEST_RABBITMQ_IMAGE"
_IMAGE: Final = "rabbitmq:3"
_PROBE_TIMEOUT: Final = 2.0
_SERVER: Final = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""Debian's real script: the one on PATH changes to its own user."""

_NODE: Final = "abe@localhost"
_NO_SPINNING: Final = "+sbwt none +sbwtdcpu none +sbwtdio none"
"""Schedulers that wait without spinning: the processors are the tests'."""

_CERTIFICATE_DEMANDED: Final = ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_HANDSHAKE_FAILURE")
"""How the server closes a connection without a client certificate if it requires one, by TLS 1.3 and before."""

_GREETING: Final = b"AMQP\x00\x00\x09\x01"


class RabbitMQ(Broker):
    """A RabbitMQ node of its own, with the user guest and no plugins."""

    name: ClassVar[str] = "RabbitMQ"
    address_variable: ClassVar[str] = "ABE_TEST_RABBITMQ_URL"
    shell_variable: ClassVar[str] = "ABE_TEST_RABBITMQ_SHELL"
    container_port: ClassVar[int] = 5672
    start_timeout: ClassVar[float] = 90.0

    def __init__(self, *, image: str = _IMAGE, configuration: Sequence[str] = (), tls: TlsFiles | None = None) -> None:
        """Describe a node.

        Args:
            image: The container image.
            configuration: Lines of ``rabbitmq.conf``, for a private process.
            tls: Serve TLS with these files, and nothing else. A client's certificate must be from the authority;
                ``ssl_options.fail_if_no_peer_cert = true`` in the configuration demands one.
        """
        self._image = image
        self._configuration = tuple(configuration)
        self._tls = tls
        self._distribution: dict[int, int] = {}

    @property
    def image(self) -> str:
        """The container image."""
        return self._image

    def url(self, port: int) -> str:
        """Return the address."""
        scheme = "amqp" if self._tls is None else "amqps"
        return f"{scheme}://guest:guest@127.0.0.1:{port}/"

    def probe(self, url: str) -> str:
        """Send the protocol header, and read the version in the answer."""
        parts = urlsplit(url)
        host = parts.hostname or "127.0.0.1"
        secure = parts.scheme == "amqps"
        with socket.create_connection((host, parts.port or (5671 if secure else 5672)), _PROBE_TIMEOUT) as connection:
            try:
                stream = self._context().wrap_socket(connection, server_hostname=host) if secure else connection
                with stream:
                    stream.sendall(_GREETING)
                    reply = stream.recv(4096)
            except ssl.SSLError as exc:
                if exc.reason not in _CERTIFICATE_DEMANDED:
                    raise
                # A server that requires a login serves too.
                return "RabbitMQ of a version it does not tell"
        found = reply.find(b"\x07versionS")
        if not reply.startswith(b"\x01") or found < 0:
            raise NotReadyError("it does not answer as RabbitMQ does")
        size = int.from_bytes(reply[found + 9 : found + 13], "big")
        return f"RabbitMQ {reply[found + 13 : found + 13 + size].decode(errors='replace')}"

    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=None if self._tls is None else self._tls.authority)

    def command(self, port: int, directory: Path) -> Sequence[str]:
        """Write the node's configuration, and return the server's command."""
        if not _SERVER.exists() or shutil.which("erl") is None:
            raise ServiceUnavailable(
                "no RabbitMQ server is installed; install the package rabbitmq-server of the system"
            )
        # The listener is configured in Erlang's own notation: translating the other file takes as long as a third of the start.
        kind, other = ("tcp", "ssl") if self._tls is None else ("ssl", "tcp")
        (directory / "advanced.config").write_text(
            f'[{{rabbit, [{{{kind}_listeners, [{{"127.0.0.1", {port}}}]}}, {{{other}_listeners, []}}]}}].\n'
        )
        lines = [*_tls_lines(self._tls), *self._configuration]
        if lines:
            (directory / "rabbitmq.conf").write_text("\n".join([*lines, ""]))
        return [str(_SERVER)]

    def environment(self, port: int, directory: Path) -> Mapping[str, str]:
        """Return the node's name, its directories, and where the nodes find each other: at a known port, without a port mapper."""
        distribution = self._distribution.setdefault(port, free_port())
        return {
            "HOME": str(directory),
            "ERL_AFLAGS": f"-start_epmd false -erl_epmd_port {distribution}",
            "ERL_CRASH_DUMP_SECONDS": "0",
            "RABBITMQ_NODENAME": _NODE,
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"{_NO_SPINNING} -sname {_NODE} -kernel inet_dist_use_interface {{127,0,0,1}}"
            ),
            # The process is the node itself, not a script that waits for it.
            "RUNNING_UNDER_SYSTEMD": "true",
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            # What is not there is not read, and nothing is read that the system says.
            "RABBITMQ_CONF_ENV_FILE": str(directory / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(directory / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        }

    def started(self, log: str) -> bool:
        """Look for the line that reports it."""
        return "Server startup complete" in log

    def container_command(self) -> Sequence[str]:
        """Return the command of the image."""
        return ["rabbitmq-server"]

    def container_environment(self) -> Mapping[str, str]:
        """Return the node's name, which would else be that of the container."""
        return {"RABBITMQ_NODENAME": _NODE, "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _NO_SPINNING}


def rabbitmq_service(
    *, configuration: Sequence[str] = (), tls: TlsFiles | None = None, environ: Mapping[str, str] | None = None
) -> Service:
    """Return a RabbitMQ, not started yet: from ``ABE_TEST_RABBITMQ_URL``, in a container, or as a private process.

    It is a private process in any case where something special is asked of it. ``ABE_TEST_RABBITMQ_IMAGE`` names the
    container image.

    Args:
        configuration: As in `RabbitMQ`.
        tls: As in `RabbitMQ`.
        environ: Read instead of the process environment.

    Raises:
        ServiceUnavailable: None can be had; the text says what to install.
    """
    values = os.environ if environ is None else environ
    broker = RabbitMQ(image=values.get(IMAGE_VARIABLE) or _IMAGE, configuration=configuration, tls=tls)
    return choose(broker, process_only=bool(configuration or tls), environ=values)


def _tls_lines(files: TlsFiles | None) -> list[str]:
    if files is None:
        return []
    return [
        f"ssl_options.certfile = {files.certificate}",
        f"ssl_options.keyfile = {files.key}",
        f"ssl_options.cacertfile = {files.authority}",
        "ssl_options.verify = verify_peer",
        "ssl_options.fail_if_no_peer_cert = false",
    ]
