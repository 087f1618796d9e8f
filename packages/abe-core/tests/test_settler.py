"""The settler: acknowledgements and settlements, in batches, on a receiver that does as it is told."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from engine_doubles import ScriptedReceiver, delivery, numbers, turns, within

from abe.backends.message_queue.base import Delivery, Disposition, Outcomes, Settlement, Settling
from abe.backends.message_queue.engine.settler import Settler
from abe.errors import AbeError, BackendConnectionError, LeaseLostError, PermissionDeniedError
from abe.testing import ManualClock
from abe_contract_tests import bounds

_at_once = False


@pytest.fixture
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have receivers say that they acknowledge without waiting, or not, as the parameter says."""
    monkeypatch.setattr(f"{__name__}._at_once", request.param)


def settler_on(
    receiver: ScriptedReceiver,
    clock: ManualClock,
    *,
    sure: bool = True,
    sent: Callable[[], None] = lambda: None,
    refused: Callable[[AbeError], object] = lambda _: None,
    settling: Settling | None = None,
    count: int = 100,
    stranded: Callable[[], object] = bool,
    leased: bool = True,
) -> Settler:
    return Settler(
        receiver,
        settling or Settling(at_once=_at_once),
        count=lambda: count,
        sure=lambda: sure,
        settled=sent,
        refused=refused,
        timeout=30.0,
        stranded=stranded,
        leased=leased,
        clock=clock,
    )


@pytest.mark.parametrize("at_once", [False, True], ids=["by a task", "at once"], indirect=True)
@pytest.mark.usefixtures("at_once")
class TestSettler:
    async def test_the_acknowledgements_of_one_turn_leave_together(self, manual_clock: ManualClock) -> None:
        receiver, sent = ScriptedReceiver(), list[int]()
        settler = settler_on(receiver, manual_clock, sent=lambda: sent.append(1))
        for number in range(5):
            settler.ack(delivery(number))
        assert receiver.acks == []
        await settler.drain()
        assert receiver.acks == [([0, 1, 2, 3, 4], False)]
        assert sent

    async def test_when_the_leases_are_not_certain_they_are_verified(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        settler = settler_on(receiver, manual_clock, sure=False)
        settler.ack(delivery(1))
        await settler.drain()
        assert receiver.acks == [([1], True)]

    async def test_a_settlement_that_somebody_waits_for_tells_what_went_wrong_with_it(
        self, manual_clock: ManualClock
    ) -> None:
        receiver = ScriptedReceiver()
        receiver.lost = {2}
        settler = settler_on(receiver, manual_clock)
        dead = [delivery(number) for number in (1, 2)]
        waiters = [settler.submit(item, Settlement(item, Disposition.DEAD)) for item in dead]
        acknowledged = settler.submit(delivery(3), None)
        async with bounds.within(5):
            fine, lost, acked = await asyncio.gather(*waiters, acknowledged)
        assert fine is None
        assert acked is None
        assert isinstance(lost, LeaseLostError)
        assert [item.lost for item in dead] == [False, True]
        assert receiver.acks == [([3], True)]

    async def test_a_broken_connection_is_tried_again(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        receiver.failures.extend([BackendConnectionError("gone")] * 3)
        waiter = settler_on(receiver, manual_clock).submit(delivery(1), None)
        await manual_clock.advance(5)
        assert waiter.done()
        assert waiter.result() is None

    async def test_it_is_tried_until_the_lease_must_have_run_out_and_no_longer(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        receiver.failures.extend([BackendConnectionError("gone")] * 1000)
        waiter = settler_on(receiver, manual_clock).submit(delivery(1), None)
        await manual_clock.advance(25)
        assert not waiter.done()
        await manual_clock.advance(6)
        assert isinstance(waiter.result(), BackendConnectionError)

    async def test_an_acknowledgement_that_is_tried_again_is_verified(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        receiver.failures.append(BackendConnectionError("gone"))
        settler = settler_on(receiver, manual_clock)
        settler.ack(delivery(1))
        await manual_clock.advance(5)
        assert receiver.acks == [([1], True)]

    async def test_what_the_broker_does_not_know_yet_is_still_held(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        receiver.failures.extend([BackendConnectionError("gone")] * 3)
        settler = settler_on(receiver, manual_clock)
        settler.ack(delivery(1))
        settler.submit(delivery(2), None)
        settler.submit(delivery(3), Settlement(delivery(3), Disposition.RETRY))
        assert numbers(settler.deliveries()) == [1, 2, 3]
        await turns()
        assert numbers(settler.deliveries()) == [1, 2, 3]
        await manual_clock.advance(5)
        assert settler.deliveries() == []
        assert settler.outstanding == 0

    async def test_a_fault_in_the_transport_reaches_whoever_waits(
        self, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        receiver: Any = ScriptedReceiver()
        receiver.failures.append(TypeError("a fault"))
        async with bounds.within(5):
            outcome = await settler_on(receiver, manual_clock).submit(delivery(1), None)
        assert isinstance(outcome, LeaseLostError)
        assert isinstance(outcome.__cause__, TypeError)
        assert "a bug of the provider" in caplog.text

    async def test_a_permanent_error_is_not_tried_again(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        receiver.failures.append(PermissionDeniedError("no"))
        async with bounds.within(5):
            outcome = await settler_on(receiver, manual_clock).submit(delivery(1), None)
        assert isinstance(outcome, PermissionDeniedError)

    async def test_a_failed_acknowledgement_that_nobody_waits_for_is_logged(
        self, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        receiver = ScriptedReceiver()
        receiver.lost = {1}
        settler, lost = settler_on(receiver, manual_clock), delivery(1)
        settler.ack(lost)
        settler.ack(delivery(2))
        await settler.drain()
        assert lost.lost
        assert "1 of 2 acknowledgements were not carried out" in caplog.text

    async def test_an_acknowledgement_that_closing_gave_up_is_known_not_to_be_carried_out(
        self, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Silent(ScriptedReceiver):
            async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
                await asyncio.Event().wait()
                return ()

        settler, item = settler_on(Silent(), manual_clock), delivery(1)
        settler.ack(item)
        await turns()
        settler.abandon()
        await within(settler.drain())
        assert item.lost
        assert "1 of 1 acknowledgements were not carried out" in caplog.text

    async def test_what_will_never_be_carried_out_is_told_at_once(self, manual_clock: ManualClock) -> None:
        receiver, refused = ScriptedReceiver(), list[AbeError]()
        settler = settler_on(receiver, manual_clock, refused=refused.append)
        receiver.failures.append(PermissionDeniedError("no"))
        settler.ack(delivery(1))
        await within(settler.drain())
        assert [type(error) for error in refused] == [PermissionDeniedError]

    async def test_a_batch_that_fails_for_good_fails_for_the_one_that_is_to_blame(
        self, manual_clock: ManualClock
    ) -> None:
        class Picky(ScriptedReceiver):
            async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
                if 3 in numbers(deliveries):
                    raise AbeError("a script failed")
                return await super().ack(deliveries, verify=verify)

        receiver, refused = Picky(), list[AbeError]()
        settler = settler_on(receiver, manual_clock, refused=refused.append)
        waiters = [settler.submit(delivery(number), None) for number in range(8)]
        await within(settler.drain())
        outcomes = [waiter.result() for waiter in waiters]
        assert [number for number, outcome in enumerate(outcomes) if outcome is not None] == [3]
        assert refused == []
        assert sorted(number for acked, _ in receiver.acks for number in acked) == [0, 1, 2, 4, 5, 6, 7]

    async def test_of_a_batch_only_what_may_be_carried_out_later_is_tried_again(
        self, manual_clock: ManualClock
    ) -> None:
        class Partly(ScriptedReceiver):
            async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
                await super().settle(settlements)
                first = len(self.settled) == len(settlements)
                errors = {2: LeaseLostError("lost"), 3: BackendConnectionError("busy") if first else None}
                return [errors.get(settlement.delivery.native) for settlement in settlements]

        receiver = Partly()
        settler = settler_on(receiver, manual_clock)
        items = [delivery(number) for number in (1, 2, 3)]
        waiters = [settler.submit(item, Settlement(item, Disposition.RETRY)) for item in items]
        await turns()
        assert [waiter.done() for waiter in waiters] == [True, True, False], (
            "what is final waits for no other's next try"
        )
        await manual_clock.advance(5)
        outcomes = await within(asyncio.gather(*waiters))
        assert [type(outcome) for outcome in outcomes] == [type(None), LeaseLostError, type(None)]
        assert [item.delivery.native for item in receiver.settled] == [1, 2, 3, 3]

    async def test_what_cannot_be_settled_is_given_back_where_no_lease_runs_out(
        self, manual_clock: ManualClock
    ) -> None:
        class Never(ScriptedReceiver):
            async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
                await super().settle(settlements)
                last = Disposition.RETURN
                return [None if item.disposition is last else BackendConnectionError("no") for item in settlements]

        for leased, expected in ((True, []), (False, [Disposition.RETURN])):
            receiver, item = Never(), delivery(1)
            stranded: list[bool] = []
            settler = settler_on(receiver, manual_clock, stranded=partial(stranded.append, True), leased=leased)
            waiter = settler.submit(item, Settlement(item, Disposition.DEAD))
            await manual_clock.advance(31)
            assert isinstance(await within(waiter), BackendConnectionError)
            given_back = [each.disposition for each in receiver.settled if each.disposition is not Disposition.DEAD]
            assert given_back == expected
            assert stranded == [True] * leased, "it is recovered where the lease may be our own"

    async def test_what_was_carried_out_before_closing_gave_the_others_up_is_not_called_failed(
        self, manual_clock: ManualClock
    ) -> None:
        class Partly(ScriptedReceiver):
            async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
                return [BackendConnectionError("busy") if each.native == 2 else None for each in deliveries]

        settler, items = settler_on(Partly(), manual_clock), [delivery(1), delivery(2)]
        done, given_up = [settler.submit(item, None) for item in items]
        await turns()
        settler.abandon()
        await within(settler.drain())
        assert await within(done) is None
        assert isinstance(await within(given_up), BackendConnectionError)
        assert [item.lost for item in items] == [False, True]

    @pytest.mark.parametrize(("outcomes", "wrong"), [([None], True), ([], False), ([None, None], False)])
    async def test_each_settlement_has_one_outcome(
        self, manual_clock: ManualClock, outcomes: Outcomes, wrong: bool
    ) -> None:
        class Short(ScriptedReceiver):
            async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
                return outcomes if len(deliveries) == 2 else [LeaseLostError("alone")]

        settler = settler_on(Short(), manual_clock)
        waiters = [settler.submit(delivery(number), None) for number in (1, 2)]
        found = await within(asyncio.gather(*waiters))
        assert [isinstance(each, LeaseLostError) for each in found] == [wrong, wrong]


async def test_acknowledgements_at_once_need_no_task(manual_clock: ManualClock) -> None:
    receiver, sent = ScriptedReceiver(), list[int]()
    settler = settler_on(
        receiver, manual_clock, settling=Settling(at_once=True), sent=lambda: sent.append(settler.outstanding)
    )
    settler.ack(delivery(1))
    settler.ack(delivery(2))
    tasks = asyncio.all_tasks()
    await asyncio.sleep(0)
    assert receiver.acks == [([1, 2], False)]
    assert sent == [0]
    assert asyncio.all_tasks() == tasks
    assert settler.deliveries() == []


async def test_what_is_said_to_be_at_once_and_waits_is_carried_out_too(manual_clock: ManualClock) -> None:
    gate = asyncio.Event()

    class Waiting(ScriptedReceiver):
        async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
            await gate.wait()
            return await super().ack(deliveries, verify=verify)

    receiver, item = Waiting(), delivery(1)
    settler = settler_on(receiver, manual_clock, settling=Settling(at_once=True))
    settler.ack(item)
    await turns()
    assert settler.deliveries() == [item]
    assert settler.outstanding == 1
    gate.set()
    await within(settler.drain())
    assert receiver.acks == [([1], False)]
    assert settler.outstanding == 0


class TestLingering:
    """Acknowledgements that wait for others, as each request of the broker is expensive."""

    SETTLING = Settling(messages=3, linger=1000)

    async def test_a_full_batch_leaves_and_the_rest_waits(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        settler = settler_on(receiver, manual_clock, settling=self.SETTLING)
        for number in range(4):
            settler.ack(delivery(number))
        await turns()
        assert [acked for acked, _ in receiver.acks] == [[0, 1, 2]]
        assert numbers(settler.deliveries()) == [3]
        for number in (4, 5):
            settler.ack(delivery(number))
        await turns()
        assert [acked for acked, _ in receiver.acks] == [[0, 1, 2], [3, 4, 5]]
        assert settler.outstanding == 0

    async def test_they_wait_no_longer_than_that(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        settler = settler_on(receiver, manual_clock, settling=Settling(messages=3, linger=0.01))
        settler.ack(delivery(1))
        async with bounds.within(5):
            while not receiver.acks:  # noqa: ASYNC110 - the scripted receiver tells nobody
                await asyncio.sleep(0.001)

    async def test_where_too_few_are_held_nothing_is_waited_for(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        settler = settler_on(receiver, manual_clock, settling=self.SETTLING, count=2)
        settler.ack(delivery(1))
        await turns()
        assert receiver.acks == [([1], False)]

    async def test_what_somebody_waits_for_waits_only_while_a_call_is_under_way(
        self, manual_clock: ManualClock
    ) -> None:
        gate = asyncio.Event()

        class Slow(ScriptedReceiver):
            async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
                outcomes = await super().ack(deliveries, verify=verify)
                await gate.wait()
                return outcomes

        receiver = Slow()
        settler = settler_on(receiver, manual_clock, settling=self.SETTLING)
        first = settler.submit(delivery(1), None)
        await turns()
        assert receiver.acks == [([1], True)]
        others = [settler.submit(delivery(number), None) for number in (2, 3)]
        await turns()
        assert len(receiver.acks) == 1
        gate.set()
        assert await within(asyncio.gather(first, *others)) == [None] * 3
        assert receiver.acks == [([1], True), ([2, 3], True)]

    async def test_draining_waits_for_nobody(self, manual_clock: ManualClock) -> None:
        receiver = ScriptedReceiver()
        settler = settler_on(receiver, manual_clock, settling=self.SETTLING)
        settler.ack(delivery(1))
        await within(settler.drain())
        assert receiver.acks == [([1], False)]


async def test_what_is_submitted_in_the_turn_in_which_closing_gives_up_is_told_so(manual_clock: ManualClock) -> None:
    settler = settler_on(ScriptedReceiver(), manual_clock)
    waiters = [
        settler.submit(delivery(1), None),
        settler.submit(delivery(2), Settlement(delivery(2), Disposition.RETRY)),
    ]
    asyncio.get_running_loop().call_soon(settler.abandon)  # in the turn in which their calls begin
    for waiter in waiters:
        assert isinstance(await within(waiter), LeaseLostError)
    await turns()
    assert settler.outstanding == 0
