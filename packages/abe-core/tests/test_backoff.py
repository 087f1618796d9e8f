"""How long the next try waits."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abe.backends.message_queue.base import ConstantBackoff, ExponentialBackoff
from abe.errors import ConfigurationError


def test_without_jitter_it_is_the_formula() -> None:
    backoff = ExponentialBackoff(initial=1, factor=2, maximum=300, jitter=False)
    assert [backoff(attempt) for attempt in range(1, 11)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]


@given(
    initial=st.floats(0.001, 10),
    factor=st.floats(1, 1e6),
    maximum=st.floats(10, 1e6),
    attempt=st.integers(1, 10**9),
)
def test_with_jitter_it_is_between_half_the_formula_and_all_of_it(
    initial: float, factor: float, maximum: float, attempt: int
) -> None:
    full = ExponentialBackoff(initial=initial, factor=factor, maximum=maximum, jitter=False)(attempt)
    assert 0 < full <= maximum
    assert full / 2 <= ExponentialBackoff(initial=initial, factor=factor, maximum=maximum)(attempt) <= full


@given(factor=st.floats(1, 1e6), attempt=st.integers(1, 2000))
def test_it_never_gets_shorter(factor: float, attempt: int) -> None:
    backoff = ExponentialBackoff(factor=factor, jitter=False)
    assert backoff(attempt) <= backoff(attempt + 1)


def test_a_small_factor_reaches_the_maximum_too() -> None:
    assert ExponentialBackoff(factor=1.05, maximum=300, jitter=False)(200) == 300


@pytest.mark.parametrize("factor", [2, 1e5, 10**6])
def test_a_late_attempt_waits_for_the_maximum_whatever_the_factor(factor: float) -> None:
    assert ExponentialBackoff(factor=factor, jitter=False)(10**9) == 300


def test_what_failed_together_does_not_come_back_together() -> None:
    assert len({ExponentialBackoff()(5) for _ in range(50)}) > 10


@pytest.mark.parametrize("seconds", [0, 0.5, 60])
def test_a_constant_backoff_is_constant(seconds: float) -> None:
    assert {ConstantBackoff(seconds)(attempt) for attempt in (1, 2, 1000)} == {seconds}


@pytest.mark.parametrize(
    "values",
    [
        {"initial": 0},
        {"initial": -1},
        {"factor": 0.5},
        {"maximum": 0.5},
        {"initial": float("nan")},
        {"factor": float("nan")},
        {"maximum": float("nan")},
        {"maximum": float("inf")},
    ],
)
def test_an_exponential_backoff_that_makes_no_sense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="initial > 0, factor >= 1, maximum >= initial"):
        ExponentialBackoff(**values)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_a_constant_backoff_that_makes_no_sense_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigurationError, match="a number of seconds of at least 0"):
        ConstantBackoff(seconds)
