"""The retry policy: whether, and when, a message whose handler failed is delivered again."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from abe.backends.message_queue.base.backoff import Backoff, ConstantBackoff, ExponentialBackoff
from abe.backends.message_queue.base.names import check_count
from abe.backends.message_queue.report import reason_of
from abe.errors import ConfigurationError

__all__ = ["Backoff", "Classifier", "ConstantBackoff", "ExponentialBackoff", "Reject", "Retry", "RetryPolicy"]


class Retry(Exception):  # noqa: N818 - a decision, not an error
    """Raised by a handler: deliver the message again.

    Args:
        after: The delay in seconds; None: the policy's backoff.
        reason: The reason, for the log and the dead letter.
    """

    def __init__(self, *, after: float | None = None, reason: str = "the handler asked for a retry") -> None:
        super().__init__(reason)
        self.after = after
        self.reason = reason


class Reject(Exception):  # noqa: N818 - a decision, not an error
    """Raised by a handler: the message will never succeed, move it to the dead letters.

    Args:
        reason: The reason, for the dead letter: a text or an exception.
    """

    def __init__(self, reason: object = "rejected by the handler") -> None:
        super().__init__(reason)
        self.reason = reason


Classifier: TypeAlias = Callable[[Exception], Retry | Reject | None]
"""Maps a handler's exception to a decision; None: the policy decides."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often a failing message is delivered, and the delay between attempts. The broker keeps the message meanwhile.

    An exception group, as a TaskGroup raises it, is judged by its members, nested ones included: any `Reject` rejects the
    message; else the `Retry` with the longest delay applies. The classifier is called with the group first, then with each
    member, with the same precedence.

    Args:
        max_attempts: Deliveries in all, including those whose consumer died; after the last one the message is a dead letter. None:
            the backend's setting, ``QUEUE_MAX_ATTEMPTS``.
        backoff: Maps the failed attempt to the delay in seconds.
        classify: Decides about particular exceptions.

    Raises:
        ConfigurationError: `max_attempts` is not a count, or another argument is not a function of one argument.
    """

    max_attempts: int | None = None
    backoff: Backoff = field(default_factory=ExponentialBackoff)
    classify: Classifier | None = None

    def __post_init__(self) -> None:
        if self.max_attempts is not None:
            check_count("max_attempts", self.max_attempts)
        hint = "such as ConstantBackoff(5) or ExponentialBackoff()"
        _check_function("backoff", self.backoff, f"a function from the failed attempt to seconds, {hint}")
        if self.classify is not None:
            _check_function("classify", self.classify, "a function from an exception to Retry, Reject or None")

    def judge(self, exc: BaseException, attempt: int) -> Retry | Reject:
        """Return the decision on a failure, with the delay filled in.

        Raises:
            ValueError: The backoff, the classifier or a `Retry` has a wrong value.
            Exception: Any exception of the backoff or the classifier.
        """
        decision = _first([leaf for leaf in _leaves(exc) if isinstance(leaf, Retry | Reject)]) or self._classified(exc)
        if isinstance(decision, Reject):
            return decision
        if decision is None:
            decision = Retry(reason=reason_of(exc))
        after: Any = self.backoff(attempt) if decision.after is None else decision.after
        if isinstance(after, bool) or not isinstance(after, int | float) or not math.isfinite(after):
            source = "the backoff returned" if decision.after is None else "Retry(after=) was given"
            raise ValueError(f"{source} a {type(after).__name__} that is not a number of seconds")
        return Retry(after=float(after), reason=decision.reason)

    def _classified(self, exc: BaseException) -> Retry | Reject | None:
        if self.classify is None or not isinstance(exc, Exception):
            return None
        decisions = [self._ask(exc)]
        if decisions == [None] and isinstance(exc, ExceptionGroup):
            decisions = [self._ask(leaf) for leaf in _leaves(cast("BaseException", exc)) if isinstance(leaf, Exception)]
        return _first([decision for decision in decisions if decision is not None])

    def _ask(self, exc: Exception) -> Retry | Reject | None:
        assert self.classify is not None
        decision: Any = self.classify(exc)
        if decision is Retry or decision is Reject:
            decision = decision()
        if decision is not None and not isinstance(decision, Retry | Reject):
            raise ValueError(f"the classifier returned a {type(decision).__name__}, not Retry, Reject or None")
        return decision


def _first(decisions: list[Retry | Reject]) -> Retry | Reject | None:
    """Return a rejection if there is one, else the retry with the longest delay."""
    rejected = next((decision for decision in decisions if isinstance(decision, Reject)), None)
    return rejected or max(decisions, key=_wait, default=None)


def _wait(decision: Retry | Reject) -> float:
    after = decision.after if isinstance(decision, Retry) else None
    return after if isinstance(after, int | float) and math.isfinite(after) else -1.0


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    ahead = [exc]
    while ahead:
        member = ahead.pop(0)
        if isinstance(member, BaseExceptionGroup):
            ahead[:0] = cast("BaseExceptionGroup[BaseException]", member).exceptions
        else:
            yield member


def _check_function(name: str, function: object, wanted: str) -> None:
    if inspect.isclass(function):
        raise ConfigurationError(f"{name} must be {wanted}; {function.__name__} is a class: give an instance")
    if not callable(function):
        raise ConfigurationError(f"{name} must be {wanted}, not {function!r}")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        raise ConfigurationError(f"{name} must be {wanted}: it is called synchronously, so it cannot be async")
    try:
        inspect.signature(function).bind(None)
    except TypeError as exc:
        raise ConfigurationError(f"{name} must be {wanted}: {exc}") from None
    except ValueError:
        return  # a builtin without a signature
