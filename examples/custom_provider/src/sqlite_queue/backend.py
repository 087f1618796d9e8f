"""The backend: settings, capabilities, and a transport. The engine brings the rest."""

from dataclasses import dataclass

from abe.backends.message_queue.base import Durability, Transport
from abe.backends.message_queue.engine import TransportBackend
from abe.backends.message_queue.stored import StoreTransport, store_capabilities
from abe.settings import QueueSettings, setting
from sqlite_queue.store import SqliteStore


@dataclass(frozen=True, kw_only=True, repr=False)
class SqliteSettings(QueueSettings):
    """Where the queues are."""

    path: str = setting("SQLITE_QUEUE_PATH", str, default="queue.sqlite3", help="The database file, made if missing.")


class SqliteBackend(TransportBackend[SqliteSettings]):
    """Message queues that the processes of one machine share through a file."""

    capabilities = store_capabilities(
        lease=30.0,
        redelivery_bound=1.0,
        silence_bound=None,
        max_payload_bytes=1024 * 1024,
        durability=Durability.PROCESS_CRASH,
    )
    settings_type = SqliteSettings

    def make_transport(self) -> Transport:
        """Return a transport whose consumers look every 0.05 s, as SQLite notifies nobody of what other processes store."""
        return StoreTransport(SqliteStore(self.settings.path, self.settings.namespace), self.settings, interval=0.05)
