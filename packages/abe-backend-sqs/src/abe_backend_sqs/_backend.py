"""SQS's backend class: its settings, its capabilities, the transport that it makes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final

from abe.backends.message_queue.base import (
    Capabilities,
    Clock,
    Durability,
    MessageQueueBackend,
    Middleware,
    Transport,
)
from abe.backends.message_queue.engine import TransportBackend
from abe.codec import Codec
from abe.settings import QueueSettings
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._transport import SqsTransport

_DAY: Final = 86_400.0


class SqsBackend(TransportBackend[SqsSettings]):
    """A message queue on Amazon SQS, or on a service that speaks its protocol.

    Args:
        settings: The account and the region, and the settings that all backends have.
        codec: Payload to bytes and back.
        middleware: Wraps each publish, the first outermost.
        clock: Measures leases in the engine.
    """

    settings_type: ClassVar[type[QueueSettings]] = SqsSettings
    capabilities: Capabilities = Capabilities(
        groups=True,
        key_patterns=True,
        ordered=False,
        ordered_per_key=False,
        spurious_duplicates=True,
        dead_letter=True,
        max_delay=10 * _DAY,
        lease=30.0,
        redelivery_bound=4.0,
        silence_bound=15.0,
        publish_dedup=None,
        max_payload_bytes=1_024_000,
        durability=Durability.POWER_LOSS,
    )

    def __init__(
        self,
        settings: SqsSettings | None = None,
        *,
        codec: Codec | None = None,
        middleware: Sequence[Middleware] = (),
        clock: Clock | None = None,
    ) -> None:
        super().__init__(settings, codec=codec, middleware=middleware, clock=clock)
        if self.settings.fifo:
            self.capabilities = replace(
                self.capabilities,
                ordered=self.settings.message_group is not None,
                ordered_per_key=True,
                spurious_duplicates=False,
                publish_dedup=300.0,
            )

    def make_transport(self) -> Transport:
        """Return a transport with this backend's settings; it is not connected."""
        return SqsTransport(self.settings)


if TYPE_CHECKING:
    _: type[MessageQueueBackend] = SqsBackend
