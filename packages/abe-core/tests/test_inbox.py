"""The inbox: what it takes in, hands out and gives back, within its bound."""

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import pytest
from engine_doubles import ScriptedReceiver, delivery, inbox_on, turns, within

from abe.backends.message_queue.base import Delivery, Disposition, Outcomes, Settlement
from abe.backends.message_queue.engine.inbox import Inbox
from abe.codec import JSONCodec
from abe.errors import BackendClosedError, BackendConnectionError, LeaseLostError, PermissionDeniedError
from abe.testing import ManualClock


class TestSuspects:
    async def test_a_suspect_is_given_back_before_what_is_in_hand_can_kill_it_and_what_came_before_it_is_handed_out(
        self, manual_clock: ManualClock
    ) -> None:
        receiver = ScriptedReceiver(delivery(1), delivery(2), delivery(3, attempt=4), delivery(4))
        inbox = inbox_on(receiver, manual_clock, prefetch=20)
        first = await within(inbox.receive())
        await turns()
        assert [(item.delivery.native, item.disposition) for item in receiver.settled] == [
            (3, Disposition.RELEASE),
            (4, Disposition.RELEASE),
        ]
        assert receiver.stopped, "it must not come back here"
        assert first.id == "1"
        assert (await within(inbox.receive())).id == "2"
        with pytest.raises(BackendClosedError):
            await within(inbox.receive())
        assert inbox.changing
        await within(inbox.close())

    async def test_uncertain_attempts_bury_nothing_unless_a_try_with_nothing_else_in_hand_is_recorded(
        self, manual_clock: ManualClock
    ) -> None:
        unsure = [delivery(number, attempt=9, uncertain=8) for number in range(1, 4)]
        unsure[1].alone, unsure[2].alone = 1, 0
        receiver = ScriptedReceiver(*unsure)
        inbox = inbox_on(receiver, manual_clock, alone=True, prefetch=1)
        message = await within(inbox.receive())
        assert message.id == "3", "its try has not begun yet"
        await turns(60)
        assert [(item.delivery.native, item.disposition, item.alone) for item in receiver.settled] == [
            (1, Disposition.RELEASE, True),
            (2, Disposition.DEAD, False),
        ]
        assert (unsure[0].attempt, unsure[0].uncertain) == (4, 3), "what is beyond the limit says nothing more"
        await within(inbox.close())

    async def test_a_suspect_among_the_last_ones_of_the_receiver_is_given_back_as_it_is(
        self, manual_clock: ManualClock
    ) -> None:
        class Holding(ScriptedReceiver):
            async def stop(self) -> Sequence[Delivery]:
                await super().stop()
                return [delivery(7, attempt=9, uncertain=8), delivery(8, attempt=4), delivery(9)]

        receiver = Holding(delivery(1))
        inbox = inbox_on(receiver, manual_clock, prefetch=20)
        assert (await within(inbox.receive())).id == "1"
        await within(inbox.halt())
        assert (await within(inbox.receive())).id == "9"
        await turns()
        assert [(item.delivery.native, item.disposition, item.alone) for item in receiver.settled] == [
            (7, Disposition.RELEASE, False),
            (8, Disposition.RELEASE, False),
        ]
        await within(inbox.close())

    async def test_the_next_one_that_is_tried_alone_is_asked_for_when_a_handler_is_free(
        self, manual_clock: ManualClock
    ) -> None:
        """It must not wait here: its try is recorded when it comes."""
        receiver = ScriptedReceiver(delivery(1, attempt=4), delivery(2, attempt=4))
        inbox = inbox_on(receiver, manual_clock, alone=True, prefetch=1)
        message = await within(inbox.receive())
        await within(message.ack())
        await turns(60)
        assert [each.native for each in receiver.waiting] == [2]
        assert (await within(inbox.receive())).id == "2"
        await within(inbox.close())

    async def test_failures_alone_make_a_message_dead(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver(delivery(1, attempt=3, uncertain=1), delivery(2, attempt=3))
        inbox = inbox_on(receiver, manual_clock, prefetch=2)
        for _ in range(2):
            await within((await within(inbox.receive())).nack(delay=0))
        assert [(item.delivery.native, item.disposition) for item in receiver.settled] == [
            (1, Disposition.RETRY),
            (2, Disposition.DEAD),
        ]
        await within(inbox.close())

    async def test_when_settling_is_refused_for_good_everybody_is_told_and_nothing_more_is_handed_out(
        self, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        receiver = ScriptedReceiver(*(delivery(number) for number in range(4)))
        inbox = inbox_on(receiver, manual_clock)
        message = await within(inbox.receive())
        receiver.failures.append(PermissionDeniedError("no right to settle"))
        message._source.ack_soon(message)  # type: ignore[attr-defined]
        await turns()
        assert inbox.take() is None
        with pytest.raises(PermissionDeniedError):
            await within(inbox.receive())
        assert "refuses to settle" in caplog.text
        await within(inbox.close())


class TestInbox:
    async def test_what_could_not_be_settled_in_its_time_is_recovered(self, manual_clock: ManualClock) -> None:
        """A broker may not hand out to us what it counts as ours."""

        class Failing(ScriptedReceiver):
            held: list[list[int]]

            async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
                raise BackendConnectionError("no writes now")

            async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
                self.held.append([each.native for each in deliveries])
                self.waiting.append(delivery(1, attempt=2))
                return ()

        receiver = Failing(delivery(1), delivery(2))
        receiver.held = []
        inbox = inbox_on(receiver, manual_clock, prefetch=4)
        first = await within(inbox.receive())
        acking = asyncio.create_task(first.ack())
        for _ in range(40):
            await manual_clock.advance(1)
        with pytest.raises(BackendConnectionError):
            await within(acking)
        assert (await within(inbox.receive())).id == "2"
        receiver.waiting.append(delivery(3))
        receiver.more.set()
        await manual_clock.advance(5)
        assert (await within(inbox.receive())).id == "3"
        receiving = asyncio.create_task(inbox.receive())
        await manual_clock.advance(5)
        again = await within(receiving)
        assert (again.id, again.attempt) == ("1", 2)
        assert receiver.held == [[2, 3]]
        await within(inbox.close())

    async def test_a_message_that_closing_gave_back_is_known_to_be_lost(self, manual_clock: ManualClock) -> None:
        inbox = inbox_on(ScriptedReceiver(delivery(1), delivery(2)), manual_clock)
        first, second = await within(inbox.receive()), await within(inbox.receive())
        await within(first.ack())
        assert not second.lease_lost
        await within(inbox.close())
        assert second.lease_lost, "another consumer has it, or will get it"
        for _ in range(2):
            with pytest.raises(LeaseLostError):
                await second.ack()
        assert not first.lease_lost, "it was settled"

    async def test_an_ack_while_closing_gives_the_message_back_fails_each_time(self, manual_clock: ManualClock) -> None:
        class Slow(ScriptedReceiver):
            going_on = asyncio.Event()

            async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
                await self.going_on.wait()
                return await super().settle(settlements)

        receiver = Slow(delivery(1))
        inbox = inbox_on(receiver, manual_clock)
        message = await within(inbox.receive())
        closing = asyncio.create_task(inbox.close())
        await turns(20)
        with pytest.raises(LeaseLostError):
            await message.ack()
        receiver.going_on.set()
        await within(closing)
        assert [item.disposition for item in receiver.settled] == [Disposition.RELEASE]
        with pytest.raises(LeaseLostError):
            await message.ack()

    async def test_whatever_a_codec_raises_concerns_that_message(self, manual_clock: ManualClock) -> None:
        class Codec(JSONCodec):
            def decode(self, body: bytes) -> dict[str, Any]:
                if body == b"bad":
                    raise KeyError("secret")
                return super().decode(body)

        receiver = ScriptedReceiver(delivery(1, body=b"bad"), delivery(2))
        inbox = inbox_on(receiver, manual_clock, codec=Codec())
        assert (await within(inbox.receive())).id == "2"
        await turns()
        assert [(item.delivery.native, item.reason) for item in receiver.settled] == [(1, "undecodable")]
        assert "secret" not in receiver.settled[0].error
        await within(inbox.close())

    async def test_closing_takes_its_time_and_no_more_whatever_the_broker_does(self, manual_clock: ManualClock) -> None:
        class Silent(ScriptedReceiver):
            async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
                await asyncio.Event().wait()
                return ()

            async def close(self) -> None:
                await asyncio.Event().wait()

        inbox = inbox_on(Silent(delivery(1)), manual_clock)
        await within(inbox.receive())
        loop = asyncio.get_running_loop()
        began = loop.time()
        await within(inbox.close(0.2))
        assert loop.time() - began >= 0.2
        assert inbox.closed

    async def test_what_is_settled_after_closing_failed_is_told_so_and_the_broker_is_left_alone(
        self, manual_clock: ManualClock
    ) -> None:
        class Silent(ScriptedReceiver):
            async def receive(self, limit: int) -> Sequence[Delivery]:
                return await super().receive(limit) if self.waiting else await self._never()

            async def stop(self) -> None:
                await self._never()

            async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
                return await self._never()

            async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
                return await self._never()

            async def _never(self) -> Any:
                await asyncio.Event().wait()

        before = asyncio.all_tasks()
        left = list[Inbox]()
        inbox = inbox_on(Silent(*map(delivery, range(6))), manual_clock, left=left.append)
        message, other = await within(inbox.receive()), await within(inbox.receive())
        await turns()
        stopping = asyncio.create_task(inbox.stop())
        await within(inbox.close(0.2))
        assert left == [inbox]
        with pytest.raises(LeaseLostError, match="closed"):
            await within(message.ack())
        with pytest.raises(LeaseLostError, match="closed"):
            await within(other.nack(0))
        await within(stopping)
        assert asyncio.all_tasks() == before, "nothing goes on behind its back"

    async def test_a_receiver_that_fails_to_close_is_not_kept_in_the_list(self, manual_clock: ManualClock) -> None:
        class Bad(ScriptedReceiver):
            async def close(self) -> None:
                raise ZeroDivisionError

        left = list[Inbox]()
        inbox = inbox_on(Bad(), manual_clock, left=left.append)
        with pytest.raises(ZeroDivisionError):
            await within(inbox.close())
        assert left == [inbox]

    async def test_it_holds_no_more_than_the_prefetch(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver(*map(delivery, range(100)))
        inbox = inbox_on(receiver, manual_clock)
        await turns()
        assert len(receiver.waiting) == 92
        assert max(receiver.limits) <= 4, "half of the bound at a time"
        message = await within(inbox.receive())
        await turns()
        assert len(receiver.waiting) == 92, "what is handled counts too"
        await within(message.ack())
        for _ in range(3):
            await within((await within(inbox.receive())).ack())
        await turns()
        assert len(receiver.waiting) < 92
        await inbox.close()

    async def test_one_who_settles_nothing_gets_as_many_as_the_prefetch_however_they_arrive(
        self, manual_clock: ManualClock
    ) -> None:
        receiver = ScriptedReceiver()
        inbox = inbox_on(receiver, manual_clock, prefetch=8)
        for number in range(8):
            receiver.waiting.append(delivery(number))
            receiver.more.set()
            await within(inbox.receive())
        receiver.waiting.append(delivery(8))
        receiver.more.set()
        await turns()
        assert len(receiver.waiting) == 1, "the ninth is over the bound"
        await inbox.close()

    async def test_it_makes_no_task_for_a_message(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver(*map(delivery, range(50)))
        inbox = inbox_on(receiver, manual_clock, prefetch=100)
        await turns()
        before = asyncio.all_tasks()
        for _ in range(50):
            await within(inbox.receive())
        assert asyncio.all_tasks() == before
        await inbox.close()

    async def test_what_cannot_be_read_or_killed_its_consumers_even_alone_is_buried_and_never_handed_out(
        self, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        bad = [delivery(1, body=b"\x09"), delivery(2, fault="unknown version 9"), delivery(3, attempt=5)]
        receiver = ScriptedReceiver(*bad, delivery(4))
        inbox = inbox_on(receiver, manual_clock)
        assert (await within(inbox.receive())).id == "4"
        await turns()
        assert [(item.delivery.native, item.disposition, item.reason) for item in receiver.settled] == [
            (1, Disposition.DEAD, "undecodable"),
            (2, Disposition.DEAD, "undecodable"),
            (3, Disposition.DEAD, "max_attempts"),
        ]
        await inbox.close()

    async def test_closing_gives_back_what_is_not_settled_and_ends_every_wait(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver(*map(delivery, range(3)))
        inbox = inbox_on(receiver, manual_clock)
        message = await within(inbox.receive())
        await within(inbox.close())
        assert sorted((item.delivery.native, item.disposition) for item in receiver.settled) == [
            (number, Disposition.RELEASE) for number in range(3)
        ]
        with pytest.raises(LeaseLostError):
            await message.ack()
        with pytest.raises(BackendClosedError):
            await inbox.receive()

    async def test_a_cancelled_wait_hands_its_message_to_another(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        inbox = inbox_on(receiver, manual_clock)
        first, second = asyncio.create_task(inbox.receive()), asyncio.create_task(inbox.receive())
        await turns()
        receiver.waiting.append(delivery(1))
        receiver.more.set()
        # The first is woken in the turn in which it is cancelled.
        while not inbox._buffer:  # noqa: ASYNC110
            await asyncio.sleep(0)
        first.cancel()
        assert (await within(second)).id == "1"
        await inbox.close()
