"""The harness of the memory backend."""

from collections.abc import Mapping
from typing import ClassVar
from uuid import uuid4

from abe.backends.message_queue.base import Envelope, MonotonicClock
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.backends.message_queue.service.namespaces import Namespace, forget, namespace
from abe.types import MessageQueueBackendProtocol
from abe_contract_tests.harness import Counts, Evidence, Harness, Oracle


class MemoryHarness(Harness):
    """The broker is this process."""

    name: ClassVar[str] = "memory"
    backend: ClassVar[type[MessageQueueBackendProtocol]] = MemoryBackend
    evidence: ClassVar[Evidence] = "in process"
    networked: ClassVar[bool] = False

    def environment(self, namespace: str, *, lease: float) -> Mapping[str, str]:
        return {"QUEUE_NAMESPACE": namespace, "QUEUE_LEASE_SECONDS": str(lease)}

    async def oracle(self, namespace: str) -> Oracle:
        return _MemoryOracle(namespace)

    async def clean(self, namespace: str) -> None:
        forget(namespace)

    def broker_version(self) -> str:
        return "memory"


class _MemoryOracle:
    """Looks into the process's memory, past the transport."""

    def __init__(self, namespace: str) -> None:
        self._name = namespace

    async def inject(self, group: str, body: bytes, *, key: str = "injected") -> None:
        self._put(group, Envelope(f"injected-{uuid4().hex}", key, body, 0))

    async def inject_version(self, group: str, body: bytes) -> None:
        # Nothing is written down in memory, so there is no version to get wrong: what is left is a body that no codec reads.
        self._put(group, Envelope(f"injected-{uuid4().hex}", "injected", b"\xff" + body, 0))

    async def counts(self, group: str) -> Counts:
        space = self._space()
        with space.lock:
            queue = space.queues.get(group)
            if queue is None:
                return Counts(waiting=0, in_flight=0, delayed=0, dead=0)
            expired = len(queue.expired(MonotonicClock().time()))
            return Counts(
                waiting=len(queue.ready) + expired,
                in_flight=len(queue.held) - expired,
                delayed=len(queue.delayed),
                dead=len(queue.dead),
            )

    async def consumers(self, group: str) -> int:
        space = self._space()
        with space.lock:
            queue = space.queues.get(group)
            if queue is None:
                return 0
            return len({*queue.waiting, *(held.owner for held in queue.held.values())})

    async def connections(self) -> int:
        return 0

    async def aclose(self) -> None:
        """There is nothing to disconnect from."""

    def _put(self, group: str, envelope: Envelope) -> None:
        space = self._space()
        now = MonotonicClock().time()
        with space.lock:
            queue = space.queue(group)
            queue.put(envelope, now, now)
            queue.wake()

    def _space(self) -> Namespace:
        return namespace(self._name)
