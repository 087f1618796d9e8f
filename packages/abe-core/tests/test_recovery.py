"""How an inbox goes on: after connections that are lost, groups that are deleted, and transports that misbehave."""

import asyncio
from collections import deque
from collections.abc import Collection
from typing import Any

import pytest
from engine_doubles import ScriptedReceiver, delivery, inbox_on, numbers, turns, within

from abe.backends.message_queue.base import Delivery
from abe.errors import BackendConnectionError, GroupMissingError, LeaseLostError, PermissionDeniedError
from abe.testing import ManualClock


class TestRecovery:
    async def test_a_fault_in_the_transport_does_not_end_the_group(
        self, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        receiver = ScriptedReceiver()
        fault: Any = KeyError("a fault")
        receiver.errors.append(fault)
        receiver.waiting.append(delivery(1))
        inbox = inbox_on(receiver, manual_clock)
        waiting = asyncio.create_task(inbox.receive())
        await turns()
        await manual_clock.advance(5)
        assert (await within(waiting)).id == "1"
        assert "a bug of the provider" in caplog.text
        await within(inbox.close())

    async def test_a_group_that_was_deleted_is_made_again_whatever_goes_wrong_with_that(
        self, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        faults: deque[Exception] = deque([KeyError("a fault"), BackendConnectionError("away")])

        async def restore() -> None:
            if faults:
                raise faults.popleft()

        receiver = ScriptedReceiver()
        receiver.errors.extend([GroupMissingError("gone")] * 3)
        receiver.waiting.append(delivery(1))
        inbox = inbox_on(receiver, manual_clock, restore=restore)
        waiting = asyncio.create_task(inbox.receive())
        await turns()
        await manual_clock.advance(20)
        assert (await within(waiting)).id == "1"
        assert not faults
        assert "a bug of the provider" in caplog.text
        await within(inbox.close())

    async def test_a_group_whose_making_is_refused_for_good_ends_the_subscription(
        self, manual_clock: ManualClock
    ) -> None:
        async def restore() -> None:
            raise PermissionDeniedError("no")

        receiver = ScriptedReceiver()
        receiver.errors.append(GroupMissingError("gone"))
        inbox = inbox_on(receiver, manual_clock, restore=restore)
        with pytest.raises(PermissionDeniedError):
            await within(inbox.receive())
        await within(inbox.close())

    async def test_a_receiver_that_recovers_keeps_what_has_a_settlement_on_its_way(
        self, manual_clock: ManualClock
    ) -> None:
        receiver = ScriptedReceiver(delivery(1), delivery(2))
        recovered: list[list[int]] = []

        async def recover(deliveries: Collection[Delivery]) -> Collection[Delivery]:
            recovered.append(numbers(deliveries))
            return []

        receiver.recover = recover  # type: ignore[method-assign]
        inbox = inbox_on(receiver, manual_clock)
        message = await within(inbox.receive())
        receiver.failures.extend([BackendConnectionError("gone")] * 2)
        receiver.errors.append(BackendConnectionError("gone"))
        receiver.more.set()
        settling = asyncio.create_task(message.nack(1))
        await manual_clock.advance(5)
        await within(settling)
        assert recovered == [[1, 2]]
        await inbox.close()

    async def test_a_lost_connection_is_recovered_and_what_was_lost_is_known(
        self, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        receiver = ScriptedReceiver(delivery(1), delivery(2))
        inbox = inbox_on(receiver, manual_clock)
        first, second = await within(inbox.receive()), await within(inbox.receive())
        receiver.lost = {1}
        receiver.errors.append(BackendConnectionError("gone"))
        receiver.more.set()
        await turns()
        receiver.waiting.append(delivery(3))
        await manual_clock.advance(5)
        assert (await within(inbox.receive())).id == "3"
        assert (first.lease_lost, second.lease_lost) == (True, False)
        with pytest.raises(LeaseLostError):
            await first.ack()
        await within(second.ack())
        await inbox.close()

    async def test_a_permanent_error_reaches_everybody_who_waits(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        inbox = inbox_on(receiver, manual_clock)
        waiting = [asyncio.create_task(inbox.receive()) for _ in range(3)]
        await turns()
        receiver.errors.append(PermissionDeniedError("no"))
        receiver.more.set()
        results = await within(asyncio.gather(*waiting, return_exceptions=True))
        assert all(isinstance(result, PermissionDeniedError) for result in results)
        await inbox.close()
