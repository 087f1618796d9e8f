"""The counts and the dead letters of a group."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A message that was rejected, or whose attempts are used up.

    Attributes:
        id: The message's id; the broker's own where the message had none.
        key: Its key; empty where it had none.
        body: The payload, as bytes.
        headers: Its headers.
        attempts: How often it was delivered.
        reason: Why it is dead, in a word or a line.
        error: The traceback of the last failure; empty where there was no exception.
        published_at: When it was published, by its publisher's clock, in seconds since the epoch; 0 if unknown.
        dead_at: When it became a dead letter, by the broker's clock where it has one, in seconds since the epoch.
    """

    id: str
    key: str
    body: bytes
    headers: Mapping[str, str]
    attempts: int
    reason: str
    error: str
    published_at: float
    dead_at: float


@dataclass(frozen=True, kw_only=True)
class GroupStats:
    """The counts of a group, exact or approximate, as the broker counts.

    Attributes:
        waiting: Messages that could be delivered now.
        in_flight: Messages that were delivered to a consumer, and are not settled.
        delayed: Messages whose delay has not passed.
        dead: Dead letters.
        oldest: Seconds that the oldest waiting message has waited; None where none waits, or the broker cannot tell.
    """

    waiting: int
    in_flight: int
    delayed: int
    dead: int
    oldest: float | None
