"""Queues and exchanges that are deleted underneath are made again."""

import asyncio
import logging
from contextlib import suppress
from typing import Any

import pytest

from abe.backends.message_queue.base import Publication
from abe.errors import AbeError, LeaseLostError
from abe_backend_rabbitmq import RabbitMQBackend
from abe_contract_tests import bounds
from abe_contract_tests.services import RabbitMQShell

pytestmark = pytest.mark.xdist_group("rabbitmq-faults")


class TestDeletedUnderneath:
    @staticmethod
    async def published_until_it_comes(
        backend: RabbitMQBackend, subscription: Any, key: str, payload: dict[str, Any]
    ) -> Any:
        """Publish until the group is there again. (Meanwhile it wants nothing: that is what deleting its queue means.)"""

        async def publish() -> None:
            while True:
                with suppress(AbeError):
                    await backend.publish(key, payload)
                await asyncio.sleep(0.05)

        publishing = asyncio.create_task(publish())
        try:
            while (message := await subscription.receive()) != payload:
                await message.ack()
            return message
        finally:
            publishing.cancel()
            await asyncio.wait([publishing])

    async def test_a_queue_is_made_again_under_its_consumer(
        self, lab: Any, shell: RabbitMQShell, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "abe")
        backend = await lab.backend(groups={"g": ()})
        async with backend.consume(group="g") as subscription, bounds.within(20):
            await backend.publish("k", {"n": 1})
            message = await subscription.receive()
            await (await lab.pika()).queue_delete(lab.names.queue("g"))
            found = await self.published_until_it_comes(backend, subscription, "k", {"n": 2})
            await found.ack()
            with pytest.raises(LeaseLostError):
                await message.nack()
        assert any("deleted underneath" in text for text in caplog.messages), caplog.messages
        assert not [text for text in caplog.messages if "Traceback" in text]

    @pytest.mark.parametrize("deleted_by", ["an operator", "the application"])
    async def test_consumers_of_a_queue_that_another_process_makes_again_at_once_are_served(
        self, lab: Any, deleted_by: str
    ) -> None:
        """RabbitMQ puts them on the new queue by itself, and throws away what that one sends them."""
        backend, other = await lab.backend(groups={"g": ()}), await lab.backend()
        async with backend.consume(group="g") as subscription, bounds.within(20):
            for number in range(6):
                await other.publish("k", {"n": number})
                while (await anext(subscription))["n"] != number:
                    pass
                if deleted_by == "an operator":
                    await (await lab.pika()).queue_delete(lab.names.queue("g"))
                else:
                    await other.delete_group("g")
                await other.declare("g")

    async def test_what_waits_for_its_time_comes_to_the_queue_that_is_made_again(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        await backend.publish_many([Publication("k", {"n": n}, delay=1.0) for n in range(40)])
        await (await lab.pika()).queue_delete(lab.names.queue("g"))
        await asyncio.sleep(1.2)  # all of them fall due, and the queue is not there
        await backend.declare("g")
        async with bounds.within(3), backend.consume(group="g") as subscription:
            assert {(await anext(subscription))["n"] for _ in range(40)} == set(range(40))

    async def test_the_queue_is_deleted_under_a_consumer_while_messages_wait_for_their_time(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        async with backend.consume(group="g") as subscription, bounds.within(10):
            await backend.publish_many([Publication("k", {"n": n}, delay=1.0) for n in range(40)])
            await (await lab.pika()).queue_delete(lab.names.queue("g"))
            assert {(await anext(subscription))["n"] for _ in range(40)} == set(range(40))

    async def test_the_levels_are_deleted_under_a_consumer(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        async with backend.consume(group="g") as subscription, bounds.within(20):
            for number in range(2):
                await backend.publish("k", {"n": number}, delay=0.8)
                assert await anext(subscription) == {"n": number}
                for level in range(4):
                    await (await lab.pika()).queue_delete(lab.names.waiting("g", level))
            await backend.publish("k", {"n": 2}, delay=0.8)
            assert await anext(subscription) == {"n": 2}

    async def test_a_group_that_is_full_when_messages_fall_due_gets_them_when_there_is_room(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()}, max_backlog=5)
        for number in range(5):
            await backend.publish("k", {"n": number})
        for number in range(5, 10):
            await backend.publish("k", {"n": number}, delay=0.2)
        async with backend.consume(group="g", prefetch=1) as subscription, bounds.within(10):
            first = await subscription.receive()
            await asyncio.sleep(1.0)  # those that are due find no room
            await first.ack()
            assert {(await anext(subscription))["n"] for _ in range(9)} == set(range(1, 10))

    async def test_everything_is_made_again(self, lab: Any, shell: RabbitMQShell) -> None:
        backend = await lab.backend()
        async with backend.consume(group="g") as subscription, bounds.within(30):
            await backend.publish("k", {"n": 1})
            assert await subscription.receive() == {"n": 1}
            await shell.delete(f"abe:{lab.namespace}")
            await self.published_until_it_comes(backend, subscription, "k", {"n": 2})
            assert await backend.groups() == {"g": ("#",)}

    async def test_a_consumer_with_patterns_keeps_them(self, lab: Any, shell: RabbitMQShell) -> None:
        backend = await lab.backend()
        async with backend.consume(group="g", keys=["orders.*"]) as subscription, bounds.within(20):
            await (await lab.pika()).queue_delete(lab.names.queue("g"))
            await self.published_until_it_comes(backend, subscription, "orders.made", {"n": 1})
            assert await backend.groups() == {"g": ("orders.*",)}

    async def test_an_exchange_comes_back_with_its_bindings(self, lab: Any) -> None:
        backend = await lab.backend(groups={"g": ()})
        await backend.publish("k", {"n": 1})
        await (await lab.pika()).exchange_delete(lab.names.exchange)
        for number in (2, 3):
            await backend.publish("k", {"n": number})
        async with backend.consume(group="g") as subscription, bounds.within(10):
            assert [(await anext(subscription))["n"] for _ in range(3)] == [1, 2, 3]

    @pytest.mark.parametrize("name", ["later", "delay"])
    async def test_the_exchanges_of_delays_come_back(self, lab: Any, name: str) -> None:
        backend = await lab.backend(groups={"g": ()}, publish_timeout=1.0)
        await backend.publish("k", {"n": 1}, delay=0.1)
        await (await lab.pika()).exchange_delete(getattr(lab.names, name))
        await backend.publish("k", {"n": 2}, delay=0.1)
        async with backend.consume(group="g") as subscription, bounds.within(10):
            while (await anext(subscription))["n"] != 2:
                pass
