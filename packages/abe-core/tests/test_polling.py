"""The polling receiver: when it asks, what it waits for, and what a cancellation or a failure leaves behind, at each of its waits."""

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from abe.backends.message_queue.base import Delivery
from abe.backends.message_queue.base import polling as polling_module
from abe.backends.message_queue.base.polling import PollingReceiver, Taken
from abe.errors import BackendConnectionError
from abe_contract_tests.bounds import within

LONG = 3600.0
"""Seconds: an interval that no test waits for."""


class Asked(PollingReceiver):
    """A receiver whose broker answers what the test has put into `answers`, and nothing else afterwards."""

    def __init__(self, *answers: Taken | BaseException, interval: float = LONG) -> None:
        super().__init__(interval)
        self.answers = list(answers)
        self.asked = 0
        self.calls: list[tuple[str, Sequence[Delivery]]] = []
        self.open = asyncio.Event()
        """Whether the broker answers."""
        self.open.set()

    async def take(self, limit: int) -> Taken:
        self.asked += 1
        await self.open.wait()
        answer = self.answers.pop(0) if self.answers else Taken()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def give_back(self, keep: Collection[Delivery]) -> None:
        self.calls.append(("give_back", list(keep)))
        await self.open.wait()

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        self.calls.append(("renew", list(deliveries)))
        await self.open.wait()
        return list(deliveries)[:1]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each pause: none of them takes any time, but that of an hour."""
    seen: list[float] = []

    async def pause(ended: asyncio.Event, seconds: float) -> bool:
        seen.append(seconds)
        if seconds == LONG:
            return await ended.wait()
        await asyncio.sleep(0)
        return ended.is_set()

    monkeypatch.setattr(polling_module, "pause", pause)
    return seen


def delivery() -> Delivery:
    return Delivery(b"", None, 1, object())


async def asleep() -> None:
    """Let every task go on until it waits for something that does not come by itself."""
    for _ in range(50):
        await asyncio.sleep(0)


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_is_there_is_returned_without_a_pause(pauses: list[float]) -> None:
    one = delivery()
    receiver = Asked(Taken([one]))
    assert await receiver.receive(5) == [one]
    assert pauses == []


async def test_pauses_double_up_to_the_interval_and_begin_anew_with_each_call(pauses: list[float]) -> None:
    nothing = [Taken()] * 6
    receiver = Asked(*nothing, Taken([delivery()]), Taken(), Taken([delivery()]), interval=1.6)
    await receiver.receive(1)
    await receiver.receive(1)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 1.6, 0.1])


async def test_the_time_that_the_broker_names_ends_a_pause_and_lengthens_none(pauses: list[float]) -> None:
    receiver = Asked(Taken(due_in=0.02), Taken(due_in=0.15), Taken(due_in=9.0), Taken([delivery()]), interval=1.6)
    await receiver.receive(1)
    assert pauses == pytest.approx([0.02, 0.15, 0.4])


@pytest.mark.parametrize("due_in", [0.0, -5.0, 1e-9])
async def test_a_broker_that_names_a_time_too_early_is_not_asked_without_a_pause(
    pauses: list[float], due_in: float
) -> None:
    receiver = Asked(*[Taken(due_in=due_in)] * 3, Taken([delivery()]), interval=1.6)
    await receiver.receive(1)
    assert pauses == pytest.approx([0.005] * 3)


async def test_a_ring_ends_a_real_pause() -> None:
    one = delivery()
    receiver = Asked(Taken(), Taken([one]))
    receiving = asyncio.create_task(receiver.receive(1))
    await asleep()
    assert receiver.asked == 1
    receiver.ring()
    async with within(5):
        assert await receiving == [one]


async def test_a_ring_that_comes_during_a_question_is_heard_after_it() -> None:
    one = delivery()
    receiver = Asked(Taken(), Taken([one]))
    receiver.open.clear()
    receiving = asyncio.create_task(receiver.receive(1))
    await asleep()
    receiver.ring()
    receiver.open.set()
    async with within(5):
        assert await receiving == [one]


async def test_a_ring_while_nobody_receives_costs_no_pause_and_no_question_more(pauses: list[float]) -> None:
    receiver = Asked(Taken([delivery()]))
    receiver.ring()
    await receiver.receive(1)
    assert (receiver.asked, pauses) == (1, [])


async def test_stop_ends_a_waiting_receive_and_nothing_is_taken_from_then_on() -> None:
    receiver = Asked()
    receiving = asyncio.create_task(receiver.receive(1))
    await asleep()
    await receiver.stop()
    async with within(5):
        assert await receiving == ()
        assert await receiver.receive(1) == ()
    assert receiver.asked == 1


async def test_stop_lets_a_receive_return_what_the_broker_is_answering() -> None:
    one = delivery()
    receiver = Asked(Taken([one]))
    receiver.open.clear()
    receiving = asyncio.create_task(receiver.receive(1))
    await asleep()
    assert await receiver.stop() is None
    receiver.open.set()
    async with within(5):
        assert await receiving == [one]


async def test_a_receive_cancelled_in_its_question_can_be_called_again() -> None:
    one = delivery()
    receiver = Asked(Taken([one]))
    receiver.open.clear()
    receiving = asyncio.create_task(receiver.receive(1))
    await asleep()
    await cancelled(receiving)
    receiver.open.set()
    assert await receiver.receive(1) == [one]


async def test_a_receive_cancelled_in_its_pause_can_be_called_again_and_leaves_nothing() -> None:
    one = delivery()
    receiver = Asked(Taken(), Taken([one]))
    receiving = asyncio.create_task(receiver.receive(1))
    await asleep()
    await cancelled(receiving)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert await receiver.receive(1) == [one]


async def test_a_receive_cancelled_as_it_is_rung_loses_no_message() -> None:
    one = delivery()
    receiver = Asked(Taken(), Taken([one]))
    receiving = asyncio.create_task(receiver.receive(1))
    await asleep()
    receiver.ring()
    await cancelled(receiving)
    assert await receiver.receive(1) == [one]


async def test_a_failed_question_is_raised_and_the_next_receive_asks_again() -> None:
    one = delivery()
    receiver = Asked(BackendConnectionError("gone"), Taken([one]))
    with pytest.raises(BackendConnectionError):
        await receiver.receive(1)
    assert await receiver.receive(1) == [one]


async def test_recovering_gives_back_what_was_never_seen_and_then_renews() -> None:
    receiver = Asked()
    held = [delivery(), delivery()]
    assert await receiver.recover(held) == held[:1]
    assert receiver.calls == [("give_back", held), ("renew", held)]


@pytest.mark.parametrize("done", [1, 2])
async def test_recovering_that_is_cancelled_at_either_step_is_done_again_as_a_whole(done: int) -> None:
    receiver = Asked()
    held = [delivery()]
    receiver.open.clear()
    recovering = asyncio.create_task(receiver.recover(held))
    await asleep()
    if done == 2:
        receiver.open.set()
        receiver.open.clear()  # whoever waits is woken; the next one is not
        await asleep()
    assert len(receiver.calls) == done
    await cancelled(recovering)
    receiver.open.set()
    receiver.calls.clear()
    await receiver.recover(held)
    assert [name for name, _ in receiver.calls] == ["give_back", "renew"]


async def test_closing_gives_back_everything_also_when_it_was_cancelled_before() -> None:
    receiver = Asked()
    receiver.open.clear()
    closing = asyncio.create_task(receiver.close())
    await asleep()
    await cancelled(closing)
    receiver.open.set()
    await receiver.close()
    assert receiver.calls == [("give_back", [])] * 2


async def test_no_two_receivers_have_the_same_name() -> None:
    assert Asked().consumer != Asked().consumer
