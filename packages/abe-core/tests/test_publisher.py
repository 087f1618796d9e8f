"""The publisher, on a transport that does as it is told."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from engine_doubles import turns, within

from abe.backends.message_queue.base import Batching, Envelope, Outcomes
from abe.backends.message_queue.engine.publisher import Publisher
from abe.errors import (
    AbeError,
    BackendClosedError,
    BackendConnectionError,
    BackpressureError,
    PermissionDeniedError,
    PublishRejectedError,
    PublishUnknownError,
)
from abe_contract_tests import bounds


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
