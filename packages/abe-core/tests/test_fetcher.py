"""Several calls of `Receiver.receive` in progress at once: how many, for how many messages, and what becomes of them."""

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import pytest
from engine_doubles import turns, within

from abe.backends.message_queue.base import Delivery, Receiving
from abe.backends.message_queue.engine.fetcher import Fetcher
from abe.errors import AbeError, BackendConnectionError, GroupMissingError, PermissionDeniedError
from abe.testing import ManualClock


def messages(count: int) -> list[Delivery]:
    return [Delivery(b"", None, 1, None) for _ in range(count)]


class Consumer:
    """A receiver whose answers the test gives, and what holds the messages."""

    def __init__(self, clock: ManualClock, receiving: Receiving, bound: int = 100) -> None:
        self.bound = bound
        self.limits: list[int] = []
        self.under_way: list[tuple[int, asyncio.Future[Sequence[Delivery]]]] = []
        self.held: list[Delivery] = []
        self.recoveries: list[AbeError | asyncio.Event | None] = []
        self.recovered: int = 0
        self.restored: int = 0
        self.errors: list[BaseException] = []
        self.wanted = True
        fake: Any = self
        self.fetcher = Fetcher(
            fake,
            receiving,
            group="g",
            room=lambda: self.bound - len(self.held),
            held=lambda: self.held,
            arrived=self.arrived,
            lost=lambda _: None,
            restore=self.restore,
            ended=self.ended,
            clock=clock,
        )

    async def receive(self, limit: int) -> Sequence[Delivery]:
        call = limit, asyncio.get_running_loop().create_future()
        self.limits.append(limit)
        self.under_way.append(call)
        assert len(self.held) + sum(count for count, _ in self.under_way) <= self.bound
        try:
            return await call[1]
        finally:
            self.under_way.remove(call)

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        outcome = self.recoveries.pop(0) if self.recoveries else None
        if isinstance(outcome, AbeError):
            raise outcome
        if outcome is not None:
            await outcome.wait()
        self.recovered += 1
        return ()

    async def stop(self) -> None:
        for _, answer in self.under_way:
            if not answer.done():
                answer.set_result(())

    async def restore(self) -> None:
        await turns()  # as it asks a broker
        self.restored += 1

    def arrived(self, deliveries: Sequence[Delivery]) -> bool:
        self.held += deliveries
        return self.wanted

    def ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)

    async def answer(self, *answers: int | AbeError) -> None:
        """Answer the oldest calls, all of them in one turn: each with so many messages, or an error."""
        for (_, future), each in zip(list(self.under_way), answers, strict=False):
            if isinstance(each, AbeError):
                future.set_exception(each)
            else:
                future.set_result(messages(each))
        await turns()

    async def settle(self, count: int = 1000) -> None:
        del self.held[:count]
        self.fetcher.look()
        await turns()


@pytest.fixture
async def consumers(manual_clock: ManualClock) -> AsyncIterator[Any]:
    made: list[Consumer] = []

    async def consumer(*, at_once: int = 3, bound: int = 100) -> Consumer:
        made.append(Consumer(manual_clock, Receiving(messages=10, max_concurrent=at_once), bound))
        await turns()
        return made[-1]

    yield consumer
    for each in made:
        await within(each.fetcher.stop())
        assert not each.fetcher.tasks


async def test_there_are_as_many_calls_as_messages_flow(consumers: Any) -> None:
    consumer = await consumers(bound=10_000)
    seen: list[int] = []
    for count in (10, 10, 10, 9, 1, 1, 10, 10, 0, 0, 10):
        await consumer.answer(count)
        seen.append(len(consumer.under_way))
    assert seen == [2, 3, 3, 2, 1, 1, 2, 3, 2, 1, 2]


async def test_where_one_call_is_allowed_one_task_makes_them_all(consumers: Any) -> None:
    consumer = await consumers(at_once=1)
    before = asyncio.all_tasks()
    for count in (10, 10, 10):
        await consumer.answer(count)
        assert len(consumer.under_way) == 1
        assert asyncio.all_tasks() == before


@pytest.mark.parametrize("failing", [False, True])
async def test_together_they_never_ask_for_more_than_there_is_room_for(
    consumers: Any, manual_clock: ManualClock, failing: bool
) -> None:
    """Each call asserts it."""
    choose = random.Random(7)
    gone = BackendConnectionError("gone")
    consumer = await consumers(at_once=5, bound=35)
    for _ in range(100):
        limits = [limit for limit, _ in consumer.under_way][: choose.randint(0, 5)]
        consumer.recoveries = [choose.choice((gone, None, None))] if failing else []
        await consumer.answer(
            *(choose.choice((limit, limit, limit, limit - 1, gone if failing else 0)) for limit in limits)
        )
        await consumer.settle(choose.randint(0, 20))
        if failing:
            await manual_clock.advance(20)
        assert consumer.under_way or len(consumer.held) == consumer.bound
    assert max(consumer.limits) == 10


async def test_when_all_find_no_room_in_one_turn_one_of_them_waits_for_it(consumers: Any) -> None:
    consumer = await consumers(bound=30)
    await consumer.answer(10)
    assert [limit for limit, _ in consumer.under_way] == [10, 10]
    await consumer.answer(10, 10)
    assert (len(consumer.held), consumer.under_way) == (30, [])
    await consumer.settle(25)
    assert [limit for limit, _ in consumer.under_way] == [10, 10, 5], "as many as before, as there is room at once"


@pytest.mark.parametrize("error", [BackendConnectionError("gone"), GroupMissingError("gone")])
async def test_one_that_fails_recovers_while_the_others_go_on(
    consumers: Any, manual_clock: ManualClock, error: AbeError
) -> None:
    consumer = await consumers(bound=1000)
    await consumer.answer(10)
    await consumer.answer(10)
    assert len(consumer.under_way) == 3
    recovering = asyncio.Event()
    consumer.recoveries = [recovering]
    await consumer.answer(error)
    await manual_clock.advance(0.1)
    assert len(consumer.under_way) == 2
    assert consumer.restored == isinstance(error, GroupMissingError)
    await consumer.answer(10)
    assert len(consumer.held) == 30
    recovering.set()
    await turns()
    assert (len(consumer.under_way), consumer.recovered) == (3, 1)


async def test_all_that_fail_together_recover_once(consumers: Any, manual_clock: ManualClock) -> None:
    consumer = await consumers(bound=1000)
    await consumer.answer(10)
    await consumer.answer(10)
    gone = BackendConnectionError("gone")
    consumer.recoveries = [gone, None]
    await consumer.answer(gone, gone, gone)
    await manual_clock.advance(10)
    await turns()
    assert (len(consumer.under_way), consumer.recovered) == (3, 1)


@pytest.mark.parametrize(
    "error", [BackendConnectionError("gone"), GroupMissingError("gone")], ids=["connection", "group"]
)
async def test_all_that_fail_together_pause_once(consumers: Any, manual_clock: ManualClock, error: AbeError) -> None:
    consumer = await consumers(at_once=8, bound=1000)
    for _ in range(7):
        await consumer.answer(10)
    assert len(consumer.under_way) == 8
    await consumer.answer(*[error] * 8)
    await manual_clock.advance(0.1)  # the first pause is a twentieth of a second, the eighth five
    assert (len(consumer.under_way), consumer.recovered) == (8, 1)
    assert consumer.restored == isinstance(error, GroupMissingError)


async def test_what_fails_while_another_recovers_is_recovered_too(consumers: Any, manual_clock: ManualClock) -> None:
    consumer = await consumers(bound=1000)
    await consumer.answer(10)
    recovering = asyncio.Event()
    consumer.recoveries = [recovering, None]
    await consumer.answer(BackendConnectionError("gone"))
    await manual_clock.advance(0.1)
    await consumer.answer(BackendConnectionError("gone too"))
    assert not consumer.under_way
    recovering.set()
    await manual_clock.advance(10)
    await turns()
    assert consumer.recovered == 2
    assert consumer.under_way


async def test_an_error_that_does_not_pass_ends_all_of_them(consumers: Any) -> None:
    consumer = await consumers(bound=1000)
    await consumer.answer(10)
    error = PermissionDeniedError("no")
    await consumer.answer(10, error)
    assert consumer.errors == [error]
    while consumer.under_way:
        await consumer.answer(10)
    assert not consumer.fetcher.tasks


async def test_when_no_more_is_wanted_none_is_asked_for(consumers: Any) -> None:
    consumer = await consumers(bound=1000)
    await consumer.answer(10)
    consumer.wanted = False
    await consumer.answer(10)
    assert len(consumer.under_way) == 1
    await consumer.answer(10)
    assert len(consumer.held) == 30, "what comes all the same is not lost"
    assert not consumer.fetcher.tasks


async def test_stopping_ends_them_all_and_takes_what_came_meanwhile(consumers: Any) -> None:
    consumer = await consumers(bound=1000)
    await consumer.answer(10)
    await consumer.answer(10)
    consumer.under_way[1][1].set_result(messages(7))
    await within(consumer.fetcher.stop())
    assert len(consumer.held) == 27
    assert not consumer.under_way


async def test_stopping_does_not_wait_for_one_that_recovers(consumers: Any) -> None:
    consumer = await consumers(bound=1000)
    await consumer.answer(10)
    consumer.recoveries = [asyncio.Event()]
    await consumer.answer(GroupMissingError("gone"))
    await within(consumer.fetcher.stop())
    assert not consumer.fetcher.tasks


async def test_what_fails_once_the_receiver_has_stopped_is_not_recovered(consumers: Any) -> None:
    consumer = await consumers(at_once=1)
    consumer.recoveries = [asyncio.Event()]
    stop = consumer.stop

    async def fail() -> None:
        consumer.under_way[0][1].set_exception(BackendConnectionError("gone"))
        consumer.stop = stop

    consumer.stop = fail
    await within(consumer.fetcher.stop())
    assert not consumer.fetcher.tasks
    assert consumer.recoveries, "it was never asked to"


async def test_where_one_call_has_no_answer_others_use_the_room(consumers: Any) -> None:
    consumer = await consumers(bound=30)
    await consumer.answer(10)
    await consumer.answer(10)
    assert len(consumer.under_way) == 1, "there is room for no more"
    await consumer.settle()
    assert len(consumer.under_way) == 3, "the first one is silent still"


async def test_while_one_recovers_another_has_a_place(consumers: Any, manual_clock: ManualClock) -> None:
    consumer = await consumers(bound=30)
    await consumer.answer(10)
    consumer.recoveries = [asyncio.Event()]
    await consumer.answer(BackendConnectionError("gone"))
    await manual_clock.advance(0.1)
    await consumer.answer(9)
    assert len(consumer.under_way) == 1, "after a partial answer one call is left, and the one that recovers is none"


async def test_a_fault_of_the_provider_is_logged_also_while_another_is_mended(
    consumers: Any, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = await consumers()
    await consumer.answer(10)
    consumer.recoveries = [asyncio.Event()]
    await consumer.answer(BackendConnectionError("gone"))
    await manual_clock.advance(0.1)
    consumer.under_way[0][1].set_exception(KeyError("a bug"))
    await turns()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError]


async def test_a_receiver_that_cannot_be_stopped_has_its_calls_cancelled(consumers: Any) -> None:
    consumer = await consumers(bound=1000)
    await consumer.answer(10)

    async def stop() -> None:
        raise BackendConnectionError("gone")

    consumer.stop = stop
    await within(consumer.fetcher.stop())
    assert not consumer.under_way
