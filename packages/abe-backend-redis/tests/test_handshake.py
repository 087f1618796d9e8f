"""The login itself: what is sent, what a server may refuse of it, and what is left of one that is cut short."""

import asyncio
import gc
import logging
import warnings
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import hiredis
import pytest
import trustme
import uvloop

from abe.errors import AbeError, BackendConnectionError, ConfigurationError, PermissionDeniedError
from abe_backend_redis import RedisBackend, RedisSettings
from abe_backend_redis._login import connect
from abe_backend_redis._options import read
from abe_backend_redis._protocol import Wire
from abe_contract_tests import bounds
from abe_contract_tests.services import TlsFiles

SECRET = "swordfish-8061"
OK = b"+OK\r\n"


class FakeServer:
    """Speaks RESP: answers each command by its first two words, or not at all."""

    def __init__(self) -> None:
        self.commands: list[list[bytes]] = []
        self.replies: dict[bytes, bytes] = {}
        self.greeting = b""
        self.mute = False
        self.asked = asyncio.Event()
        self.open = 0
        self.closed = asyncio.Event()
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    def settings(self, query: str = "", credentials: str = "", **changes: Any) -> RedisSettings:
        return bounds.stretched(RedisSettings(url=f"redis://{credentials}127.0.0.1:{self.port}{query}", **changes))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        parser = hiredis.Reader()
        try:
            writer.write(self.greeting)
            while data := await reader.read(65536):
                self.asked.set()
                if data[:1] != b"*":  # a TLS greeting, which Redis takes for a command that is not complete
                    continue
                parser.feed(data)
                while (command := parser.gets()) is not False:
                    self.commands.append(command)
                    if not self.mute:
                        writer.write(self.replies.get(b" ".join(command[:2]), self.replies.get(command[0], OK)))
        except ConnectionError:
            pass
        finally:
            writer.close()
            self.open -= 1
            self.closed.set()


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """Fail on transports that nobody closed, and on what the event loop complains of."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        yield
        await asyncio.sleep(0)
        gc.collect()
    assert complaints == []
    assert [str(each.message) for each in caught if issubclass(each.category, ResourceWarning)] == []


@pytest.fixture
async def fake() -> AsyncIterator[FakeServer]:
    server = FakeServer()
    await server.start()
    yield server
    await server.stop()


async def logged_in(settings: RedisSettings) -> None:
    (await connect(settings, "test", 5.0)).close()


def clients(text: bytes, name: str) -> list[dict[str, str]]:
    lines = (dict(pair.split("=", 1) for pair in line.split()) for line in text.decode().splitlines())
    return [client for client in lines if client["name"] == name]


async def test_the_whole_login_is_sent_before_the_first_reply(fake: FakeServer) -> None:
    fake.mute = True
    connecting = asyncio.create_task(logged_in(fake.settings("/3", "app:p%40ss@")))
    try:
        async with bounds.within(5):
            while len(fake.commands) < 5:
                fake.asked.clear()
                await fake.asked.wait()
    finally:
        connecting.cancel()
        await asyncio.wait([connecting])
    assert fake.commands[0] == [b"AUTH", b"app", b"p@ss"]
    assert fake.commands[1] == [b"SELECT", b"3"]
    assert fake.commands[2] == [b"CLIENT", b"SETNAME", b"test"]
    assert [command[:3] for command in fake.commands[3:]] == [
        [b"CLIENT", b"SETINFO", b"LIB-NAME"],
        [b"CLIENT", b"SETINFO", b"LIB-VER"],
    ]


@pytest.mark.parametrize(
    ("credentials", "changes", "sent"),
    [
        ("", {}, []),
        (f":{SECRET}@", {}, [[b"AUTH", SECRET.encode()]]),
        ("app@", {}, [[b"AUTH", b"app", b""]]),
        ("a%3Ab:p%2Fw%25@", {}, [[b"AUTH", b"a:b", b"p/w%"]]),
        ("app@", {"password": SECRET}, [[b"AUTH", b"app", SECRET.encode()]]),
        ("", {"username": "app", "password": SECRET}, [[b"AUTH", b"app", SECRET.encode()]]),
    ],
)
async def test_user_and_password_are_sent_as_they_are_given(
    fake: FakeServer, credentials: str, changes: dict[str, str], sent: list[list[bytes]]
) -> None:
    await logged_in(fake.settings("", credentials, **changes))
    assert [command for command in fake.commands if command[0] == b"AUTH"] == sent


@pytest.mark.parametrize(("query", "database"), [("", 0), ("/0", 0), ("/7", 7), ("?db=5", 5), ("/7?db=5", 5)])
async def test_the_database_is_in_the_path_or_the_query(fake: FakeServer, query: str, database: int) -> None:
    await logged_in(fake.settings(query))
    assert [command for command in fake.commands if command[0] == b"SELECT"] == (
        [[b"SELECT", b"%d" % database]] if database else []
    )


@pytest.mark.parametrize(
    "refusal",
    [
        b"-ERR unknown command 'CLIENT'\r\n",
        b"-ERR unknown subcommand 'SETINFO'. Try CLIENT HELP.\r\n",
        b"-ERR Unknown subcommand or wrong number of arguments for 'SETINFO'. Try CLIENT HELP.\r\n",
        b"-NOPERM User app has no permissions to run the 'client|setname' command\r\n",
    ],
)
async def test_a_server_that_takes_no_name_is_used_without(fake: FakeServer, refusal: bytes) -> None:
    fake.replies[b"CLIENT"] = refusal
    wire = await connect(fake.settings(), "test", 5.0)
    assert await wire.call(b"PING") == b"OK"
    wire.close()


@pytest.mark.parametrize(
    ("command", "reply", "kind", "words"),
    [
        (b"AUTH", b"-WRONGPASS invalid username-password pair", PermissionDeniedError, "REDIS_PASSWORD"),
        (b"AUTH", b"-ERR AUTH <password> called without any password", PermissionDeniedError, "REDIS_PASSWORD"),
        (b"SELECT", b"-ERR DB index is out of range", ConfigurationError, "'databases'"),
        (
            b"SELECT",
            b"-NOPERM User app has no permissions to run the 'select' command",
            PermissionDeniedError,
            "rights",
        ),
        (b"CLIENT", b"-NOAUTH Authentication required.", PermissionDeniedError, "REDIS_PASSWORD"),
        (b"AUTH", b"?what is this", ConfigurationError, "protocol"),
    ],
)
async def test_a_login_that_is_refused_says_what_to_do_and_ends_the_connection(
    fake: FakeServer, command: bytes, reply: bytes, kind: type[AbeError], words: str
) -> None:
    fake.replies[command] = reply + b"\r\n"
    async with bounds.within(5):
        with pytest.raises(kind, match=words) as caught:
            await logged_in(fake.settings("/9", f"app:{SECRET}@"))
        await fake.closed.wait()
    assert type(caught.value) is kind
    assert SECRET not in repr(caught.value) + repr(caught.value.__cause__)


@pytest.mark.parametrize(
    ("greeting", "kind"),
    [
        (b"-ERR max number of clients reached\r\n", BackendConnectionError),
        (b"-DENIED Redis is running in protected mode because\r\n", PermissionDeniedError),
    ],
)
async def test_a_server_that_refuses_before_it_is_asked_is_understood(
    fake: FakeServer, greeting: bytes, kind: type[AbeError]
) -> None:
    fake.greeting, fake.mute = greeting, True
    with pytest.raises(kind, match=greeting[1:-2].decode()) as caught:
        await logged_in(fake.settings())
    assert type(caught.value) is kind


async def test_a_login_that_is_cancelled_leaves_no_connection(fake: FakeServer) -> None:
    fake.mute = True
    connecting = asyncio.create_task(logged_in(fake.settings("", f"app:{SECRET}@")))
    async with bounds.within(5):
        await fake.asked.wait()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await fake.closed.wait()
    assert fake.open == 0


async def test_a_login_that_is_cancelled_at_any_step_leaves_no_connection(fake: FakeServer) -> None:
    done = False
    turns = 0
    while not done:
        connecting = asyncio.create_task(logged_in(fake.settings()))
        for _ in range(turns):
            await asyncio.sleep(0)
        connecting.cancel()
        done = not (await asyncio.gather(connecting, return_exceptions=True))[0]
        turns += 1
    assert turns > 3
    async with bounds.within(5):
        while fake.open:
            fake.closed.clear()
            await fake.closed.wait()


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_a_login_that_nobody_answers_ends_in_time(fake: FakeServer, scheme: str) -> None:
    fake.mute = True
    settings = fake.settings(connect_timeout=0.3)
    settings = RedisSettings(url=settings.url.replace("redis", scheme), connect_timeout=settings.connect_timeout)
    async with bounds.within(2):
        with pytest.raises(BackendConnectionError, match=r"timed out after .* s$"):
            await logged_in(settings)
        await fake.closed.wait()


async def test_a_connection_that_ends_within_the_login_may_be_tried_again() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    try:
        with pytest.raises(BackendConnectionError, match="REDIS_URL") as caught:
            await logged_in(RedisSettings(url=f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        assert caught.value.retryable
    finally:
        server.close()
        await server.wait_closed()


async def test_the_connection_has_a_name_and_says_which_library_it_is(
    server: Any, lab_at: Callable[[str], Any]
) -> None:
    wire = await connect(RedisSettings(url=f"{server.url.rpartition('/')[0]}/3"), "abe-test", 5.0)
    try:
        [client] = clients(await wire.call(b"CLIENT", b"LIST"), "abe-test")
        assert client["db"] == "3"
        if "lib-name" in client:  # Redis has it from 7.2
            assert client["lib-name"] == "abe-backend-redis"
            assert client["lib-ver"]
    finally:
        wire.close()


async def test_a_password_alone_is_refused_where_none_is_asked_for(one_server: Any) -> None:
    host = one_server.url.partition("://")[2]
    with pytest.raises(PermissionDeniedError, match="without any password"):
        await logged_in(RedisSettings(url=f"redis://:{SECRET}@{host}"))


@pytest.mark.parametrize(("query", "keeps"), [("", True), ("?socket_keepalive=no", False)])
async def test_tcp_keepalive_is_on_unless_the_url_says_no(fake: FakeServer, query: str, keeps: bool) -> None:
    import socket

    wire = await connect(fake.settings(query), "test", 5.0)
    assert wire._transport is not None
    sock = wire._transport.get_extra_info("socket")
    try:
        assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is keeps
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        wire.close()


async def test_a_password_is_in_no_repr(fake: FakeServer) -> None:
    settings = fake.settings("", f"app:{SECRET}@")
    wire = await connect(settings, "test", 5.0)
    try:
        assert SECRET not in f"{wire!r} {wire.greeting!r} {read(settings)!r} {settings!r}"
    finally:
        wire.close()


class TestTls:
    @pytest.fixture
    def files(self, tmp_path: Path) -> TlsFiles:
        authority = trustme.CA()
        files = TlsFiles(certificate=tmp_path / "cert", key=tmp_path / "key", authority=tmp_path / "ca")
        certificate = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(files.authority)
        certificate.private_key_pem.write_to_path(files.key)
        certificate.cert_chain_pems[0].write_to_path(files.certificate)
        return files

    async def test_the_server_is_checked_as_the_url_says(self, launch: Any, files: TlsFiles, tmp_path: Path) -> None:
        address = launch(tls=files).url.partition("://")[2].partition("/")[0]
        port = address.rpartition(":")[2]
        ca = f"ssl_ca_certs={files.authority}"
        for good in (
            f"rediss://{address}?{ca}",
            f"rediss://{address}?ssl_cert_reqs=none",
            f"rediss://localhost:{port}?{ca}&ssl_check_hostname=no",
            f"rediss://{address}?{ca}&ssl_min_version=772&ssl_certfile={files.certificate}&ssl_keyfile={files.key}",
            f"rediss://{address}/1?{ca}&ssl_ciphers=ECDHE%2BAESGCM",
        ):
            await logged_in(RedisSettings(url=good))
        for wrong in (f"rediss://localhost:{port}?{ca}", f"rediss://{address}", f"rediss://{address}?ssl_ciphers=none"):
            with pytest.raises(ConfigurationError, match=r"ssl_ca_certs|ssl_ parameters"):
                await logged_in(RedisSettings(url=wrong))

    async def test_a_key_with_a_password(self, launch: Any, files: TlsFiles, tmp_path: Path) -> None:
        from cryptography.hazmat.primitives import serialization as form

        key = form.load_pem_private_key(files.key.read_bytes(), None)
        locked = tmp_path / "locked"
        how = form.BestAvailableEncryption(SECRET.encode())
        locked.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, how))
        url = f"{launch(tls=files).url}?ssl_ca_certs={files.authority}&ssl_certfile={files.certificate}&ssl_keyfile={locked}"
        await logged_in(RedisSettings(url=f"{url}&ssl_password={SECRET}"))
        for wrong in (url, f"{url}&ssl_password=wrong"):
            with pytest.raises(ConfigurationError, match="ssl_ parameters"):
                await logged_in(RedisSettings(url=wrong))

    async def test_a_handshake_that_is_cancelled_leaves_no_connection(self, fake: FakeServer) -> None:
        connecting = asyncio.create_task(
            logged_in(RedisSettings(url=f"rediss://127.0.0.1:{fake.port}?ssl_cert_reqs=none"))
        )
        async with bounds.within(5):
            await fake.asked.wait()
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
            await fake.closed.wait()


class TestUvloop:
    def run(self, steps: Iterable[Callable[[FakeServer], Any]]) -> None:
        async def main() -> None:
            complaints: list[str] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
            for step in steps:
                fake = FakeServer()
                await fake.start()
                await step(fake)
                async with bounds.within(5):
                    while fake.open:
                        fake.closed.clear()
                        await fake.closed.wait()
                await fake.stop()
            gc.collect()
            await asyncio.sleep(0)
            assert complaints == []

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    def test_logging_in_being_refused_and_being_cancelled(self) -> None:
        async def logs_in(fake: FakeServer) -> None:
            await logged_in(fake.settings("/3", f"app:{SECRET}@"))

        async def is_refused(fake: FakeServer) -> None:
            fake.replies[b"AUTH"] = b"-WRONGPASS no\r\n"
            with pytest.raises(PermissionDeniedError):
                await logged_in(fake.settings("/3", f"app:{SECRET}@"))

        async def is_cancelled(fake: FakeServer) -> None:
            fake.mute = True
            for scheme in ("redis", "rediss"):
                fake.asked.clear()
                url = f"{scheme}://127.0.0.1:{fake.port}"
                connecting = asyncio.create_task(logged_in(RedisSettings(url=url)))
                await fake.asked.wait()
                connecting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await connecting

        async def times_out(fake: FakeServer) -> None:
            fake.mute = True
            for scheme in ("redis", "rediss"):
                url = f"{scheme}://127.0.0.1:{fake.port}"
                with pytest.raises(BackendConnectionError, match="timed out"):
                    await logged_in(RedisSettings(url=url, connect_timeout=0.3))

        self.run([logs_in, is_refused, is_cancelled, times_out])

    def test_a_unix_socket_and_tls_and_the_wrong_port(self, launch: Any, tmp_path: Path) -> None:
        authority = trustme.CA()
        files = TlsFiles(certificate=tmp_path / "cert", key=tmp_path / "key", authority=tmp_path / "ca")
        authority.cert_pem.write_to_path(files.authority)
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(files.key)
        certificate.cert_chain_pems[0].write_to_path(files.certificate)
        path = tmp_path / "r.sock"
        plain = launch("--unixsocket", str(path)).url.partition("://")[2]
        secure = launch(tls=files).url.partition("://")[2]
        ca = f"ssl_ca_certs={files.authority}"

        async def connects(_: FakeServer) -> None:
            for url in (f"unix://{path}?db=2", f"redis://{plain}", f"rediss://{secure}?{ca}"):
                await logged_in(RedisSettings(url=url))
            for url, words in ((f"rediss://{plain}?{ca}", "without TLS"), (f"redis://{secure}", "with TLS")):
                with pytest.raises(ConfigurationError, match=words):
                    await logged_in(RedisSettings(url=url))
            with pytest.raises(BackendConnectionError):
                await logged_in(RedisSettings(url=f"unix://{tmp_path / 'nobody'}"))

        self.run([connects])


async def test_concurrent_callers_share_one_login(fake: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    backend = RedisBackend(fake.settings("", f"app:{SECRET}@", publish_timeout=1.0))
    fake.replies[b"SCRIPT"] = b"-ERR no scripts\r\n"
    outcomes = await asyncio.gather(*(backend.ping() for _ in range(5)), return_exceptions=True)
    await backend.disconnect()
    assert len([command for command in fake.commands if command[0] == b"AUTH"]) <= 2
    assert all(isinstance(outcome, AbeError) for outcome in outcomes)
    assert SECRET not in caplog.text


async def test_a_wire_that_was_lost_before_it_was_watched_starts_no_timer(fake: FakeServer) -> None:
    wire: Wire = await connect(fake.settings(), "test", 5.0)
    wire.close()
    wire.watch()
    await asyncio.sleep(0)
    assert wire._timer is None or wire._timer.cancelled()
