"""The harness of the RabbitMQ provider."""

from collections.abc import Mapping
from secrets import token_hex
from typing import ClassVar, Final

import aio_pika
from aio_pika.abc import AbstractConnection

from abe.types import MessageQueueBackendProtocol
from abe_backend_rabbitmq import RabbitMQBackend
from abe_contract_tests.harness import Counts, Evidence, Harness, Oracle
from abe_contract_tests.services import RabbitMQShell, Service, rabbitmq_service

_UNREACHABLE: Final = "amqp://guest:guest@127.0.0.1:1/"


class RabbitMQHarness(Harness):
    """A RabbitMQ of the run's own, or the one at ``ABE_TEST_RABBITMQ_URL``."""

    name: ClassVar[str] = "rabbitmq"
    pace: ClassVar[float] = 3.0  # each queue that is made or deleted is a write to the node's disk
    backend: ClassVar[type[MessageQueueBackendProtocol]] = RabbitMQBackend
    evidence: ClassVar[Evidence] = "real broker"

    def __init__(self) -> None:
        self._service: Service | None = None
        self._shell: RabbitMQShell | None = None

    @property
    def service(self) -> Service:
        """The running broker."""
        assert self._service is not None, "start() first"
        return self._service

    @property
    def shell(self) -> RabbitMQShell:
        """The shell beside it."""
        assert self._shell is not None, "start() first"
        return self._shell

    def start(self) -> None:
        service = rabbitmq_service()
        service.start()
        self._service, self._shell = service, RabbitMQShell(service)

    def stop(self) -> None:
        self.shell.stop()
        self.service.stop()

    def environment(self, namespace: str, *, lease: float) -> Mapping[str, str]:
        return {"RABBITMQ_URL": self.service.url, **_queue(namespace, lease)}

    def unreachable(self, namespace: str) -> Mapping[str, str]:
        return {"RABBITMQ_URL": _UNREACHABLE, **_queue(namespace, 1.0)}

    def wrong_credentials(self, namespace: str) -> tuple[Mapping[str, str], str]:
        secret = "swordfish-8061"
        host = self.service.url.partition("://")[2].rpartition("@")[2]
        return {"RABBITMQ_URL": f"amqp://nobody:{secret}@{host}", **_queue(namespace, 1.0)}, secret

    async def oracle(self, namespace: str) -> Oracle:
        return _RabbitMQOracle(self.service.url, self.shell, namespace)

    async def clean(self, namespace: str) -> None:
        # Namespaces that a test made of this one begin with it.
        await self.shell.delete(f"abe:{namespace}")

    def broker_version(self) -> str:
        return self.service.version


class _RabbitMQOracle:
    """Counts by the node itself, and injects by aio-pika."""

    def __init__(self, url: str, shell: RabbitMQShell, namespace: str) -> None:
        self._url = url
        self._shell = shell
        self._prefix = f"abe:{namespace}:"
        self._connection: AbstractConnection | None = None

    async def inject(self, group: str, body: bytes, *, key: str = "injected") -> None:
        await self._inject(group, aio_pika.Message(body), key)

    async def inject_version(self, group: str, body: bytes) -> None:
        await self._inject(
            group, aio_pika.Message(body, headers={"abe-version": 9}, message_id="from-the-future"), "injected"
        )

    async def counts(self, group: str) -> Counts:
        waiting = in_flight = delayed = dead = 0
        for queue in await self._shell.counts(self._prefix):
            name = queue.name.removeprefix(self._prefix)
            held = queue.ready + queue.unacknowledged
            if name == f"queue:{group}":
                waiting, in_flight = queue.ready, queue.unacknowledged
            elif name == f"dead:{group}":
                dead = held
            elif name.startswith("delay:") and name.split(":", 2)[2] == group:
                delayed += held
        return Counts(waiting=waiting, in_flight=in_flight, delayed=delayed, dead=dead)

    async def consumers(self, group: str) -> int:
        name = f"{self._prefix}queue:{group}"
        return sum(queue.consumers for queue in await self._shell.counts(name) if queue.name == name)

    async def connections(self) -> int:
        return await self._shell.connections() - (self._connection is not None)

    async def aclose(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def _inject(self, group: str, message: aio_pika.Message, key: str) -> None:
        """Publish by way of an exchange that leads to this queue alone, so that the key arrives as it would from the real one."""
        if self._connection is None:
            self._connection = await aio_pika.connect(self._url)
        async with self._connection.channel() as channel:
            exchange = await channel.declare_exchange(
                f"{self._prefix}oracle-{token_hex(4)}", aio_pika.ExchangeType.FANOUT
            )
            queue = await channel.get_queue(f"{self._prefix}queue:{group}", ensure=False)
            await queue.bind(exchange)
            await exchange.publish(message, key)
            await exchange.delete()


def _queue(namespace: str, lease: float) -> Mapping[str, str]:
    return {"QUEUE_NAMESPACE": namespace, "QUEUE_LEASE_SECONDS": str(lease)}
