"""The engine's parts, on a transport and a receiver that do as they are told."""

import asyncio
import gc
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any

import pytest

from abe.backends.message_queue.base import (
    Batching,
    Delivery,
    Disposition,
    Envelope,
    Metadata,
    Outcomes,
    Publication,
    Settlement,
    Settling,
)
from abe.backends.message_queue.base.transport import Transport
from abe.backends.message_queue.engine.inbox import Inbox
from abe.backends.message_queue.engine.leases import LeaseKeeper
from abe.backends.message_queue.engine.publisher import Publisher
from abe.backends.message_queue.engine.session import Session
from abe.backends.message_queue.engine.settler import Settler
from abe.backends.message_queue.engine.subscription import GroupSubscription
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.codec import JSONCodec
from abe.errors import (
    AbeError,
    AlreadySettledError,
    BackendClosedError,
    BackendConnectionError,
    BackpressureError,
    ConfigurationError,
    GroupMissingError,
    LeaseLostError,
    PermissionDeniedError,
    PublishRejectedError,
    PublishUnknownError,
    UnsupportedCapabilityError,
)
from abe.settings import QueueSettings
from abe.testing import ManualClock, fresh_memory_backend
from abe_contract_tests import bounds


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def envelope(number: int, size: int = 1) -> Envelope:
    return Envelope(f"id{number}", "key", b"x" * size, 0)


class ScriptedTransport:
    """Sends as scripted: raises an exception, returns outcomes, or waits for an event; with no script left, accepts."""

    batching = Batching(messages=3, bytes=100, max_concurrent=1)

    def __init__(self, *script: Any) -> None:
        self.script = deque(script)
        self.sends: list[list[str]] = []
        self.opening: asyncio.Event | None = None

    @property
    def ids(self) -> list[str]:
        """What was sent, whichever batch it was in."""
        return [id for sent in self.sends for id in sent]

    async def open(self) -> None:
        if self.opening is not None:
            await self.opening.wait()

    async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
        self.sends.append([item.id for item in envelopes])
        step = self.script.popleft() if self.script else ()
        if isinstance(step, asyncio.Event):
            await step.wait()
            return ()
        if isinstance(step, BaseException):
            raise step
        return step  # type: ignore[no-any-return]


_connected = False


@pytest.fixture
def connected(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have publishers believe that they are connected, or not, as the parameter says."""
    monkeypatch.setattr(f"{__name__}._connected", request.param)


def publisher_on(
    transport: ScriptedTransport, *, timeout: float = 5, count: int = 1000, size: int = 10**6
) -> Publisher:
    fake: Any = transport
    publisher = Publisher(fake, transport.open, timeout=timeout, max_count=count, max_bytes=size)
    publisher._connected = _connected and transport.opening is None
    return publisher


async def published(publisher: Publisher, *numbers: int, size: int = 1) -> Sequence[AbeError | BaseException | None]:
    async with bounds.within(5):
        tasks = [publisher.publish(envelope(number, size)) for number in numbers]
        return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("connected", [False, True], ids=["new", "connected"], indirect=True)
@pytest.mark.usefixtures("connected")
class TestPublisher:
    async def test_a_lone_publish_leaves_at_once_in_its_callers_task(self) -> None:
        gate = asyncio.Event()
        transport = ScriptedTransport(gate)
        task = asyncio.create_task(publisher_on(transport).publish(envelope(1)))
        before = asyncio.all_tasks()
        await asyncio.sleep(0)
        assert transport.sends == [["id1"]]
        assert asyncio.all_tasks() == before, "a lone publish makes no task"
        gate.set()
        assert await task is None

    async def test_what_is_published_while_a_batch_is_under_way_leaves_together(self) -> None:
        gate = asyncio.Event()
        transport = ScriptedTransport(gate)
        publisher = publisher_on(transport)
        running = asyncio.create_task(published(publisher, 1, 2, 3))
        await turns()
        assert transport.sends == [["id1"]]
        gate.set()
        assert await running == [None, None, None]
        assert transport.sends == [["id1"], ["id2", "id3"]]

    async def test_a_batch_holds_no_more_messages_than_the_transport_takes(self) -> None:
        transport = ScriptedTransport()
        assert await publisher_on(transport).publish_many([envelope(number) for number in range(8)]) == [None] * 8
        assert [len(sent) for sent in transport.sends] == [3, 3, 2]

    async def test_a_batch_ends_where_its_bytes_are_reached(self) -> None:
        transport = ScriptedTransport()
        await publisher_on(transport).publish_many([envelope(number, 60) for number in range(4)])
        assert [len(sent) for sent in transport.sends] == [2, 2]

    @pytest.mark.parametrize("bound", [{"count": 2}, {"size": 20}])
    async def test_publish_waits_while_too_much_is_on_its_way(self, bound: dict[str, int]) -> None:
        gate = asyncio.Event()
        transport = ScriptedTransport(gate)
        publisher = publisher_on(transport, **bound)
        running = asyncio.create_task(published(publisher, 1, 2, 3, 4, size=10))
        await turns()
        assert transport.sends == [["id1"]]
        gate.set()
        assert await running == [None] * 4
        assert sorted(transport.ids) == ["id1", "id2", "id3", "id4"]
        assert max(map(len, transport.sends)) <= 2

    async def test_one_that_waits_for_room_and_is_cancelled_hands_its_place_on(self) -> None:
        gate = asyncio.Event()
        publisher = publisher_on(ScriptedTransport(gate), count=1)
        first, second, third = (asyncio.create_task(publisher.publish(envelope(number))) for number in (1, 2, 3))
        await turns()
        # The first returns in the next turn, and wakes the second, which is cancelled before it can run.
        gate.set()
        asyncio.get_running_loop().call_soon(second.cancel)
        await first
        async with bounds.within(5):
            assert await third is None
            with pytest.raises(asyncio.CancelledError):
                await second

    async def test_a_cancelled_publisher_leaves_and_its_batch_goes_on(self) -> None:
        gate = asyncio.Event()
        transport = ScriptedTransport(gate)
        publisher = publisher_on(transport)
        tasks = [asyncio.create_task(publisher.publish(envelope(number))) for number in range(4)]
        await turns()
        tasks[2].cancel()
        gate.set()
        async with bounds.within(5):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [type(None), type(None), asyncio.CancelledError, type(None)]
        assert transport.ids == ["id0", "id1", "id2", "id3"]
        assert await published(publisher, 9) == [None], "and it still works"

    async def test_a_lost_connection_is_tried_again_with_the_same_ids(self) -> None:
        transport = ScriptedTransport(BackendConnectionError("gone"), PublishUnknownError("gone"))
        publisher = publisher_on(transport)
        async with bounds.within(5):
            assert await publisher.publish_many([envelope(1), envelope(2)]) == [None, None]
        assert transport.sends == [["id1", "id2"]] * 3

    async def test_only_those_without_an_outcome_are_tried_again(self) -> None:
        full = BackpressureError("full")
        transport = ScriptedTransport([None, BackendConnectionError("gone"), full])
        async with bounds.within(5):
            outcomes = await publisher_on(transport).publish_many([envelope(1), envelope(2), envelope(3)])
        assert outcomes == [None, None, full]
        assert transport.sends == [["id1", "id2", "id3"], ["id2"]]

    async def test_one_that_was_never_sent_within_the_time_is_rejected(self) -> None:
        transport = ScriptedTransport()
        transport.opening = asyncio.Event()
        (outcome,) = await published(publisher_on(transport, timeout=0.02), 1)
        assert isinstance(outcome, PublishRejectedError)
        assert not outcome.maybe_accepted
        assert transport.sends == []

    async def test_one_whose_broker_was_never_reached_is_rejected_and_the_cause_is_kept(self) -> None:
        cause = BackendConnectionError("refused")
        (outcome,) = await published(publisher_on(ScriptedTransport(*[cause] * 100), timeout=0.1), 1)
        assert isinstance(outcome, PublishRejectedError)
        assert outcome.__cause__ is cause
        assert "refused" in str(outcome)

    async def test_one_that_was_sent_and_not_answered_within_the_time_is_unknown(self) -> None:
        (outcome,) = await published(publisher_on(ScriptedTransport(asyncio.Event()), timeout=0.02), 1)
        assert isinstance(outcome, PublishUnknownError)
        assert outcome.maybe_accepted

    async def test_once_unknown_it_stays_so_even_if_the_broker_cannot_be_reached_later(self) -> None:
        script = [PublishUnknownError("cut"), *[BackendConnectionError("refused")] * 100]
        (outcome,) = await published(publisher_on(ScriptedTransport(*script), timeout=0.1), 1)
        assert isinstance(outcome, PublishUnknownError)

    async def test_one_that_may_have_arrived_is_not_certainly_absent_when_it_is_refused_later(self) -> None:
        for refusal in (BackpressureError("full"), [BackpressureError("full")], PermissionDeniedError("no")):
            transport = ScriptedTransport(PublishUnknownError("the reply was lost"), refusal)
            (outcome,) = await published(publisher_on(transport), 1)
            assert isinstance(outcome, PublishUnknownError)
            assert outcome.__cause__ is not None

    async def test_those_that_wait_for_room_when_it_is_closed_are_told_one_by_one(self) -> None:
        gate = asyncio.Event()
        publisher = publisher_on(ScriptedTransport(gate), count=2)
        many = asyncio.create_task(publisher.publish_many([envelope(number) for number in range(4)]))
        await turns()
        closing = asyncio.create_task(publisher.close(5))
        await turns()
        gate.set()
        async with bounds.within(5):
            await closing
            outcomes = await many
        assert outcomes[:2] == [None, None]
        assert all(isinstance(outcome, BackendClosedError) for outcome in outcomes[2:])

    async def test_a_permanent_error_is_everybodys_at_once(self) -> None:
        error = PermissionDeniedError("no")
        outcomes = await publisher_on(ScriptedTransport(error)).publish_many([envelope(1), envelope(2)])
        assert outcomes == [error, error]

    async def test_closing_waits_for_what_is_on_its_way_and_refuses_the_rest(self) -> None:
        gate = asyncio.Event()
        publisher = publisher_on(ScriptedTransport(gate))
        running = asyncio.create_task(published(publisher, 1, 2))
        await turns()
        closing = asyncio.create_task(publisher.close(5))
        await turns()
        with pytest.raises(BackendClosedError):
            await publisher.publish(envelope(3))
        gate.set()
        async with bounds.within(5):
            await closing
            first, second = await running
        assert first is None
        assert second is None or isinstance(second, BackendClosedError)

    async def test_closing_is_bounded_and_everybody_gets_an_outcome(self) -> None:
        publisher = publisher_on(ScriptedTransport(asyncio.Event()), timeout=60)
        many = asyncio.create_task(publisher.publish_many([envelope(number) for number in range(7)]))
        await turns()
        async with bounds.within(5):
            await publisher.close(0.02)
            outcomes = await many
        assert all(isinstance(outcome, PublishUnknownError) for outcome in outcomes[:3]), "they were on their way"
        assert all(isinstance(outcome, BackendClosedError) for outcome in outcomes[3:]), "they were not"

    async def test_what_was_confirmed_stays_so_when_the_rest_of_its_batch_fails_for_good(self) -> None:
        refused = PermissionDeniedError("no")
        transport = ScriptedTransport([None, BackendConnectionError("gone"), None], refused)
        outcomes = await publisher_on(transport).publish_many([envelope(number) for number in range(3)])
        assert outcomes == [None, refused, None]

    async def test_what_was_confirmed_stays_so_when_it_is_closed_before_the_rest_is(self) -> None:
        transport = ScriptedTransport([None, BackendConnectionError("gone"), None], asyncio.Event())
        publisher = publisher_on(transport, timeout=60)
        many = asyncio.create_task(publisher.publish_many([envelope(number) for number in range(3)]))
        while len(transport.sends) < 2:  # noqa: ASYNC110 - the scripted transport tells nobody
            await asyncio.sleep(0)
        async with bounds.within(5):
            await publisher.close(0.01)
            first, second, third = await many
        assert (first, third) == (None, None)
        assert isinstance(second, PublishUnknownError)

    async def test_whoever_waits_for_room_while_it_is_closed_is_told(self) -> None:
        publisher = publisher_on(ScriptedTransport(asyncio.Event()), count=1, timeout=60)
        tasks = [asyncio.create_task(publisher.publish(envelope(number))) for number in range(3)]
        await turns()
        async with bounds.within(5):
            await publisher.close(0.01)
            outcomes = await asyncio.gather(*tasks[1:], return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [BackendClosedError] * 2

    async def test_the_wait_for_room_is_part_of_the_time(self) -> None:
        publisher = publisher_on(ScriptedTransport(asyncio.Event()), count=1, timeout=60)
        first = asyncio.create_task(publisher.publish(envelope(1)))
        await turns()
        outcome = await within(publisher.publish(envelope(2), 0.01))
        assert isinstance(outcome, PublishRejectedError)
        first.cancel()

    @pytest.mark.parametrize(("flights", "expected"), [(1, PublishRejectedError), (2, PublishUnknownError)])
    async def test_a_time_of_ones_own_ends_whether_or_not_the_message_could_leave(
        self, flights: int, expected: type[AbeError]
    ) -> None:
        transport = ScriptedTransport(asyncio.Event(), asyncio.Event())
        transport.batching = Batching(messages=3, bytes=100, max_concurrent=flights)
        publisher = publisher_on(transport, timeout=60)
        first = asyncio.create_task(publisher.publish(envelope(1)))
        await turns()
        outcome = await within(publisher.publish(envelope(2), 0.05))
        assert type(outcome) is expected
        assert ("id2" in transport.ids) == (expected is PublishUnknownError)
        first.cancel()

    async def test_one_that_left_its_batch_in_time_takes_no_other_with_it(self) -> None:
        gate = asyncio.Event()
        transport = ScriptedTransport(gate)
        publisher = publisher_on(transport, timeout=60)
        first = asyncio.create_task(publisher.publish(envelope(1)))
        await turns()
        hasty = asyncio.create_task(publisher.publish(envelope(2), 0.01))
        await turns()
        third = asyncio.create_task(publisher.publish(envelope(3)))
        assert isinstance(await within(hasty), PublishRejectedError)
        gate.set()
        assert await within(asyncio.gather(first, third)) == [None, None]
        assert transport.ids == ["id1", "id3"]

    async def test_those_with_a_time_of_their_own_leave_together_with_the_others(self) -> None:
        gate = asyncio.Event()
        transport = ScriptedTransport(gate)
        publisher = publisher_on(transport)
        times = (None, None, 4, None, 60, 2)
        tasks = [asyncio.create_task(publisher.publish(envelope(n), time)) for n, time in enumerate(times)]
        await turns()
        gate.set()
        assert await within(asyncio.gather(*tasks)) == [None] * 6
        assert transport.sends == [["id0"], ["id1", "id2", "id3"], ["id4", "id5"]]

    async def test_those_that_waited_long_for_room_leave_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = asyncio.Event()
        transport = ScriptedTransport(gate)
        publisher = publisher_on(transport, timeout=60, count=3)
        tasks = [asyncio.create_task(publisher.publish(envelope(number))) for number in range(6)]
        await turns()
        loop = asyncio.get_running_loop()
        now = loop.time
        with monkeypatch.context() as later:
            later.setattr(loop, "time", lambda: now() + 30)
            gate.set()
            while len(transport.ids) < 6:  # noqa: ASYNC110 - the scripted transport tells nobody
                await asyncio.sleep(0)
        assert await within(asyncio.gather(*tasks)) == [None] * 6
        assert transport.sends[-1] == ["id4", "id5"]

    async def test_the_room_that_a_large_one_leaves_is_for_all_that_fit(self) -> None:
        gate, second = asyncio.Event(), asyncio.Event()
        transport = ScriptedTransport(gate, second)
        publisher = publisher_on(transport, size=50)
        large = asyncio.create_task(publisher.publish(envelope(0, 50)))
        await turns()
        small = [asyncio.create_task(publisher.publish(envelope(number))) for number in range(1, 31)]
        await turns()
        gate.set()
        await turns(60)
        second.set()
        assert await within(asyncio.gather(large, *small)) == [None] * 31
        assert len(transport.sends) < 20

    async def test_one_that_left_is_not_tried_again_and_was_certainly_not_sent(self) -> None:
        class Away(ScriptedTransport):
            away = True

            async def send(self, envelopes: Sequence[Envelope]) -> Sequence[AbeError | None]:
                sent = await super().send(envelopes)
                if len(self.sends) > 1 and self.away:
                    raise BackendConnectionError("refused")
                return sent

        gate = asyncio.Event()
        transport = Away(gate)
        publisher = publisher_on(transport, timeout=60)
        first = asyncio.create_task(publisher.publish(envelope(1)))
        await turns()
        others = [
            asyncio.create_task(publisher.publish(envelope(number), time)) for number, time in ((2, 0.2), (3, None))
        ]
        await turns()
        gate.set()
        outcome = await within(others[0])
        assert type(outcome) is PublishRejectedError
        assert "within 0.2 s: refused" in str(outcome)
        transport.away = False
        assert await within(asyncio.gather(first, others[1])) == [None, None]
        assert transport.sends[1] == ["id2", "id3"]
        assert transport.sends[-1] == ["id3"]

    async def test_a_lone_one_that_is_on_its_way_when_it_is_closed_is_told_too(self) -> None:
        publisher = publisher_on(ScriptedTransport(asyncio.Event()), timeout=60)
        lone = asyncio.create_task(publisher.publish(envelope(1)))
        await turns()
        await within(publisher.close(0.01))
        assert isinstance(await within(lone), PublishUnknownError)

    async def test_a_fault_in_the_transport_is_the_outcome_of_a_lone_publish_too(self) -> None:
        outcome = await within(publisher_on(ScriptedTransport(TypeError("a fault"))).publish(envelope(1)))
        assert isinstance(outcome, PublishUnknownError)
        assert isinstance(outcome.__cause__, TypeError)

    @pytest.mark.parametrize("outcomes", [(), [None], (None,), [BackpressureError("full")]])
    async def test_a_lone_publish_that_is_answered_at_once_lets_nothing_else_run(self, outcomes: Outcomes) -> None:
        publisher = publisher_on(ScriptedTransport(outcomes))
        publishing = publisher.publish(envelope(1))
        with pytest.raises(StopIteration) as end:
            publishing.send(None)
        assert end.value.value == (outcomes[0] if outcomes else None)
        await within(publisher.close(0.01))

    async def test_a_lone_publish_of_no_time_that_was_sent_is_unknown(self) -> None:
        publisher = publisher_on(ScriptedTransport((), asyncio.Event()), timeout=60)
        assert await publisher.publish(envelope(1)) is None
        assert isinstance(await within(publisher.publish(envelope(2), 1e-9)), PublishUnknownError)

    @pytest.mark.parametrize("way", ["cancelled", "closed"])
    async def test_a_lone_publish_that_is_ended_leaves_nothing_behind(self, way: str) -> None:
        transport = ScriptedTransport(asyncio.Event())
        publisher = publisher_on(transport, timeout=60)
        task = asyncio.create_task(publisher.publish(envelope(1)))
        await turns()
        if way == "closed":
            await within(publisher.close(0.01))
            assert isinstance(await within(task), PublishUnknownError)
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await published(publisher, 2) == [None]
        assert publisher._room.count == 0

    async def test_a_transport_is_opened_once_and_again_after_a_failure(self) -> None:
        transport = ScriptedTransport((), (), BackendConnectionError("gone"))
        opened: list[int] = []

        async def note() -> None:
            opened.append(len(transport.sends))

        fake: Any = transport
        publisher = Publisher(fake, note, timeout=5, max_count=10, max_bytes=1000)
        async with bounds.within(5):
            for number in range(4):
                assert await publisher.publish(envelope(number)) is None
        assert transport.ids == ["id0", "id1", "id2", "id2", "id3"]
        assert opened == [0, 3]

    async def test_publish_many_that_is_cancelled_tries_none_again(self) -> None:
        gate = asyncio.Event()
        transport = ScriptedTransport(gate)
        publisher = publisher_on(transport, timeout=60)
        many = asyncio.create_task(publisher.publish_many([envelope(number) for number in range(5)]))
        await turns()
        many.cancel()
        with pytest.raises(asyncio.CancelledError):
            await many
        transport.script.append(BackendConnectionError("gone"))
        gate.set()
        await turns()
        assert await published(publisher, 9) == [None]
        assert transport.ids.count("id4") <= 1


class ScriptedReceiver:
    """A broker's side of a group that holds what it was given, and notes what it is asked."""

    def __init__(self, *deliveries: Delivery) -> None:
        self.waiting = deque(deliveries)
        self.limits: list[int] = []
        self.acks: list[tuple[list[int], bool]] = []
        self.settled: list[Settlement] = []
        self.renewed: list[list[int]] = []
        self.failures: deque[AbeError] = deque()
        self.lost: set[int] = set()
        self.errors: deque[AbeError] = deque()
        self.more = asyncio.Event()
        self.stopped = False

    async def receive(self, limit: int) -> Sequence[Delivery]:
        self.limits.append(limit)
        while not self.stopped:
            if self.errors:
                raise self.errors.popleft()
            if self.waiting:
                return [self.waiting.popleft() for _ in range(min(limit, len(self.waiting)))]
            self.more.clear()
            await self.more.wait()
        return ()

    def metadata(self, delivery: Delivery) -> Metadata:
        return Metadata(str(delivery.native))

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        self._fail()
        self.acks.append(([delivery.native for delivery in deliveries], verify))
        return self._outcomes(deliveries)

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        self._fail()
        self.settled.extend(settlements)
        return self._outcomes([settlement.delivery for settlement in settlements])

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        self._fail()
        self.renewed.append([delivery.native for delivery in deliveries])
        return [delivery for delivery in deliveries if delivery.native in self.lost]

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        return [delivery for delivery in deliveries if delivery.native in self.lost]

    def _outcomes(self, deliveries: Sequence[Delivery]) -> Outcomes:
        return [LeaseLostError("lost") if delivery.native in self.lost else None for delivery in deliveries]

    async def stop(self) -> None:
        self.stopped = True
        self.more.set()

    async def close(self) -> None:
        """Nothing is left to give back."""

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.popleft()


def delivery(
    number: int, attempt: int = 1, body: bytes = b"{}", fault: str | None = None, uncertain: int = 0
) -> Delivery:
    return Delivery(body, None, attempt, number, fault=fault, uncertain=uncertain)


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
        leased=leased,
        clock=clock,
    )


def numbers(deliveries: Iterable[Delivery]) -> list[int]:
    return sorted(delivery.native for delivery in deliveries)


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
                retry = Disposition.RETRY
                return [None if item.disposition is retry else BackendConnectionError("no") for item in settlements]

        for leased, expected in ((True, []), (False, [Disposition.RETRY])):
            receiver, item = Never(), delivery(1)
            settler = settler_on(receiver, manual_clock, leased=leased)
            waiter = settler.submit(item, Settlement(item, Disposition.DEAD))
            await manual_clock.advance(31)
            assert isinstance(await within(waiter), BackendConnectionError)
            given_back = [each.disposition for each in receiver.settled if each.disposition is not Disposition.DEAD]
            assert given_back == expected

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


async def restored() -> None:
    """The group is there again."""


def inbox_on(
    receiver: ScriptedReceiver,
    clock: ManualClock,
    *,
    prefetch: int = 8,
    max_delay: float | None = 60,
    alone: bool = False,
    codec: JSONCodec | None = None,
    left: Callable[[Inbox], object] = lambda _: None,
    restore: Callable[[], Awaitable[None]] = restored,
) -> Inbox:
    return Inbox(
        receiver,
        group="g",
        prefetch=prefetch,
        max_attempts=3,
        max_delay=max_delay,
        lease=30,
        settling=Settling(),
        restore=restore,
        alone=alone,
        codec=codec or JSONCodec(),
        clock=clock,
        close_timeout=1,
        left=left,
    )


async def within(awaitable: Awaitable[Any]) -> Any:
    async with bounds.within(5):
        return await awaitable


async def consumed_with_a_suspect(backend: MemoryBackend, clock: ManualClock) -> GroupSubscription:
    """Return a consumer that has begun; a suspect comes to it once the lease of a consumer that died has run out."""
    await backend.declare("g", ["a"])
    await backend.publish("a", {})
    dead = await backend.make_transport().subscribe("g", 1)
    await dead.receive(1)
    subscription = backend.consume(group="g", keys=["a"], max_attempts=1)
    await subscription.__aenter__()
    return subscription


class TestGroupSubscription:
    async def test_a_start_that_failed_with_nobody_waiting_is_begun_anew(self, manual_clock: ManualClock) -> None:
        inbox = inbox_on(ScriptedReceiver(delivery(1)), manual_clock)
        fails, starts = asyncio.Event(), 0

        async def start(_: bool) -> Inbox:
            nonlocal starts
            starts += 1
            if starts == 1:
                await fails.wait()
                raise BackendConnectionError("gone")
            return inbox

        subscription = GroupSubscription(start)
        waiting = asyncio.create_task(subscription.receive())
        await turns()
        waiting.cancel()
        await asyncio.wait([waiting])
        fails.set()
        await turns()
        assert (await within(subscription.receive())).attempt == 1
        await subscription.aclose()

    async def test_a_suspect_is_tried_alone_and_what_was_beside_it_comes_back(self, manual_clock: ManualClock) -> None:
        made: list[tuple[bool, ScriptedReceiver]] = []
        scripts = [
            [delivery(1), delivery(2, attempt=4), delivery(3)],
            [delivery(2, attempt=4), delivery(3)],
            [delivery(4)],
        ]

        async def start(alone: bool) -> Inbox:
            receiver = ScriptedReceiver(*scripts[len(made)])
            made.append((alone, receiver))
            return inbox_on(receiver, manual_clock, alone=alone, prefetch=1 if alone else 8)

        subscription = GroupSubscription(start)
        first = await within(subscription.receive())
        waiting = asyncio.create_task(subscription.receive())
        await turns()
        assert not waiting.done(), "something is in hand still"
        assert [(item.delivery.native, item.disposition) for item in made[0][1].settled] == [
            (2, Disposition.RELEASE),
            (3, Disposition.RELEASE),
        ]
        await within(first.ack())
        suspect = await within(waiting)
        assert (suspect.id, suspect.attempt) == ("2", 4)
        await within(suspect.ack())
        third = await within(subscription.receive())
        fourth = await within(subscription.receive())
        assert (third.id, fourth.id) == ("3", "4")
        assert [alone for alone, _ in made] == [False, True, False]
        await within(third.ack())
        await within(subscription.aclose())

    async def test_a_suspect_waits_no_longer_than_a_lease_for_what_is_in_hand(self, manual_clock: ManualClock) -> None:
        scripts = [[delivery(1), delivery(2, attempt=4)], [delivery(2, attempt=4)]]

        async def start(alone: bool) -> Inbox:
            return inbox_on(ScriptedReceiver(*scripts.pop(0)), manual_clock, alone=alone, prefetch=1 if alone else 8)

        subscription = GroupSubscription(start)
        first = await within(subscription.receive())
        waiting = asyncio.create_task(subscription.receive())
        await turns()
        await manual_clock.advance(31)
        assert (await within(waiting)).id == "2"
        await within(first.ack())
        await within(subscription.aclose())

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

    async def test_one_that_is_stopped_between_two_inboxes_ends_and_subscribes_no_more(
        self, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("abe.backends.message_queue.engine.subscription._RESUBSCRIBE", lambda _: 3600.0)
        receiver, starts = ScriptedReceiver(delivery(1), delivery(2, attempt=4)), 0

        async def start(_: bool) -> Inbox:
            nonlocal starts
            starts += 1
            if starts == 1:
                return inbox_on(receiver, manual_clock)
            raise BackendConnectionError("away")

        for in_hand in (True, False):
            starts = 0
            receiver = ScriptedReceiver(delivery(1), delivery(2, attempt=4))
            subscription = GroupSubscription(start)
            message = await within(subscription.receive())
            if not in_hand:
                await within(message.ack())
            waiting = asyncio.create_task(subscription.receive())
            await turns(60)
            assert starts == (1 if in_hand else 2)
            await within(subscription.stop())
            for task in (waiting, asyncio.create_task(subscription.receive())):
                with pytest.raises(BackendClosedError):
                    await within(task)
            if in_hand:
                await within(message.ack())
            await turns(60)
            assert starts == (1 if in_hand else 2)
            await within(subscription.aclose())

    async def test_inboxes_that_were_followed_are_not_kept(self, manual_clock: ManualClock) -> None:
        made: list[weakref.ref[Inbox]] = []

        async def start(alone: bool) -> Inbox:
            receiver = ScriptedReceiver(delivery(len(made), attempt=1 if alone else 4))
            inbox = inbox_on(receiver, manual_clock, alone=alone, prefetch=1)
            made.append(weakref.ref(inbox))
            return inbox

        subscription = GroupSubscription(start)
        for _ in range(6):
            await within((await within(subscription.receive())).ack())
        await turns(60)
        gc.collect()
        assert len(made) > 10
        assert sum(inbox() is not None for inbox in made) <= 3
        await within(subscription.aclose())

    async def test_a_change_that_failed_is_begun_anew_and_the_first_inbox_still_closes(
        self, manual_clock: ManualClock
    ) -> None:
        made: list[Inbox] = []

        async def start(_: bool) -> Inbox:
            if made:
                raise PermissionDeniedError("no")
            made.append(inbox_on(ScriptedReceiver(delivery(1), delivery(2, attempt=4)), manual_clock))
            return made[0]

        subscription = GroupSubscription(start)
        message = await within(subscription.receive())
        for _ in range(2):
            waiting = asyncio.create_task(subscription.receive())
            await turns()
            await manual_clock.advance(31)
            with pytest.raises(PermissionDeniedError):
                await within(waiting)
        await within(message.ack())
        while not made[0].closed:  # noqa: ASYNC110 - an inbox tells nobody
            await asyncio.sleep(0)
        await turns()
        assert not [task for task in asyncio.all_tasks() if "_retire" in repr(task)]
        await within(subscription.aclose())

    async def test_a_change_does_not_wait_for_a_message_that_the_transport_saw_go(
        self, manual_clock: ManualClock
    ) -> None:
        lost = delivery(1)
        scripts = [[delivery(2, attempt=4), lost], [delivery(2, attempt=4)]]

        async def start(alone: bool) -> Inbox:
            return inbox_on(ScriptedReceiver(*scripts.pop(0)), manual_clock, alone=alone, prefetch=1 if alone else 8)

        subscription = GroupSubscription(start)
        await subscription.__aenter__()
        await turns()
        lost.lost = True
        assert (await within(subscription.receive())).id == "2"
        await within(subscription.aclose())

    async def test_patterns_that_are_changed_under_a_consumer_do_not_end_it(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        subscription = await consumed_with_a_suspect(memory_backend, manual_clock)
        await memory_backend.declare("g", ["#"])
        await manual_clock.advance(31)
        await within((await within(subscription.receive())).ack())
        await within(subscription.aclose())

    async def test_a_subscription_ends_with_its_session_also_between_two_inboxes(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subscription = await consumed_with_a_suspect(memory_backend, manual_clock)
        session = memory_backend._calls.session
        assert session is not None
        pausing = asyncio.Event()

        async def away(*_: Any) -> Any:
            raise BackendConnectionError("away")

        def pause(_: int) -> float:
            pausing.set()
            return 0.5

        monkeypatch.setattr(session.transport, "subscribe", away)
        monkeypatch.setattr("abe.backends.message_queue.engine.subscription._RESUBSCRIBE", pause)
        object.__setattr__(memory_backend.settings, "publish_timeout", 0.1)
        await manual_clock.advance(31)
        waiting = asyncio.create_task(subscription.receive())
        await within(pausing.wait())
        await within(memory_backend.disconnect())
        await within(memory_backend.connect())
        with pytest.raises(BackendClosedError):
            await within(waiting)
        await within(subscription.aclose())

    async def test_uncertain_attempts_are_made_certain_before_a_suspect_is_tried(
        self, manual_clock: ManualClock
    ) -> None:
        receiver = ScriptedReceiver(delivery(1, attempt=9, uncertain=8), delivery(2, attempt=6, uncertain=2))
        inbox = inbox_on(receiver, manual_clock, alone=True, prefetch=1)
        waiting = asyncio.create_task(inbox.receive())
        await turns(60)
        assert [(item.delivery.native, item.disposition, item.attempts) for item in receiver.settled] == [
            (1, Disposition.RELEASE, 3),  # it begins its one try with the limit used up
            (2, Disposition.RELEASE, 4),  # it had its try: what comes next is its burial
        ]
        waiting.cancel()
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

    async def test_one_that_is_dropped_after_it_was_stopped_gives_its_message_back(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.publish("k", {})
        subscription = memory_backend.consume(group="g")
        await within(subscription.receive())
        await subscription.stop()
        del subscription
        gc.collect()
        async with bounds.within(5):
            while (await memory_backend.stats("g")).waiting != 1:  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0)

    async def test_a_disconnect_that_was_cancelled_leaves_a_backend_that_can_be_opened_again(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.declare("g")
        closing = asyncio.create_task(memory_backend.disconnect())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await memory_backend.connect()
        await memory_backend.publish("k", {})
        assert (await memory_backend.stats("g")).waiting == 1

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


class JoiningTransport:
    """Lets somebody join once `gate` is set, and notes in which order things are closed."""

    def __init__(self, *deliveries: Delivery) -> None:
        self.gate = asyncio.Event()
        self.closed: list[str] = []
        self.batching = Batching(messages=1, bytes=1, max_concurrent=1)
        self._deliveries = deliveries

    async def subscribe(self, group: str, prefetch: int) -> ScriptedReceiver:
        await self.gate.wait()
        receiver = ScriptedReceiver(*self._deliveries)

        async def close() -> None:
            await turns(3)
            self.closed.append(group)

        receiver.close = close  # type: ignore[method-assign]
        return receiver

    async def close(self) -> None:
        self.closed.append("transport")


class TestSession:
    @pytest.fixture
    def transport(self) -> JoiningTransport:
        return JoiningTransport()

    @pytest.fixture
    async def session(self, transport: JoiningTransport) -> Session:
        fake: Any = transport
        return Session(fake, QueueSettings(close_timeout=0.5))

    @pytest.fixture
    def join(self, session: Session, manual_clock: ManualClock) -> Callable[[str], asyncio.Task[Inbox]]:
        def join(group: str) -> asyncio.Task[Inbox]:
            def inbox(receiver: Any) -> Inbox:
                return inbox_on(receiver, manual_clock, left=session.inboxes.discard)

            return asyncio.create_task(session.join(group, 1, inbox))

        return join

    async def test_who_is_joining_when_it_is_closed_leaves_before_the_connection_ends(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        joining = join("g")
        await turns()
        closing = asyncio.create_task(session.close())
        await turns()
        transport.gate.set()
        await within(closing)
        assert transport.closed == ["g", "transport"]
        with pytest.raises(BackendClosedError):
            await joining

    async def test_nobody_joins_once_it_is_being_closed(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        transport.gate.set()
        await within(session.close())
        with pytest.raises(BackendClosedError):
            await within(join("g"))
        assert transport.closed == ["transport"]

    async def test_who_is_cancelled_while_joining_leaves_again(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        joining = join("g")
        await turns()
        joining.cancel()
        await asyncio.wait([joining])
        transport.gate.set()
        await turns()
        assert transport.closed == ["g"]
        assert not session.inboxes

    async def test_a_broker_that_does_not_answer_keeps_nobody_from_closing(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        joining = join("g")
        await turns()
        await within(session.close())
        assert transport.closed == ["transport"]
        joining.cancel()

    async def test_closing_ends_the_calls_that_a_broken_client_leaves_waiting(
        self, memory_backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await memory_backend.declare("g")

        async def never(*_: Any, **__: Any) -> None:
            await asyncio.Event().wait()

        for name in ("declare", "subscribe"):
            with monkeypatch.context() as patch:
                await memory_backend.connect()
                session = memory_backend._calls.session
                assert session is not None
                patch.setattr(session.transport, name, never)
                waiting = asyncio.create_task(memory_backend.consume(group="g").receive())
                await turns()
                session._close_timeout = 0.1
                await within(memory_backend.disconnect())
                with pytest.raises(BackendClosedError):
                    await within(waiting)

    async def test_what_is_asked_while_it_is_closed_does_not_connect_it_again(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.connect()
        session = memory_backend._calls.session
        assert session is not None
        closing, gate, opened = asyncio.Event(), asyncio.Event(), list[bool]()

        async def close() -> None:
            closing.set()
            await gate.wait()

        async def reopen() -> None:
            opened.append(True)

        session.transport.close = close  # type: ignore[method-assign]
        session.transport.open = reopen  # type: ignore[method-assign]
        disconnecting = asyncio.create_task(memory_backend.disconnect())
        await within(closing.wait())
        for call in (memory_backend.ping(), memory_backend.groups(), memory_backend.dead_letters().list()):
            with pytest.raises(BackendClosedError):
                await within(call)
        gate.set()
        await within(disconnecting)
        assert not opened

    async def test_groups_of_the_settings_that_have_other_patterns_stop_everything_but_what_mends_that(self) -> None:
        other = fresh_memory_backend()
        settings = QueueSettings(namespace=other.settings.namespace, groups={"billing": ("b",)})
        await other.declare("billing", ["a"])
        backend = MemoryBackend(settings)
        for call in (backend.connect(), backend.publish("b", {}), backend.stats("billing")):
            with pytest.raises(
                ConfigurationError, match=r"'billing' has the key patterns 'a', and QUEUE_GROUPS asks for 'b'"
            ):
                await within(call)
        await within(backend.declare("billing", ["b"]))
        await within(backend.publish("b", {}))
        assert (await within(backend.stats("billing"))).waiting == 1
        await backend.disconnect()
        await other.disconnect()

    async def test_times_of_ones_own_among_many_are_checked_before_anything_is_sent(
        self, memory_backend: MemoryBackend
    ) -> None:
        await memory_backend.declare("g")
        with pytest.raises(ConfigurationError, match="message #1"):
            await memory_backend.publish_many([Publication("k", {}), Publication("k", {}, timeout=-1)])
        assert (await memory_backend.stats("g")).waiting == 0
        await memory_backend.publish_many([Publication("k", {}), Publication("k", {}, timeout=5)])
        assert (await memory_backend.stats("g")).waiting == 2

    async def test_nobody_goes_on_joining_if_the_transport_fails_to_close(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        async def fails() -> None:
            raise ZeroDivisionError

        transport.close = fails  # type: ignore[method-assign]
        joining = join("g")
        await turns()
        with pytest.raises(ZeroDivisionError):
            await within(session.close())
        await within(asyncio.wait([joining]))
        assert joining.cancelled()

    async def test_one_that_fails_while_it_is_closed_does_not_cut_the_others_off(
        self, session: Session, transport: JoiningTransport, join: Callable[[str], asyncio.Task[Inbox]]
    ) -> None:
        transport.gate.set()
        for group in ("a", "b", "c"):
            await join(group)

        async def fails(_: float | None) -> None:
            raise ZeroDivisionError

        next(iter(session.inboxes)).close = fails  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            await within(session.close())
        assert transport.closed[-1] == "transport"
        assert len(transport.closed) == 3


def test_the_memory_transport_is_a_transport() -> None:
    async def make() -> Transport:
        return MemoryBackend().make_transport()

    assert asyncio.run(make()).batching.messages > 1
