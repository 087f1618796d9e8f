"""What holds of the SQS for tests alone."""

import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from abe_contract_tests.services import NotReadyError, ServiceUnavailable, sqs_service
from abe_contract_tests.services._container import ContainerService
from abe_contract_tests.services._process import ProcessService
from abe_contract_tests.services.sqs import ask

sys.path.insert(0, str(Path(__file__).parent))
from brokers import CONTAINERS, PROCESSES

pytestmark = pytest.mark.thorough

HANGS = 120
"""Seconds without an answer after which a server hangs: a busy machine takes some."""


class TestServer:
    @pytest.mark.parametrize("server", ["moto", "ministack"])
    def test_each_server_starts_by_its_name_and_tells_its_version(self, server: str) -> None:
        with sqs_service(environ=PROCESSES | {"ABE_TEST_SQS_SERVER": server}) as service:
            assert service.version.startswith(f"{server} ")
            assert service.version[-1].isdigit()

    @pytest.mark.parametrize("server", ["moto", "ministack"])
    def test_it_leaves_no_file_outside_of_its_directory(
        self, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        with sqs_service(environ=PROCESSES | {"ABE_TEST_SQS_SERVER": server}) as service:
            assert isinstance(service, ProcessService)
            assert list(tmp_path.iterdir()) == [service.directory]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("server", ["moto", "ministack"])
    def test_it_loses_and_doubles_nothing_of_what_is_asked_at_the_same_time(self, server: str) -> None:
        with sqs_service(environ=PROCESSES | {"ABE_TEST_SQS_SERVER": server}) as service:
            request = partial(ask, service.url, timeout=HANGS)
            queue = {"QueueUrl": request("CreateQueue", {"QueueName": "q"})[0]["QueueUrl"]}
            waiting, count, hands = range(300), 600, 12
            for n in waiting[::10]:
                entries = [{"Id": str(each), "MessageBody": str(each)} for each in waiting[n : n + 10]]
                request("SendMessageBatch", queue | {"Entries": entries})

            def send(part: int) -> None:
                for n in range(len(waiting) + part, count, hands):
                    request("SendMessage", queue | {"MessageBody": str(n)})

            def take(_: int) -> list[str]:
                taken: list[str] = []
                while found := request("ReceiveMessage", queue | {"WaitTimeSeconds": 1})[0].get("Messages"):
                    for message in cast("list[dict[str, str]]", found):
                        taken.append(message["Body"])
                        request("DeleteMessage", queue | {"ReceiptHandle": message["ReceiptHandle"]})
                return taken

            with ThreadPoolExecutor(2 * hands) as pool:
                sending = [pool.submit(send, part) for part in range(hands)]
                taken = Counter(body for each in pool.map(take, range(hands)) for body in each)
                for each in sending:
                    each.result()
        assert taken == Counter(map(str, range(count)))

    def test_a_server_that_the_caller_names_is_that_one(self) -> None:
        environ = PROCESSES | {"ABE_TEST_SQS_SERVER": "moto"}
        with sqs_service("ministack", environ=environ) as service:
            assert service.version.startswith("ministack ")


class TestChoice:
    @pytest.fixture(autouse=True)
    def engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine on which every container can be had."""
        monkeypatch.setattr("abe_contract_tests.services._choice.image_problem", lambda _: None)

    @pytest.mark.parametrize("server", ["moto", "ministack"])
    def test_a_server_that_the_environment_names_is_a_process(self, server: str) -> None:
        assert isinstance(sqs_service(environ={"ABE_TEST_SQS_SERVER": server}), ProcessService)

    @pytest.mark.parametrize("environ", [{}, CONTAINERS, {"ABE_TEST_SQS_URL": "http://127.0.0.1:1"}])
    def test_ministack_is_a_process_whatever_there_is(self, environ: dict[str, str]) -> None:
        assert isinstance(sqs_service("ministack", environ=environ), ProcessService)

    def test_forced_containers_hold_a_moto(self) -> None:
        service = sqs_service(environ=CONTAINERS | {"ABE_TEST_SQS_SERVER": "moto"})
        assert isinstance(service, ContainerService)


class TestComplaints:
    def test_an_unknown_server_is_refused_with_the_names(self) -> None:
        with pytest.raises(ServiceUnavailable, match="moto or ministack, not 'localstack'"):
            sqs_service(environ={"ABE_TEST_SQS_SERVER": "localstack"})

    @pytest.mark.parametrize(("server", "package"), [("moto", r"moto\[server\]"), ("ministack", "ministack")])
    def test_a_missing_server_says_what_to_install(
        self, server: str, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("abe_contract_tests.services.sqs.find_spec", lambda _: None)
        with pytest.raises(ServiceUnavailable, match=f"no {server} is installed; install the Python package {package}"):
            sqs_service(environ=PROCESSES | {"ABE_TEST_SQS_SERVER": server}).start()


def test_a_refused_request_is_reported_with_its_status() -> None:
    with (
        sqs_service("ministack", environ=PROCESSES) as service,
        pytest.raises(NotReadyError, match="DeleteQueue has status 400"),
    ):
        ask(service.url, "DeleteQueue", {"QueueUrl": f"{service.url}/000000000000/none"})
