"""Backoffs: the delay before a retry, from the number of attempts so far."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from abe.errors import ConfigurationError

Backoff: TypeAlias = Callable[[int], float]
"""Maps the failed attempt, 1 for the first, to the delay in seconds."""


@dataclass(frozen=True, kw_only=True)
class ExponentialBackoff:
    """``min(maximum, initial * factor ** (attempt - 1))`` seconds.

    With jitter the result is uniformly distributed between half of that and all of it, so that messages that failed together
    are not retried together ("equal jitter", M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015).
    """

    initial: float = 1.0
    factor: float = 2.0
    maximum: float = 300.0
    jitter: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.initial <= self.maximum < math.inf and 1 <= self.factor < math.inf):
            raise ConfigurationError(f"a backoff needs finite initial > 0, factor >= 1, maximum >= initial: {self}")

    def __call__(self, attempt: int) -> float:
        try:
            delay = min(self.maximum, self.initial * float(self.factor) ** (attempt - 1))
        except OverflowError:
            delay = self.maximum
        return delay * random.uniform(0.5, 1.0) if self.jitter else delay  # noqa: S311


@dataclass(frozen=True)
class ConstantBackoff:
    """The same number of seconds each time."""

    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.seconds < math.inf:
            raise ConfigurationError(f"a backoff must be a number of seconds of at least 0, not {self.seconds}")

    def __call__(self, attempt: int) -> float:
        return self.seconds
