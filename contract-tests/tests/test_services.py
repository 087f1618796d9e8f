"""The brokers of a test run: where they come from, and what a test may do to them. What holds for one holds for all."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from abe_contract_tests import bounds, services
from abe_contract_tests.services import FaultUnsupportedError, Service, ServiceUnavailable
from abe_contract_tests.services import _process as process_module
from abe_contract_tests.services._address import AddressService
from abe_contract_tests.services._container import ContainerService, image_problem
from abe_contract_tests.services._process import ProcessService

sys.path.insert(0, str(Path(__file__).parent))
from brokers import BOUND, CONTAINERS, KINDS, PROCESSES, SERVERS, Kind

QUICK = ("redis", "process")
"""What the other kinds and places do too, in a second each time."""


def each(place: str, kinds: Iterable[str]) -> list[object]:
    """Return parameters whose tests run in one worker each, for they share a broker."""
    return [
        pytest.param(
            (name, place),
            id=f"{name}-{place}",
            marks=[
                pytest.mark.xdist_group(f"services-{name}-{place}"),
                *([] if (name, place) == QUICK else [pytest.mark.thorough]),
            ],
        )
        for name in kinds
    ]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(
    params=[pytest.param(name, marks=[] if (name, "process") == QUICK else [pytest.mark.thorough]) for name in SERVERS]
)
def server(request: pytest.FixtureRequest) -> Kind:
    return SERVERS[request.param]


@pytest.fixture(scope="module", params=[*each("process", SERVERS), *each("container", KINDS)])
def placed(request: pytest.FixtureRequest) -> Iterator[tuple[Kind, Service]]:
    """A running broker, which every test leaves running."""
    name, place = request.param
    kind = SERVERS[name]
    if place == "container" and (problem := image_problem(kind.image)):
        pytest.skip(problem)
    with kind.make(environ=kind.processes if place == "process" else CONTAINERS) as service:
        yield kind, service


@pytest.fixture(scope="module", params=each("process", SERVERS))
def started(request: pytest.FixtureRequest) -> Iterator[tuple[Kind, ProcessService]]:
    """A private process, which every test leaves running."""
    kind = SERVERS[request.param[0]]
    service = kind.make(environ=kind.processes)
    assert isinstance(service, ProcessService)
    with service:
        yield kind, service


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return request.node.originalname


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def family(pid: int) -> set[int]:
    """Return the process and all that descend from it, as they are now."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_end(processes: set[int]) -> None:
    deadline = bounds.Deadline(BOUND)
    while survivors := {pid for pid in processes if alive(pid)}:
        assert not deadline.passed, f"still there: {survivors}"
        time.sleep(0.02)


def listeners(processes: set[int]) -> set[str]:
    """Return the addresses, in hexadecimal, on which the processes listen."""
    sockets: set[str] = set()
    for pid in processes:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                sockets.add(target[len("socket:[") : -1])
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and row[9] in sockets}


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


def test_exports_are_what_the_package_says() -> None:
    public = {
        name for name, value in vars(services).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(services.__all__) == public


class TestFaults:
    def test_a_started_service_answers(self, placed: tuple[Kind, Service]) -> None:
        kind, service = placed
        assert kind.answers(service.url)
        assert service.version.startswith(kind.versions)

    def test_a_killed_service_refuses_connections_and_comes_back_with_its_data_where_it_is_durable(
        self, placed: tuple[Kind, Service], key: str
    ) -> None:
        kind, service = placed
        url = service.url
        kind.put(service, key)
        service.kill()
        with pytest.raises(OSError):
            kind.answers(url)
        service.start()
        assert service.url == url
        assert kind.has(url, key) is kind.durable

    def test_a_restarted_service_has_its_data_where_it_is_durable(self, placed: tuple[Kind, Service], key: str) -> None:
        kind, service = placed
        kind.put(service, key)
        service.restart()
        assert kind.has(service.url, key) is kind.durable

    def test_a_paused_service_is_silent_until_it_resumes(self, placed: tuple[Kind, Service]) -> None:
        kind, service = placed
        service.pause()
        try:
            with pytest.raises(TimeoutError):
                kind.answers(service.url)
        finally:
            service.resume()
        assert kind.answers(service.url)

    def test_a_paused_service_can_be_killed(self, placed: tuple[Kind, Service]) -> None:
        kind, service = placed
        service.pause()
        service.kill()
        service.start()
        assert kind.answers(service.url)

    def test_a_paused_service_can_be_terminated(self, placed: tuple[Kind, Service], key: str) -> None:
        kind, service = placed
        kind.put(service, key)
        service.pause()
        service.restart()
        assert kind.has(service.url, key) is kind.durable

    def test_kill_and_stop_may_be_repeated_and_a_new_start_finds_no_data(
        self, placed: tuple[Kind, Service], key: str
    ) -> None:
        kind, service = placed
        kind.put(service, key)
        service.kill()
        service.kill()
        service.stop()
        service.stop()
        service.start()
        assert not kind.has(service.url, key)


class TestProcess:
    def test_it_listens_on_the_loopback_address_only(self, started: tuple[Kind, ProcessService]) -> None:
        _, service = started
        found = listeners(family(service.pid))
        assert f"0100007F:{port_of(service.url):04X}" in found
        assert {address.partition(":")[0] for address in found} == {"0100007F"}

    def test_a_program_can_be_run_beside_it(self, started: tuple[Kind, ProcessService]) -> None:
        _, service = started
        companion = service.beside(["/bin/sh", "-c", "read line; echo $line in $PWD"])
        companion.write(b"here\n")
        assert companion.readline() == f"here in {service.directory}\n".encode()
        assert companion.readline() == b""
        companion.close()
        with pytest.raises(ServiceUnavailable, match="no-such-program"):
            service.beside(["no-such-program"])

    def test_a_port_taken_while_the_server_was_down_is_reported(self, started: tuple[Kind, ProcessService]) -> None:
        kind, service = started
        port = port_of(service.url)
        service.kill()
        with socket.socket() as rival:
            rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            rival.bind(("127.0.0.1", port))
            rival.listen()
            with pytest.raises(ServiceUnavailable, match=f"port {port} taken"):
                service.start()
        service.start()
        assert kind.answers(service.url)

    def test_starting_twice_is_an_error(self, started: tuple[Kind, ProcessService]) -> None:
        with pytest.raises(RuntimeError, match="running already"):
            started[1].start()

    def test_stop_leaves_no_process_no_file_and_no_descriptor(self, server: Kind) -> None:
        before = open_files()
        service = server.make(environ=server.processes)
        assert isinstance(service, ProcessService)
        service.start()
        processes, directory = family(service.pid), service.directory
        service.stop()
        assert not directory.exists()
        assert open_files() == before
        await_end(processes)

    def test_it_dies_with_the_process_that_started_it(self, server: Kind) -> None:
        script = (
            "import sys\n"
            "from abe_contract_tests import services\n"
            f"service = services.{server.make.__name__}(environ={server.processes!r})\n"
            "service.start()\n"
            "print(service.pid, service.directory, flush=True)\n"
            "sys.stdin.read()\n"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with parent:
            assert parent.stdout is not None
            pid, directory = parent.stdout.readline().split()
            processes = family(int(pid))
            assert all(alive(process) for process in processes)
            parent.send_signal(signal.SIGKILL)
            await_end(processes)
        deadline = bounds.Deadline(BOUND)
        while Path(directory).exists():
            assert not deadline.passed, f"still there: {directory}"
            time.sleep(0.02)

    def test_a_taken_port_is_left_for_another(self, server: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as rival:
            rival.bind(("127.0.0.1", 0))
            rival.listen()
            free = process_module.free_port()
            ports = iter([rival.getsockname()[1], free])
            monkeypatch.setattr(process_module, "free_port", lambda: next(ports))
            with server.make(environ=server.processes) as service:
                assert port_of(service.url) == free


class TestComplaints:
    def test_a_service_that_was_not_started_has_no_address(self, kind: Kind) -> None:
        with pytest.raises(RuntimeError, match="not started"):
            _ = kind.make(environ=PROCESSES).url


class TestChoice:
    def test_an_address_from_the_environment_wins(self, started: tuple[Kind, ProcessService]) -> None:
        kind, process = started
        with kind.make(environ={kind.variable: process.url}) as service:
            assert isinstance(service, AddressService)
            assert service.url == process.url
            assert service.version == process.version

    def test_a_broker_of_somebody_else_is_not_hurt(self, started: tuple[Kind, ProcessService]) -> None:
        kind, process = started
        with kind.make(environ={kind.variable: process.url}) as service:
            assert not service.faults
            for fault in (service.kill, service.terminate, service.restart, service.pause, service.resume):
                with pytest.raises(FaultUnsupportedError, match=kind.variable):
                    fault()
        assert kind.answers(process.url)

    @pytest.mark.parametrize(
        ("name", "scheme"),
        [("redis", "redis"), ("rabbitmq", "amqp"), ("rabbitmq", "amqps"), ("sqs", "http"), ("sqs", "https")],
    )
    def test_an_address_where_nobody_answers_is_reported_without_its_password(self, name: str, scheme: str) -> None:
        kind = KINDS[name]
        url = f"{scheme}://somebody:secret@127.0.0.1:{process_module.free_port()}/0"
        with pytest.raises(ServiceUnavailable, match=kind.variable) as caught:
            kind.make(environ={kind.variable: url}).start()
        assert "secret" not in str(caught.value)

    def test_forced_processes_are_processes(self, kind: Kind) -> None:
        address = {kind.variable: "any://127.0.0.1:1/0"}
        assert isinstance(kind.make(environ=PROCESSES | address), ProcessService)

    def test_forced_containers_are_containers_or_an_error(self, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
        choice = "abe_contract_tests.services._choice.image_problem"
        monkeypatch.setattr(choice, lambda _: None)
        assert isinstance(kind.make(environ=CONTAINERS), ContainerService)
        monkeypatch.setattr(choice, lambda _: "no engine answers")
        with pytest.raises(ServiceUnavailable, match="no engine answers"):
            kind.make(environ=CONTAINERS)

    def test_without_a_wish_it_is_a_container_where_there_is_one(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        choice = "abe_contract_tests.services._choice.image_problem"
        monkeypatch.setattr(choice, lambda _: None)
        assert isinstance(kind.make(environ={}), ContainerService)
        monkeypatch.setattr(choice, lambda _: "no engine answers")
        assert isinstance(kind.make(environ={}), ProcessService)

    def test_the_image_is_the_one_that_the_environment_names(self, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("abe_contract_tests.services._choice.image_problem", lambda image: f"wanted {image}")
        with pytest.raises(ServiceUnavailable, match=f"wanted {kind.image}"):
            kind.make(environ=CONTAINERS)
        with pytest.raises(ServiceUnavailable, match="wanted mirror/broker:1"):
            kind.make(environ=CONTAINERS | {kind.variable.replace("_URL", "_IMAGE"): "mirror/broker:1"})

    def test_a_machine_without_an_engine_has_no_containers(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        image_problem.cache_clear()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
        with pytest.raises(ServiceUnavailable, match="no Docker engine answers"):
            kind.make(environ=CONTAINERS)
        image_problem.cache_clear()

    def test_an_unknown_wish_is_refused(self, kind: Kind) -> None:
        with pytest.raises(ServiceUnavailable, match="containers or processes"):
            kind.make(environ={"ABE_TEST_SERVICES": "pigeons"})
