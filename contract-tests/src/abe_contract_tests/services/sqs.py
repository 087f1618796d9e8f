"""SQS for tests: two servers that speak its protocol, and disagree in places."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Final, Literal
from urllib.parse import urlsplit

from abe_contract_tests.services._base import Broker, NotReadyError, Service, ServiceUnavailable
from abe_contract_tests.services._choice import choose

IMAGE_VARIABLE: Final = "ABE_TEST_SQS_IMAGE"
_IMAGE: Final = "motoserver/moto:5.2.5"
_PROBE_TIMEOUT: Final = 5.0
_MOTO: Final = """
import sys
from moto.server import main
from werkzeug.serving import WSGIRequestHandler
# moto and the server under it both send the header Server, which aiohttp refuses in Python's development mode.
WSGIRequestHandler.send_response = lambda self, code, message=None: self.send_response_only(code, message)
main(sys.argv[1:])
"""


class Moto(Broker):
    """moto in its server mode."""

    name: ClassVar[str] = "moto"
    address_variable: ClassVar[str] = "ABE_TEST_SQS_URL"
    container_port: ClassVar[int] = 5000

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
        """Ask for the queues."""
        ask(url, "ListQueues", {})
        return _version("moto")

    def command(self, port: int, directory: Path) -> Sequence[str]:
        """Return the server's command line."""
        return [_interpreter("moto.server", "moto[server]"), "-c", _MOTO, "-H", "127.0.0.1", "-p", str(port)]

    def container_command(self) -> Sequence[str]:
        """Return the arguments of the image's own command."""
        return ["-H", "0.0.0.0", "-p", str(self.container_port)]


class MiniStack(Broker):
    """ministack, of which SQS and SNS are served."""

    name: ClassVar[str] = "ministack"
    address_variable: ClassVar[str] = "ABE_TEST_MINISTACK_URL"
    container_port: ClassVar[int] = 4566

    @property
    def image(self) -> str:
        """The container image."""
        return "ministackorg/ministack:latest"

    def url(self, port: int) -> str:
        """Return the address."""
        return f"http://127.0.0.1:{port}"

    def probe(self, url: str) -> str:
        """Ask for the queues."""
        ask(url, "ListQueues", {})
        return _version("ministack")

    def command(self, port: int, directory: Path) -> Sequence[str]:
        """Return the server's command line."""
        return [_interpreter("ministack", "ministack"), "-m", "ministack"]

    def environment(self, port: int, directory: Path) -> Mapping[str, str]:
        """Return where it listens, as its command line takes nothing."""
        return {
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "SERVICES": "sqs,sns",
            "DOCKER_HOST": "unix:///nonexistent",
            "LOG_LEVEL": "WARNING",
        }

    def container_command(self) -> Sequence[str]:
        """Return nothing: the image's own command is right."""
        return []


def sqs_service(kind: Literal["moto", "ministack"], *, environ: Mapping[str, str] | None = None) -> Service:
    """Return an SQS, not started yet: at an address, in a container (moto), or as a private process.

    ``ABE_TEST_SQS_URL`` is the address of a moto, ``ABE_TEST_MINISTACK_URL`` that of a ministack, ``ABE_TEST_SQS_IMAGE``
    names moto's image.

    Args:
        kind: Which server.
        environ: Read instead of the process environment.

    Raises:
        ServiceUnavailable: None can be had; the text says what to install.
    """
    values = os.environ if environ is None else environ
    if kind == "moto":
        return choose(Moto(image=values.get(IMAGE_VARIABLE) or _IMAGE), environ=values)
    broker = MiniStack()
    return choose(broker, process_only=not values.get(broker.address_variable), environ=values)


def ask(url: str, operation: str, arguments: Mapping[str, object]) -> object:
    """Make a request of the protocol's JSON form, unsigned and without a client library, and return the reply.

    Raises:
        NotReadyError: The reply is none.
        OSError: Nobody answers.
    """
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "127.0.0.1", parts.port or 80, timeout=_PROBE_TIMEOUT)
    headers = {
        "Content-Type": "application/x-amz-json-1.0",
        "X-Amz-Target": f"AmazonSQS.{operation}",
        # moto finds the service by what a signature would name.
        "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/sqs/aws4_request, SignedHeaders=host, Signature=0",
    }
    try:
        connection.request("POST", "/", json.dumps(arguments), headers)
        reply = connection.getresponse()
        text = reply.read()
    except HTTPException as exc:
        raise NotReadyError(f"the reply is no HTTP: {exc!r}") from exc
    finally:
        connection.close()
    if reply.status != 200:
        raise NotReadyError(f"the reply has status {reply.status}")
    return json.loads(text)


def _interpreter(module: str, package: str) -> str:
    if find_spec(module.partition(".")[0]) is None:
        raise ServiceUnavailable(f"no {module.partition('.')[0]} is installed; install the Python package {package}")
    return sys.executable


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
