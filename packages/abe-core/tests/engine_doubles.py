"""Doubles for the tests of the engine's parts: a receiver that does as it is told, and what is made on it."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any

from abe.backends.message_queue.base import Delivery, Metadata, Outcomes, Receiving, Settlement, Settling
from abe.backends.message_queue.engine.inbox import Inbox
from abe.codec import JSONCodec
from abe.errors import AbeError, LeaseLostError
from abe.testing import ManualClock
from abe_contract_tests import bounds


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class ScriptedReceiver:
    """A broker's side of a group that holds what it was given, and notes what it is asked."""

    def __init__(self, *deliveries: Delivery) -> None:
        self.waiting = deque(deliveries)
        self.limits: list[int] = []
        self.acks: list[tuple[list[int], bool]] = []
        self.settled: list[Settlement] = []
        self.renewed: list[list[int]] = []
        self.failures: deque[AbeError] = deque()
        self.lost: set[int] = set()
        self.errors: deque[AbeError] = deque()
        self.more = asyncio.Event()
        self.stopped = False

    async def receive(self, limit: int) -> Sequence[Delivery]:
        self.limits.append(limit)
        while not self.stopped:
            if self.errors:
                raise self.errors.popleft()
            if self.waiting:
                return [self.waiting.popleft() for _ in range(min(limit, len(self.waiting)))]
            self.more.clear()
            await self.more.wait()
        return ()

    def metadata(self, delivery: Delivery) -> Metadata:
        return Metadata(str(delivery.native))

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        self._fail()
        self.acks.append(([delivery.native for delivery in deliveries], verify))
        return self._outcomes(deliveries)

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        self._fail()
        self.settled.extend(settlements)
        return self._outcomes([settlement.delivery for settlement in settlements])

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        self._fail()
        self.renewed.append([delivery.native for delivery in deliveries])
        return [delivery for delivery in deliveries if delivery.native in self.lost]

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        return [delivery for delivery in deliveries if delivery.native in self.lost]

    def _outcomes(self, deliveries: Sequence[Delivery]) -> Outcomes:
        return [LeaseLostError("lost") if delivery.native in self.lost else None for delivery in deliveries]

    async def stop(self) -> None:
        self.stopped = True
        self.more.set()

    async def close(self) -> None:
        """Nothing is left to give back."""

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.popleft()


def delivery(
    number: int, attempt: int = 1, body: bytes = b"{}", fault: str | None = None, uncertain: int = 0
) -> Delivery:
    return Delivery(body, None, attempt, number, fault=fault, uncertain=uncertain)


def numbers(deliveries: Iterable[Delivery]) -> list[int]:
    return sorted(delivery.native for delivery in deliveries)


async def restored() -> None:
    """The group is there again."""


def inbox_on(
    receiver: ScriptedReceiver,
    clock: ManualClock,
    *,
    prefetch: int = 8,
    max_delay: float | None = 60,
    alone: bool = False,
    codec: JSONCodec | None = None,
    left: Callable[[Inbox], object] = lambda _: None,
    restore: Callable[[], Awaitable[None]] = restored,
) -> Inbox:
    return Inbox(
        receiver,
        group="g",
        prefetch=prefetch,
        max_attempts=3,
        max_delay=max_delay,
        lease=30,
        receiving=Receiving(),
        settling=Settling(),
        restore=restore,
        alone=alone,
        codec=codec or JSONCodec(),
        clock=clock,
        close_timeout=1,
        left=left,
    )


async def within(awaitable: Awaitable[Any]) -> Any:
    async with bounds.within(5):
        return await awaitable
