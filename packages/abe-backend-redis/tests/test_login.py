"""What is wrong with REDIS_URL is said in a text that names it, by an error that says whether a retry can help."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from abe.errors import BackendConnectionError, ConfigurationError, PermissionDeniedError, PublishRejectedError
from abe_backend_redis import RedisBackend, RedisSettings
from abe_contract_tests import bounds
from abe_contract_tests.services import TlsFiles


def tls_files(directory: Path) -> TlsFiles:
    authority = trustme.CA()
    files = TlsFiles(certificate=directory / "cert", key=directory / "key", authority=directory / "ca")
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(files.authority)
    certificate.private_key_pem.write_to_path(files.key)
    certificate.cert_chain_pems[0].write_to_path(files.certificate)
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return tls_files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def with_tls(launch: Any, files: TlsFiles) -> str:
    """The address of a server that speaks TLS only."""
    return str(launch(tls=files).url.partition("://")[2].rpartition("/")[0])


@pytest.fixture
async def web() -> AsyncIterator[str]:
    """The address of a web server."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await server.wait_closed()


@pytest.fixture
def refused(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., Any]]:
    """See that connecting, publishing and consuming are refused in the same way; and that nobody else has a word to say."""
    caplog.set_level(logging.WARNING)

    async def refused(url: str, kind: type[Exception], *words: str) -> None:
        backend = RedisBackend(RedisSettings(url=url, publish_timeout=4.0))
        try:
            for call in (backend.connect, lambda: backend.publish("k", {}), backend.consume().__aenter__):
                async with bounds.within(8):
                    with pytest.raises(kind) as caught:
                        await call()
                assert type(caught.value) is kind
                for word in words:
                    assert word in str(caught.value)
        finally:
            await backend.disconnect()

    yield refused
    assert [record.name for record in caplog.records if not record.name.startswith("abe.")] == []


async def test_a_database_that_is_not_there(server: Any, refused: Any) -> None:
    host = server.url.partition("://")[2].rpartition("/")[0]
    for url in (f"redis://{host}/99", f"redis://{host}?db=16", f"redis://{host}/99999999999"):
        await refused(url, ConfigurationError, "REDIS_URL", "database", "'databases'")


async def test_tls_to_a_port_without_it(server: Any, files: TlsFiles, refused: Any) -> None:
    host = server.url.partition("://")[2]
    await refused(f"rediss://{host}?ssl_ca_certs={files.authority}", ConfigurationError, "without TLS", "redis://")


async def test_no_tls_to_a_port_with_it(with_tls: str, refused: Any) -> None:
    await refused(f"redis://{with_tls}/0", ConfigurationError, "with TLS", "rediss://", "REDIS_URL")


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_a_port_where_something_else_listens(web: str, refused: Any, scheme: str) -> None:
    await refused(f"{scheme}://{web}/0", ConfigurationError, "REDIS_URL", web)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("nonsense=1", ("nonsense", "socket_keepalive", "ssl_ca_certs")),
        ("usrname=x", ("usrname", "did you mean 'username'")),
        ("ssl_ca_certs=/etc/hostname", ("ssl_ca_certs", "rediss://")),
        ("socket_timeout=soon", ("socket_timeout",)),
        ("db=first", ("db",)),
        ("credential_provider=x", ("credential_provider",)),
    ],
)
async def test_a_query_parameter_that_is_wrong_is_named(
    one_server: Any, refused: Any, query: str, words: tuple[str, ...]
) -> None:
    await refused(f"{one_server.url.rpartition('/')[0]}?{query}", ConfigurationError, "REDIS_URL", *words)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("ssl_ca_cert={ca}", ("ssl_ca_cert", "did you mean 'ssl_ca_certs'")),
        ("ssl_ca_certs=/nowhere/ca.pem", ("ssl_ca_certs does not name a file",)),
        ("ssl_ca_certs={key}", ("ssl_ parameters",)),
        ("ssl_ca_certs={ca}&ssl_cert_reqs=maybe", ("maybe",)),
        ("ssl_ca_certs={ca}&ssl_min_version=9", ("0x9",)),
        ("ssl_ca_certs={ca}&ssl_keyfile={key}", ("ssl_keyfile needs ssl_certfile",)),
        ("ssl_ca_certs={ca}&ssl_certfile={ca}", ("ssl_ parameters",)),
    ],
)
async def test_a_tls_parameter_that_is_wrong_is_named(
    one_server: Any, refused: Any, files: TlsFiles, query: str, words: tuple[str, ...]
) -> None:
    query = query.format(ca=files.authority, key=files.key)
    host = one_server.url.partition("://")[2]
    await refused(f"rediss://{host}?{query}", ConfigurationError, "REDIS_URL", *words)


async def test_what_the_provider_decides_may_be_in_a_shared_url(one_server: Any) -> None:
    query = (
        "decode_responses=true&health_check_interval=5&protocol=3&client_name=x&max_connections=3&retry_on_timeout=1"
    )
    async with RedisBackend(RedisSettings(url=f"{one_server.url}?{query}")) as backend:
        await backend.ping()


async def test_a_password_where_none_is_asked_for(one_server: Any, refused: Any) -> None:
    host = one_server.url.partition("://")[2]
    await refused(f"redis://app:wrong@{host}", PermissionDeniedError, "REDIS_URL", "REDIS_PASSWORD")


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
async def test_who_is_not_there_may_come_and_the_text_says_where_the_address_is_from(host: str) -> None:
    backend = RedisBackend(RedisSettings(url=f"redis://{host}/0", publish_timeout=0.5 * bounds.allowance()))
    with pytest.raises(BackendConnectionError, match="REDIS_URL") as caught:
        await backend.connect()
    assert caught.value.retryable
    with pytest.raises(PublishRejectedError, match="REDIS_URL"):
        await backend.publish("k", {})
    await backend.disconnect()


@pytest.mark.parametrize("settings", ["redis://localhost", ""])
def test_a_string_is_no_settings(settings: str) -> None:
    with pytest.raises(ConfigurationError, match=r"RedisSettings\(\.\.\.\).*RedisBackend\.from_env"):
        RedisBackend(settings)  # type: ignore[arg-type]
