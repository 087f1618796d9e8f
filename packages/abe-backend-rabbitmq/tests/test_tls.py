"""Certificates and keys, the broker's and ours."""

import asyncio
import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rabbitmq_access import SECRET, refusal, round_trip

from abe.errors import AbeError, BackendConnectionError, ConfigurationError
from abe_backend_rabbitmq import RabbitMQBackend, RabbitMQSettings
from abe_contract_tests import bounds
from abe_contract_tests.services import Service, TlsFiles, rabbitmq_service

pytestmark = [pytest.mark.xdist_group("rabbitmq-node"), pytest.mark.usefixtures("nothing_left")]

PROCESSES = {"ABE_TEST_SERVICES": "processes"}


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
