"""Going in, and being refused: what the tests of connections, certificates and rights share."""

import traceback
from contextlib import suppress
from typing import Any

import pytest

from abe.errors import AbeError
from abe_backend_rabbitmq import RabbitMQBackend, RabbitMQSettings
from abe_contract_tests import bounds

SECRET = "swordfish-8061"


async def round_trip(backend: RabbitMQBackend) -> None:
    """Do everything that an application does."""
    await backend.publish("early", {"n": 0})
    await backend.publish("early", {"n": 1}, delay=0.05)
    await backend.declare("g")
    await backend.publish("k", {"n": 2}, delay=0.05)
    async with backend.consume(group="g") as subscription, bounds.within(10):
        first = await subscription.receive()
        await first.nack(0.05)
        found = sorted([await subscription.receive() for _ in range(3)], key=lambda message: message["n"])
        assert [message["n"] for message in found] == [0, 1, 2]
        await found[0].reject("test")
        await found[1].ack()
        await found[2].ack()
        assert await backend.dead_letters("g").replay_all() == 1
        await (await subscription.receive()).reject("again")
    assert len(await backend.dead_letters("g").list()) == 1
    assert await backend.dead_letters("g").purge_all() == 1
    stats = await backend.stats("g")
    assert (stats.waiting, stats.in_flight, stats.delayed, stats.dead) == (0, 0, 0, 0)
    assert await backend.groups() == {"g": ("#",)}
    await backend.ping()
    await backend.delete_group("g")


async def consume(backend: RabbitMQBackend) -> None:
    subscription = backend.consume()
    try:
        await subscription.__aenter__()
    finally:
        with suppress(AbeError):
            await subscription.aclose()


def told(error: BaseException) -> str:
    """Return all that a log shows of an error."""
    return "".join(traceback.format_exception(error)) + repr(error)


async def refusal(kind: type[AbeError], **settings: Any) -> AbeError:
    """Connect, publish and consume, and return why not. It takes no longer than it may."""
    errors: list[AbeError] = []
    backend = RabbitMQBackend(RabbitMQSettings(**settings))
    try:
        for call in (backend.connect(), backend.publish("k", {}), consume(backend)):
            async with bounds.within(4):
                with pytest.raises(AbeError) as caught:
                    await call
            errors.append(caught.value)
    finally:
        await backend.disconnect()
    assert [type(error) for error in errors] == [kind] * 3
    assert not any(SECRET in told(error) for error in errors)
    return errors[0]
