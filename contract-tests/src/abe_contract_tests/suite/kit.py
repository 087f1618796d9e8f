"""A transport without the engine: what its tests send, take and settle with it."""

import itertools
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self, TypeVar

from abe.backends.message_queue.base import (
    DeadLetter,
    Delivery,
    Disposition,
    Envelope,
    Receiver,
    Settlement,
    Transport,
)
from abe.errors import AbeError
from abe_contract_tests.contract import Contract
from abe_contract_tests.suite.steps import LONG_LEASE, until

_T = TypeVar("_T")


class Kit:
    """Transports of the backend under test, and one's own part in what the engine does: ``async with Kit(contract) as kit:``.

    What the engine promises a transport, the kit keeps: batches no larger than it takes, and one `receive` after another. Leases are
    longer than a test, as nothing renews them.
    """

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._stack = AsyncExitStack()
        self._serial = itertools.count()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        async with self._contract.within():
            await self._stack.aclose()

    async def transport(self, **overrides: str) -> Transport:
        """Return a connected transport, closed at the end of the test.

        Args:
            overrides: Environment variables on top of the harness's.
        """
        transport = self._contract.backend(**{"QUEUE_LEASE_SECONDS": LONG_LEASE, **overrides}).make_transport()
        self._stack.push_async_callback(transport.close)  # one that could not be opened is closed too
        async with self._contract.within():
            await transport.open()
        return transport

    async def receiver(self, transport: Transport, group: str = "g", prefetch: int = 1000) -> Receiver:
        """Join a group; the receiver is closed at the end of the test."""
        async with self._contract.within():
            receiver = await transport.subscribe(group, prefetch)
        self._stack.push_async_callback(receiver.close)
        return receiver

    def envelope(
        self,
        key: str = "k",
        *,
        delay: float = 0.0,
        headers: dict[str, str] | None = None,
        body: bytes = b"{}",
        group: str | None = None,
    ) -> Envelope:
        """Return a message with an id of its own; later ones have greater ids."""
        return Envelope(f"id-{next(self._serial):06}", key, body, time.time_ns() // 1_000_000, headers, delay, group)

    def envelopes(self, count: int, key: str = "k", *, delay: float = 0.0) -> list[Envelope]:
        """Return messages that one consumer may have in flight at once, with keys of two words."""
        apart = self._contract.capabilities.ordered_per_key
        return [self.envelope(f"{key}.{number if apart else 'x'}", delay=delay) for number in range(count)]

    async def send(self, transport: Transport, *envelopes: Envelope) -> list[AbeError | None]:
        """Send messages in as many batches as it takes, and return one outcome each."""
        outcomes: list[AbeError | None] = []
        async with self._contract.within():
            for batch in _batches(envelopes, transport.batching.messages):
                outcomes += await transport.send(batch) or [None] * len(batch)
        return outcomes

    async def take(self, receiver: Receiver, count: int) -> list[Delivery]:
        """Receive that many messages, and hold them."""
        taken: list[Delivery] = []
        async with self._contract.within():
            while len(taken) < count:
                taken += await receiver.receive(count - len(taken))
        return taken

    async def drain(self, transport: Transport, receiver: Receiver, count: int) -> list[Delivery]:
        """Receive that many messages, and acknowledge them as they come."""
        drained: list[Delivery] = []
        async with self._contract.within():
            while len(drained) < count:
                deliveries = await receiver.receive(count - len(drained))
                await self.ack(transport, receiver, deliveries)
                drained += deliveries
        return drained

    async def ack(self, transport: Transport, receiver: Receiver, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge messages that are still ours."""
        async with self._contract.within():
            for batch in _batches(deliveries, transport.settling.messages):
                assert not any(await receiver.ack(batch, verify=True))

    async def settle(self, transport: Transport, receiver: Receiver, *settlements: Settlement) -> None:
        """Carry out settlements of messages that are still ours."""
        async with self._contract.within():
            for batch in _batches(settlements, transport.settling.messages):
                assert not any(await receiver.settle(batch))

    async def expect(self, transport: Transport, group: str, **counts: int) -> None:
        """Assert what the group's statistics are, or become where the broker counts approximately."""
        if self._contract.harness.approximate:
            await self.expect_soon(transport, group, **counts)
            return
        async with self._contract.within():
            stats = await transport.stats(group)
        assert {name: getattr(stats, name) for name in counts} == counts

    async def expect_soon(self, transport: Transport, group: str, **counts: int) -> None:
        """Assert what the group's statistics become. A message that moves may be counted in its old place for a moment still."""
        seen: dict[str, int] = {}

        async def is_so() -> bool:
            stats = await transport.stats(group)
            seen.update({name: getattr(stats, name) for name in counts})
            return seen == counts

        try:
            async with self._contract.within():
                await until(is_so)
        except TimeoutError:
            raise AssertionError(f"{seen}, and not {counts}") from None

    async def bury(self, transport: Transport, receiver: Receiver, count: int) -> list[Delivery]:
        """Receive that many messages, and make them dead letters as they come."""
        buried: list[Delivery] = []
        async with self._contract.within():
            while len(buried) < count:
                deliveries = await receiver.receive(count - len(buried))
                await self.settle(transport, receiver, *map(dead, deliveries))
                buried += deliveries
        return buried

    async def letters(self, transport: Transport, group: str = "g") -> list[DeadLetter]:
        """Return all dead letters."""
        async with self._contract.within():
            return [letter async for page in transport.dead_letters(group) for letter in page]

    async def total(self, steps: AsyncGenerator[int]) -> int:
        """Go through the steps of a replay or a purge, and return their sum."""
        async with self._contract.within():
            return sum([count async for count in steps])


def retry(delivery: Delivery, delay: float = 0.0) -> Settlement:
    return Settlement(delivery, Disposition.RETRY, delay=delay)


def release(delivery: Delivery) -> Settlement:
    return Settlement(delivery, Disposition.RELEASE)


def dead(delivery: Delivery, reason: str = "why", error: str = "trace") -> Settlement:
    return Settlement(delivery, Disposition.DEAD, reason=reason, error=error)


def _batches(items: Sequence[_T], size: int) -> Generator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
