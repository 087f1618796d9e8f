"""Negative probes: using a capability that the backend does not declare must be refused at the call."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from abe.errors import UnsupportedCapabilityError
from abe_contract_tests.contract import Contract


async def _refused(what: str, use: Callable[[], Awaitable[Any]]) -> None:
    try:
        await use()
    except UnsupportedCapabilityError:
        return
    raise AssertionError(
        f"{what} is not declared, and was not refused: declare it, or raise UnsupportedCapabilityError"
    )


async def _groups(contract: Contract) -> None:
    backend = contract.backend()

    async def consume() -> None:
        async with backend.consume(group="another"):
            pass

    async with contract.within():
        await _refused("groups: declare", lambda: backend.declare("another"))
        await _refused("groups: consume", consume)


async def _key_patterns(contract: Contract) -> None:
    backend = contract.backend()

    async def consume() -> None:
        async with backend.consume(keys=["order.*"]):
            pass

    async with contract.within():
        await _refused("key_patterns: declare", lambda: backend.declare(keys=["order.*"]))
        await _refused("key_patterns: consume", consume)


async def _dead_letter(contract: Contract) -> None:
    backend = contract.backend()

    async def look() -> None:
        await backend.dead_letters().list()

    async with contract.within():
        await _refused("dead_letter", look)


async def _max_delay(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        await backend.declare()
        await _refused("max_delay: publish", lambda: backend.publish("order.created", {"n": 1}, delay=0.05))
        await backend.publish("order.created", {"n": 2})
        async with backend.consume() as subscription:
            message = await subscription.receive()
            assert message == {"n": 2}, f"the refused message was published all the same: {message}"
            await _refused("max_delay: nack", lambda: message.nack(delay=0.05))


async def _publish_dedup(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        await backend.declare()
        await backend.publish("order.created", {"n": 1}, id="twice")
        await backend.publish("order.created", {"n": 1}, id="twice")
        await backend.publish("order.created", {"n": 2}, id="last")
        seen: list[str] = []
        async with backend.consume() as subscription:
            while "last" not in seen or seen.count("twice") < 2:
                message = await subscription.receive()
                seen.append(message.id)
                await message.ack()
                # A broker that keeps no order may be late with it; one that keeps order has dropped it.
                dropped = "last" in seen and seen.count("twice") < 2 and contract.declares("ordered")
                assert not dropped, "publish_dedup is not declared, and the same id published again was dropped"


async def _nothing_to_refuse(contract: Contract) -> None:
    """Do nothing: no call uses this capability, which is only a promise."""


PROBES: Final[Mapping[str, Callable[[Contract], Awaitable[None]]]] = {
    "groups": _groups,
    "key_patterns": _key_patterns,
    "ordered": _nothing_to_refuse,
    "ordered_per_key": _nothing_to_refuse,
    "spurious_duplicates": _nothing_to_refuse,
    "dead_letter": _dead_letter,
    "max_delay": _max_delay,
    "lease": _nothing_to_refuse,
    "redelivery_bound": _nothing_to_refuse,
    "silence_bound": _nothing_to_refuse,
    "publish_dedup": _publish_dedup,
    "max_payload_bytes": _nothing_to_refuse,
    "durability": _nothing_to_refuse,
}
