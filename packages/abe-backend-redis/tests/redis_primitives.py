"""Settlements, and looks at a server, that the tests share."""

from collections.abc import AsyncGenerator

from abe.backends.message_queue.base import DeadLetter, Delivery, Disposition, Settlement
from abe_backend_redis._transport import RedisTransport


def retry(delivery: Delivery, delay: float = 0.0) -> Settlement:
    return Settlement(delivery, Disposition.RETRY, delay=delay)


def release(delivery: Delivery) -> Settlement:
    return Settlement(delivery, Disposition.RELEASE)


def dead(delivery: Delivery, reason: str = "why", error: str = "trace") -> Settlement:
    return Settlement(delivery, Disposition.DEAD, reason=reason, error=error)


async def letters_of(transport: RedisTransport, group: str = "g") -> list[DeadLetter]:
    return [letter async for page in transport.dead_letters(group) for letter in page]


async def total(steps: AsyncGenerator[int]) -> int:
    return sum([count async for count in steps])
