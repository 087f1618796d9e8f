"""RabbitMQ's backend class: its settings, its capabilities, the transport that it makes."""

from typing import TYPE_CHECKING, ClassVar

from abe.backends.message_queue.base import (
    Capabilities,
    Durability,
    MessageQueueBackend,
    Transport,
)
from abe.backends.message_queue.engine import TransportBackend
from abe.settings import QueueSettings
from abe_backend_rabbitmq._settings import RabbitMQSettings
from abe_backend_rabbitmq._topology import MAX_DELAY
from abe_backend_rabbitmq._transport import RabbitMQTransport


class RabbitMQBackend(TransportBackend[RabbitMQSettings]):
    """A message queue on RabbitMQ from 3.10.

    Args:
        settings: RabbitMQ's address and credentials, and the settings that all backends have.
        codec: Payload to bytes and back.
        middleware: Wraps each publish, the first outermost.
    """

    settings_type: ClassVar[type[QueueSettings]] = RabbitMQSettings
    capabilities: Capabilities = Capabilities(
        groups=True,
        key_patterns=True,
        ordered=True,
        ordered_per_key=False,
        spurious_duplicates=False,
        dead_letter=True,
        max_delay=MAX_DELAY,
        lease=None,
        redelivery_bound=1.0,
        silence_bound=15.0,
        publish_dedup=None,
        max_payload_bytes=16 * 1024 * 1024,
        durability=Durability.POWER_LOSS,
    )

    def make_transport(self) -> Transport:
        """Return a transport with this backend's settings; it is not connected."""
        return RabbitMQTransport(self.settings)


if TYPE_CHECKING:
    _: type[MessageQueueBackend] = RabbitMQBackend
