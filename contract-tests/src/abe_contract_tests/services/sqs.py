"""SQS for tests: moto and ministack, two servers that speak its protocol, and disagree in places."""

import json
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Final, Literal
from urllib.parse import urlsplit

from abe_contract_tests.services._base import Broker, NotReadyError, Service, ServiceUnavailable
from abe_contract_tests.services._choice import choose

SERVER_VARIABLE: Final = "ABE_TEST_SQS_SERVER"
IMAGE_VARIABLE: Final = "ABE_TEST_SQS_IMAGE"
_IMAGE: Final = "motoserver/moto:5.2.5"
_PROBE_TIMEOUT: Final = 2.0
_VERSION_HEADER: Final = "X-Moto-Version"
_MOTO: Final = f"""
import functools, sys, threading
from moto import __version__
from moto.server import main
from moto.sqs.models import Queue, SQSBackend
from werkzeug.serving import WSGIRequestHandler

def send_response(self, code, message=None):
    # moto and the server under it both send the header Server, which aiohttp refuses in Python's development mode.
    self.send_response_only(code, message)
    self.send_header("{_VERSION_HEADER}", __version__)

WSGIRequestHandler.send_response = send_response

# moto answers each request in a thread and locks nothing: of two that receive at once both get the same message, and a message that is
# sent while another one is deleted is gone. One request has the turn; a poll that waits passes it on.
turn = threading.Condition()

def in_turn(method):
    @functools.wraps(method)
    def call(*arguments, **named):
        with turn:
            return method(*arguments, **named)
    return call

for name, method in list(vars(SQSBackend).items()):
    if callable(method) and not name.startswith("_"):
        setattr(SQSBackend, name, in_turn(method))

add_message = Queue.add_message

def add_and_tell(self, message):
    with turn:
        add_message(self, message)
        turn.notify_all()

Queue.add_message = add_and_tell
# Not for a whole second: messages become visible by time too.
Queue.wait_for_messages = lambda self, timeout: turn.wait(0.05)

main(sys.argv[1:])
"""


class _Emulator(Broker):
    """What both servers have in common: they keep everything in memory, so a restarted one is empty."""

    address_variable: ClassVar[str] = "ABE_TEST_SQS_URL"
    module: ClassVar[str]
    """The module that is run."""
    package: ClassVar[str]
    """The Python package that has it."""

    def __init__(self, *, image: str = _IMAGE) -> None:
        """Describe a server.

        Args:
            image: The container image.
        """
        self._image = image

    @property
    def image(self) -> str:
        """The container image."""
        return self._image

    def url(self, port: int) -> str:
        """Return the address."""
        return f"http://127.0.0.1:{port}"

    def probe(self, url: str) -> str:
        """List the queues, and ask for the version if the server reports one."""
        headers = ask(url, "ListQueues", {})[1]
        if version := headers.get(_VERSION_HEADER):
            return f"moto {version}"
        status, _, text = _request(url, "GET", "/_ministack/health")
        if status == 200 and text.startswith(b"{"):
            return f"ministack {json.loads(text)['version']}"
        return "SQS of a make that it does not tell"

    def command(self, port: int, directory: Path) -> Sequence[str]:
        """Return the server's command line."""
        if find_spec(self.module) is None:
            raise ServiceUnavailable(f"no {self.name} is installed; install the Python package {self.package}")
        return [sys.executable, *self.arguments("127.0.0.1", port)]

    def started(self, log: str) -> bool:
        """Look for the line that both log when their port is open."""
        return "Running on http" in log

    @abstractmethod
    def arguments(self, host: str, port: int) -> Sequence[str]:
        """Return the interpreter's arguments."""


class Moto(_Emulator):
    """moto in its server mode."""

    name: ClassVar[str] = "moto"
    container_port: ClassVar[int] = 5000
    module: ClassVar[str] = "moto"
    package: ClassVar[str] = "moto[server]"

    def arguments(self, host: str, port: int) -> Sequence[str]:
        """Return a program that is the server."""
        return ["-c", _MOTO, "-H", host, "-p", str(port)]

    def container_entrypoint(self) -> Sequence[str]:
        """Return the interpreter: the image's own command is the server as it comes."""
        return ["python3"]

    def container_command(self) -> Sequence[str]:
        """Return the same program, where the engine guards the port."""
        return self.arguments("0.0.0.0", self.container_port)


class MiniStack(_Emulator):
    """ministack, of which SQS and SNS are served."""

    name: ClassVar[str] = "ministack"
    container_port: ClassVar[int] = 4566
    module: ClassVar[str] = "ministack"
    package: ClassVar[str] = "ministack"

    def arguments(self, host: str, port: int) -> Sequence[str]:
        """Return the module; environment variables configure it."""
        return ["-m", "ministack"]

    def environment(self, port: int, directory: Path) -> Mapping[str, str]:
        """Return where it listens, and there alone; its file with its process id goes with its directory."""
        return {
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "SERVICES": "sqs,sns",
            # Two more listeners, at every address of the machine.
            "IOT_MTLS_ENABLED": "false",
            "SFTP_ENABLED": "false",
            # It ends containers that it takes for its own.
            "DOCKER_HOST": "unix:///nonexistent",
            "LOG_LEVEL": "INFO",
            "TMPDIR": str(directory),
        }

    def container_command(self) -> Sequence[str]:
        """Return nothing: it is always a process."""
        return []


_SERVERS: Final[Mapping[str, Callable[..., _Emulator]]] = {"moto": Moto, "ministack": MiniStack}


def sqs_service(server: Literal["", "moto", "ministack"] = "", *, environ: Mapping[str, str] | None = None) -> Service:
    """Return an SQS, not started yet: from ``ABE_TEST_SQS_URL``, in a container, or as a private process.

    Where no server is named, the address may be that of any server that speaks the protocol; so may it where moto is.
    ministack is a private process in any case, and so is the one that ``ABE_TEST_SQS_SERVER`` names with containers not
    forced. ``ABE_TEST_SQS_IMAGE`` names the container image, which holds a moto.

    Args:
        server: Which one; empty takes the one in ``ABE_TEST_SQS_SERVER``, and moto if there is none.
        environ: Read instead of the process environment.

    Raises:
        ServiceUnavailable: None can be had; the text says what to install.
    """
    values = os.environ if environ is None else environ
    wanted = "" if server else values.get(SERVER_VARIABLE, "")
    if wanted and wanted not in _SERVERS:
        raise ServiceUnavailable(f"{SERVER_VARIABLE} must be {' or '.join(_SERVERS)}, not {wanted!r}")
    name = server or wanted or "moto"
    forced = values.get("ABE_TEST_SERVICES", "")
    broker = _SERVERS[name](image=values.get(IMAGE_VARIABLE) or _IMAGE)
    return choose(broker, process_only=name == "ministack" or bool(wanted and not forced), environ=values)


def ask(
    url: str, operation: str, arguments: Mapping[str, object], *, timeout: float = _PROBE_TIMEOUT
) -> tuple[Mapping[str, object], Mapping[str, str]]:
    """Make a request in the protocol's JSON form, unsigned and without a client library, and return reply and headers.

    Args:
        url: Where the server is.
        operation: The request's name.
        arguments: Its arguments.
        timeout: Seconds that the server may be silent.

    Raises:
        NotReadyError: The reply is an error, or none.
        OSError: No server answers.
    """
    headers = {
        "Content-Type": "application/x-amz-json-1.0",
        "X-Amz-Target": f"AmazonSQS.{operation}",
        # moto finds the service by what a signature would name.
        "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/sqs/aws4_request, SignedHeaders=host, Signature=0",
    }
    status, found, text = _request(url, "POST", "/", json.dumps(arguments), headers, timeout)
    if status != 200:
        raise NotReadyError(f"the reply to {operation} has status {status}")
    try:
        return json.loads(text), found
    except ValueError:
        raise NotReadyError(f"the reply to {operation} is no JSON") from None


def _request(
    url: str,
    method: str,
    path: str,
    body: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = _PROBE_TIMEOUT,
) -> tuple[int, Mapping[str, str], bytes]:
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=timeout)
    try:
        connection.request(method, path, body, dict(headers or {}))
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read()
    except HTTPException as exc:
        raise NotReadyError(f"the reply is no HTTP: {exc!r}") from exc
    finally:
        connection.close()
