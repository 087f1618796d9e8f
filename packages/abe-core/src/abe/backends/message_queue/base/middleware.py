"""What wraps every publish and every handled message."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from abe.backends.message_queue.base.message import Message
from abe.types import MessageQueuePayload


@dataclass(frozen=True, slots=True)
class Publication:
    """A message that is about to be published; middleware may pass on a changed copy (``dataclasses.replace``)."""

    key: str
    payload: MessageQueuePayload
    headers: Mapping[str, str] | None = None
    id: str | None = None
    delay: float = 0.0
    mandatory: bool = False
    group: str | None = None
    timeout: float | None = None


PublishNext: TypeAlias = Callable[[Publication], Awaitable[None]]
HandleNext: TypeAlias = Callable[[Message], Awaitable[object]]


class Middleware:
    """Override what you need; each method must call `forward` for the rest to happen."""

    async def publish(self, publication: Publication, forward: PublishNext) -> None:
        """Around a publish, in the caller's task."""
        await forward(publication)

    async def handle(self, message: Message, forward: HandleNext) -> None:
        """Around a handler. What it raises is the handler's failure."""
        await forward(message)
