"""The outcome of every message of a test: published, rejected, unknown; delivered once, repeatedly, or never."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias
from uuid import uuid4

from abe.errors import AbeError
from abe.types import MessageQueueBackendProtocol

Outcome: TypeAlias = Literal["ok", "rejected", "unknown"]


class Accounting:
    """Compares the messages that one group should get with those that it got.

    A message is identified by its id if the backend takes one at publish; otherwise by its payload, which must be unique in the test.
    """

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        """The outcome of `publish` for each message."""
        self.errors: dict[str, AbeError] = {}
        """The error of each message that is not ok."""
        self.deliveries: Counter[str] = Counter()
        """How often each message was delivered."""

    async def publish(
        self, backend: MessageQueueBackendProtocol, key: str, payload: dict[str, Any], **options: Any
    ) -> Outcome:
        """Publish, and record the outcome: ok, or by the error's type rejected or unknown.

        Errors outside of the library's tree pass through, as does a cancellation; both count as unknown.
        """
        if hasattr(backend, "capabilities"):
            options.setdefault("id", uuid4().hex)
        identity: str = options.get("id") or _fingerprint(payload)
        self.record(identity, "unknown")
        try:
            await backend.publish(key, payload, **options)
        except AbeError as exc:
            self.errors[identity] = exc
            return self.record(identity, "unknown" if exc.maybe_accepted else "rejected")
        return self.record(identity, "ok")

    def record(self, identity: str, outcome: Outcome) -> Outcome:
        """Record an outcome that was observed elsewhere, for example in a worker, and return it."""
        self.outcomes[identity] = outcome
        return outcome

    def delivered(self, message: Mapping[str, Any] | str) -> None:
        """Record a delivery, given the message or its id."""
        if isinstance(message, str):
            self.deliveries[message] += 1
        else:
            self.deliveries[getattr(message, "id", None) or _fingerprint(message)] += 1

    def published(self, outcome: Outcome = "ok") -> set[str]:
        """Return the messages with that outcome."""
        return {identity for identity, found in self.outcomes.items() if found == outcome}

    @property
    def lost(self) -> set[str]:
        """Messages that were published and never delivered."""
        return self.published() - self.deliveries.keys()

    @property
    def unexpected(self) -> set[str]:
        """Deliveries of messages that were never published, or rejected."""
        return self.deliveries.keys() - self.published() - self.published("unknown")

    @property
    def duplicates(self) -> dict[str, int]:
        """Messages delivered more than once, and how often."""
        return {identity: count for identity, count in self.deliveries.items() if count > 1}

    @property
    def complete(self) -> bool:
        """Whether every published message was delivered."""
        return not self.lost

    def check(self, *, duplicates_allowed: bool = False) -> None:
        """Assert that no message was lost, none was unexpected, and (unless allowed) none was duplicated."""
        assert not self.lost, f"{len(self.lost)} of {len(self.published())} published messages lost: {_some(self.lost)}"
        rejected = self.unexpected & self.published("rejected")
        assert not rejected, f"rejected by publish, yet delivered: {_some(rejected)}"
        assert not self.unexpected, f"delivered but never published: {_some(self.unexpected)}"
        if self.duplicates:
            text = f"{len(self.duplicates)} of {len(self.deliveries)} messages delivered twice or more: {_some(self.duplicates)}"
            assert duplicates_allowed, text
            print(text)  # pytest shows it if the test fails later


def _fingerprint(payload: Mapping[str, Any]) -> str:
    return json.dumps(payload, sort_keys=True)


def _some(items: "set[str] | dict[str, int]") -> str:
    shown = ", ".join(sorted(items)[:5])
    return shown if len(items) <= 5 else f"{shown} and {len(items) - 5} more"
