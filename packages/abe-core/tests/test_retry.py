"""What becomes of a message whose handler failed."""

import asyncio
from typing import Any

import pytest
from consumer_doubles import ONCE, PATIENT, Collector, drained, publish, running

from abe import AsyncLoopConsumer, ConstantBackoff, Message, Reject, Retry, RetryPolicy
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import ConfigurationError
from abe.testing import ManualClock

POLICY = RetryPolicy(backoff=lambda attempt: attempt * 10.0)


def test_an_exception_is_retried_after_the_backoff_of_its_attempt() -> None:
    decision = POLICY.judge(KeyError("id"), 3)
    assert isinstance(decision, Retry)
    assert (decision.after, decision.reason) == (30.0, "KeyError: 'id'")


def test_a_retry_raised_by_the_handler_says_how_long() -> None:
    decision = POLICY.judge(Retry(after=7, reason="the bank is closed"), 3)
    assert isinstance(decision, Retry)
    assert (decision.after, decision.reason) == (7, "the bank is closed")


def test_a_retry_after_no_time_at_all_is_one_at_once() -> None:
    decision = POLICY.judge(Retry(after=0), 3)
    assert isinstance(decision, Retry)
    assert decision.after == 0


def test_a_retry_that_does_not_say_how_long_takes_the_backoff() -> None:
    decision = POLICY.judge(Retry(reason="later"), 2)
    assert isinstance(decision, Retry)
    assert (decision.after, decision.reason) == (20.0, "later")


def test_a_reject_raised_by_the_handler_stands() -> None:
    decision = Reject("no such customer")
    assert POLICY.judge(decision, 1) is decision


def test_a_function_may_decide_about_particular_exceptions() -> None:
    def classify(exc: Exception) -> Retry | Reject | None:
        if isinstance(exc, KeyError):
            return Reject("malformed")
        return Retry(after=1.5) if isinstance(exc, OSError) else None

    policy = RetryPolicy(backoff=ConstantBackoff(9), classify=classify)
    assert isinstance(policy.judge(KeyError(), 1), Reject)
    retried, left_alone = policy.judge(OSError(), 1), policy.judge(ValueError(), 1)
    assert isinstance(retried, Retry)
    assert isinstance(left_alone, Retry)
    assert (retried.after, left_alone.after) == (1.5, 9)


def test_a_handlers_own_settlement_comes_before_the_function() -> None:
    policy = RetryPolicy(classify=lambda _: Reject("never asked"))
    assert isinstance(policy.judge(Retry(after=1), 1), Retry)


@pytest.mark.parametrize("attempts", [0, -1])
def test_a_policy_allows_at_least_one_attempt(attempts: int) -> None:
    with pytest.raises(ConfigurationError, match="max_attempts"):
        RetryPolicy(max_attempts=attempts)


def test_the_default_is_the_backends_number_of_attempts_with_growing_pauses() -> None:
    policy = RetryPolicy()
    assert policy.max_attempts is None
    decision = policy.judge(ValueError(), 10**6)
    assert isinstance(decision, Retry)
    assert decision.after is not None
    assert 150 <= decision.after <= 300


def test_settlements_can_be_raised_without_words() -> None:
    assert str(Retry()) == "the handler asked for a retry"
    assert str(Reject()) == "rejected by the handler"


LEAVES = [
    ([Reject("no")], Reject),
    ([ValueError(), Reject("no")], Reject),
    ([Retry(after=1), Reject("no")], Reject),
    ([ExceptionGroup("inner", [ValueError(), Reject("no")]), OSError()], Reject),
    ([Retry(after=1), ValueError()], Retry),
    ([ValueError(), OSError()], Retry),
]


@pytest.mark.parametrize(("leaves", "decision"), LEAVES)
def test_in_a_group_of_exceptions_a_reject_wins_and_then_a_retry(leaves: list[Exception], decision: type) -> None:
    assert isinstance(POLICY.judge(ExceptionGroup("tasks", leaves), 1), decision)


def test_of_several_retries_in_a_group_the_one_that_waits_longest_counts() -> None:
    group = ExceptionGroup("tasks", [Retry(after=2), ExceptionGroup("inner", [Retry(after=7), Retry()])])
    decision = POLICY.judge(group, 1)
    assert isinstance(decision, Retry)
    assert decision.after == 7


def test_the_classifier_is_asked_about_a_group_and_then_about_its_members() -> None:
    def classify(exc: Exception) -> Retry | Reject | None:
        return Reject("malformed") if isinstance(exc, KeyError) else None

    def whole(exc: Exception) -> Retry | Reject | None:
        return Retry(after=3) if isinstance(exc, ExceptionGroup) else Reject("a member")

    group = ExceptionGroup("tasks", [OSError(), ExceptionGroup("inner", [KeyError()])])
    assert isinstance(RetryPolicy(classify=classify).judge(group, 1), Reject)
    assert isinstance(RetryPolicy(classify=whole).judge(group, 1), Retry)


def test_a_classifier_may_return_the_class() -> None:
    policy = RetryPolicy(classify=lambda exc: Reject)  # type: ignore[arg-type, return-value]
    assert isinstance(policy.judge(ValueError(), 1), Reject)


async def later(attempt: int) -> float:
    return 5.0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backoff": 5}, "backoff must be a function.*such as ConstantBackoff"),
        ({"backoff": None}, "backoff must be a function"),
        ({"backoff": ConstantBackoff}, "ConstantBackoff is a class: give an instance"),
        ({"backoff": lambda: 5}, "backoff must be a function"),
        ({"backoff": later}, "so it cannot be async"),
        ({"classify": Reject("no")}, "classify must be a function"),
        ({"classify": Reject}, "Reject is a class"),
        ({"max_attempts": "5"}, "max_attempts must be an integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_asked_is_refused_where_the_policy_is_made(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        RetryPolicy(**options)


@pytest.mark.parametrize("after", ["soon", float("nan"), True, [1]], ids=str)
def test_a_wait_that_is_none_is_an_error_of_the_policy(after: Any) -> None:
    with pytest.raises(ValueError, match="not a number of seconds"):
        POLICY.judge(Retry(after=after), 1)
    with pytest.raises(ValueError, match="not a number of seconds"):
        RetryPolicy(backoff=lambda attempt: after).judge(KeyError(), 1)


def test_an_exception_outside_of_exception_is_a_failure_like_others() -> None:
    policy = RetryPolicy(backoff=ConstantBackoff(1), classify=lambda exc: Reject("never asked"))
    decision = policy.judge(SystemExit(1), 1)
    assert isinstance(decision, Retry)
    assert decision.reason == "SystemExit: 1"


class TestFailures:
    async def test_a_failed_message_comes_back_after_the_policys_backoff_and_not_before(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        collector = Collector(ValueError("no"), ValueError("no"))
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), collector):
            await manual_clock.advance(99.9)
            assert collector.attempts == [1]
            await manual_clock.advance(0.1)
            assert collector.attempts == [1, 2]
            await manual_clock.advance(100)
            assert collector.attempts == [1, 2, 3]
            await drained(memory_backend)
        assert "of group 'default', attempt 1 of 3: ValueError: no (retrying in 100 s)" in caplog.text
        assert (await memory_backend.stats()).dead == 0

    async def test_others_are_handled_while_a_failed_one_waits(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        collector = Collector(ValueError("no"), wanted=3)
        await publish(memory_backend, 3)
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), collector):
            await collector.done.wait()
            assert [message["n"] for message in collector.seen] == [0, 1, 2]
            await manual_clock.advance(100)
            assert [message["n"] for message in collector.seen] == [0, 1, 2, 0]

    async def test_after_its_last_attempt_it_is_a_dead_letter_that_says_why(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        collector = Collector(*[ValueError("the bank is gone")] * 3)
        await memory_backend.publish("order.created", {"n": 1}, headers={"h": "v"}, id="seven")
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), collector):
            await manual_clock.advance(1000)
        assert collector.attempts == [1, 2, 3]
        (letter,) = await memory_backend.dead_letters().list()
        assert (letter.id, letter.key, letter.body, letter.headers) == (
            "seven",
            "order.created",
            b'{"n":1}',
            {"h": "v"},
        )
        assert (letter.attempts, letter.reason) == (3, "ValueError: the bank is gone")
        assert letter.error.startswith("Traceback")
        assert letter.error.endswith("ValueError: the bank is gone\n")

    async def test_a_handler_may_say_when_to_try_again(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        collector = Collector(Retry(after=7))
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), collector):
            await manual_clock.advance(6.9)
            assert collector.attempts == [1]
            await manual_clock.advance(0.2)
            assert collector.attempts == [1, 2]

    async def test_a_handler_may_reject(self, memory_backend: MemoryBackend, manual_clock: ManualClock) -> None:
        collector = Collector(Reject("no such customer"))
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), collector):
            await manual_clock.advance(1000)
        assert collector.attempts == [1]
        (letter,) = await memory_backend.dead_letters().list()
        assert letter.reason == "no such customer"

    async def test_a_function_may_decide_about_an_exception(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        def classify(exc: Exception) -> Retry | Reject | None:
            return Reject("malformed") if isinstance(exc, KeyError) else Retry(after=1)

        collector = Collector(OSError(), KeyError())
        await publish(memory_backend, 1)
        policy = RetryPolicy(classify=classify)
        async with running(AsyncLoopConsumer(memory_backend, retry=policy), collector):
            await manual_clock.advance(1)
        assert collector.attempts == [1, 2]
        (letter,) = await memory_backend.dead_letters().list()
        assert letter.reason == "malformed"

    async def test_a_replayed_dead_letter_starts_again_at_attempt_1(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        collector = Collector(ValueError("no"))
        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=ONCE), collector):
            await manual_clock.advance(0)
            assert (await memory_backend.stats()).dead == 1
            assert await memory_backend.dead_letters().replay_all() == 1
            await collector.done.wait()
        assert collector.attempts == [1, 1]

    async def test_a_handler_that_settled_the_message_itself_has_the_last_word(
        self, memory_backend: MemoryBackend, manual_clock: ManualClock
    ) -> None:
        async def handler(message: Message) -> None:
            await message.ack()
            raise ValueError("afterwards")

        await publish(memory_backend, 1)
        async with running(AsyncLoopConsumer(memory_backend, retry=PATIENT), handler):
            await manual_clock.advance(1000)
        stats = await memory_backend.stats()
        assert (stats.waiting, stats.in_flight, stats.delayed, stats.dead) == (0, 0, 0, 0)

    async def test_a_handler_that_awaits_something_cancelled_has_failed_and_the_consumer_lives(
        self, memory_backend: MemoryBackend
    ) -> None:
        done = asyncio.Event()

        async def handler(message: Message) -> None:
            if message["n"] == 1:
                done.set()
                return
            cancelled = asyncio.ensure_future(asyncio.Event().wait())
            cancelled.cancel()
            await cancelled

        await publish(memory_backend, 2)
        async with running(AsyncLoopConsumer(memory_backend, retry=ONCE), handler):
            await done.wait()
        (letter,) = await memory_backend.dead_letters().list()
        assert "cancelled" in letter.reason
