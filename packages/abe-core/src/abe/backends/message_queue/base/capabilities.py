"""What a backend can do, declared. The contract suite checks the declaration both ways."""

from dataclasses import dataclass
from enum import Enum


class Durability(Enum):
    """What a message survives once its publish returned.

    Attributes:
        NONE: Nothing: it ends with the broker's process.
        PROCESS_CRASH: The end of any process, the broker's included.
        POWER_LOSS: The end of the machine, too.
    """

    NONE = "none"
    PROCESS_CRASH = "process_crash"
    POWER_LOSS = "power_loss"


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """A backend class declares one of these; there are no defaults, so that each answer is a decision.

    What is declared must hold. What is not declared must raise `UnsupportedCapabilityError`, never be ignored.

    Attributes:
        groups: Named groups, each with its own copy of every message.
        key_patterns: ``consume(keys=...)`` with ``*`` and ``#``.
        ordered: One producer, one consumer at concurrency 1, no faults: first in, first out.
        ordered_per_key: The broker keeps messages of one key in order across the consumers of a group.
        spurious_duplicates: The broker may deliver a message twice for no reason that the contract names.
        dead_letter: Dead letters are kept, and can be listed, shown, replayed and purged.
        max_delay: The longest ``delay=`` in seconds (infinity: none is too long). None: no delays.
        lease: Seconds after which a silent consumer's messages are redelivered, by default; an instance has that of its settings. None:
            the connection is the lease.
        redelivery_bound: Seconds by which a delivery may be late: after a delay or backoff has passed, or a lease has run out. None: no
            redelivery.
        silence_bound: Seconds within which a connection that went silent is aborted and replaced, at the default settings. None: there
            is no connection.
        publish_dedup: Seconds within which the same id published again is delivered once. None: never.
        max_payload_bytes: The largest encoded payload, in bytes.
        durability: What a message survives once its publish returned.
    """

    groups: bool
    key_patterns: bool
    ordered: bool
    ordered_per_key: bool
    spurious_duplicates: bool
    dead_letter: bool
    max_delay: float | None
    lease: float | None
    redelivery_bound: float | None
    silence_bound: float | None
    publish_dedup: float | None
    max_payload_bytes: int
    durability: Durability
