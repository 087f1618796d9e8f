"""The protocol of a subscription: how applications and consumers receive messages."""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from abe.backends.message_queue.base.message import Message


@runtime_checkable
class Subscription(Protocol):
    """The messages of a group: an async iterator and an async context manager.

    As an iterator: the request for the next message acknowledges the previous one; ending the iteration (``break``, `aclose`, the end of
    ``async with``) gives the current one back unacknowledged, and an exception out of the ``async with`` body fails it. Only one task may
    iterate; a second ``anext`` while one waits raises RuntimeError. A cancelled or timed-out ``anext`` has taken no message.

    `receive` and `take` return messages that the caller settles itself, any number concurrently.

    It subscribes when it is entered, or first iterated: every publish that starts after that reaches it.
    """

    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def __aiter__(self) -> AsyncIterator[Message]: ...
    async def __anext__(self) -> Message: ...

    def take(self) -> Message | None:
        """Return the next buffered message, or None."""
        ...

    async def receive(self) -> Message:
        """Wait for the next message. Any number of tasks may wait.

        Raises:
            BackendClosedError: The subscription was closed, or stopped and is empty.
        """
        ...

    def ack_soon(self, message: Message) -> None:
        """Acknowledge with the next batch, without waiting; a no-op if the message is settled already. Failures are logged."""
        ...

    async def release(self, message: Message) -> None:
        """Give a message back as if it had never been taken; a no-op if it is settled already."""
        ...

    async def halt(self) -> None:
        """Stop receiving from the broker; `take` still returns the buffered messages."""
        ...

    async def stop(self) -> None:
        """Stop receiving from the broker, and give buffered messages back; messages in flight keep their leases."""
        ...

    async def aclose(self) -> None:
        """Stop, carry out pending settlements, give all other messages back, and unsubscribe. May be called repeatedly."""
        ...
