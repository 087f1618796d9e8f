"""What becomes of a message whose handler failed."""

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
        after: Seconds before which it must not come back; None: the policy's backoff.
        reason: Why, for the log and the dead letter.
    """

    def __init__(self, *, after: float | None = None, reason: str = "the handler asked for a retry") -> None:
        super().__init__(reason)
        self.after = after
        self.reason = reason


class Reject(Exception):  # noqa: N818 - a decision, not an error
    """Raised by a handler: the message will never succeed, move it to the dead letters.

    Args:
        reason: Why, for the dead letter; an exception will do.
    """

    def __init__(self, reason: object = "rejected by the handler") -> None:
        super().__init__(reason)
        self.reason = reason


Classifier: TypeAlias = Callable[[Exception], Retry | Reject | None]
"""From a handler's exception to a decision; None leaves it to the policy."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often a failing message is tried, and how long it waits in between. The waiting is done by the broker.

    A group of exceptions, as a TaskGroup raises it, is judged by its members, nested ones too: a `Reject` among them rejects the
    message, whatever else failed; else a `Retry` retries it, the longest of several. The classifier is asked about
    the group as a whole, then about each member, in the same order of precedence.

    Args:
        max_attempts: Deliveries in all, those included whose consumer died; the last failure moves the message to the dead letters. None:
            the backend's setting, ``QUEUE_MAX_ATTEMPTS``.
        backoff: From the attempt that failed to the seconds until the next.
        classify: Decides about particular exceptions.

    Raises:
        ConfigurationError: `max_attempts` is no count, or one of the others no function of one argument.
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
        """Return the decision on a failure, with the wait filled in.

        Raises:
            ValueError: The backoff, the classifier or a `Retry` gave something else than it should. Besides, what they raise.
        """
        decision = _first([leaf for leaf in _leaves(exc) if isinstance(leaf, Retry | Reject)]) or self._classified(exc)
        if isinstance(decision, Reject):
            return decision
        if decision is None:
            decision = Retry(reason=reason_of(exc))
        after: Any = self.backoff(attempt) if decision.after is None else decision.after
        if isinstance(after, bool) or not isinstance(after, int | float) or not math.isfinite(after):
            source = "the backoff returned" if decision.after is None else "Retry(after=) was given"
            raise ValueError(f"{source} a {type(after).__name__} that is no number of seconds")
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
    """A rejection comes first, then the retry that waits longest."""
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
        raise ConfigurationError(f"{name} must be {wanted}: it is asked without waiting, so not an async one")
    try:
        inspect.signature(function).bind(None)
    except TypeError as exc:
        raise ConfigurationError(f"{name} must be {wanted}: {exc}") from None
    except ValueError:
        return  # a builtin without a signature
