"""The harness of the Redis provider."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, cast

from redis.asyncio import Redis

from abe.types import MessageQueueBackendProtocol
from abe_backend_redis import RedisBackend
from abe_contract_tests.harness import Counts, Evidence, Harness, Oracle
from abe_contract_tests.services import Service, redis_service

_RELEASED: Final = "released"
"""The consumer that owns released entries until another consumer claims them."""
_GROUP: Final = "group"
"""The consumer group of every stream."""

_UNREACHABLE: Final = "redis://127.0.0.1:1/0"


class RedisHarness(Harness):
    """A Redis for this run, or the one at ``ABE_TEST_REDIS_URL``."""

    name: ClassVar[str] = "redis"
    backend: ClassVar[type[MessageQueueBackendProtocol]] = RedisBackend
    evidence: ClassVar[Evidence] = "real broker"

    def __init__(self) -> None:
        self._service: Service | None = None

    @property
    def service(self) -> Service:
        """The running broker."""
        assert self._service is not None, "start() first"
        return self._service

    def start(self) -> None:
        service = redis_service()
        service.start()
        self._service = service

    def stop(self) -> None:
        self.service.stop()

    def environment(self, namespace: str, *, lease: float) -> Mapping[str, str]:
        return {"REDIS_URL": self.service.url, **_queue(namespace, lease)}

    def unreachable(self, namespace: str) -> Mapping[str, str]:
        return {"REDIS_URL": _UNREACHABLE, **_queue(namespace, 1.0)}

    def wrong_credentials(self, namespace: str) -> tuple[Mapping[str, str], str]:
        secret = "swordfish-8061"
        host = self.service.url.partition("://")[2].rpartition("@")[2]
        return {"REDIS_URL": f"redis://nobody:{secret}@{host}", **_queue(namespace, 1.0)}, secret

    async def oracle(self, namespace: str) -> Oracle:
        return _RedisOracle(self.service.url, namespace)

    async def clean(self, namespace: str) -> None:
        async with _client(self.service.url) as client:
            keys = [key async for key in client.scan_iter(match=f"{{{namespace}}}:*", count=1_000)]
            if keys:
                await client.unlink(*keys)

    def broker_version(self) -> str:
        return self.service.version


class _RedisOracle:
    """Looks at the provider's keys with redis-py. Every key begins with ``{namespace}``, so that a cluster keeps them together."""

    def __init__(self, url: str, namespace: str) -> None:
        self._client: Any = _client(url)
        self._prefix = f"{{{namespace}}}"

    async def inject(self, group: str, body: bytes, *, key: str = "injected") -> None:
        await self._client.xadd(f"{self._prefix}:queue:{group}", {"p": body, "k": key})

    async def inject_version(self, group: str, body: bytes) -> None:
        metadata = '[9,"from-the-future","injected",0]'
        await self._client.xadd(f"{self._prefix}:queue:{group}", {"m": metadata, "p": body})

    async def counts(self, group: str) -> Counts:
        stream = f"{self._prefix}:queue:{group}"
        length, held = 0, 0
        if await self._client.exists(stream):
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.xpending(stream, _GROUP)
                pipe.xlen(stream)
                pending, length = await pipe.execute()
            released = (entry["pending"] for entry in pending["consumers"] if entry["name"] == _RELEASED.encode())
            held = pending["pending"] - sum(map(int, released))
        return Counts(
            waiting=length - held,
            in_flight=held,
            delayed=await self._client.zcard(f"{self._prefix}:delayed:{group}"),
            dead=await self._client.xlen(f"{self._prefix}:dead:{group}"),
        )

    async def consumers(self, group: str) -> int:
        found = await self._client.xinfo_consumers(f"{self._prefix}:queue:{group}", _GROUP)
        return sum(consumer["name"] != _RELEASED.encode() for consumer in found)

    async def connections(self) -> int:
        own = await self._client.client_id()
        return sum(int(client["id"]) != own for client in await self._client.client_list())

    async def aclose(self) -> None:
        await self._client.aclose()


def _client(url: str) -> Any:
    # One connection: the oracle's questions come one after the other, and `connections` leaves out exactly this one.
    return cast("Any", Redis).from_url(url, single_connection_client=True)


def _queue(namespace: str, lease: float) -> Mapping[str, str]:
    return {"QUEUE_NAMESPACE": namespace, "QUEUE_LEASE_SECONDS": str(lease)}
