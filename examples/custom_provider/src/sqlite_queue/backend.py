"""The backend: settings, capabilities, and a transport. The engine brings the rest."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from abe.backends.message_queue.base import Capabilities, Durability, MessageQueueBackend, Transport
from abe.backends.message_queue.engine import TransportBackend
from abe.settings import QueueSettings, setting
from sqlite_queue.transport import SqliteTransport


@dataclass(frozen=True, kw_only=True, repr=False)
class SqliteSettings(QueueSettings):
    """Where the queues are."""

    path: str = setting(
        "SQLITE_QUEUE_PATH", str, default="queue.sqlite3", help="The database file. It is made when it is missing."
    )


class SqliteBackend(TransportBackend[SqliteSettings]):
    """Message queues that the processes of one machine share through a file."""

    capabilities = Capabilities(
        groups=True,
        key_patterns=True,
        ordered=True,
        ordered_per_key=False,
        spurious_duplicates=False,
        dead_letter=True,
        max_delay=math.inf,
        lease=30.0,
        redelivery_bound=1.0,
        silence_bound=None,
        publish_dedup=None,
        max_payload_bytes=1024 * 1024,
        durability=Durability.PROCESS_CRASH,
    )
    settings_type = SqliteSettings

    def make_transport(self) -> Transport:
        """Return a transport to the file, not opened yet."""
        return SqliteTransport(self.settings.path, self.settings)


if TYPE_CHECKING:
    _: type[MessageQueueBackend] = SqliteBackend
