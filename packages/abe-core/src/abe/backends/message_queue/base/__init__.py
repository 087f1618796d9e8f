"""The contract: the protocols and data between applications, the engine and providers."""

from abe.backends.message_queue.base.backoff import Backoff, ConstantBackoff, ExponentialBackoff
from abe.backends.message_queue.base.capabilities import Capabilities, Durability
from abe.backends.message_queue.base.clock import Clock, MonotonicClock
from abe.backends.message_queue.base.consumer import EventConsumer
from abe.backends.message_queue.base.groups import DeadLetter, GroupStats
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.middleware import Middleware, Publication
from abe.backends.message_queue.base.protocol import DeadLetterBox, FullBackend, MessageQueueBackend, QueueBackend
from abe.backends.message_queue.base.subscription import Subscription
from abe.backends.message_queue.base.transport import (
    Batching,
    Delivery,
    Disposition,
    Envelope,
    Metadata,
    Outcomes,
    Receiver,
    Receiving,
    Settlement,
    Settling,
    Transport,
)

__all__ = [
    "Backoff",
    "Batching",
    "Capabilities",
    "Clock",
    "ConstantBackoff",
    "DeadLetter",
    "DeadLetterBox",
    "Delivery",
    "Disposition",
    "Durability",
    "Envelope",
    "EventConsumer",
    "ExponentialBackoff",
    "FullBackend",
    "GroupStats",
    "Message",
    "MessageQueueBackend",
    "Metadata",
    "Middleware",
    "MonotonicClock",
    "Outcomes",
    "Publication",
    "QueueBackend",
    "Receiver",
    "Receiving",
    "Settlement",
    "Settling",
    "Subscription",
    "Transport",
]
