"""The engine: a transport made into a backend. Providers use `TransportBackend`; the rest is its own."""

from abe.backends.message_queue.engine.backend import TransportBackend
from abe.backends.message_queue.engine.dead_letters import DeadLetters
from abe.backends.message_queue.engine.subscription import GroupSubscription

__all__ = ["DeadLetters", "GroupSubscription", "TransportBackend"]
