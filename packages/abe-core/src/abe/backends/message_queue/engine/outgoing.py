"""Checks and encodes what is published, before any I/O."""

import time
from collections.abc import Mapping
from typing import Final

from abe.backends.message_queue.base.capabilities import Capabilities
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.names import (
    DEFAULT_GROUP,
    check_group,
    check_headers,
    check_id,
    check_key,
    check_seconds,
)
from abe.backends.message_queue.base.transport import Envelope
from abe.backends.message_queue.engine.ids import next_id
from abe.codec import Codec
from abe.errors import AbeError, PayloadError, PayloadTooLargeError, UnsupportedCapabilityError
from abe.types import Publishable

_log: Final = Log("abe.engine")
_MOST_KNOWN_KEYS: Final = 10_000


class Outgoing:
    """Makes envelopes, and knows which keys no group wanted.

    Args:
        name: The backend's name, for texts.
        codec: Payload to bytes.
    """

    def __init__(self, name: str, codec: Codec) -> None:
        self._name = name
        self._encode = codec.encode
        self._known: set[str] = set()
        self._unwanted: set[str] = set()

    def envelope(
        self,
        capabilities: Capabilities,
        key: str,
        payload: Publishable,
        headers: Mapping[str, str] | None,
        id: str | None,
        delay: float | None,
        group: str | None,
    ) -> Envelope:
        """Return the message as it will be sent; see `TransportBackend.publish` for the arguments.

        Raises:
            PayloadError: The payload cannot be encoded, or is too large.
            InvalidNameError: The key, the id, the group or a header cannot be carried.
            UnsupportedCapabilityError: The backend cannot hold a delay that long, or has no groups.
        """
        if type(key) is not str or key not in self._known:
            _remember(self._known, check_key(key))
        try:
            body = self._encode(payload)
        except AbeError:
            raise
        except Exception as exc:
            raise PayloadError(f"the codec failed on the payload with {type(exc).__name__}") from exc
        if not isinstance(body, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PayloadError(f"the codec must return bytes, not {type(body).__name__}")
        if len(body) > capabilities.max_payload_bytes:
            raise PayloadTooLargeError(
                f"the payload is {len(body)} bytes of {capabilities.max_payload_bytes}: store it elsewhere, and publish where it is"
            )
        return Envelope(
            next_id() if id is None else check_id(id),
            key if type(key) is str else str.__str__(key),
            body,
            time.time_ns() // 1_000_000,
            check_headers(headers) if headers else None,
            self._delay(capabilities, delay) if delay else 0.0,
            None if group is None else self.group(capabilities, group),
        )

    def group(self, capabilities: Capabilities, group: str | None) -> str:
        """Return the name of a group.

        Raises:
            InvalidNameError: The name is invalid.
            UnsupportedCapabilityError: The backend has no groups.
        """
        if group is not None and group != DEFAULT_GROUP and not capabilities.groups:
            raise UnsupportedCapabilityError(f"group={group!r}: {self._name} has no groups but {DEFAULT_GROUP!r}")
        return check_group(group)

    def unwanted(self, key: str) -> None:
        """Log that no group wanted a message, once for each key."""
        if key not in self._unwanted:
            _remember(self._unwanted, key)
            _log.warning(
                "a message with the key %r was published, no group wants that key, and the message is gone; declare() makes a group "
                "want it, mandatory=True makes publish raise, and `unroutable` counts (logged once for each key)",
                key,
            )

    def _delay(self, capabilities: Capabilities, delay: float) -> float:
        check_seconds("delay", delay)
        longest = capabilities.max_delay
        if longest is None or delay > longest:
            limit = "not at all" if longest is None else f"by at most {longest:g} s"
            raise UnsupportedCapabilityError(f"delay={delay:g}: {self._name} can delay messages {limit}")
        return delay


def _remember(keys: set[str], key: str) -> None:
    if len(keys) >= _MOST_KNOWN_KEYS:
        keys.clear()
    keys.add(key)
