"""The tree of errors: what it is, and what each of its members tells a caller."""

import inspect
import re

import pytest

from abe import errors
from abe.errors import (
    AbeError,
    BackpressureError,
    ConfigurationError,
    DecodeError,
    PartialPublishError,
    PayloadError,
    PublishRejectedError,
    PublishUnknownError,
    UnroutableError,
)

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]


def real_tree() -> dict[str, tuple[str, ...]]:
    return {item.__name__: tuple(base.__name__ for base in item.__bases__) for item in CLASSES}


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """The bases of each class that the module's docstring draws, from its depth and what it has in brackets."""
    drawn: dict[str, tuple[str, ...]] = {"AbeError": ("Exception",)}
    above = ["AbeError"]
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ((?:\|   |    )*)[+`]-- (\w+)(?: \((\w+)\))?", line)
        if found is None:
            continue
        depth = len(found[1]) // 4 + 1
        del above[depth:]
        drawn[found[2]] = (above[-1], *([found[3]] if found[3] else []))
        above.append(found[2])
    return drawn


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert drawn_tree() == real_tree()


@pytest.mark.parametrize("error", CLASSES, ids=lambda item: item.__name__)
def test_every_error_says_whether_a_retry_helps_and_whether_the_message_may_be_there(error: type[AbeError]) -> None:
    assert issubclass(error, AbeError)
    assert isinstance(error.retryable, bool)
    assert isinstance(error.maybe_accepted, bool)


@pytest.mark.parametrize("error", CLASSES, ids=lambda item: item.__name__)
def test_every_error_says_in_one_sentence_when_it_is_raised(error: type[AbeError]) -> None:
    assert (error.__doc__ or "").strip()


def test_an_unknown_publish_may_be_there_and_a_rejected_one_is_not() -> None:
    assert PublishUnknownError.maybe_accepted
    assert not PublishRejectedError("full").maybe_accepted
    assert not issubclass(PublishUnknownError, PublishRejectedError)
    assert not issubclass(PublishRejectedError, PublishUnknownError)


def test_a_rejected_publish_can_be_retried_unless_it_says_otherwise() -> None:
    assert PublishRejectedError("busy").retryable
    assert BackpressureError("full").retryable
    assert not UnroutableError("nobody wants it").retryable


def test_one_error_that_cannot_be_retried_does_not_change_the_others() -> None:
    UnroutableError("nobody wants it")
    assert BackpressureError("full").retryable


def test_a_partial_publish_names_the_failed_messages_and_why() -> None:
    first, second = BackpressureError("full"), PayloadError("no JSON")
    error = PartialPublishError([(2, first), (5, second)], 9)
    assert error.failures == ((2, first), (5, second))
    assert str(error) == "2 of 9 messages failed: #2: full; #5: no JSON"


def test_a_partial_publish_shows_three_failures_and_counts_the_rest() -> None:
    error = PartialPublishError([(index, BackpressureError("full")) for index in range(5)], 5)
    assert str(error) == "5 of 5 messages failed: #0: full; #1: full; #2: full; and 2 more"
    assert len(error.failures) == 5


def test_a_partial_publish_can_be_retried_when_every_failure_can() -> None:
    assert PartialPublishError([(0, BackpressureError("full"))], 2).retryable
    assert not PartialPublishError([(0, BackpressureError("full")), (1, PayloadError("no JSON"))], 2).retryable


def test_a_partial_publish_with_one_unknown_outcome_may_have_been_accepted() -> None:
    assert PartialPublishError([(0, BackpressureError("full")), (1, PublishUnknownError("cut"))], 2).maybe_accepted
    assert not PartialPublishError([(0, BackpressureError("full"))], 2).maybe_accepted


@pytest.mark.parametrize(("error", "builtin"), [(ConfigurationError, ValueError), (DecodeError, ValueError)])
def test_what_is_a_builtin_error_is_caught_as_one(error: type[AbeError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin):
        raise error("wrong")
