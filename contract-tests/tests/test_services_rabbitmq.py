"""What holds of the RabbitMQ for tests alone: the shell beside it, its configuration, TLS."""

import asyncio
import os
import shlex
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiormq
import pytest
import trustme
from aiormq.abc import AbstractChannel, AbstractConnection

from abe_contract_tests import bounds
from abe_contract_tests.services import (
    RabbitMQ,
    RabbitMQShell,
    Service,
    ServiceUnavailable,
    TlsFiles,
    rabbitmq_service,
)
from abe_contract_tests.services._container import image_problem
from abe_contract_tests.services._process import ProcessService

sys.path.insert(0, str(Path(__file__).parent))
from brokers import BOUND, CONTAINERS, PROCESSES

QUORUM = {"x-queue-type": "quorum"}

pytestmark = pytest.mark.thorough


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(place, marks=pytest.mark.xdist_group(f"rabbitmq-{place}")) for place in ("process", "container")
    ],
)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """A running node, which every test leaves running."""
    if request.param == "container" and (problem := image_problem("rabbitmq:3")):
        pytest.skip(problem)
    with rabbitmq_service(environ=PROCESSES if request.param == "process" else CONTAINERS) as service:
        yield service


@pytest.fixture
def shell(service: Service) -> Iterator[RabbitMQShell]:
    shell = RabbitMQShell(service)
    yield shell
    shell.stop()


@pytest.fixture
async def connection(service: Service) -> AsyncIterator[AbstractConnection]:
    connection = await aiormq.connect(service.url)
    yield connection
    await connection.close()


@pytest.fixture
async def channel(connection: AbstractConnection) -> AbstractChannel:
    return await connection.channel()


class TestShell:
    async def test_it_evaluates_in_the_node(self, shell: RabbitMQShell) -> None:
        assert await shell.evaluate("node().") == "abe@localhost"
        assert await shell.evaluate('X = <<"caf\u00e9 €"/utf8>>, X.') == "café €"

    @pytest.mark.parametrize(("wrong", "why"), [("1 = 2.", "badmatch,2"), ("oh(no", "syntax error")])
    async def test_it_goes_on_after_a_failure(self, shell: RabbitMQShell, wrong: str, why: str) -> None:
        with pytest.raises(RuntimeError, match=why):
            await shell.evaluate(wrong)
        assert await shell.evaluate("1 + 1.") == "2"

    @pytest.mark.parametrize("arguments", [QUORUM, {}], ids=["quorum", "classic"])
    async def test_it_counts_exactly(
        self, shell: RabbitMQShell, channel: AbstractChannel, arguments: dict[str, str]
    ) -> None:
        await channel.queue_declare("count:a queue", durable=True, arguments=arguments)  # type: ignore[arg-type]
        held = asyncio.Event()

        async def hold(_: object) -> None:
            held.set()

        for _ in range(5):
            await channel.basic_publish(b"", routing_key="count:a queue")
        assert await shell.counts("count:") == [("count:a queue", 5, 0, 0)]
        await channel.basic_qos(prefetch_count=2)
        await channel.basic_consume("count:a queue", hold)
        async with bounds.within(BOUND):
            await held.wait()
            while (counts := await shell.counts("count:")) != [("count:a queue", 3, 2, 1)]:
                assert counts[0].ready + counts[0].unacknowledged == 5
        assert await shell.counts("another:") == []
        await shell.delete("count:")
        assert await shell.counts("count:") == []

    async def test_it_deletes_what_begins_so_and_nothing_else(
        self, shell: RabbitMQShell, channel: AbstractChannel
    ) -> None:
        for name in ("gone:queue", "kept:queue"):
            await channel.queue_declare(name, durable=True, arguments=QUORUM)  # type: ignore[arg-type]
            await channel.exchange_declare(name)
        await shell.delete("gone:")
        assert [queue.name for queue in await shell.counts("")] == ["kept:queue"]
        exchanges = await shell.evaluate("[N || {resource, _, _, N} <- rabbit_exchange:list_names()].")
        assert "kept:queue" in exchanges
        assert "gone:queue" not in exchanges
        await shell.delete("kept:")

    async def test_it_counts_connections_and_closes_them(self, service: Service, shell: RabbitMQShell) -> None:
        opened = [
            await aiormq.connect(service.url, client_properties={"connection_name": name})
            for name in ("one", "two", "three")
        ]
        assert await shell.connections() == 3
        async with bounds.within(BOUND):
            assert await shell.close_connections("two") == 1
            with pytest.raises(aiormq.exceptions.ConnectionClosed, match="closed by a test"):
                await opened[1].closing
            assert [connection.is_closed for connection in opened] == [False, True, False]
            assert await shell.close_connections("nobody") == 0
            assert await shell.close_connections() == 2
            for connection in (opened[0], opened[2]):
                with pytest.raises(aiormq.exceptions.ConnectionClosed, match="closed by a test"):
                    await connection.closing
            while await shell.connections():
                pass

    async def test_a_user_has_the_rights_that_it_was_given(self, service: Service, shell: RabbitMQShell) -> None:
        await shell.add_user("bob", 'a "word" €', configure="^mine$", write="")
        url = service.url.replace("guest:guest", "bob:a%20%22word%22%20%E2%82%AC")
        connection = await aiormq.connect(url)
        channel = await connection.channel()
        await channel.exchange_declare("mine")
        with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
            await channel.exchange_declare("yours")
        channel = await connection.channel()
        with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
            await channel.basic_publish(b"", exchange="mine")
        await shell.add_user("bob", "as before", write="^mine$")
        channel = await connection.channel()
        async with bounds.within(BOUND):
            # A channel knows the rights that it asked for before; this one has not asked yet.
            await channel.basic_publish(b"", exchange="mine")
        await connection.close()
        await shell.delete_user("bob")
        with pytest.raises(aiormq.exceptions.AMQPConnectionError):
            await aiormq.connect(url)
        await shell.delete("mine")

    async def test_a_memory_alarm_blocks_who_publishes(self, shell: RabbitMQShell, channel: AbstractChannel) -> None:
        await channel.queue_declare("alarm", exclusive=True)
        await shell.raise_memory_alarm()
        publishing = asyncio.create_task(channel.basic_publish(b"body", routing_key="alarm"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(publishing), 0.5)
        await shell.clear_memory_alarm()
        async with bounds.within(BOUND):
            await publishing

    async def test_it_survives_the_node(self, service: Service, shell: RabbitMQShell) -> None:
        assert await shell.evaluate("1.") == "1"
        service.kill()
        try:
            with pytest.raises(RuntimeError):
                await shell.evaluate("1.")
        finally:
            service.start()
        assert await shell.evaluate("1.") == "1"


@pytest.fixture(scope="module")
def node() -> Iterator[ProcessService]:
    service = rabbitmq_service(environ=PROCESSES)
    assert isinstance(service, ProcessService)
    with service:
        yield service


@pytest.mark.xdist_group("rabbitmq-process")
class TestShellAtAnAddress:
    async def test_without_a_way_to_the_node_it_says_what_is_needed(self, node: ProcessService) -> None:
        with (
            rabbitmq_service(environ={"ABE_TEST_RABBITMQ_URL": node.url}) as service,
            pytest.raises(ServiceUnavailable, match=r"(?s)ABE_TEST_RABBITMQ_SHELL.*docker exec.*ABE_TEST_RABBITMQ_URL"),
        ):
            await RabbitMQShell(service).counts("")

    async def test_a_command_leads_to_the_node(self, node: ProcessService) -> None:
        port = int(node.url.rpartition(":")[2].rstrip("/"))
        there = RabbitMQ().environment(port, node.directory) | {"ERL_AFLAGS": self._flags(node)}
        words = ["env", *(f"{name}={value}" for name, value in there.items())]
        environ = {"ABE_TEST_RABBITMQ_URL": node.url, "ABE_TEST_RABBITMQ_SHELL": shlex.join(words)}
        with rabbitmq_service(environ=environ) as service:
            shell = RabbitMQShell(service)
            assert await shell.evaluate("node().") == "abe@localhost"
            shell.stop()

    @staticmethod
    def _flags(node: ProcessService) -> str:
        variables = Path(f"/proc/{node.pid}/environ").read_text().split("\0")
        return next(line.partition("=")[2] for line in variables if line.startswith("ERL_AFLAGS="))


class TestServer:
    def test_lines_of_the_configuration_reach_it(self) -> None:
        with rabbitmq_service(configuration=("channel_max = 17",), environ=CONTAINERS) as service:
            assert isinstance(service, ProcessService)
            shell = RabbitMQShell(service)
            assert asyncio.run(shell.evaluate("application:get_env(rabbit, channel_max).")) == "{ok,17}"
            shell.stop()

    def test_a_wrong_line_is_reported(self) -> None:
        with pytest.raises(
            ServiceUnavailable, match=r"(?s)ended at once with status 1.*failed_to_prepare_configuration"
        ):
            rabbitmq_service(configuration=("no_such_setting = 1",)).start()

    def test_a_missing_server_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("abe_contract_tests.services.rabbitmq._SERVER", tmp_path / "rabbitmq-server")
        with pytest.raises(ServiceUnavailable, match="the package rabbitmq-server"):
            rabbitmq_service(environ=PROCESSES).start()

    def test_the_environment_of_this_process_is_as_it_was(self) -> None:
        assert "RABBITMQ_NODENAME" not in os.environ


class TestTls:
    @pytest.fixture
    def files(self, tmp_path: Path) -> TlsFiles:
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        files = TlsFiles(certificate=tmp_path / "cert", key=tmp_path / "key", authority=tmp_path / "ca")
        authority.cert_pem.write_to_path(files.authority)
        certificate.private_key_pem.write_to_path(files.key)
        certificate.cert_chain_pems[0].write_to_path(files.certificate)
        return files

    async def test_it_can_speak_tls(self, files: TlsFiles) -> None:
        with rabbitmq_service(tls=files, environ=PROCESSES) as service:
            assert service.url.startswith("amqps://")
            assert service.version.startswith("RabbitMQ 3.")
            context = ssl.create_default_context(cafile=files.authority)
            async with bounds.within(BOUND):
                connection = await aiormq.connect(service.url, context=context)
                await connection.close()
                with pytest.raises(aiormq.exceptions.AMQPConnectionError, match="certificate verify failed"):
                    await aiormq.connect(service.url, context=ssl.create_default_context())

    async def test_it_can_demand_a_certificate(self, files: TlsFiles) -> None:
        demand = ("ssl_options.fail_if_no_peer_cert = true",)
        with rabbitmq_service(tls=files, configuration=demand, environ=PROCESSES) as service:
            context = ssl.create_default_context(cafile=files.authority)
            with pytest.raises(aiormq.exceptions.AMQPConnectionError):
                await aiormq.connect(service.url, context=context)
