"""The engine: makes a backend of a transport. Providers use `TransportBackend`; the other modules are internal."""

from abe.backends.message_queue.engine.backend import TransportBackend
from abe.backends.message_queue.engine.dead_letters import DeadLetters
from abe.backends.message_queue.engine.subscription import GroupSubscription

__all__ = ["DeadLetters", "GroupSubscription", "TransportBackend"]
