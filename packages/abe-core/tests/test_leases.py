"""The lease keeper, on a receiver that does as it is told."""

import asyncio

from engine_doubles import ScriptedReceiver, delivery, numbers

from abe.backends.message_queue.base import Delivery
from abe.backends.message_queue.engine.leases import LeaseKeeper
from abe.errors import BackendConnectionError
from abe.testing import ManualClock


class TestLeaseKeeper:
    async def test_leases_are_renewed_every_third(self, manual_clock: ManualClock) -> None:
        receiver, live = ScriptedReceiver(), [delivery(1), delivery(2)]
        task = asyncio.create_task(LeaseKeeper(receiver, lambda: live, lambda _: None, 30, manual_clock).run())
        await manual_clock.advance(9.9)
        assert receiver.renewed == []
        await manual_clock.advance(30)
        assert receiver.renewed == [[1, 2]] * 3
        task.cancel()

    async def test_it_is_sure_for_half_a_lease_after_the_last_renewal(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        keeper = LeaseKeeper(receiver, lambda: [delivery(1)], lambda _: None, 30, manual_clock)
        task = asyncio.create_task(keeper.run())
        await manual_clock.advance(100)
        assert keeper.sure()
        receiver.failures.extend([BackendConnectionError("gone")] * 100)
        await manual_clock.advance(16)
        assert not keeper.sure()
        receiver.failures.clear()
        await manual_clock.advance(5)
        assert keeper.sure()
        task.cancel()

    async def test_what_is_not_ours_any_more_is_told(self, manual_clock: ManualClock) -> None:
        receiver, lost = ScriptedReceiver(), list[Delivery]()
        receiver.lost = {2}
        live = [delivery(1), delivery(2)]
        task = asyncio.create_task(LeaseKeeper(receiver, lambda: live, lost.extend, 30, manual_clock).run())
        await manual_clock.advance(10)
        assert numbers(lost) == [2]
        task.cancel()

    async def test_where_the_connection_is_the_lease_it_is_always_sure(self, manual_clock: ManualClock) -> None:
        keeper = LeaseKeeper(ScriptedReceiver(), list, lambda _: None, None, manual_clock)
        task = asyncio.create_task(keeper.run())
        await manual_clock.advance(10**6)
        assert keeper.sure()
        task.cancel()
