"""Brokers for tests: at an address, in a container, or as a private process, with one interface."""

from abe_contract_tests.services._base import (
    Broker,
    Companion,
    FaultUnsupportedError,
    NotReadyError,
    Service,
    ServiceUnavailable,
    TlsFiles,
    running_services,
)
from abe_contract_tests.services._choice import choose
from abe_contract_tests.services._shell import QueueCounts, RabbitMQShell
from abe_contract_tests.services.rabbitmq import RabbitMQ, rabbitmq_service
from abe_contract_tests.services.redis import Redis, redis_service
from abe_contract_tests.services.sqs import MiniStack, Moto, sqs_service

__all__ = [
    "Broker",
    "Companion",
    "FaultUnsupportedError",
    "MiniStack",
    "Moto",
    "NotReadyError",
    "QueueCounts",
    "RabbitMQ",
    "RabbitMQShell",
    "Redis",
    "Service",
    "ServiceUnavailable",
    "TlsFiles",
    "choose",
    "rabbitmq_service",
    "redis_service",
    "running_services",
    "sqs_service",
]
