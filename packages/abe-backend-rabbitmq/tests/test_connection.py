"""Getting in: addresses, certificates, users and rights, and what is already there."""

import asyncio
import datetime
import gc
import inspect
import io
import logging
import re
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from abe import AsyncLoopConsumer, Reject, Retry
from abe.backends.message_queue.base import Disposition, Settlement
from abe.errors import (
    AbeError,
    BackendConnectionError,
    ConfigurationError,
    PermissionDeniedError,
    PublishRejectedError,
    PublishUnknownError,
)
from abe_backend_rabbitmq import RabbitMQBackend, RabbitMQSettings
from abe_backend_rabbitmq._connection import Link, run_to_completion
from abe_backend_rabbitmq._control import Control
from abe_contract_tests import bounds
from abe_contract_tests.services import RabbitMQShell, Service, TlsFiles, rabbitmq_service

pytestmark = pytest.mark.xdist_group("rabbitmq-node")

SECRET = "swordfish-8061"
PROCESSES = {"ABE_TEST_SERVICES": "processes"}
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """Fail on tasks that are left behind, and on what only the event loop would complain of."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
    yield
    gc.collect()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=2 * bounds.slowness())
    assert [task for task in left if not task.done()] == []
    assert complaints == []


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that is logged, with its tracebacks, as a file would have it."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="module")
def shell(node: Service) -> Iterator[RabbitMQShell]:
    shell = RabbitMQShell(node)
    yield shell
    shell.stop()


@pytest.fixture
async def user(shell: RabbitMQShell, lab: Any) -> Callable[..., Awaitable[str]]:
    """Give the test's user rights, and return its address. ``NS`` stands for what the namespace's names begin with."""
    name = f"app-{lab.namespace}"

    async def grant(configure: str = ".*", write: str = ".*", read: str = ".*") -> str:
        rights = [right.replace("NS", f"abe:{lab.namespace}") for right in (configure, write, read)]
        await shell.add_user(name, SECRET, configure=rights[0], write=rights[1], read=rights[2])
        return f"amqp://{name}:{SECRET}@{lab.url.rpartition('@')[2]}"

    # After what was opened since is closed: the node ends the connections of a user that it deletes.
    lab.at_the_end(shell.delete_user, name)
    return grant


@asynccontextmanager
async def mute() -> AsyncIterator[int]:
    """Listen, accept, and say nothing."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        for writer in writers:
            writer.transport.abort()
        server.close()
        await server.wait_closed()


async def round_trip(backend: RabbitMQBackend) -> None:
    """Do everything that an application does."""
    await backend.publish("early", {"n": 0})
    await backend.publish("early", {"n": 1}, delay=0.05)
    await backend.declare("g")
    await backend.publish("k", {"n": 2}, delay=0.05)
    async with backend.consume(group="g") as subscription, bounds.within(10):
        first = await subscription.receive()
        await first.nack(0.05)
        found = sorted([await subscription.receive() for _ in range(3)], key=lambda message: message["n"])
        assert [message["n"] for message in found] == [0, 1, 2]
        await found[0].reject("test")
        await found[1].ack()
        await found[2].ack()
        assert await backend.dead_letters("g").replay_all() == 1
        await (await subscription.receive()).reject("again")
    assert len(await backend.dead_letters("g").list()) == 1
    assert await backend.dead_letters("g").purge_all() == 1
    stats = await backend.stats("g")
    assert (stats.waiting, stats.in_flight, stats.delayed, stats.dead) == (0, 0, 0, 0)
    assert await backend.groups() == {"g": ("#",)}
    await backend.ping()
    await backend.delete_group("g")


async def consume(backend: RabbitMQBackend) -> None:
    subscription = backend.consume()
    try:
        await subscription.__aenter__()
    finally:
        with suppress(AbeError):
            await subscription.aclose()


def told(error: BaseException) -> str:
    """Return all that a log shows of an error."""
    return "".join(traceback.format_exception(error)) + repr(error)


async def refusal(kind: type[AbeError], **settings: Any) -> AbeError:
    """Connect, publish and consume, and return why not. It takes no longer than it may."""
    errors: list[AbeError] = []
    backend = RabbitMQBackend(RabbitMQSettings(**settings))
    try:
        for call in (backend.connect(), backend.publish("k", {}), consume(backend)):
            async with bounds.within(4):
                with pytest.raises(AbeError) as caught:
                    await call
            errors.append(caught.value)
    finally:
        await backend.disconnect()
    assert [type(error) for error in errors] == [kind] * 3
    assert not any(SECRET in told(error) for error in errors)
    return errors[0]


class TestConnections:
    async def test_there_is_one_to_publish_one_to_consume_and_one_for_the_rest_and_each_says_so(
        self, lab: Any, shell: RabbitMQShell
    ) -> None:
        name = f"named-{lab.namespace}"
        await shell.add_user(name, SECRET)
        backend = await lab.backend(url=f"amqp://{name}:{SECRET}@{lab.url.rpartition('@')[2]}")
        async with backend.consume(group="g"):
            found = await shell.evaluate(
                "iolist_to_binary([[Name, 10] || C <- rabbit_networking:connections(), "
                f'[{{_, <<"{name}">>}}, {{_, Properties}}] <- [rabbit_networking:connection_info(C, [user, client_properties])], '
                '{<<"connection_name">>, _, Name} <- Properties]).'
            )
        assert sorted(found.split()) == ["abe-consume", "abe-control", "abe-publish"]
        await backend.disconnect()
        await shell.delete_user(name)

    async def test_the_heartbeat_is_agreed_on(self, lab: Any, shell: RabbitMQShell) -> None:
        await lab.backend(heartbeat=17)
        found = await shell.evaluate(
            "[T || C <- rabbit_networking:connections(), [{_, T}] <- [rabbit_networking:connection_info(C, [timeout])]]."
        )
        assert "17" in re.findall(r"\d+", found)

    async def test_nothing_is_left_of_a_backend(self, lab: Any, shell: RabbitMQShell, until: Any) -> None:
        before = await shell.connections()
        for _ in range(5):
            backend = RabbitMQBackend(lab.settings())
            async with backend, backend.consume(group="g") as subscription:
                await backend.publish("k", {"n": 1})
                await anext(subscription)
        async with bounds.within(10):
            while await shell.connections() > before:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def test_who_waits_for_a_connection_may_leave(self, lab: Any) -> None:
        backend = RabbitMQBackend(lab.settings(url="amqp://127.0.0.1:1"))
        for turns in range(6):
            pinging = asyncio.create_task(backend.ping())
            for _ in range(turns):
                await asyncio.sleep(0)
            pinging.cancel()
            with pytest.raises((asyncio.CancelledError, BackendConnectionError)):
                await pinging
        await backend.disconnect()

    async def test_who_waits_for_an_answer_may_leave_and_the_connection_lives(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        for turns in range(12):
            asking = asyncio.create_task(backend.stats("g"))
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        await backend.stats("g")

    async def test_closing_while_it_connects_ends_all_who_wait(self, lab: Any) -> None:
        async with mute() as port:
            backend = RabbitMQBackend(lab.settings(url=f"amqp://127.0.0.1:{port}", close_timeout=0.2))
            waiting = [asyncio.create_task(call) for call in (backend.ping(), backend.publish("k", {}))]
            await asyncio.sleep(0)
            async with bounds.within(3):
                await backend.disconnect()
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(outcome, AbeError) for outcome in outcomes)


class TestRequests:
    """`Control` and `Link`, at the awaits where a connection may end."""

    async def test_a_request_that_finds_its_connection_lost_waits_for_the_next_and_is_made(self, lab: Any) -> None:
        control = Control(Link(lab.settings(), "test"))
        async with bounds.within(5):
            before = await control.connection()
            await before.close()
            requests = (
                control.call(lambda channel: channel.exchange_declare("amq.topic", passive=True)) for _ in range(5)
            )
            await asyncio.gather(*requests)
            assert await control.connection() is not before
            await control.close()

    @pytest.mark.parametrize("turns", range(8))
    async def test_who_asks_while_it_is_closed_is_told_and_not_cancelled(self, lab: Any, turns: int) -> None:
        """aiormq cancels what waits for the broker when its connection is closed; the caller is somebody else's task."""
        link = Link(lab.settings(), "test")
        control = Control(link)
        await control.connection()
        asking = asyncio.create_task(control.call(lambda channel: channel.exchange_declare("amq.topic", passive=True)))
        for _ in range(turns):
            await asyncio.sleep(0)
        async with bounds.within(5):
            await link.close()
            outcome = (await asyncio.gather(asking, return_exceptions=True))[0]
        assert not isinstance(outcome, BaseException) or isinstance(outcome, BackendConnectionError), repr(outcome)
        with pytest.raises(BackendConnectionError, match="closed"):
            await link.get()

    async def test_a_request_outlives_its_caller(self) -> None:
        done = asyncio.Event()
        going = asyncio.Event()

        async def work() -> None:
            await going.wait()
            done.set()

        caller = asyncio.create_task(run_to_completion(work()))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        going.set()
        async with bounds.within(1):
            await done.wait()

    async def test_what_fails_after_its_caller_left_complains_nowhere(self) -> None:
        failing = asyncio.Event()

        async def work() -> None:
            await failing.wait()
            raise BackendConnectionError("lost")

        caller = asyncio.create_task(run_to_completion(work()))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        failing.set()

    def test_a_request_that_ends_with_the_event_loop_before_it_began_counts_as_awaited(self) -> None:
        async def work() -> None:
            raise AssertionError("it was begun")

        request = work()

        async def main() -> None:
            self.caller = asyncio.create_task(
                run_to_completion(request)
            )  # it makes the request's task in the last turn

        asyncio.run(main())
        assert inspect.getcoroutinestate(request) == inspect.CORO_CLOSED


class TestAddresses:
    async def test_nobody_listens(self) -> None:
        backend = RabbitMQBackend(RabbitMQSettings(url="amqp://127.0.0.1:1", publish_timeout=0.3))
        with pytest.raises(BackendConnectionError, match=r"127\.0\.0\.1:1"):
            await backend.ping()
        with pytest.raises(PublishRejectedError):
            await backend.publish("k", {})
        await backend.disconnect()

    @pytest.mark.parametrize("scheme", ["amqp", "amqps"])
    async def test_who_accepts_and_says_nothing_is_given_up(self, scheme: str) -> None:
        async with mute() as port:
            settings = RabbitMQSettings(
                url=f"{scheme}://app:{SECRET}@127.0.0.1:{port}", connect_timeout=0.2, publish_timeout=2.0
            )
            backend = RabbitMQBackend(settings)
            async with bounds.within(1.5):
                with pytest.raises(BackendConnectionError, match=r"timed out after 0\.2 s") as caught:
                    await backend.connect()
            assert SECRET not in told(caught.value)
            await backend.disconnect()

    async def test_who_hangs_up_is_tried_again(self) -> None:
        visits = 0

        def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal visits
            visits += 1
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        url = f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        backend = RabbitMQBackend(bounds.stretched(RabbitMQSettings(url=url, publish_timeout=1.0)))
        with pytest.raises(PublishRejectedError):
            await backend.publish("k", {})
        assert visits > 2
        await backend.disconnect()
        server.close()
        await server.wait_closed()

    async def test_who_speaks_another_language_is_told(self) -> None:
        def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        backend = RabbitMQBackend(bounds.stretched(RabbitMQSettings(url=url, connect_timeout=0.5)))
        with pytest.raises(BackendConnectionError, match="is it RabbitMQ that listens there"):
            await backend.connect()
        await backend.disconnect()
        server.close()
        await server.wait_closed()

    async def test_several_addresses_are_tried_in_turn(self, lab: Any, log: io.StringIO) -> None:
        async with mute() as port:
            urls = f"amqp://127.0.0.1:1, amqp://127.0.0.1:{port}, {lab.url}"
            backend = RabbitMQBackend(lab.settings(url=urls, connect_timeout=0.3))
            async with bounds.within(5):
                await round_trip(backend)
                await backend.disconnect()
        assert "another address is tried: rabbitmq at 127.0.0.1:1" in log.getvalue()

    @pytest.mark.parametrize("host", ["a\\b", "xn--a", "a" * 70, "a..b"])
    async def test_a_host_that_cannot_be_one_is_a_matter_of_configuration(self, host: str) -> None:
        error = await refusal(ConfigurationError, url=f"amqp://app:{SECRET}@{host}")
        assert "RABBITMQ_URL" in str(error)

    @pytest.mark.parametrize("vhost", ["a/b", "a%b", "a%2Fb", "é ü"])
    async def test_a_vhost_may_have_any_name(self, node: Service, shell: RabbitMQShell, vhost: str) -> None:
        name = f"<<{','.join(map(str, vhost.encode()))}>>"
        await shell.evaluate(
            f'rabbit_vhost:add({name}, <<"abe">>), '
            f'rabbit_auth_backend_internal:set_permissions(<<"guest">>, {name}, <<".*">>, <<".*">>, <<".*">>, <<"abe">>).'
        )
        port = int(node.url.rpartition(":")[2].strip("/"))
        async with RabbitMQBackend(RabbitMQSettings(host="127.0.0.1", port=port, vhost=vhost)) as backend:
            await backend.ping()
            found = await shell.evaluate(
                f'length([Q || Q <- rabbit_amqqueue:list_names({name}), element(4, Q) =:= <<"abe:application_events:parked">>]).'
            )
        assert found == "1"
        await shell.evaluate(f'rabbit_vhost:delete({name}, <<"abe">>).')


def tls_files(directory: Path, authority: trustme.CA) -> TlsFiles:
    files = TlsFiles(certificate=directory / "cert", key=directory / "key", authority=directory / "ca")
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(files.authority)
    certificate.private_key_pem.write_to_path(files.key)
    certificate.cert_chain_pems[0].write_to_path(files.certificate)
    return files


def client_files(directory: Path, authority: trustme.CA) -> dict[str, str]:
    """Make a client's certificate and return the settings. (Erlang takes none of trustme's own: their uses are marked critical.)"""
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    signer = serialization.load_pem_private_key(authority.private_key_pem.bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "app")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (directory / "app.pem").write_bytes(certificate.public_bytes(pem))
    (directory / "app.key").write_bytes(key.private_bytes(pem, *plain))
    return {"certificate_file": str(directory / "app.pem"), "key_file": str(directory / "app.key")}


def merged(settings: dict[str, str]) -> str:
    """Put certificate and key into one file."""
    both = Path(settings["certificate_file"]).with_name("both.pem")
    both.write_bytes(Path(settings["certificate_file"]).read_bytes() + Path(settings["key_file"]).read_bytes())
    return str(both)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, authority: trustme.CA) -> TlsFiles:
    return tls_files(tmp_path_factory.mktemp("tls"), authority)


@pytest.fixture
def ours(tmp_path: Path, authority: trustme.CA) -> dict[str, str]:
    return client_files(tmp_path, authority)


@pytest.fixture(scope="module")
def secure(served: TlsFiles) -> Iterator[Service]:
    """A node that asks its clients for a certificate."""
    demanding = ("ssl_options.fail_if_no_peer_cert = true",)
    with rabbitmq_service(tls=served, configuration=demanding, environ=PROCESSES) as service:
        yield service


class TestTls:
    def test_everything_works_by_another_event_loop(
        self, secure: Service, served: TlsFiles, ours: dict[str, str]
    ) -> None:
        async def work() -> None:
            await refusal(ConfigurationError, url=secure.url)
            settings = RabbitMQSettings(url=secure.url, ca_file=str(served.authority), namespace="uvloop", **ours)
            async with RabbitMQBackend(settings) as backend:
                await round_trip(backend)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work())

    async def test_certificates_that_hold_on_both_sides(
        self, secure: Service, served: TlsFiles, ours: dict[str, str]
    ) -> None:
        settings = RabbitMQSettings(url=secure.url, ca_file=str(served.authority), **ours)
        async with RabbitMQBackend(settings) as backend:
            await round_trip(backend)
            await backend.declare("g")
            await asyncio.gather(*(backend.publish("k", {"n": number, "x": "y" * 1000}) for number in range(500)))
            async with backend.consume(group="g", prefetch=100) as subscription, bounds.within(10):
                numbers = [(await anext(subscription))["n"] for _ in range(500)]
            assert numbers == list(range(500))

    async def test_certificate_and_key_may_be_in_one_file(
        self, secure: Service, served: TlsFiles, ours: dict[str, str]
    ) -> None:
        settings = RabbitMQSettings(url=secure.url, ca_file=str(served.authority), certificate_file=merged(ours))
        async with RabbitMQBackend(settings) as backend:
            await backend.ping()

    async def test_a_certificate_that_was_renewed_is_used_for_the_next_connection(
        self, secure: Service, served: TlsFiles, ours: dict[str, str], tmp_path: Path, authority: trustme.CA
    ) -> None:
        client_files(tmp_path, trustme.CA())
        backend = RabbitMQBackend(RabbitMQSettings(url=secure.url, ca_file=str(served.authority), **ours))
        with pytest.raises(AbeError, match="RABBITMQ_CERTIFICATE_FILE"):
            await backend.connect()
        client_files(tmp_path, authority)
        await backend.ping()
        await backend.disconnect()

    async def test_an_authority_that_is_not_ours_is_refused_at_once(self, secure: Service, tmp_path: Path) -> None:
        trustme.CA().cert_pem.write_to_path(tmp_path / "other")
        for ca_file in (str(tmp_path / "other"), None):
            error = await refusal(ConfigurationError, url=secure.url, ca_file=ca_file)
            assert "certificate cannot be verified" in str(error)
            assert "RABBITMQ_CA_FILE must hold the authority" in str(error)

    async def test_a_certificate_for_another_host_is_refused_at_once(self, secure: Service, served: TlsFiles) -> None:
        url = secure.url.replace("127.0.0.1", "localhost")
        error = await refusal(ConfigurationError, url=url, ca_file=str(served.authority))
        assert "the host in RABBITMQ_URL must match its subject alternative names" in str(error)

    @pytest.mark.parametrize("foreign", [False, True])
    async def test_a_client_without_a_certificate_that_holds_is_told_so(
        self, secure: Service, served: TlsFiles, tmp_path: Path, foreign: bool
    ) -> None:
        """The broker says so after the client believes that all is well, and hangs up: its reason may be lost on the way."""
        files = client_files(tmp_path, trustme.CA()) if foreign else {}
        backend = RabbitMQBackend(RabbitMQSettings(url=secure.url, ca_file=str(served.authority), **files))
        async with bounds.within(4):
            with pytest.raises((ConfigurationError, BackendConnectionError), match="RABBITMQ_CERTIFICATE_FILE"):
                await backend.connect()
        await backend.disconnect()

    async def test_files_are_checked_when_it_connects(self, served: TlsFiles, tmp_path: Path) -> None:
        nonsense = tmp_path / "nonsense"
        nonsense.write_text(SECRET)
        foreign = tls_files(tmp_path, trustme.CA())
        ca, certificate = str(served.authority), str(served.certificate)
        for files, complaint in (
            ({"ca_file": "/nowhere/ca.pem"}, "RABBITMQ_CA_FILE must be a file that can be read: '/nowhere/ca.pem'"),
            ({"ca_file": str(tmp_path)}, "RABBITMQ_CA_FILE must be a file that can be read"),
            ({"ca_file": str(nonsense)}, "RABBITMQ_CA_FILE must hold certificates as PEM"),
            ({"certificate_file": "/nowhere/app.pem"}, "RABBITMQ_CERTIFICATE_FILE must be a file that can be read"),
            ({"certificate_file": certificate, "key_file": "/nowhere"}, "RABBITMQ_KEY_FILE must be a file that can be"),
            ({"certificate_file": str(nonsense)}, "RABBITMQ_CERTIFICATE_FILE must hold a certificate as PEM"),
            ({"certificate_file": certificate}, "RABBITMQ_KEY_FILE, or the same file, its private key"),
            ({"certificate_file": certificate, "key_file": str(foreign.key)}, "RABBITMQ_KEY_FILE"),
        ):
            error = await refusal(ConfigurationError, **{"url": "amqps://127.0.0.1:1", "ca_file": ca, **files})
            assert complaint in str(error)

    async def test_a_key_with_a_password_is_refused_and_not_asked_for(self, served: TlsFiles, tmp_path: Path) -> None:
        key = serialization.load_pem_private_key(served.key.read_bytes(), None)
        locked = tmp_path / "locked"
        locked.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(SECRET.encode()),
            )
        )
        error = await refusal(
            ConfigurationError,
            url="amqps://127.0.0.1:1",
            certificate_file=str(served.certificate),
            key_file=str(locked),
        )
        assert "RABBITMQ_KEY_FILE must hold a private key without a password" in str(error)

    async def test_a_port_without_tls_is_told_at_once(self, node: Service) -> None:
        error = await refusal(ConfigurationError, url=node.url.replace("amqp:", "amqps:"))
        assert "does not speak TLS at this port" in str(error)

    async def test_a_port_with_tls_is_not_spoken_to_without(self, secure: Service) -> None:
        url = secure.url.replace("amqps:", "amqp:")
        backend = RabbitMQBackend(bounds.stretched(RabbitMQSettings(url=url, connect_timeout=1.0)))
        async with bounds.within(3):
            with pytest.raises(BackendConnectionError, match="amqps://"):
                await backend.connect()
        await backend.disconnect()


class TestLogin:
    @pytest.mark.parametrize("login", [f"guest:{SECRET}", f"nobody:{SECRET}"])
    async def test_a_wrong_password_is_told_at_once_and_not_shown(self, lab: Any, log: io.StringIO, login: str) -> None:
        url = f"amqp://{login}@{lab.url.rpartition('@')[2]}"
        error = await refusal(PermissionDeniedError, url=url, namespace=lab.namespace)
        assert "check the user" in str(error)
        assert SECRET not in log.getvalue()

    async def test_a_password_may_hold_any_character(self, lab: Any, shell: RabbitMQShell) -> None:
        name, password = f"odd-{lab.namespace}", "p@ss/w:rd%+ é?#,"
        await shell.add_user(name, password)
        host, port = lab.url.rpartition("@")[2].strip("/").split(":")
        settings = lab.settings(url=None, host=host, port=int(port), username=name, password=password)
        async with RabbitMQBackend(settings) as backend:
            await backend.ping()
        await shell.delete_user(name)

    async def test_a_vhost_that_is_missing_is_named(self, lab: Any) -> None:
        error = await refusal(ConfigurationError, url=f"{lab.url}nowhere")
        assert "vhost nowhere not found" in str(error)
        assert "MESSAGE_QUEUE_VHOST" in str(error)

    async def test_a_vhost_that_the_user_may_not_enter(
        self, lab: Any, user: Callable[..., Awaitable[str]], shell: RabbitMQShell
    ) -> None:
        url = await user()
        await shell.evaluate(
            f'rabbit_auth_backend_internal:clear_permissions(<<"app-{lab.namespace}">>, <<"/">>, <<"abe">>).'
        )
        error = await refusal(PermissionDeniedError, url=url)
        assert "access to vhost '/' refused" in str(error)

    async def test_a_limit_of_connections_may_end(
        self, lab: Any, user: Callable[..., Awaitable[str]], shell: RabbitMQShell
    ) -> None:
        url = await user()
        name = f'<<"app-{lab.namespace}">>'
        await shell.evaluate(
            f'rabbit_auth_backend_internal:set_user_limits({name}, #{{<<"max-connections">> => 0}}, <<"abe">>).'
        )
        backend = RabbitMQBackend(lab.settings(url=url))
        with pytest.raises(BackendConnectionError, match="limit"):
            await backend.connect()
        await backend.disconnect()


class TestRights:
    @staticmethod
    def documented(which: int) -> tuple[str, str, str]:
        """Return the rights of the README, in the form that the fixture `user` takes."""
        lines = re.findall(r"set_permissions -p VHOST USER '(.*)' '(.*)' '(.*)'", README.read_text())
        configure, write, read = (right.replace("abe:NAMESPACE", "NS") for right in lines[which])
        return configure, write, read

    async def test_the_documented_user_can_do_everything(
        self, lab: Any, user: Callable[..., Awaitable[str]], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        await round_trip(await lab.backend(url=await user(*self.documented(0))))
        assert caplog.messages == []

    async def test_the_documented_user_can_do_everything_on_an_exchange_of_its_own(
        self, lab: Any, user: Callable[..., Awaitable[str]], shell: RabbitMQShell
    ) -> None:
        exchange = f"shop-{lab.namespace}"
        rights = [f"({right})|^{exchange}$" for right in self.documented(0)]
        await round_trip(await lab.backend(url=await user(*rights), exchange=exchange))
        await shell.delete(exchange)

    async def test_the_documented_publisher_can_publish_and_nothing_else(
        self, lab: Any, user: Callable[..., Awaitable[str]]
    ) -> None:
        owner = await lab.backend(groups={"g": ()})
        publisher = await lab.backend(url=await user(*self.documented(1)))
        await publisher.publish("k", {"n": 1})
        for call in (publisher.publish("k", {}, delay=1.0), publisher.declare("h"), publisher.dead_letters("g").list()):
            with pytest.raises(PermissionDeniedError):
                await call
        async with owner.consume(group="g") as subscription, bounds.within(5):
            assert await subscription.receive() == {"n": 1}

    @pytest.mark.parametrize("failure", [Reject("no good"), Retry(after=0.2)], ids=["dead letter", "retry"])
    async def test_a_settlement_that_the_user_may_not_carry_out_ends_the_consumer_and_nothing_is_lost(
        self, lab: Any, user: Callable[..., Awaitable[str]], failure: Exception
    ) -> None:
        owner = await lab.backend(groups={"g": ()})
        await owner.publish("k", {"n": 1})
        backend = await lab.backend(url=await user("NS", "^$", "NS"))

        async def handle(payload: dict[str, Any]) -> None:
            raise failure

        async with bounds.within(20), AsyncLoopConsumer(backend, "g") as consumer:
            with pytest.raises(PermissionDeniedError, match="refused for user"):
                await consumer.run(handle)
        async with bounds.within(20):
            # The queue hears of a closed channel later than whoever closed it.
            while not (stats := await owner.stats("g")).waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (stats.waiting, stats.dead) == (1, 0)

    async def test_a_publisher_that_is_denied_disturbs_no_settlement_beside_it(
        self, lab: Any, user: Callable[..., Awaitable[str]], collect: Any
    ) -> None:
        owner = await lab.transport()
        await owner.declare("g", None, change=True)
        await owner.send(lab.envelopes(50))
        transport = await lab.transport(url=await user("NS", "NS:|amq.default", "NS"))  # to all but the exchange
        await transport.declare("g", None, change=False)
        receiver = await lab.receiver(transport)
        found = await collect(receiver, 50)
        dead = [Settlement(each, Disposition.DEAD, reason="r", error="e") for each in found]

        async def settle() -> None:
            left = dead
            while left:
                outcomes = await receiver.settle(left)
                assert all(isinstance(outcome, BackendConnectionError) for outcome in outcomes if outcome is not None)
                left = [each for each, outcome in zip(left, outcomes, strict=False) if outcome is not None]
                await asyncio.sleep(0.01)

        async with bounds.within(20):
            _, outcomes = await asyncio.gather(settle(), transport.send(lab.envelopes(5)))
        assert [type(outcome) for outcome in outcomes] == [PermissionDeniedError] * 5
        assert (await owner.stats("g")).dead >= 50

    async def test_who_may_not_know_the_groups_is_told_that_others_may_have_what_one_refused(
        self, lab: Any, user: Callable[..., Awaitable[str]]
    ) -> None:
        owner = await lab.transport(max_backlog=3)
        for group in ("free", "full"):
            await owner.declare(group, None, change=True)
        publisher = await lab.transport(url=await user(*self.documented(1)), max_backlog=3)
        assert await publisher.send(lab.envelopes(3)) == ()
        [envelope] = lab.envelopes(1)
        for _ in range(3):  # what may be there is not sent again
            assert [type(outcome) for outcome in await publisher.send([envelope])] == [PublishUnknownError]
        for group in ("free", "full"):
            assert (await owner.stats(group)).waiting == 3

    async def test_a_queue_with_a_limit_of_the_operator_s_is_asked_alone_after_it_refused(
        self, lab: Any, shell: RabbitMQShell, collect: Any
    ) -> None:
        transport = await lab.transport()
        for group in ("free", "full"):
            await transport.declare(group, None, change=True)
        await shell.evaluate(
            f'rabbit_policy:set(<<"/">>, <<"{lab.namespace}">>, <<"^{lab.names.queue("full")}$">>, '
            '[{<<"max-length">>, 1}], 0, <<"queues">>, <<"abe">>).'
        )
        [envelope] = lab.envelopes(1)
        async with bounds.within(10):
            while not (outcomes := await transport.send(lab.envelopes(1))):  # the queue learns of it, and fills up
                pass
        assert [type(outcome) for outcome in outcomes] == [PublishUnknownError]
        for _ in range(4):
            assert [type(outcome) for outcome in await transport.send([envelope])] == [PublishUnknownError]
        receiver = await lab.receiver(transport, "free")
        async with bounds.within(10):
            ids: list[str] = []
            while (await transport.stats("free")).waiting or not ids:
                ids += [receiver.metadata(each).id for each in await receiver.receive(1000)]
        assert ids.count(envelope.id) <= 2
        await shell.evaluate(f'rabbit_policy:delete(<<"/">>, <<"{lab.namespace}">>, <<"abe">>).')

    @pytest.mark.parametrize("missing", ["configure", "write", "read"])
    async def test_each_right_that_is_missing_is_told(
        self, lab: Any, shell: RabbitMQShell, log: io.StringIO, missing: str
    ) -> None:
        owner = await lab.backend(groups={"g": ()})
        await owner.publish("k", {"n": 1})
        name = f"app-{lab.namespace}"
        await shell.add_user(name, SECRET, **{missing: "^$"})
        backend = RabbitMQBackend(lab.settings(url=f"amqp://{name}:{SECRET}@{lab.url.rpartition('@')[2]}"))
        calls = {
            "configure": backend.connect,
            "write": lambda: backend.publish("k", {}),
            "read": lambda: consume(backend),
        }
        async with bounds.within(3):
            with pytest.raises(
                PermissionDeniedError, match=r"access to .* refused for user .*check the user"
            ) as caught:
                await calls[missing]()
        assert SECRET not in told(caught.value)
        await backend.disconnect()
        assert SECRET not in log.getvalue()
        await shell.delete_user(name)

    async def test_a_right_that_was_given_meanwhile_is_used(
        self, lab: Any, shell: RabbitMQShell, caplog: pytest.LogCaptureFixture
    ) -> None:
        await lab.backend(groups={"g": ()})
        name = f"app-{lab.namespace}"
        await shell.add_user(name, SECRET, write="^$")
        backend = await lab.backend(url=f"amqp://{name}:{SECRET}@{lab.url.rpartition('@')[2]}")
        with pytest.raises(PermissionDeniedError):
            await backend.publish("k", {"n": 1})
        await shell.add_user(name, SECRET)
        await backend.publish("k", {"n": 2})
        assert (await backend.stats("g")).waiting == 1
        await backend.disconnect()
        await shell.delete_user(name)


class TestWhatIsThere:
    @pytest.mark.parametrize(
        ("before", "after", "told"),
        [
            (None, 5, "x-max-length unset, and the settings here make it 4: leave QUEUE_MAX_BACKLOG unset"),
            (5, None, "x-max-length 4, and the settings here make it unset: set QUEUE_MAX_BACKLOG to 5"),
            (5, 100_000, "x-max-length 4, and the settings here make it 99999: set QUEUE_MAX_BACKLOG to 5"),
        ],
    )
    async def test_a_backlog_that_was_changed_is_told_with_both_values(
        self, lab: Any, before: int | None, after: int | None, told: str
    ) -> None:
        owner = await lab.backend(groups={"g": ()}, max_backlog=before)
        await owner.publish("k", {"n": 1})
        await owner.disconnect()
        backend = RabbitMQBackend(lab.settings(max_backlog=after))
        for call in (backend.declare("g"), _entered(backend)):
            async with bounds.within(3):
                with pytest.raises(ConfigurationError, match=re.escape(told)) as caught:
                    await call
            assert f"the queue 'abe:{lab.namespace}:queue:g'" in str(caught.value)
        await backend.disconnect()
        again = await lab.backend(max_backlog=before)
        async with again.consume(group="g") as subscription, bounds.within(5):
            assert await subscription.receive() == {"n": 1}

    async def test_an_exchange_of_another_kind_is_told(self, lab: Any, shell: RabbitMQShell) -> None:
        name = f"shop-{lab.namespace}"
        await (await lab.pika()).declare_exchange(name, "fanout", durable=True)
        error = await refusal(ConfigurationError, url=lab.url, namespace=lab.namespace, exchange=name)
        assert f"the exchange '{name}' exists with type fanout, and the settings here make it topic" in str(error)
        assert "MESSAGE_QUEUE_EXCHANGE" in str(error)
        await shell.delete(name)

    async def test_a_queue_of_somebody_else_is_told(self, lab: Any) -> None:
        await (await lab.pika()).declare_queue(f"abe:{lab.namespace}:queue:g", durable=True)
        backend = await lab.backend()
        with pytest.raises(ConfigurationError, match="QUEUE_NAMESPACE") as caught:
            await backend.declare("g")
        assert f"the queue 'abe:{lab.namespace}:queue:g' exists with x-" in str(caught.value)
        await (await lab.pika()).queue_delete(f"abe:{lab.namespace}:queue:g")


async def _entered(backend: RabbitMQBackend) -> None:
    async with backend.consume(group="g"):
        raise AssertionError("it was let in")
