"""What a consumer has in flight, and how each of it is settled."""

import asyncio
import gc
import logging
from collections.abc import Sequence

import pytest
from engine_doubles import ScriptedReceiver, delivery, inbox_on, turns, within

from abe.backends.message_queue.base import Delivery, Disposition, Outcomes, Settlement
from abe.errors import AlreadySettledError, LeaseLostError, UnsupportedCapabilityError
from abe.testing import ManualClock


class TestInFlight:
    async def test_a_message_that_is_dropped_unsettled_is_delivered_again(
        self, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("abe.backends.message_queue.engine.in_flight._DROPPED", 0.0)
        receiver = ScriptedReceiver(delivery(1), delivery(2))
        inbox = inbox_on(receiver, manual_clock, prefetch=2)
        kept = await within(inbox.receive())
        await within(inbox.receive())
        gc.collect()
        while not receiver.settled:  # noqa: ASYNC110 - the scripted receiver tells nobody
            await asyncio.sleep(0)
        assert [(item.delivery.native, item.disposition) for item in receiver.settled] == [(2, Disposition.RETRY)]
        assert "dropped" in caplog.text
        assert kept.attempt == 1
        await within(inbox.close())

    async def test_a_message_that_is_settled_twice_is_settled_when_both_return(self, manual_clock: ManualClock) -> None:
        receiver, gate = ScriptedReceiver(delivery(1)), asyncio.Event()
        carry_out = receiver.ack

        async def slow(deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
            await gate.wait()
            return await carry_out(deliveries, verify=verify)

        receiver.ack = slow  # type: ignore[method-assign]
        inbox = inbox_on(receiver, manual_clock)
        message = await within(inbox.receive())
        first, second = asyncio.create_task(message.ack()), asyncio.create_task(message.ack())
        await turns()
        assert not first.done()
        assert not second.done()
        receiver.lost = {1}
        gate.set()
        outcomes = await within(asyncio.gather(first, second, return_exceptions=True))
        assert [type(outcome) for outcome in outcomes] == [LeaseLostError] * 2
        await within(inbox.close())

    async def test_extending_one_lease_renews_all_and_leaves_none_out(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver(delivery(1), delivery(2), delivery(3))
        inbox = inbox_on(receiver, manual_clock)
        message = await within(inbox.receive())
        await within(message.extend(0.1))
        assert receiver.renewed == [[1, 2, 3]], "a provider may take what is left out for given up"
        await within(inbox.close())

    async def test_a_logging_filter_that_raises_keeps_nothing_from_being_buried(
        self, manual_clock: ManualClock
    ) -> None:
        def failing(record: logging.LogRecord) -> bool:
            raise RuntimeError("a filter fails")

        logger = logging.getLogger("abe.engine")
        receiver = ScriptedReceiver(delivery(1, attempt=5), delivery(2))
        logger.addFilter(failing)
        try:
            inbox = inbox_on(receiver, manual_clock)
            assert (await within(inbox.receive())).id == "2"
            await turns()
            assert [(item.delivery.native, item.disposition) for item in receiver.settled] == [(1, Disposition.DEAD)]
            await within(inbox.close())
        finally:
            logger.removeFilter(failing)

    async def test_what_is_buried_unseen_is_named_in_the_log(
        self, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        inbox = inbox_on(ScriptedReceiver(delivery(7, attempt=5), delivery(8)), manual_clock)
        await within(inbox.receive())
        (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
        facts = {name: getattr(record, name) for name in ("message_id", "key", "group", "attempt")}
        assert facts == {"message_id": "7", "key": "", "group": "g", "attempt": 5}
        assert "'7'" in record.getMessage()
        await within(inbox.close())

    async def test_what_was_settled_while_leases_were_renewed_is_not_called_lost(
        self, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        taken = delivery(1)
        inbox = inbox_on(ScriptedReceiver(taken), manual_clock)
        message = await within(inbox.receive())
        await within(message.ack())
        inbox._lose([taken])
        assert "lost" not in caplog.text
        await within(inbox.close())

    async def test_two_deliveries_of_one_message_are_settled_each_for_itself(self, manual_clock: ManualClock) -> None:
        # A broker that names the message, not the delivery, gave it to us again after its lease ran out unnoticed.
        receiver = ScriptedReceiver(delivery(1, attempt=1, body=b"bad"), delivery(1, attempt=2))
        inbox = inbox_on(receiver, manual_clock)
        assert (await within(inbox.receive())).attempt == 2
        await within(inbox.close())
        settled = [(item.delivery.attempt, item.disposition) for item in receiver.settled]
        assert settled == [(1, Disposition.DEAD), (2, Disposition.RELEASE)]

    async def test_an_error_text_with_half_a_character_is_carried(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver(delivery(1), delivery(2))
        inbox = inbox_on(receiver, manual_clock)
        first, second = await within(inbox.receive()), await within(inbox.receive())
        await within(first.nack(0, error="caf\udce9.txt"))
        await within(second.reject("caf\udce9.txt"))
        for settlement in receiver.settled:
            (settlement.error + settlement.reason).encode()
        await inbox.close()

    async def test_the_first_settlement_wins(self, manual_clock: ManualClock) -> None:
        taken = delivery(1)
        receiver = ScriptedReceiver(taken)
        inbox = inbox_on(receiver, manual_clock)
        message = await within(inbox.receive())
        await within(message.reject("because"))
        await within(message.reject("again"))
        with pytest.raises(AlreadySettledError):
            await message.ack()
        assert receiver.settled == [Settlement(taken, Disposition.DEAD, reason="because")]
        await inbox.close()

    async def test_a_delay_longer_than_the_broker_can_hold_is_refused_and_settles_nothing(
        self, manual_clock: ManualClock
    ) -> None:
        inbox = inbox_on(ScriptedReceiver(delivery(1)), manual_clock)
        message = await within(inbox.receive())
        with pytest.raises(UnsupportedCapabilityError, match="61"):
            await message.nack(61)
        await within(message.nack(60))
        await inbox.close()

    async def test_a_nack_at_the_last_attempt_is_a_dead_letter(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver(delivery(1, attempt=2), delivery(2, attempt=3))
        inbox = inbox_on(receiver, manual_clock)
        for _ in range(2):
            await within((await within(inbox.receive())).nack(0, reason="no"))
        assert [item.disposition for item in receiver.settled] == [Disposition.RETRY, Disposition.DEAD]
        await inbox.close()
