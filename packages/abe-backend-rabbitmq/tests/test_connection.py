"""Connections and the requests on them, and the addresses that they lead to."""

import asyncio
import inspect
import io
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from rabbitmq_access import SECRET, refusal, round_trip, told

from abe.errors import AbeError, BackendConnectionError, ConfigurationError, PublishRejectedError
from abe_backend_rabbitmq import RabbitMQBackend, RabbitMQSettings
from abe_backend_rabbitmq._connection import Link, run_to_completion
from abe_backend_rabbitmq._control import Control
from abe_contract_tests import bounds
from abe_contract_tests.services import RabbitMQShell, Service

pytestmark = [pytest.mark.xdist_group("rabbitmq-node"), pytest.mark.usefixtures("nothing_left")]


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

    @pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
    @pytest.mark.parametrize("kind", ["channel", "plain"])
    async def test_a_channel_whose_caller_leaves_is_closed_again(
        self, lab: Any, until: Any, kind: str, turns: int
    ) -> None:
        link = Link(lab.settings(), "test")
        connection = await link.get()
        opening = asyncio.create_task(getattr(connection, kind)())
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait([opening])
        if not opening.cancelled():
            await getattr(opening.result(), "native", opening.result()).close()
        await (await connection.plain()).close()  # it was opened after the other, if that was opened at all
        await until(lambda: not any(connection._native.channels.values()))
        await link.close()

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
