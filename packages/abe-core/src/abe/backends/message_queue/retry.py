"""What becomes of a message whose handler failed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from abe.backends.message_queue.base.backoff import Backoff, ConstantBackoff, ExponentialBackoff
from abe.backends.message_queue.base.names import check_count

__all__ = ["Backoff", "Classifier", "ConstantBackoff", "ExponentialBackoff", "Reject", "Retry", "RetryPolicy"]


class Retry(Exception):  # noqa: N818 - a verdict, not an error
    """Raised by a handler: deliver the message again.

    Args:
        after: Seconds before which it must not come back; None: the policy's backoff.
        reason: Why, for the log and the dead letter.
    """

    def __init__(self, *, after: float | None = None, reason: str = "the handler asked for a retry") -> None:
        super().__init__(reason)
        self.after = after
        self.reason = reason


class Reject(Exception):  # noqa: N818 - a verdict, not an error
    """Raised by a handler: the message will never succeed, move it to the dead letters.

    Args:
        reason: Why, for the dead letter.
    """

    def __init__(self, reason: str = "rejected by the handler") -> None:
        super().__init__(reason)
        self.reason = reason


Classifier: TypeAlias = Callable[[Exception], Retry | Reject | None]
"""From a handler's exception to a verdict; None leaves it to the policy."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often a failing message is tried, and how long it waits in between. The waiting is done by the broker.

    Args:
        max_attempts: Deliveries in all, those included whose consumer died; the last failure moves the message to the dead letters.
        backoff: From the attempt that failed to the seconds until the next.
        classify: Decides about particular exceptions.
    """

    max_attempts: int = 5
    backoff: Backoff = field(default_factory=ExponentialBackoff)
    classify: Classifier | None = None

    def __post_init__(self) -> None:
        check_count("max_attempts", self.max_attempts)

    def judge(self, exc: Exception, attempt: int) -> Retry | Reject:
        """Return the verdict on a failure, with the wait filled in."""
        verdict = exc if isinstance(exc, Retry | Reject) else self.classify(exc) if self.classify else None
        if isinstance(verdict, Reject):
            return verdict
        if verdict is None:
            verdict = Retry(reason=f"{type(exc).__name__}: {exc}")
        if verdict.after is None:
            verdict = Retry(after=self.backoff(attempt), reason=verdict.reason)
        return verdict
