"""Leases in memory: who gets what a consumer has let run out, and when."""

import asyncio

from abe.backends.message_queue.base import Disposition, Settlement
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import LeaseLostError
from abe.testing import ManualClock
from abe_contract_tests import bounds


class TestLeases:
    async def test_what_a_silent_consumer_held_keeps_its_order_whatever_the_order_it_was_taken_in(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        await memory_backend.declare("g")
        await memory_backend.publish_many([("a", {"n": n}) for n in range(3)])
        silent, other = [await memory_backend.make_transport().subscribe("g", 5) for _ in range(2)]
        first, *_ = await silent.receive(2)
        await silent.settle([Settlement(first, Disposition.RELEASE)])
        await silent.receive(2)
        await manual_clock.advance(31)
        assert [delivery.body for delivery in await other.receive(5)] == [b'{"n":%d}' % n for n in range(3)]

    async def test_a_consumer_that_looks_first_does_not_hide_from_others_what_it_let_run_out(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        await memory_backend.declare("g")
        await memory_backend.publish("a", {"n": 1})
        negligent, other = [await memory_backend.make_transport().subscribe("g", 2) for _ in range(2)]
        await negligent.receive(1)
        async with bounds.within(5):
            looking = asyncio.ensure_future(negligent.receive(1))
            await asyncio.sleep(0)
            coming = asyncio.ensure_future(other.receive(1))
            await manual_clock.advance(31)
            assert [delivery.attempt for delivery in await coming] == [2]
            await negligent.stop()
            assert not await looking

    async def test_a_consumer_whose_lease_has_run_out_gets_what_is_due_in_time(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        await memory_backend.declare("g")
        await memory_backend.publish("a", {"n": 1})
        negligent = await memory_backend.make_transport().subscribe("g", 2)
        await negligent.receive(1)
        await manual_clock.advance(31)
        await memory_backend.publish("a", {"n": 2}, delay=0.5)
        async with bounds.within(5):
            coming = asyncio.ensure_future(negligent.receive(1))
            await asyncio.sleep(0)
            await manual_clock.advance(0.5)
            assert [delivery.body for delivery in await coming] == [b'{"n":2}']

    async def test_what_a_silent_consumer_holds_goes_to_another_when_its_lease_has_run_out(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        await memory_backend.declare("g")
        await memory_backend.publish("a", {"n": 1})
        silent = await memory_backend.make_transport().subscribe("g", 1)
        (delivery,) = await silent.receive(1)
        async with bounds.within(5), memory_backend.consume(group="g") as messages:
            coming = asyncio.ensure_future(anext(messages))
            await manual_clock.advance(29)
            assert not coming.done()
            await manual_clock.advance(1)
            message = await coming
            assert message.attempt == 2
            late = await silent.ack([delivery], verify=True)
            assert isinstance(late[0], LeaseLostError)
            late = await silent.settle([Settlement(delivery, Disposition.DEAD)])
            assert isinstance(late[0], LeaseLostError)
            assert await silent.renew([delivery]) == [delivery]
            await message.ack()
        assert (await memory_backend.stats("g")).dead == 0
