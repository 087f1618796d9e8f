"""What the tests of the services must know of each kind of broker."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import aiormq

from abe_contract_tests import bounds, services
from abe_contract_tests.services import RabbitMQShell, Service, rabbitmq_service, redis_service, sqs_service
from abe_contract_tests.services.redis import ask
from abe_contract_tests.services.sqs import ask as ask_sqs

PROCESSES = {"ABE_TEST_SERVICES": "processes"}
CONTAINERS = {"ABE_TEST_SERVICES": "containers"}
BOUND = 20
"""Seconds for what takes one or two."""
_NAME = 80
"""Characters that the name of a queue has in SQS at most."""


async def _set(event: asyncio.Event) -> None:
    event.set()


class Kind(ABC):
    """What the tests must know of a kind of broker."""

    name: ClassVar[str]
    image: ClassVar[str]
    variable: ClassVar[str]
    versions: ClassVar[tuple[str, ...]]
    make: ClassVar[Callable[..., Service]]
    processes: ClassVar[Mapping[str, str]] = PROCESSES
    """The environment in which it is a private process."""
    durable: ClassVar[bool] = True
    """Whether a broker that was ended has its data when it starts again."""

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
        async with bounds.within(BOUND):
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
        async with bounds.within(BOUND):
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


class SqsKind(Kind):
    name = "sqs"
    image = "motoserver/moto:5.2.5"
    variable = "ABE_TEST_SQS_URL"
    versions = ("moto ",)
    make = staticmethod(sqs_service)
    durable = False

    def answers(self, url: str) -> bool:
        ask_sqs(url, "ListQueues", {})
        return True

    def put(self, service: Service, key: str) -> None:
        ask_sqs(service.url, "CreateQueue", {"QueueName": key[:_NAME]})

    def has(self, url: str, key: str) -> bool:
        return bool(ask_sqs(url, "ListQueues", {"QueueNamePrefix": key[:_NAME]})[0].get("QueueUrls"))


class MiniStackKind(SqsKind):
    name = "ministack"
    versions = ("ministack ",)
    processes = PROCESSES | {"ABE_TEST_SQS_SERVER": "ministack"}


KINDS = {kind.name: kind for kind in (RedisKind(), RabbitMQKind(), SqsKind())}
"""What a broker may be chosen from."""

SERVERS = KINDS | {kind.name: kind for kind in (MiniStackKind(),)}
"""What a private process may be."""
