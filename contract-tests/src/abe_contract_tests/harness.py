"""What the author of a provider writes so that the suite can test it, and what the suite's tests see of it.

An author subclasses `Harness` (one per provider) and implements `Oracle` with the broker's *native* client, so that what the backend says
about the broker can be checked against the broker.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from abe.types import MessageQueueBackendProtocol

Evidence = Literal["real broker", "emulator", "in process"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the broker itself holds for a group."""

    waiting: int
    in_flight: int
    delayed: int
    dead: int

    @property
    def total(self) -> int:
        """Every message that is not dead."""
        return self.waiting + self.in_flight + self.delayed


class Oracle(Protocol):
    """The broker, seen and touched by its native client. One per test, on that test's namespace."""

    async def inject(self, group: str, body: bytes, *, key: str = "injected") -> None:
        """Put a body on the group's queue as a stranger would, with no metadata but (where the broker has a place for it) the key."""
        ...

    async def inject_version(self, group: str, body: bytes) -> None:
        """Put a message of ours on the group's queue whose envelope says a version that nobody knows."""
        ...

    async def counts(self, group: str) -> Counts:
        """Count the group's messages."""
        ...

    async def consumers(self, group: str) -> int | None:
        """Count the consumers that the broker knows in the group, dead ones included; None where it knows messages and no consumers."""
        ...

    async def connections(self) -> int:
        """Count the connections to the broker (all namespaces), the oracle's own left out."""
        ...

    async def aclose(self) -> None:
        """Disconnect."""
        ...


class Harness(ABC):
    """One provider on one broker. The suite makes one instance a session."""

    name: ClassVar[str]
    """How the provider is called in reports and in ``--contract``."""

    backend: ClassVar[type[MessageQueueBackendProtocol]]
    """The production class."""

    evidence: ClassVar[Evidence]
    """What a pass proves."""

    networked: ClassVar[bool] = True
    """Whether the broker lives in another process: worker processes share it, and it can be unreachable."""

    capacity: ClassVar[int] = 200_000
    """The most messages that a test may put into the broker at once: fewer where that, or going through them, takes too long."""

    approximate: ClassVar[bool] = False
    """Whether what the broker counts is true only after a moment: it counts approximately, or a request for messages that cannot be taken
    back is still given one when its consumer is gone, and gives it back. Tests then wait, within their bounds, for what they expect."""

    hides_retries: ClassVar[bool] = False
    """Whether a message that waits for its retry stays in its queue, hidden from everybody, and counts as held."""

    may_block: ClassVar[Sequence[str]] = ()
    """Functions of the provider that are meant to block the event loop, each as ``module:function`` or ``module:Class.function``."""

    pace: ClassVar[float] = 1.0
    """How many times as long a whole test may take as on a broker of the usual speed. What the contract bounds stays as it is."""

    def start(self) -> None:  # noqa: B027 - there may be nothing to start
        """Start the broker, or find it. Raises `ServiceUnavailable` (abe_contract_tests.services) when it cannot be had."""

    def stop(self) -> None:  # noqa: B027
        """Stop what `start` started."""

    @abstractmethod
    def environment(self, namespace: str, *, lease: float) -> Mapping[str, str]:
        """Return the environment variables with which ``from_env()`` makes a backend in that namespace, with that lease in seconds."""

    @abstractmethod
    async def oracle(self, namespace: str) -> Oracle:
        """Return the oracle of that namespace."""

    def unreachable(self, namespace: str) -> Mapping[str, str]:
        """Return an environment whose broker refuses connections (networked only)."""
        raise NotImplementedError

    def wrong_credentials(self, namespace: str) -> tuple[Mapping[str, str], str] | None:
        """Return an environment whose credentials are refused, and the secret in it; None where the broker has no credentials."""
        return None

    async def clean(self, namespace: str) -> None:  # noqa: B027
        """Remove what a test left in that namespace. Only brokers that outlive the run need it."""

    def broker_version(self) -> str:
        """Return the broker's name and version, for the report."""
        return self.evidence
