"""The protocol of a message-queue backend, under the names applications import."""

from abe.types import MessageQueueBackendProtocol

MessageQueueBackend = MessageQueueBackendProtocol
QueueBackend = MessageQueueBackendProtocol
