"""Groups and their queues: made whole, and made again when others delete them."""

import asyncio
import json
from typing import Any

import pytest

from abe.errors import BackendConnectionError
from abe_backend_sqs._transport import SqsTransport
from abe_contract_tests import bounds

_DAYS_14 = str(14 * 86_400)


async def test_a_queue_has_its_attributes_from_the_beginning(lab: Any) -> None:
    """One that is made, and not described because the process ends there, would lose messages after four days."""
    async with bounds.within(15):
        await (await lab.transport()).declare("g", None, change=False)
    made = {request["QueueName"]: request.get("Attributes", {}) for request in lab.gate.requests("CreateQueue")}
    queue = next(attributes for name, attributes in made.items() if "-group-g" in name)
    dead = next(attributes for name, attributes in made.items() if "-dead-g" in name)
    assert queue["MessageRetentionPeriod"] == dead["MessageRetentionPeriod"] == _DAYS_14
    assert json.loads(queue["RedrivePolicy"])["maxReceiveCount"] == 1000
    assert not lab.gate.requests("SetQueueAttributes")


async def test_one_that_another_process_made_with_another_lease_is_used(lab: Any) -> None:
    async with bounds.within(15):
        first, second = await lab.transport(lease=30), await lab.transport(lease=60)
        hurry = asyncio.gather(first.declare("g", None, change=False), second.declare("g", None, change=False))
        await hurry
        assert set(await first.groups()) == set(await second.groups()) == {"g"}


async def test_a_lost_queue_of_dead_letters_is_made_again(lab: Any) -> None:
    async with bounds.within(20):
        backend = await lab.backend()
        async with backend.consume(group="g") as messages:
            await lab.ask("delete_queue", QueueUrl=await lab.url("dead", "g"))
            await backend.publish("k", {"n": 1})
            await (await messages.receive()).reject("no")
        assert [letter.reason for letter in await backend.dead_letters("g").list()] == ["no"]


async def test_a_group_that_another_process_deleted_is_made_again(lab: Any) -> None:
    async with bounds.within(20):
        one, other = await lab.backend(), await lab.backend()
        await one.declare("g")
        await other.declare("g")
        await other.delete_group("g")
        await one.declare("g")
        await one.publish("k", {"n": 1})
        assert (await other.stats("g")).waiting == 1


async def test_a_group_that_is_made_again_keeps_its_patterns(lab: Any) -> None:
    async with bounds.within(20):
        transport: SqsTransport = await lab.transport()
        await transport.declare("g", ("order.#",), change=True)
        await lab.ask("delete_queue", QueueUrl=await lab.url("group", "g"))
        transport.broker.groups.forget()
        with pytest.raises(BackendConnectionError):  # the address that it knew is found out to be wrong
            await transport.declare("g", ("stale",), change=False)
        await transport.declare("g", ("stale",), change=False)
        assert await transport.groups() == {"g": ("order.#",)}


async def test_a_group_that_others_made_again_keeps_their_patterns(lab: Any) -> None:
    async with bounds.within(20):
        one, other = await lab.transport(), await lab.transport()
        await one.declare("g", ("a.#",), change=True)
        await other.declare("g", ("c.#",), change=True)
        await one.declare("g", ("a.#",), change=False)
        assert await one.groups() == {"g": ("c.#",)}


async def test_pinned_groups_do_not_keep_open_from_finding_out_that_nobody_answers(lab: Any) -> None:
    transport = SqsTransport(lab.settings(endpoint_url="http://127.0.0.1:1", pinned=(("g", ("#",)),)))
    async with bounds.within(15):
        with pytest.raises(BackendConnectionError):
            await transport.open()
        await transport.close()
