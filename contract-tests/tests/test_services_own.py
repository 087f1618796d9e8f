"""A broker that the project does not know: a stranger describes his server, and the services run it."""

import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest

from abe_contract_tests.services import Broker, NotReadyError, Service, ServiceUnavailable, choose

SERVER = """
import signal, socket, sys

def shut_down(*_):
    open("shut-down", "w").close()
    sys.exit()

signal.signal(signal.SIGINT, shut_down)
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    print("serving", flush=True)
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"echo 1.0\\n")
"""


class Echo(Broker):
    """As little as a broker needs that runs as a private process only."""

    name: ClassVar[str] = "Echo"
    address_variable: ClassVar[str] = "TEST_ECHO_URL"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT

    def url(self, port: int) -> str:
        return f"echo://127.0.0.1:{port}"

    def probe(self, url: str) -> str:
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=2) as connection:
            if not (greeting := connection.recv(100)):
                raise NotReadyError("no greeting yet")
            return greeting.decode().strip()

    def command(self, port: int, directory: Path) -> Sequence[str]:
        return [sys.executable, "-u", "-c", SERVER, str(port)]

    def started(self, log: str) -> bool:
        return "serving" in log


class Deaf(Echo):
    """The same, told to stop by what it does not understand as an order."""

    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM


@pytest.fixture(params=[Echo, Deaf])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with choose(request.param(), environ={}) as service:
        yield service


def test_a_broker_without_an_image_is_a_private_process_and_survives_a_kill(service: Service) -> None:
    assert (service.evidence, service.version) == ("private process", "echo 1.0")
    url = service.url
    service.kill()
    with pytest.raises(OSError, match="refused"):
        Echo().probe(url)
    service.start()
    assert (service.url, Echo().probe(url)) == (url, "echo 1.0")


def test_it_is_shut_down_by_the_signal_that_it_names(service: Service) -> None:
    directory: Path = service.directory  # type: ignore[attr-defined]
    service.terminate()
    named = service._broker.stop_signal  # type: ignore[attr-defined]
    assert (directory / "shut-down").exists() is (named is signal.SIGINT)


def test_its_address_wins_over_a_private_process() -> None:
    with choose(Echo(), environ={}) as own, choose(Echo(), environ={"TEST_ECHO_URL": own.url}) as found:
        assert (found.evidence, found.url, found.version) == ("address from the environment", own.url, "echo 1.0")


def test_no_container_can_be_forced_of_it() -> None:
    with pytest.raises(ServiceUnavailable, match="no container of Echo: it has no image"):
        choose(Echo(), environ={"ABE_TEST_SERVICES": "containers"})
