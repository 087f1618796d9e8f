"""The clients: made once, of a size that fits, and closed whatever happens."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from abe.errors import BackendClosedError, BackendConnectionError, ConfigurationError
from abe_backend_sqs import SqsBackend, SqsSettings
from abe_backend_sqs._connection import Clients
from abe_contract_tests import bounds

SETTINGS = SqsSettings(region="us-east-1", access_key_id="key", secret_access_key="secret", wait=20)


async def test_polls_have_connections_of_their_own_and_time_for_a_long_poll() -> None:
    clients = Clients(SETTINGS)
    polls, calls = await clients.polls(), await clients.calls()
    assert polls is not calls
    assert polls.meta.config.read_timeout > SETTINGS.wait
    assert 2 * calls.meta.config.read_timeout < SETTINGS.publish_timeout, "a first try leaves time for a second"
    assert polls.meta.config.max_pool_connections > SETTINGS.pollers
    assert {client.meta.config.connect_timeout for client in (polls, calls)} == {4.0}
    await clients.close()


async def test_a_connection_that_went_silent_is_given_up_in_the_declared_time() -> None:
    settings = SqsSettings(region="us-east-1", access_key_id="key", secret_access_key="secret")
    clients = Clients(settings)
    bound = SqsBackend(settings).capabilities.silence_bound
    assert bound is not None
    for client in (await clients.polls(), await clients.calls()):
        assert client.meta.config.read_timeout <= bound - 2
    await clients.close()


async def test_a_client_is_made_once_whoever_asks_and_is_cancelled() -> None:
    clients = Clients(SETTINGS)
    asking = [asyncio.create_task(clients.calls()) for _ in range(3)]
    await asyncio.sleep(0)
    asking[0].cancel()
    _, second, third = await asyncio.gather(*asking, return_exceptions=True)
    assert second is third
    await clients.close()


async def test_all_are_closed_even_if_closing_is_cancelled_at_the_first() -> None:
    clients = Clients(SETTINGS)
    await clients.polls()
    await clients.calls()
    closed: list[int] = []

    class Slow:
        async def close(self) -> None:
            closed.append(len(closed))
            await asyncio.sleep(0)

    for name, task in list(clients._made.items()):
        await task.result().close()
        made: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        made.set_result(Slow())
        clients._made[name] = made  # type: ignore[assignment]
    closing = asyncio.create_task(clients.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert closed == [0, 1]


async def test_closing_ends_a_call_whose_answer_stops_in_the_middle() -> None:
    """The HTTP client leaves who reads an answer's body alone when its connection is closed."""
    begun = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        begun.set()
        await reader.read()
        writer.close()

    async with bounds.within(10), await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        backend = SqsBackend(replace(SETTINGS, endpoint_url=f"http://127.0.0.1:{port}"))
        waiting = asyncio.create_task(backend.ping())
        await begun.wait()
        await backend.disconnect()
        with pytest.raises(BackendClosedError):
            await waiting


async def test_without_a_region_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    clients = Clients(SqsSettings(access_key_id="key", secret_access_key="secret"))
    with pytest.raises(ConfigurationError, match="region"):
        await clients.calls()
    await clients.close()


async def test_a_profile_that_is_not_there_is_a_matter_of_configuration() -> None:
    clients = Clients(SqsSettings(region="us-east-1", profile="no-such-profile"))
    with pytest.raises(ConfigurationError, match="no-such-profile"):
        await clients.calls()
    await clients.close()


@pytest.mark.parametrize("name", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"])
async def test_a_profile_that_is_set_and_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    clients = Clients(SETTINGS)
    assert (await clients.calls()).meta.region_name == SETTINGS.region
    await clients.close()


async def test_no_client_is_made_that_nobody_would_close() -> None:
    clients = Clients(SETTINGS)
    await clients.close()
    with pytest.raises(BackendConnectionError, match="closed"):
        await clients.calls()


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, pinned=(("g", ("#",)),))])
async def test_who_cannot_connect_and_gives_up_leaves_nothing_open(settings: SqsSettings) -> None:
    """An HTTP session that nobody closes says so on the error stream."""
    backend = SqsBackend(replace(settings, endpoint_url="http://127.0.0.1:1"))
    for _ in range(2):
        with pytest.raises(BackendConnectionError):
            await backend.connect()
        session = backend._calls.session
        assert session is not None
        clients = session.transport.broker.clients  # type: ignore[attr-defined]
        for task in clients._made.values():
            assert not task.result()._endpoint.http_session._sessions
    await backend.disconnect()


async def test_a_backend_whose_connecting_fails_on_the_way_in_is_closed() -> None:
    """Nobody else would close it: `async with` ends what it has entered only."""
    backend = SqsBackend(replace(SETTINGS, endpoint_url="http://127.0.0.1:1"))
    with pytest.raises(BackendConnectionError):
        async with backend:
            pass
    assert backend._calls.session is None
