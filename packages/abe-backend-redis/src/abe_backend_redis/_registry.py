"""The groups as a publisher knows them, and which of them wants which key."""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from abe.backends.message_queue.base import Envelope
from abe.backends.message_queue.base.names import matches
from abe.errors import AbeError, BackpressureError, ConfigurationError, UnroutableError
from abe_backend_redis import _wire
from abe_backend_redis._protocol import pack
from abe_backend_redis._scripts import SCRIPTS
from abe_backend_redis._topology import Topology

_MOST_ROUTES: Final = 10_000
_decode: Final = msgspec.json.Decoder(list[str]).decode


def patterns_of(group: str, text: bytes) -> tuple[str, ...]:
    """Read a group's patterns.

    Raises:
        ConfigurationError: They are nothing that we wrote.
    """
    try:
        return tuple(_decode(text))
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise ConfigurationError(
            f"what redis has as the key patterns of group {group!r} is nothing that this provider wrote: "
            f"delete that group, or choose another QUEUE_NAMESPACE"
        ) from exc


class Registry:
    """The groups as they were at one version, and which of them wants which key."""

    def __init__(
        self, topology: Topology, version: bytes, groups: Mapping[str, tuple[str, ...]], max_backlog: int
    ) -> None:
        self.groups = groups
        self._patterns = list(groups.values())
        keys = [topology.version]
        for group in groups:
            keys += [topology.queue(group), topology.delayed(group)]
        if not groups:
            keys += [topology.held, topology.held_delayed]
        self._head = (b"EVALSHA", SCRIPTS["publish"].sha, len(keys), *keys, version, max_backlog)
        self._routes: dict[str, bytes] = {}
        self.all_routed = True
        """Whether every key seen so far is wanted by some group."""

    def pack(self, envelopes: Sequence[Envelope]) -> bytes:
        """Return the call that publishes: messages for the same groups, with the same delay, make a run."""
        args: list[object] = [*self._head]
        routes = self._routes
        run_mask, run_delay, place, count = b"", -1.0, 0, 0
        for envelope in envelopes:
            mask = (envelope.group is None and routes.get(envelope.key)) or self.route(envelope.key, envelope.group)
            if mask != run_mask or envelope.delay != run_delay:
                if count:
                    args[place] = count
                run_mask, run_delay, count = mask, envelope.delay, 0
                args += (mask, -int(-run_delay * 1000 // 1), 0)
                place = len(args) - 1
            args += (_wire.pack(envelope), envelope.body)
            count += 1
        args[place] = count
        return pack(tuple(args))

    def route(self, key: str, only: str | None = None) -> bytes:
        """Return a digit for each group: 1 for those that want the key; or for the only one that is to have it, if it exists."""
        if only is not None:
            mask = b"".join(b"1" if group == only else b"0" for group in self.groups) or b"0"
            self.all_routed = self.all_routed and b"1" in mask
            return mask
        if len(self._routes) >= _MOST_ROUTES:
            self._routes.clear()
        wanted = [any(matches(pattern, key) for pattern in patterns) for patterns in self._patterns]
        mask = b"".join(b"1" if want else b"0" for want in wanted) or b"1"  # no group: the held messages
        self.all_routed = self.all_routed and b"1" in mask
        self._routes[key] = mask
        return mask

    def outcomes(
        self, envelopes: Sequence[Envelope], full: Sequence[int], failed: Mapping[int, AbeError]
    ) -> Sequence[AbeError | None]:
        """Return what became of messages, by the positions of those that a full group kept out, and of those that failed."""
        if not full and not failed and self.all_routed:
            return ()
        outcomes: list[AbeError | None] = [self._unroutable(envelope) for envelope in envelopes]
        for position in full:
            outcomes[position] = BackpressureError("a group that wants the message has max_backlog messages waiting")
        for position, error in failed.items():
            outcomes[position] = error
        return outcomes

    def _unroutable(self, envelope: Envelope) -> UnroutableError | None:
        if b"1" in self.route(envelope.key, envelope.group):
            return None
        missing = envelope.group is not None
        return UnroutableError(
            f"there is no group {envelope.group!r}" if missing else f"no group wants the key {envelope.key!r}"
        )
