"""RabbitMQ as a backend: one topic exchange, and a quorum queue for each group."""

from abe_backend_rabbitmq._backend import RabbitMQBackend
from abe_backend_rabbitmq._settings import RabbitMQSettings

__all__ = ["RabbitMQBackend", "RabbitMQSettings"]
