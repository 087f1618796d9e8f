"""Message queues: one contract, any broker."""

from abe.backends.message_queue.consumer import AsyncLoopConsumer
from abe.backends.message_queue.loader import load_backend

__all__ = ["AsyncLoopConsumer", "load_backend"]
