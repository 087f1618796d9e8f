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
    """What the broker itself holds for a group.

    Args:
        waiting: Messages that a consumer could be given now.
        in_flight: Messages that consumers have and have not settled.
        delayed: Messages that are not due yet, by a publisher's or a retry's delay.
        dead: Dead letters.
    """

    waiting: int
    in_flight: int
    delayed: int
    dead: int

    @property
    def total(self) -> int:
        """Every message that is not dead."""
        return self.waiting + self.in_flight + self.delayed


class Oracle(Protocol):
    """The broker, seen and touched by its native client. One per test, on that test's namespace; it is asked one thing at a time."""

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
    """One provider on one broker. The suite makes one instance a session, without arguments.

    A subclass sets the first three attributes, and implements `environment` and `oracle`; `unreachable` too where it is `networked`.

    Attributes:
        name: How the provider is called in reports and in ``--contract``.
        backend: The production class.
        evidence: What a pass proves: ``"real broker"``, ``"emulator"`` or ``"in process"``.
        networked: Whether the broker lives in another process: worker processes share it, and it can be unreachable. True by default.
        capacity: The most messages that a test may put into the broker at once, 200,000 by default: fewer where that, or going
            through them, takes too long.
        approximate: Whether what the broker counts is true only after a moment: it counts approximately, or a request for messages
            that cannot be taken back is still given one when its consumer is gone, and gives it back. Tests then wait, within their
            bounds, for what they expect. False by default.
        hides_retries: Whether a message that waits for its retry stays in its queue, invisible, and counts as in flight. False by
            default.
        may_block: Functions of the provider that are meant to block the event loop, each as ``"module:function"`` or
            ``"module:Class.function"``. All others fail a test by it where blockbuster is installed. None by default.
        pace: How many times as long a whole test may take as on a broker of the usual speed, 1 by default. What the contract bounds
            stays as it is.
    """

    name: ClassVar[str]
    backend: ClassVar[type[MessageQueueBackendProtocol]]
    evidence: ClassVar[Evidence]
    networked: ClassVar[bool] = True
    capacity: ClassVar[int] = 200_000
    approximate: ClassVar[bool] = False
    hides_retries: ClassVar[bool] = False
    may_block: ClassVar[Sequence[str]] = ()
    pace: ClassVar[float] = 1.0

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
