"""The consuming side that applications and consumers see."""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from abe.backends.message_queue.base.message import Message


@runtime_checkable
class Subscription(Protocol):
    """The messages of a group: an async iterator that is an async context manager too.

    As an iterator: asking for the next message acknowledges the one before; leaving (``break``, `aclose`, the end of ``async with``)
    gives the current one back unacknowledged, and an exception out of the ``async with`` body fails it. Only one task may iterate; a
    second ``anext`` while one waits raises RuntimeError. A cancelled or timed-out ``anext`` has taken nothing.

    `receive` and `take` hand out messages that the caller settles itself, any number at once.

    It is entered, or first asked, once: from then on every publish that starts reaches it.
    """

    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def __aiter__(self) -> AsyncIterator[Message]: ...
    async def __anext__(self) -> Message: ...

    def take(self) -> Message | None:
        """Return the next message if one is at hand, else None."""
        ...

    async def receive(self) -> Message:
        """Wait for the next message. Any number of tasks may wait.

        Raises:
            BackendClosedError: The subscription was closed, or stopped and is empty.
        """
        ...

    def ack_soon(self, message: Message) -> None:
        """Acknowledge with the next batch, without waiting; nothing happens when it is settled already; a failure is logged."""
        ...

    async def release(self, message: Message) -> None:
        """Give a message back as if it had never been taken; nothing happens when it is settled already."""
        ...

    async def halt(self) -> None:
        """Take nothing new from the broker; what was taken already is still handed out by `take`."""
        ...

    async def stop(self) -> None:
        """Take nothing new from the broker, and give back what nobody was handed yet; what was handed out keeps its lease."""
        ...

    async def aclose(self) -> None:
        """Stop, carry out the settlements that wait, give back everything else, and leave the group. May be called repeatedly."""
        ...
