"""What happened in a simulated world: the trace, and the books that the oracle checks."""

import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from abe.backends.message_queue.base import Delivery as Lease
from abe.testing.simulation.world import World
from simulation.scenario import Scenario


@dataclass
class Message:
    """A message of the load, under one id.

    Attributes:
        number: Its number, in its payload and in the trace.
        key: Its key.
        group: The one group that it is for, if so.
        wanted_by: The groups that certainly wanted it while it was published.
        told: What its publishers were told, once for each call: "confirmed", "rejected", "unknown", or "" while a call has not ended.
        stored: How many copies of it the broker stored for each group, "" for the parked ones.
        strange: Whether its body cannot be decoded.
    """

    number: int
    key: str
    group: str | None = None
    wanted_by: set[str] = field(default_factory=set[str])
    told: list[str] = field(default_factory=list[str])
    stored: dict[str, int] = field(default_factory=lambda: defaultdict[str, int](int))
    strange: bool = False

    @property
    def confirmed(self) -> bool:
        """Whether a publisher was told that the broker has it."""
        return "confirmed" in self.told

    @property
    def rejected(self) -> bool:
        """Whether each publisher was told that the broker certainly does not have it."""
        return set(self.told) == {"rejected"}


@dataclass(eq=False)
class Delivery:
    """One delivery by the broker.

    Attributes:
        number: The broker's number of it.
        message: Which message.
        group: To which group.
        host: To which host.
        receiver: To which of its receivers.
        attempt: Which attempt it is, as the broker counts.
        at: When.
        original: What the engine got: it says whether the engine gave it up.
        begun: When the application got it; None: it did not.
        ended: How it ended in the broker; "" while it has not.
        ended_at: When.
        done: What the application did about it, in its order.
        told: What the application was told of its settlement: a method and its outcome.
        told_lost: Whether the engine was told that its consumer has lost it.
    """

    number: int
    message: Message
    group: str
    host: str
    receiver: int
    attempt: int
    at: float
    original: Lease
    begun: float | None = None
    ended: str = ""
    ended_at: float = 0.0
    done: list[str] = field(default_factory=list[str])
    told: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    told_lost: bool = False


class History:
    """Everything that happened in one world.

    Args:
        world: Which.
        seed: What it was made from.
        scenario: What it is like.
        reductions: What was left out of it.
    """

    def __init__(self, world: World, seed: object, scenario: Scenario, reductions: Sequence[str] = ()) -> None:
        self.seed = seed
        self.scenario = scenario
        self.reductions: tuple[str, ...] = tuple(reductions)
        self.messages: dict[int, Message] = {}
        self.deliveries: dict[int, Delivery] = {}
        self._troubled: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.order: dict[str, list[int]] = defaultdict(list)
        """The messages of each group, in the order in which the broker stored them, without those that wait for their time."""
        self.calm = math.inf
        """When faults stopped, and one more consumer joined each group."""
        self.buggy: dict[str, bool] = defaultdict(bool)
        """Whether a host's provider raised what no transport may raise."""
        self.deleted: dict[str, list[float]] = defaultdict(list)
        """When a group was deleted."""
        self.violations: list[str] = []
        """What must never happen, and did."""
        self.facts: dict[str, int] = defaultdict(int)
        """How often things happened, by kind."""
        self._world = world
        self._closed = False
        self._events: list[tuple[float, str, str, str]] = []

    @property
    def now(self) -> float:
        """The world's time in seconds."""
        return self._world.now

    @property
    def steps(self) -> int:
        """How many callbacks were run."""
        return self._world.steps

    @property
    def command(self) -> str:
        """The command that runs this world again, and shows its trace."""
        less = "".join(f" --without {shlex.quote(name)}" for name in self.reductions)
        return f"uv run --locked python -m simulation {self.seed}{less} --trace"

    def note(self, who: str, kind: str, what: object = "") -> None:
        """Add a line to the trace.

        Args:
            who: The host, or the broker.
            kind: What happened, in one word.
            what: To what, and how.
        """
        if self._closed:
            return
        self.facts[kind] += 1
        self._events.append((self._world.now, who, kind, str(what)))

    def trouble(self, host: str, seconds: float = 0.0) -> None:
        """Take note that a host is hit, for so many seconds, by a fault that may cost it leases."""
        self._troubled[host].append((self.now, self.now + seconds))

    def troubled(self, host: str, since: float, until: float) -> bool:
        """Whether such a fault hit a host between two moments."""
        return any(began <= until and since <= ended for began, ended in self._troubled[host])

    def violated(self, what: str) -> None:
        """Note that an invariant does not hold."""
        if self._closed:
            return
        self.note("oracle", "VIOLATION", what)
        self.violations.append(what)

    def close(self) -> None:
        """Take note of nothing more: the world is being taken down."""
        self._closed = True

    def trace(self) -> str:
        """Return the trace, a line for each event: seconds, who, what."""
        return "".join(f"{when:12.6f} {who:<8} {kind:<12} {what}\n" for when, who, kind, what in self._events)

    def summary(self) -> dict[str, Any]:
        """Return how much happened."""
        return {"messages": len(self.messages), "deliveries": len(self.deliveries), **self.facts}
