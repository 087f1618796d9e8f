"""Which faults a world has, and how often: drawn from the seed, few kinds at a time."""

from dataclasses import dataclass
from random import Random
from typing import Final

from abe.errors import (
    AbeError,
    BackendConnectionError,
    BackpressureError,
    PublishRejectedError,
    PublishUnknownError,
)

KINDS: Final = ("refused", "request_lost", "answer_lost", "slow", "bug", "forbidden", "entry")
"""What may happen to one request:

refused       it does not reach the broker, and whoever asked knows that
request_lost  it does not reach the broker, and whoever asked does not know
answer_lost   the broker does it, and whoever asked does not know
slow          it takes long on its way there or back
bug           the provider raises what no transport may raise, before or after the broker does it
forbidden     the broker refuses it for good
entry         some entries of a batch are refused, or their outcome is not known
"""

EVENTS: Final = ("cut", "partition", "kill", "freeze", "expire", "collect", "strange")
"""What may happen to a host: its connections break once, or for some time; it dies; it stands still; a lease of its own is taken away; its
garbage is collected; and another program publishes what cannot be decoded."""


class ProviderFaultError(Exception):
    """An exception that no transport may raise."""


@dataclass(frozen=True)
class Plan:
    """The faults of one world.

    Attributes:
        rates: How probable each kind of fault is, for one request.
        events: What happens to hosts.
        pause: Seconds between two events, on average.
        latency: Seconds that a request or an answer takes, at most, where nothing is slow. 0: requests are calls of functions.
        silence: Seconds after which an answer that does not come is given up.
        slow: Seconds that a slow request takes, at most.
    """

    rates: dict[str, float]
    events: tuple[str, ...]
    pause: float
    latency: float
    silence: float
    slow: float

    @property
    def harmless(self) -> bool:
        """Whether nothing can go wrong."""
        return not self.rates and not set(self.events) - {"collect"}


def draw_plan(random: Random) -> Plan:
    """Draw a plan: every third has no faults at all."""
    kinds = [kind for kind in KINDS if random.random() < 0.4]
    events = [event for event in EVENTS if random.random() < 0.4]
    if random.random() < 0.2:
        kinds, events = [], [event for event in events if event == "collect"]
    return Plan(
        rates={kind: 0.01 if kind == "forbidden" else random.choice((0.01, 0.03, 0.1, 0.25)) for kind in kinds},
        events=tuple(events),
        pause=random.choice((0.5, 2.0, 8.0)),
        latency=random.choice((0.0, 0.001, 0.01, 0.05)),
        silence=random.choice((0.5, 2.0, 5.0)),
        slow=random.choice((0.1, 1.0, 4.0)),
    )


class Faults:
    """Draws the faults of one connection's requests.

    Args:
        plan: What may happen.
        seed: What it is drawn from.
    """

    def __init__(self, plan: Plan, seed: str) -> None:
        self.plan = plan
        self.healed = False
        """Whether nothing happens any more."""
        self.random = Random(seed)

    def draw(self) -> str:
        """Return what happens to the next request: a kind, or nothing."""
        if self.healed:
            return ""
        for kind, rate in self.plan.rates.items():
            if self.random.random() < rate:
                return kind
        return ""

    def latency(self, fault: str) -> float:
        """Return how long the next way takes, in seconds."""
        if fault == "slow":
            return self.random.random() * self.plan.slow
        return self.random.random() * self.plan.latency

    def entry_of_send(self) -> tuple[AbeError | None, bool]:
        """Return the outcome of one envelope of a batch that fails in part, and whether the broker stores it."""
        chance = self.random.random()
        if chance < 0.5:
            return None, True
        if chance < 0.6:
            return BackpressureError("simulated: a limit is reached"), False
        if chance < 0.7:
            return PublishRejectedError("simulated: this one is refused"), False
        if chance < 0.8:
            return BackendConnectionError("simulated: not accepted"), False
        return PublishUnknownError("simulated: no confirm"), self.random.random() < 0.5

    def entry_of_settlement(self) -> tuple[AbeError | None, bool]:
        """Return the outcome of one settlement of a batch that fails in part, and whether the broker carries it out."""
        if self.random.random() < 0.5:
            return None, True
        return BackendConnectionError("simulated: this one may have been settled"), self.random.random() < 0.5
