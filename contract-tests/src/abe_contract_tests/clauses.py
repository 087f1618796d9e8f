"""The clauses of the contract.

This list is the contract's one source: the suite's verdict, the documentation's page and the manifest test are generated from it.
"""

from dataclasses import dataclass
from typing import Final, Literal

from abe.backends.message_queue.base import Capabilities, Durability

CONTRACT_VERSION: Final = "0.2"
"""Increases when a clause is added or changed, so that a result names the promises that it is about."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One promise."""

    id: str
    text: str
    level: Literal["MUST", "CAP"] = "MUST"
    """MUST: every backend keeps it. CAP: a backend that declares its `capability` does."""

    capability: str | None = None
    """The capability without which the clause does not apply. A MUST clause may have one too: no lease, no expired lease."""

    unless: str | None = None
    """The capability whose declaration excuses from it."""

    networked_only: bool = False
    """Whether it does not apply to a broker inside the process."""

    later: bool = False
    """Whether its tests are not in this version of the suite; the verdict lists it."""

    @property
    def area(self) -> str:
        """The middle part of the id."""
        return self.id.split("-")[1]


CLAUSES: Final = (
    Clause("C-PUB-01", "`publish` returns only after the broker has taken responsibility for the message"),
    Clause(
        "C-PUB-02",
        "A failed `publish` says which: *rejected* (the message is certainly absent) or *unknown* (it may be "
        "there). Two types, never confused",
    ),
    Clause(
        "C-PUB-03",
        "The same message id published again inside the declared window is delivered once",
        level="CAP",
        capability="publish_dedup",
    ),
    Clause(
        "C-PUB-04",
        "A message published while no consumer is attached to an existing group arrives when one attaches",
    ),
    Clause("C-PUB-05", "100 tasks publishing through one instance: none lost, mixed up or doubled"),
    Clause(
        "C-PUB-06",
        "The payload is taken as it is at the call: changing it later, in the publisher or in a failed handler, "
        "is seen by no delivery",
    ),
    Clause(
        "C-PUB-07",
        "A payload outside the JSON model raises `PayloadError` before any I/O and leaves nothing behind",
    ),
    Clause(
        "C-PUB-08",
        "Over the declared size raises `PayloadTooLargeError` before any I/O; one byte under arrives intact",
    ),
    Clause(
        "C-PUB-09",
        "No limit or retention ever drops an unacknowledged message silently: `publish` raises `BackpressureError`",
    ),
    Clause(
        "C-PUB-10",
        "`publish_many` confirms each message on its own; a partial failure names the failed ones and why",
    ),
    Clause(
        "C-PUB-11",
        "`publish(group=)` reaches that group alone, whatever its patterns; one that does not exist is refused",
        level="CAP",
        capability="groups",
    ),
    Clause("C-PUB-12", "`publish(timeout=)` returns or raises within that time, whatever the setting"),
    Clause("C-DLV-01", "Every message whose publish returned is delivered at least once to every existing group"),
    Clause("C-DLV-02", "Nothing is delivered that was never published, whatever was left behind earlier"),
    Clause(
        "C-DLV-03",
        "A second delivery happens only after a nack, a release, an expired lease, a crash or a reconnect",
        unless="spurious_duplicates",
    ),
    Clause(
        "C-DLV-04",
        "Namespaces are isolated; the mapping from key to broker name is injective and no character of a key "
        "acts as a wildcard",
    ),
    Clause("C-DLV-05", "A consumer that started before a key was first used receives that key's messages"),
    Clause(
        "C-DLV-06",
        "Waiting on nothing neither spins nor ends; a publish wakes the consumer within the declared latency",
    ),
    Clause(
        "C-DLV-07",
        "`keys=` patterns (`*` one word, `#` any number, words split at `.`) deliver exactly the matching keys",
        level="CAP",
        capability="key_patterns",
    ),
    Clause(
        "C-ACK-01",
        "No message is acknowledged before the caller is done with it: SIGKILL inside the loop body means redelivery",
    ),
    Clause(
        "C-ACK-02",
        "Asking for the next message acknowledges the one before; leaving by `break`, `aclose` or the end of "
        "`async with` releases it unacknowledged",
    ),
    Clause(
        "C-ACK-03",
        "An exception out of the `async with` body, or out of a handler, fails the message; the caller's "
        "exception is what propagates",
    ),
    Clause(
        "C-ACK-04",
        "`ack`, `nack(delay)`, `reject(reason)`: the first settlement wins, the same again does nothing, the "
        "opposite raises `AlreadySettledError`, none ever breaks the connection",
    ),
    Clause(
        "C-ACK-05",
        "A failed settlement surfaces (`LeaseLostError` where the lease was lost); it is never swallowed",
    ),
    Clause(
        "C-RED-01",
        "A failed message comes back to the same group within the declared bound, after its backoff and not before",
    ),
    Clause(
        "C-RED-02",
        "A dead consumer's messages reach a live one within the declared bound, without any setting",
    ),
    Clause(
        "C-RED-03",
        "A live consumer may hold a message, buffered or in a handler, for three leases with no second delivery; "
        "a revived consumer's late ack never removes the new owner's copy; one that stood still does not get again what it holds "
        "and nobody else took",
        capability="lease",
    ),
    Clause(
        "C-RED-04",
        "`attempt` starts at 1 and grows by one a delivery, clean releases aside; heartbeats do not change it",
    ),
    Clause(
        "C-RED-05",
        "Messages fetched but not yet yielded are released at close: others have them within 1 s, not after the lease",
    ),
    Clause(
        "C-ORD-01",
        "One producer, one consumer at concurrency 1, no faults: first in, first out",
        level="CAP",
        capability="ordered",
    ),
    Clause(
        "C-ORD-02",
        "`ordered_by_key`: messages of one key run one after the other in a process while other keys run beside them, also while the "
        "successors of a busy key are more than the consumer's prefetch (up to about 1,000)",
    ),
    Clause(
        "C-GRP-01",
        "Each named group gets every message; inside a group each message has one owner at a time",
        level="CAP",
        capability="groups",
    ),
    Clause("C-GRP-02", "`group=None` is the shared group `default`, on every backend"),
    Clause(
        "C-GRP-03",
        "Entering `consume()` returns once subscribed: a publish that starts later is delivered. Tests need no sleep",
    ),
    Clause(
        "C-GRP-04",
        "A capability that is absent raises `UnsupportedCapabilityError` at the call; it is never ignored",
    ),
    Clause("C-GRP-05", "A stalled member holds no more than its in-flight limit; the others drain the rest"),
    Clause(
        "C-GRP-06",
        "Two processes never share a consumer identity, not even after a restart; dead identities are cleaned up",
        networked_only=True,
    ),
    Clause(
        "C-GRP-07",
        "Messages published before any group exists reach the first group that subscribes; `declare(group)` "
        "creates one ahead of its consumers",
    ),
    Clause(
        "C-GRP-08",
        "Key patterns belong to the group: `consume(keys=)` sets those of a new group, and is refused, changing nothing, where the group "
        "has others; `declare` changes them",
        level="CAP",
        capability="key_patterns",
    ),
    Clause(
        "C-GRP-09",
        "Statistics and dead letters of a group that does not exist raise `GroupMissingError`, and deleting it does nothing; "
        "`delete_namespace` leaves nothing behind",
    ),
    Clause("C-CON-01", "50 consumers, 5,000 messages: all of them, and in flight never above the limit"),
    Clause(
        "C-CAN-01",
        "Cancelling a pending `anext` at any await point loses nothing and strands nothing until the lease",
    ),
    Clause("C-CAN-02", "Cancelling `publish` at any await point leaves 0 or 1 copies and a backend that works"),
    Clause("C-CAN-03", "`CancelledError` always propagates"),
    Clause(
        "C-CAN-04",
        "After `wait_for(anext(it), t)` times out, `it` still works; two `anext` at once is a clear error; "
        "`aclose` works while one is pending",
    ),
    Clause(
        "C-CLS-01",
        "`close` may be called twice, or beside publish and consume, and is bounded even with the broker unreachable",
    ),
    Clause("C-CLS-02", "`close` ends every pending `anext` within 1 s; later use raises `BackendClosedError`"),
    Clause(
        "C-CLS-03",
        "Shutdown of a consumer takes nothing new, lets handlers finish within the grace period with their "
        "leases kept, acknowledges, then cancels and releases the rest; start after stop works",
    ),
    Clause(
        "C-CLS-04",
        "After 100 open-use-close cycles tasks, descriptors, threads and broker-side consumers are back where "
        "they were",
    ),
    Clause(
        "C-CLS-05",
        "Loop closed without `close`, use from another loop, use after fork: a clear error or a clean end, never "
        "a hang",
    ),
    Clause(
        "C-REC-01",
        "Publishing and consuming resume by themselves after the broker restarts",
        networked_only=True,
        later=True,
    ),
    Clause(
        "C-REC-02",
        "The same after SIGKILL of the broker at a random moment: no message lost whose publish returned, at the "
        "declared durability",
        level="CAP",
        capability="durability",
        later=True,
    ),
    Clause(
        "C-REC-03",
        "A TCP cut at any byte, either way, loses no confirmed publish and no unacknowledged message",
        networked_only=True,
        later=True,
    ),
    Clause(
        "C-REC-04",
        "A black-holed link is noticed within the declared time by publisher and consumer",
        networked_only=True,
        later=True,
    ),
    Clause(
        "C-REC-05",
        "Construction and `from_env` do no I/O; with no broker the first call fails within the declared time, "
        "and a consumer retries with backoff",
        later=True,
    ),
    Clause(
        "C-REC-06",
        "Permanent errors (credentials, permission, configuration) raise at once and are not retried for ever",
        networked_only=True,
        later=True,
    ),
    Clause(
        "C-REC-07",
        "A stream, queue or group deleted underneath is made again, or raises; it never hangs silently",
        networked_only=True,
        later=True,
    ),
    Clause(
        "C-DUR-01",
        "Messages and acknowledgements outlive every client process",
        level="CAP",
        capability="durability",
        later=True,
    ),
    Clause(
        "C-PSN-01",
        "A message that cannot be decoded is dead-lettered as raw bytes with the reason, and never delays its "
        "successors",
    ),
    Clause(
        "C-PSN-02",
        "After `max_attempts` a failing message is dead-lettered with body, key, headers, attempts, reason and "
        "times, at least once even under SIGKILL in the middle of the move; a message that kills its process "
        "counts too, and one whose handler raises SystemExit or cancels itself; others keep flowing",
    ),
    Clause("C-PSN-03", "Dead letters can be listed, shown, replayed to their group and purged, while consumers run"),
    Clause(
        "C-PSN-04",
        "A message is buried for the deaths of its consumers only after it was tried with nothing else in hand: what was beside a message "
        "that kills its process is handled",
        capability="dead_letter",
    ),
    Clause(
        "C-DLY-01",
        "`delay=` delivers not before it and within the declared bound after it; delayed messages wait in the "
        "broker, not in a consumer",
        level="CAP",
        capability="max_delay",
    ),
    Clause(
        "C-ENC-01",
        "Every JSON value comes back equal in value and type: all of Unicode, integers of any size, floats to "
        "the bit, -0.0, depth 200, empty",
    ),
    Clause(
        "C-ENC-02",
        "NaN, infinities, non-string keys, tuples, sets, bytes and lone surrogates are refused, alike on all",
    ),
    Clause(
        "C-ENC-03",
        "One versioned envelope: what A's codec wrote, B's reads; an unknown version takes the poison path; a "
        "plain JSON body of a foreign message is delivered",
    ),
    Clause("C-HDR-01", "Headers (str to str), id, key and publish time arrive with the message"),
    Clause(
        "C-ERR-01",
        "Every error is of the library's tree, says whether a retry can help, keeps the native one as `__cause__`, and "
        "shows no credential in text, repr or logs; a clean run logs nothing at WARNING or above",
    ),
    Clause(
        "C-ENV-01",
        "`from_env` is pure and names the variable at fault; the loader returns the backend asked for, or fails",
    ),
    Clause(
        "C-MEM-01",
        "With 200,000 messages waiting and a stalled handler, client memory stays within limit times payload "
        "plus a constant",
        networked_only=True,
    ),
)

BY_ID: Final = {item.id: item for item in CLAUSES}

AREAS: Final = {
    "PUB": "Publishing",
    "DLV": "Delivery",
    "ACK": "Acknowledgement",
    "RED": "Redelivery",
    "ORD": "Order",
    "GRP": "Groups",
    "CON": "Concurrency",
    "CAN": "Cancellation",
    "CLS": "Closing",
    "REC": "Recovery",
    "DUR": "Durability",
    "PSN": "Poison messages",
    "DLY": "Delays",
    "ENC": "Encoding",
    "HDR": "Headers",
    "ERR": "Errors",
    "ENV": "Environment",
    "MEM": "Memory",
}


def declares(capabilities: Capabilities, name: str) -> bool:
    """Whether the capability is declared: true, a number, or a durability above none."""
    value = getattr(capabilities, name)
    return value is not None and value is not False and value is not Durability.NONE
