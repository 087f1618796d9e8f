"""What the tests of the services must know of each kind of broker."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import aiormq

from abe_contract_tests import services
from abe_contract_tests.services import RabbitMQShell, Service, rabbitmq_service, redis_service
from abe_contract_tests.services.redis import ask

PROCESSES = {"ABE_TEST_SERVICES": "processes"}
CONTAINERS = {"ABE_TEST_SERVICES": "containers"}
BOUND = 20
"""Seconds for what takes one or two."""


async def _set(event: asyncio.Event) -> None:
    event.set()


class Kind(ABC):
    """What the tests must know of a kind of broker."""

    name: ClassVar[str]
    image: ClassVar[str]
    variable: ClassVar[str]
    versions: ClassVar[tuple[str, ...]]
    make: ClassVar[Callable[..., Service]]

    @abstractmethod
    def answers(self, url: str) -> bool:
        """Return whether the broker serves."""

    @abstractmethod
    def put(self, service: Service, key: str) -> None:
        """Leave something durable."""

    @abstractmethod
    def has(self, url: str, key: str) -> bool:
        """Return whether it is there."""


class RedisKind(Kind):
    name = "redis"
    image = "redis:7"
    variable = "ABE_TEST_REDIS_URL"
    versions = ("Redis ", "Valkey ")
    make = staticmethod(redis_service)

    def answers(self, url: str) -> bool:
        return ask(url, ("PING",)) == ["PONG"]

    def put(self, service: Service, key: str) -> None:
        assert ask(service.url, ("SET", key, "value")) == ["OK"]

    def has(self, url: str, key: str) -> bool:
        return ask(url, ("GET", key)) == ["value"]


class RabbitMQKind(Kind):
    name = "rabbitmq"
    image = "rabbitmq:3"
    variable = "ABE_TEST_RABBITMQ_URL"
    versions = ("RabbitMQ ",)
    make = staticmethod(rabbitmq_service)

    def answers(self, url: str) -> bool:
        return services.RabbitMQ().probe(url).startswith("RabbitMQ ")

    def put(self, service: Service, key: str) -> None:
        asyncio.run(self._put(service, key))

    def has(self, url: str, key: str) -> bool:
        return asyncio.run(self._has(url, key))

    @staticmethod
    async def _put(service: Service, key: str) -> None:
        async with asyncio.timeout(BOUND):
            connection = await aiormq.connect(service.url)
            channel = await connection.channel()
            await channel.queue_declare(key, durable=True, arguments={"x-queue-type": "quorum"})
            await channel.basic_publish(b"value", routing_key=key)
            await connection.close()
            shell = RabbitMQShell(service)
            await shell.sync()
            shell.stop()

    @staticmethod
    async def _has(url: str, key: str) -> bool:
        async with asyncio.timeout(BOUND):
            connection = await aiormq.connect(url)
            try:
                channel = await connection.channel()
                await channel.queue_declare(key, passive=True)
                # Consumed, not fetched: a queue whose leader is being elected looks empty.
                arrived = asyncio.Event()
                await channel.basic_consume(key, lambda _: _set(arrived))
                await arrived.wait()
            except aiormq.exceptions.ChannelNotFoundEntity:
                return False
            finally:
                await connection.close()
            return True


KINDS = {kind.name: kind for kind in (RedisKind(), RabbitMQKind())}
