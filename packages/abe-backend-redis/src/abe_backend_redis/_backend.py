"""Redis's backend class: its settings, its capabilities, the transport that it makes."""

from typing import TYPE_CHECKING, ClassVar, Final

from abe.backends.message_queue.base import (
    Capabilities,
    Durability,
    MessageQueueBackend,
    Transport,
)
from abe.backends.message_queue.engine import TransportBackend
from abe.settings import QueueSettings
from abe_backend_redis._settings import RedisSettings
from abe_backend_redis._transport import RedisTransport

_CENTURY: Final = 100 * 365.25 * 24 * 3600
"""The longest delay, in seconds. Sorted sets keep due times to the millisecond for far longer."""


class RedisBackend(TransportBackend[RedisSettings]):
    """A message queue on Redis Streams: Redis from 6.2, or Valkey.

    Args:
        settings: The address and login, and the settings of every backend.
        codec: Encodes and decodes payloads.
        middleware: Wraps each publish, the first outermost.
    """

    settings_type: ClassVar[type[QueueSettings]] = RedisSettings
    capabilities: Capabilities = Capabilities(
        groups=True,
        key_patterns=True,
        ordered=True,
        ordered_per_key=False,
        spurious_duplicates=False,
        dead_letter=True,
        max_delay=_CENTURY,
        lease=30.0,
        redelivery_bound=1.0,
        silence_bound=15.0,
        publish_dedup=None,
        max_payload_bytes=16 * 1024 * 1024,
        durability=Durability.PROCESS_CRASH,
    )

    def make_transport(self) -> Transport:
        """Return a transport for the server of the settings."""
        return RedisTransport(self.settings)


if TYPE_CHECKING:
    _: type[MessageQueueBackend] = RedisBackend
