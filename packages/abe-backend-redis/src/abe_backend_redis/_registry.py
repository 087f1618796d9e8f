"""A publisher's cached registry: the groups and their key patterns."""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from abe.backends.message_queue.base import Envelope
from abe.backends.message_queue.base.routing import Routes, group_full, unroutable
from abe.errors import AbeError, ConfigurationError
from abe_backend_redis import _wire
from abe_backend_redis._protocol import pack
from abe_backend_redis._scripts import SCRIPTS
from abe_backend_redis._topology import Topology

_decode: Final = msgspec.json.Decoder(list[str]).decode


def patterns_of(group: str, text: bytes) -> tuple[str, ...]:
    """Read a group's patterns.

    Raises:
        ConfigurationError: They are not in this provider's format.
    """
    try:
        return tuple(_decode(text))
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise ConfigurationError(
            f"the key patterns of group {group!r} in redis are not in this provider's format: "
            f"delete that group, or choose another QUEUE_NAMESPACE"
        ) from exc


class Registry:
    """The groups at one version, with the routes of keys to them."""

    def __init__(
        self, topology: Topology, version: bytes, groups: Mapping[str, tuple[str, ...]], max_backlog: int
    ) -> None:
        self.groups = groups
        keys = [topology.version]
        for group in groups:
            keys += [topology.queue(group), topology.delayed(group)]
        if not groups:
            keys += [topology.parked, topology.parked_delayed]
        self._head = (b"EVALSHA", SCRIPTS["publish"].sha, len(keys), *keys, version, max_backlog)
        self._routes = Routes(groups, self._mask)
        self.all_routed = True
        """Whether every key seen so far is wanted by some group."""

    def pack(self, envelopes: Sequence[Envelope]) -> bytes:
        """Return the encoded publish call. Consecutive messages for the same groups with the same delay form a run."""
        args: list[object] = [*self._head]
        routes = self._routes
        run_mask, run_delay, place, count = b"", -1.0, 0, 0
        for envelope in envelopes:
            mask = routes[envelope.key] if envelope.group is None else self._route(envelope)
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

    def _route(self, envelope: Envelope) -> bytes:
        return self._routes[envelope.key] if envelope.group is None else self._mask((envelope.group,), b"0")

    def _mask(self, groups: tuple[str, ...], otherwise: bytes = b"1") -> bytes:
        """Return a digit per group: 1 for those that get the message. Without groups, a single 1 parks it."""
        mask = b"".join(b"1" if group in groups else b"0" for group in self.groups) or otherwise
        self.all_routed = self.all_routed and b"1" in mask
        return mask

    def outcomes(
        self, envelopes: Sequence[Envelope], full: Sequence[int], failed: Mapping[int, AbeError]
    ) -> Sequence[AbeError | None]:
        """Return the outcomes of messages: `full` has the positions that a full group rejected, `failed` the errors of others."""
        if not full and not failed and self.all_routed:
            return ()
        outcomes: list[AbeError | None] = [
            None if b"1" in self._route(envelope) else unroutable(envelope) for envelope in envelopes
        ]
        for position in full:
            outcomes[position] = group_full()
        for position, error in failed.items():
            outcomes[position] = error
        return outcomes
