"""Users and their rights, and what is already there."""

import asyncio
import io
import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from rabbitmq_access import SECRET, consume, refusal, round_trip, told

from abe import AsyncLoopConsumer, Reject, Retry
from abe.backends.message_queue.base import Disposition, Settlement
from abe.errors import BackendConnectionError, ConfigurationError, PermissionDeniedError, PublishUnknownError
from abe_backend_rabbitmq import RabbitMQBackend
from abe_contract_tests import bounds
from abe_contract_tests.services import RabbitMQShell

pytestmark = [pytest.mark.xdist_group("rabbitmq-node"), pytest.mark.usefixtures("nothing_left")]

README = Path(__file__).parents[1] / "README.md"


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
