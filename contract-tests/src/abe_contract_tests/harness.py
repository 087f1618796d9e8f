"""The interface between the suite and a provider under test.

The author of a provider subclasses `Harness` and implements `Oracle` with the broker's *native* client, so that the tests can compare
the backend's results with the broker's.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from abe.types import MessageQueueBackendProtocol

Evidence = Literal["real broker", "emulator", "in process"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The broker's own counts of a group's messages.

    Args:
        waiting: Messages that could be delivered now.
        in_flight: Messages that were delivered and not settled.
        delayed: Messages that are not due yet, because of a publisher's or a retry's delay.
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
    """Observes and manipulates the broker with its native client. One per test and namespace; calls to it do not overlap."""

    async def inject(self, group: str, body: bytes, *, key: str = "injected") -> None:
        """Put a foreign message on the group's queue: a body without metadata but (where the broker has a field for it) the key."""
        ...

    async def inject_version(self, group: str, body: bytes) -> None:
        """Put a message on the group's queue whose envelope has an unknown version."""
        ...

    async def counts(self, group: str) -> Counts:
        """Count the group's messages."""
        ...

    async def consumers(self, group: str) -> int | None:
        """Count the group's consumers in the broker, dead ones included; None if the broker does not know consumers."""
        ...

    async def connections(self) -> int:
        """Count the connections to the broker (all namespaces), without the oracle's own."""
        ...

    async def aclose(self) -> None:
        """Disconnect."""
        ...


class Harness(ABC):
    """One provider on one broker. The suite makes one instance per session, without arguments.

    A subclass sets the first three attributes, and implements `environment` and `oracle`; `unreachable` too where it is `networked`.

    Attributes:
        name: The provider's name in reports and for ``--contract``.
        backend: The production class.
        evidence: What a pass proves: ``"real broker"``, ``"emulator"`` or ``"in process"``.
        networked: Whether the broker runs in another process: worker processes share it, and it can be unreachable. True by default.
        capacity: The most messages that a test may put into the broker at once, 200,000 by default: fewer if publishing or browsing
            them takes too long.
        approximate: Whether the broker's counts are right only after a moment: it counts approximately, or a poll that cannot be
            cancelled may receive a message after its consumer was closed, and then gives it back. Tests then wait, within their
            bounds, for the expected counts. False by default.
        retries_in_flight: Whether a message that waits for its retry stays in its queue, invisible, and counts as in flight. False
            by default.
        may_block: Functions of the provider that are meant to block the event loop, each as ``"module:function"`` or
            ``"module:Class.function"``. Where blockbuster is installed, a test fails if any other function does. None by default.
        pace: The factor for the duration of a whole test on this broker, 1 by default. It does not change the contract's bounds.
    """

    name: ClassVar[str]
    backend: ClassVar[type[MessageQueueBackendProtocol]]
    evidence: ClassVar[Evidence]
    networked: ClassVar[bool] = True
    capacity: ClassVar[int] = 200_000
    approximate: ClassVar[bool] = False
    retries_in_flight: ClassVar[bool] = False
    may_block: ClassVar[Sequence[str]] = ()
    pace: ClassVar[float] = 1.0

    def start(self) -> None:  # noqa: B027 - there may be nothing to start
        """Start the broker, or find it. Raises `ServiceUnavailable` (abe_contract_tests.services) if neither is possible."""

    def stop(self) -> None:  # noqa: B027
        """Stop the broker that `start` started."""

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
        """Return an environment with wrong credentials, and the secret in it; None if the broker has no credentials."""
        return None

    async def clean(self, namespace: str) -> None:  # noqa: B027
        """Delete that namespace's data. Only brokers that outlive the run need it."""

    def broker_version(self) -> str:
        """Return the broker's name and version, for the report."""
        return self.evidence
