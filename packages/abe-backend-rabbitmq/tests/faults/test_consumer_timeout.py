"""The broker takes a message from a consumer that holds it for long."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from abe.errors import LeaseLostError
from abe_contract_tests import bounds
from abe_contract_tests.services import RabbitMQShell

pytestmark = pytest.mark.xdist_group("rabbitmq-faults")


class TestConsumerTimeout:
    @pytest.fixture
    async def impatient(self, shell: RabbitMQShell) -> AsyncIterator[None]:
        """The node gives consumers 1.5 s, and looks at the clock ten times a second."""
        get = "{ok, T} = application:get_env(rabbit, consumer_timeout), {ok, I} = application:get_env(rabbit, channel_tick_interval), "
        before = await shell.evaluate(f'{get} iolist_to_binary(io_lib:format("~w ~w", [T, I])).')
        put = (
            "application:set_env(rabbit, consumer_timeout, %s), application:set_env(rabbit, channel_tick_interval, %s)."
        )
        await shell.evaluate(put % (1500, 100))
        yield
        await shell.evaluate(put % tuple(before.split()))

    async def test_it_is_warned_of_once_before_the_broker_loses_patience(
        self, lab: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "abe.rabbitmq")
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        transport._broker.consumer_timeout = 1.0
        receiver = await transport.subscribe("g", 10)
        try:
            await transport.send(lab.envelopes(2))
            started = asyncio.get_running_loop().time()
            found: list[Any] = []
            async with bounds.within(5):
                while len(found) < 2:
                    found += await receiver.receive(2)
                for each in found:
                    each.begun = True
                while not caplog.messages:  # noqa: ASYNC110 - a log sets no event
                    await asyncio.sleep(0.01)
                assert 0.7 < asyncio.get_running_loop().time() - started < 2.0 * bounds.slowness(started)
                await asyncio.sleep(0.5)  # nothing more is said of it
            assert len(caplog.messages) == 1
            assert "consumer_timeout" in caplog.messages[0]
            assert "'g'" in caplog.messages[0]
            assert not any(await receiver.ack(found, verify=True))
        finally:
            await receiver.close()

    async def test_who_settles_in_time_is_not_warned(self, lab: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING, "abe.rabbitmq")
        transport = await lab.transport()
        await transport.declare("g", None, change=True)
        transport._broker.consumer_timeout = 0.5
        receiver = await transport.subscribe("g", 10)
        loop = asyncio.get_running_loop()
        until = loop.time() + 1.5
        try:
            while loop.time() < until:
                await transport.send(lab.envelopes(1))
                [delivery] = await receiver.receive(1)
                delivery.begun = True
                await asyncio.sleep(0.1)  # the handler
                await receiver.ack([delivery], verify=False)
        finally:
            await receiver.close()
        assert caplog.messages == []

    async def test_when_the_broker_loses_patience_the_message_comes_again_and_the_subscription_goes_on(
        self, lab: Any, impatient: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "abe")
        backend = await lab.backend(groups={"g": ()})
        for number in range(3):
            await backend.publish("k", {"n": number})
        async with backend.consume(group="g") as subscription, bounds.within(15):
            slow = await subscription.receive()
            async with bounds.within(8):
                while not slow.lease_lost:  # noqa: ASYNC110 - the engine notices, and sets no event of ours
                    await asyncio.sleep(0.02)
            with pytest.raises(LeaseLostError):
                await slow.nack()
            found = [await subscription.receive() for _ in range(3)]
            assert sorted((message["n"], message.attempt) for message in found) == [(0, 1), (1, 1), (2, 1)]
            for message in found:
                await message.ack()
        assert (await backend.stats("g")).waiting == 0
        assert any("timed out" in text for text in caplog.messages), caplog.messages

    async def test_what_waits_for_a_slow_handler_is_no_attempt_and_goes_to_it_in_the_end(
        self, lab: Any, impatient: None
    ) -> None:
        backend = await lab.backend(groups={"g": ()})
        await asyncio.gather(*(backend.publish("k", {"n": number}) for number in range(24)))
        handled: Counter[int] = Counter()
        attempts: set[int] = set()
        async with backend.consume(group="g") as subscription, bounds.within(60):
            while len(handled) < 24:
                message = await subscription.receive()
                attempts.add(message.attempt)
                await asyncio.sleep(0.2)  # the handler: twenty of them take longer than the node gives
                with suppress(LeaseLostError):
                    await message.ack()
                    handled[message["n"]] += 1
        assert attempts == {1}
        assert set(handled.values()) == {1}
        stats = await backend.stats("g")
        assert (stats.waiting, stats.dead) == (0, 0)

    async def test_a_handler_that_takes_longer_than_the_node_gives_handles_its_message_all_the_same(
        self, lab: Any, impatient: None, until: Callable[..., Awaitable[None]]
    ) -> None:
        backend = await lab.backend(groups={"g": ()})
        await backend.publish("k", {"n": 1})
        runs = 0
        async with backend.consume(group="g", max_attempts=2) as subscription, bounds.within(60):
            async for message in subscription:
                if message["n"] == 2:
                    break
                runs += 1
                await until(lambda message=message: message.lease_lost)
                if runs == 1:
                    await backend.publish("k", {"n": 2})
        assert runs <= 2  # the second was in the buffer when the first was done
        async with bounds.within(10):
            while (await backend.stats("g")).waiting != 1:  # noqa: ASYNC110 - the second message is given back
                await asyncio.sleep(0.05)
        assert (await backend.stats("g")).dead == 0
