"""Getting in: addresses, certificates, users and rights, and what the server has to be."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
import trustme
import uvloop

from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    ConfigurationError,
    PermissionDeniedError,
    PublishRejectedError,
)
from abe_backend_redis import RedisBackend, RedisSettings
from abe_backend_redis._broker import Broker
from abe_backend_redis._login import connect
from abe_contract_tests import bounds
from abe_contract_tests.services import TlsFiles

Until = Callable[..., Awaitable[None]]

SECRET = "swordfish-8061"

MINIMAL = (
    "~{test-*}:*",
    "-@all",
    "+evalsha", "+script|load", "+xreadgroup", "+xrange", "+xrevrange", "+xadd", "+xdel", "+xack", "+xlen",
    "+xpending", "+xclaim", "+xgroup|create", "+xgroup|createconsumer", "+xgroup|delconsumer", "+xinfo|groups",
    "+zadd", "+zrem", "+zcard", "+zrange", "+zrangebyscore", "+zscore", "+hget", "+hset", "+hdel", "+hgetall",
    "+get", "+set", "+del", "+rename", "+exists", "+time", "+select", "+ping",
)  # fmt: skip
"""What the documented user must be allowed; the README holds the same."""

OPTIONAL = (
    "+xackdel",
    "+unlink",
    "+scan",
    "+info",
    "+client|id",
    "+client|unblock",
    "+client|setname",
    "+client|setinfo",
)
"""What it may be refused."""

README = Path(__file__).parents[1] / "README.md"


def tls_files(directory: Path, authority: trustme.CA) -> TlsFiles:
    files = TlsFiles(certificate=directory / "cert", key=directory / "key", authority=directory / "ca")
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(files.authority)
    certificate.private_key_pem.write_to_path(files.key)
    certificate.cert_chain_pems[0].write_to_path(files.certificate)
    return files


async def round_trip(lab: Any, **changes: Any) -> None:
    """Publish, delay, retry, bury, replay, count and leave."""
    backend = await lab.backend(**changes)
    await backend.publish("early", {"n": 0})
    await backend.declare("g")
    await backend.publish("k", {"n": 1}, delay=0.05)
    async with backend.consume(group="g") as subscription, bounds.within(5):
        first = await subscription.receive()
        assert first == {"n": 0}
        await first.nack(0.05)
        found = sorted([await subscription.receive(), await subscription.receive()], key=lambda message: message["n"])
        await found[0].reject("test")
        await found[1].ack()
        assert await backend.dead_letters("g").replay_all() == 1
        await (await subscription.receive()).reject("again")
    assert await backend.dead_letters("g").purge_all() == 1
    stats = await backend.stats("g")
    assert (stats.waiting, stats.in_flight, stats.delayed, stats.dead) == (0, 0, 0, 0)
    await backend.ping()
    await backend.delete_group("g")
    await backend.delete_namespace()


class TestReplies:
    async def test_replies_go_to_their_callers_in_order(self, one_lab: Any) -> None:
        wire = await connect(one_lab.settings(), "test", 5.0)
        try:
            replies = await asyncio.gather(*(wire.call(b"ECHO", b"%d" % number) for number in range(500)))
            assert replies == [b"%d" % number for number in range(500)]
        finally:
            wire.close()

    async def test_a_caller_that_left_takes_no_reply_of_another(self, one_lab: Any) -> None:
        wire = await connect(one_lab.settings(), "test", 5.0)
        try:
            gone = wire.call(b"ECHO", b"gone")
            gone.cancel()
            assert await wire.call(b"ECHO", b"mine") == b"mine"
        finally:
            wire.close()

    async def test_a_reply_of_a_megabyte_arrives_whole(self, one_lab: Any) -> None:
        wire = await connect(one_lab.settings(), "test", 5.0)
        try:
            assert await wire.call(b"ECHO", b"x" * 5_000_000) == b"x" * 5_000_000
        finally:
            wire.close()

    async def test_after_the_end_every_call_is_told(self, one_lab: Any) -> None:
        wire = await connect(one_lab.settings(), "test", 5.0)
        waiting = wire.call(b"XREAD", b"BLOCK", 0, b"STREAMS", one_lab.names.parked, b"$")
        wire.close()
        with pytest.raises(BackendConnectionError, match="lost"):
            await waiting
        with pytest.raises(BackendConnectionError, match="closed"):
            await wire.call(b"PING")


class TestAddresses:
    async def test_a_unix_socket(self, launch: Any, lab_at: Any, tmp_path: Path) -> None:
        path = tmp_path / "r.sock"
        service = launch("--unixsocket", str(path))
        await round_trip(lab_at(service.url), url=f"unix://{path}?db=3")

    async def test_nobody_listens(self) -> None:
        backend = RedisBackend(RedisSettings(url="redis://127.0.0.1:1/0", publish_timeout=0.3))
        with pytest.raises(BackendConnectionError, match=r"127\.0\.0\.1:1"):
            await backend.ping()
        with pytest.raises(PublishRejectedError):
            await backend.publish("k", {})
        await backend.disconnect()

    async def test_who_accepts_and_says_nothing_is_given_up(self) -> None:
        release = asyncio.Event()

        async def mute(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await release.wait()
            writer.close()

        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        backend = RedisBackend(RedisSettings(url=f"redis://127.0.0.1:{port}", connect_timeout=0.2, publish_timeout=2.0))
        try:
            async with bounds.within(1.5):
                with pytest.raises(BackendConnectionError):
                    await backend.connect()
        finally:
            release.set()
            await backend.disconnect()
            server.close()
            await server.wait_closed()


class TestTls:
    async def test_a_certificate_that_holds(self, launch: Any, tmp_path: Path) -> None:
        files = tls_files(tmp_path, trustme.CA())
        service = launch(tls=files)
        async with RedisBackend(RedisSettings(url=f"{service.url}?ssl_ca_certs={files.authority}")) as backend:
            await backend.declare("g")
            await asyncio.gather(*(backend.publish("k", {"n": number, "x": "y" * 1000}) for number in range(500)))
            async with backend.consume(group="g", prefetch=100) as subscription, bounds.within(10):
                numbers = [(await anext(subscription))["n"] for _ in range(500)]
            assert numbers == list(range(500))

    def test_another_event_loop_will_do(self, launch: Any, tmp_path: Path) -> None:
        files = tls_files(tmp_path, trustme.CA())
        service = launch(tls=files)

        async def there_and_back() -> list[int]:
            async with RedisBackend(RedisSettings(url=f"{service.url}?ssl_ca_certs={files.authority}")) as backend:
                await backend.declare("g")
                await asyncio.gather(*(backend.publish("k", {"n": number, "x": "y" * 1000}) for number in range(500)))
                async with backend.consume(group="g", prefetch=100) as subscription, bounds.within(10):
                    return [(await anext(subscription))["n"] for _ in range(500)]

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(there_and_back()) == list(range(500))

    async def test_an_authority_that_is_not_ours_is_refused_at_once(self, launch: Any, tmp_path: Path) -> None:
        service = launch(tls=tls_files(tmp_path, trustme.CA()))
        trustme.CA().cert_pem.write_to_path(tmp_path / "other")
        for url in (f"{service.url}?ssl_ca_certs={tmp_path / 'other'}", service.url):
            backend = RedisBackend(RedisSettings(url=url))
            async with bounds.within(3):
                with pytest.raises(ConfigurationError, match=r"(?s)certificate verify failed.*ssl_ca_certs"):
                    await backend.publish("k", {})
            await backend.disconnect()


class TestRights:
    async def test_a_wrong_password_is_told_at_once_and_not_shown(
        self, launch: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        service = launch(password="right")
        host = service.url.rpartition("@")[2]
        for url in (f"redis://:{SECRET}@{host}", f"redis://nobody:{SECRET}@{host}", f"redis://{host}"):
            backend = RedisBackend(RedisSettings(url=url))
            async with bounds.within(3):
                for call in (backend.connect(), backend.publish("k", {}), _consume(backend)):
                    with pytest.raises(PermissionDeniedError, match="check the user") as caught:
                        await call
                    assert SECRET not in str(caught.value)
                    assert SECRET not in repr(caught.value.__cause__)
            await backend.disconnect()
        assert SECRET not in caplog.text

    async def test_the_password_may_be_beside_the_url(self, launch: Any) -> None:
        service = launch(password="p@ss/w:rd%")
        host = service.url.rpartition("@")[2]
        for settings in (
            RedisSettings(url=service.url),
            RedisSettings(url=f"redis://{host}", password="p@ss/w:rd%"),
            RedisSettings(url=f"redis://{host}", username="default", password="p@ss/w:rd%"),
        ):
            async with RedisBackend(settings) as backend:
                await backend.ping()

    async def test_the_documented_user_can_do_everything(
        self, launch: Any, lab_at: Any, caplog: pytest.LogCaptureFixture, server: Any
    ) -> None:
        make = {"Redis 7": "system", "Redis 8": "redis8", "Valkey ": "valkey"}[server.version[:7]]
        lab = lab_at(launch(server=make).url)
        await lab.redis.execute_command("ACL", "SETUSER", "app", "on", f">{SECRET}", *MINIMAL)
        caplog.set_level(logging.WARNING)
        await round_trip(lab, username="app", password=SECRET)
        assert caplog.messages == []
        documented = README.read_text().partition("ACL SETUSER")[2].partition("```")[0]
        assert {*MINIMAL[1:], *OPTIONAL} == {word for word in documented.split() if word[0] in "+-"}

    async def test_who_may_not_unblock_reads_waits_for_them(self, launch: Any, lab_at: Any, until: Until) -> None:
        lab = lab_at(launch().url)
        await lab.redis.execute_command("ACL", "SETUSER", "app", "on", f">{SECRET}", *MINIMAL)
        transport = await lab.transport(username="app", password=SECRET)
        await transport.declare("g", None, change=False)
        receiver = await lab.receiver(transport)
        await receiver.receive(1)
        reading = asyncio.create_task(receiver.receive(1))
        await asyncio.sleep(0)
        async with bounds.within(1):
            await receiver.stop()
            assert list(await reading) == []

    async def test_a_right_that_is_missing_is_named(self, launch: Any, lab_at: Any) -> None:
        lab = lab_at(launch().url)
        rules = [rule for rule in MINIMAL if rule != "+xadd"]
        await lab.redis.execute_command("ACL", "SETUSER", "app", "on", f">{SECRET}", *rules)
        backend = await lab.backend(username="app", password=SECRET)
        async with bounds.within(3):
            with pytest.raises(PermissionDeniedError, match=r"check the user, the password, and the user's rights"):
                await backend.publish("k", {})

    async def test_a_namespace_of_others_is_out_of_reach(self, launch: Any, lab_at: Any) -> None:
        lab = lab_at(launch().url)
        await lab.redis.execute_command("ACL", "SETUSER", "app", "on", f">{SECRET}", *MINIMAL)
        backend = await lab.backend(username="app", password=SECRET, namespace="others")
        async with bounds.within(3):
            with pytest.raises(PermissionDeniedError, match=r"the user's rights"):
                await backend.publish("k", {})


class TestServer:
    @pytest.mark.parametrize(
        ("version", "has_it"),
        [("6.2.14", False), ("8.0.9", False), ("8.2.0", False), ("8.2.2", False), ("8.2.3", True), ("8.3.240", False),
         ("8.4.0", True), ("9.0.0", True)],
    )  # fmt: skip
    async def test_xackdel_is_used_where_it_does_not_crash_the_server(self, version: str, has_it: bool) -> None:
        wire = AsyncMock()
        wire.call.return_value = f"redis_version:{version}\r\naof_enabled:1\r\n".encode()
        broker = Broker(RedisSettings())
        for _ in range(2):  # also of a server that is reached later, as after a failover
            broker.has_xackdel = not has_it
            await broker._check(wire)
            assert broker.has_xackdel is has_it

    async def test_a_policy_that_drops_keys_is_refused(self, launch: Any) -> None:
        service = launch("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
        backend = RedisBackend(RedisSettings(url=service.url))
        for call in (backend.connect(), backend.publish("k", {}), _consume(backend)):
            async with bounds.within(3):
                with pytest.raises(ConfigurationError, match=r"(?s)'allkeys-lru'.*'noeviction'"):
                    await call
        await backend.disconnect()

    @pytest.mark.parametrize(
        "arguments",
        [("--maxmemory-policy", "allkeys-lru"), ("--maxmemory", "100mb", "--maxmemory-policy", "noeviction")],
    )
    async def test_a_policy_that_drops_nothing_is_none_of_our_business(
        self, launch: Any, arguments: tuple[str, ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        async with RedisBackend(RedisSettings(url=launch(*arguments).url)) as backend:
            await backend.ping()
        assert caplog.messages == []

    async def test_a_server_that_keeps_nothing_is_warned_of_once(
        self, launch: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        service = launch("--appendonly", "no")
        caplog.set_level(logging.WARNING)
        async with RedisBackend(RedisSettings(url=service.url)) as backend:
            await backend.publish("k", {})
            await backend.ping()
            await _consume(backend)
        assert [message for message in caplog.messages if "appendonly" in message] == caplog.messages
        assert len(caplog.messages) == 1

    async def test_a_server_that_is_too_old_is_refused(self, one_lab: Any) -> None:
        broker = Broker(one_lab.settings())

        class Old:
            async def call(self, *_: object) -> bytes:
                return b"redis_version:6.0.16\r\naof_enabled:1\r\n"

        with pytest.raises(ConfigurationError, match=r"version 6\.0\.16"):
            await broker._check(Old())  # type: ignore[arg-type]

    async def test_a_full_memory_refuses_and_stores_nothing(self, launch: Any, lab_at: Any) -> None:
        lab = lab_at(launch("--maxmemory", "8mb", "--maxmemory-policy", "noeviction").url)
        backend = await lab.backend(groups={"g": (), "h": ()}, publish_timeout=1.0)
        stored, refused = await _fill(backend)
        assert isinstance(refused, BackpressureError)
        assert not refused.maybe_accepted
        assert refused.retryable
        assert [await lab.redis.xlen(lab.names.queue(group)) for group in ("g", "h")] == [stored, stored]

    async def test_consumers_start_and_drain_while_memory_is_full(self, launch: Any, lab_at: Any) -> None:
        lab = lab_at(launch("--maxmemory", "8mb", "--maxmemory-policy", "noeviction").url)
        backend = await lab.backend(groups={"g": ()}, publish_timeout=1.0)
        await backend.publish("k", {"delayed": True}, delay=0.01)
        stored, _ = await _fill(backend)
        await lab.redis.config_set("maxmemory", "4mb")
        async with bounds.within(10), backend.consume(group="g") as subscription:
            for _ in range(stored + 1):
                await anext(subscription)


async def _fill(backend: RedisBackend) -> tuple[int, AbeError]:
    for stored in range(10_000):
        try:
            await backend.publish("k", {"x": "y" * 20_000})
        except AbeError as exc:
            return stored, exc
    raise AssertionError("the server's memory does not end")


async def _consume(backend: RedisBackend) -> None:
    subscription = backend.consume()
    try:
        await subscription.__aenter__()
    finally:
        with suppress(AbeError):
            await subscription.aclose()
