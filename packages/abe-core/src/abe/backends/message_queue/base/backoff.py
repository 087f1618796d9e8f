"""How long to wait before the next try, from the number of tries so far."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Backoff: TypeAlias = Callable[[int], float]
"""From the attempt that failed, 1 for the first, to the seconds until the next."""


@dataclass(frozen=True, kw_only=True)
class ExponentialBackoff:
    """``min(maximum, initial * factor ** (attempt - 1))`` seconds.

    With jitter the result is drawn evenly between half of that and all of it, so that what failed together does not come back
    together ("equal jitter", M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015).
    """

    initial: float = 1.0
    factor: float = 2.0
    maximum: float = 300.0
    jitter: bool = True

    def __post_init__(self) -> None:
        if not (self.initial > 0 and self.factor >= 1 and self.maximum >= self.initial):
            raise ValueError(f"a backoff needs initial > 0, factor >= 1 and maximum >= initial: {self}")

    def __call__(self, attempt: int) -> float:
        # Past 2 ** 64 the maximum has long been reached; without the bound a float would overflow.
        delay = min(self.maximum, self.initial * self.factor ** min(attempt - 1, 64))
        return delay * random.uniform(0.5, 1.0) if self.jitter else delay  # noqa: S311


@dataclass(frozen=True)
class ConstantBackoff:
    """The same number of seconds each time."""

    seconds: float

    def __post_init__(self) -> None:
        if self.seconds < 0:
            raise ValueError(f"a backoff cannot be negative: {self.seconds}")

    def __call__(self, attempt: int) -> float:
        return self.seconds
