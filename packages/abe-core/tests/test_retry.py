"""What becomes of a message whose handler failed."""

import pytest

from abe import ConstantBackoff, Reject, Retry, RetryPolicy
from abe.errors import ConfigurationError

POLICY = RetryPolicy(backoff=lambda attempt: attempt * 10.0)


def test_an_exception_is_retried_after_the_backoff_of_its_attempt() -> None:
    verdict = POLICY.judge(KeyError("id"), 3)
    assert isinstance(verdict, Retry)
    assert (verdict.after, verdict.reason) == (30.0, "KeyError: 'id'")


def test_a_retry_raised_by_the_handler_says_how_long() -> None:
    verdict = POLICY.judge(Retry(after=7, reason="the bank is closed"), 3)
    assert isinstance(verdict, Retry)
    assert (verdict.after, verdict.reason) == (7, "the bank is closed")


def test_a_retry_after_no_time_at_all_is_one_at_once() -> None:
    verdict = POLICY.judge(Retry(after=0), 3)
    assert isinstance(verdict, Retry)
    assert verdict.after == 0


def test_a_retry_that_does_not_say_how_long_takes_the_backoff() -> None:
    verdict = POLICY.judge(Retry(reason="later"), 2)
    assert isinstance(verdict, Retry)
    assert (verdict.after, verdict.reason) == (20.0, "later")


def test_a_reject_raised_by_the_handler_stands() -> None:
    verdict = Reject("no such customer")
    assert POLICY.judge(verdict, 1) is verdict


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


def test_a_handlers_own_verdict_comes_before_the_function() -> None:
    policy = RetryPolicy(classify=lambda _: Reject("never asked"))
    assert isinstance(policy.judge(Retry(after=1), 1), Retry)


@pytest.mark.parametrize("attempts", [0, -1])
def test_a_policy_allows_at_least_one_attempt(attempts: int) -> None:
    with pytest.raises(ConfigurationError, match="max_attempts"):
        RetryPolicy(max_attempts=attempts)


def test_the_default_is_five_attempts_with_growing_pauses() -> None:
    policy = RetryPolicy()
    assert policy.max_attempts == 5
    verdict = policy.judge(ValueError(), 10**6)
    assert isinstance(verdict, Retry)
    assert verdict.after is not None
    assert 150 <= verdict.after <= 300


def test_verdicts_can_be_raised_without_words() -> None:
    assert str(Retry()) == "the handler asked for a retry"
    assert str(Reject()) == "rejected by the handler"
