"""The requests for messages that are under way for one consumer.

A poll is never cancelled: what SQS had put into its answer would be lost until its lease runs out, and an attempt with it. Who
stops leaves the polls that are under way to the group's next consumer in this process; what one of them brings while nobody has
taken it over goes to the consumer that began it, which gives it back.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from abe.errors import AbeError, BackendConnectionError
from abe_backend_sqs._errors import CLIENT_ERRORS, translate
from abe_backend_sqs._wire import BATCH, Message

if TYPE_CHECKING:
    from abe_backend_sqs._transport import SqsTransport

_log: Final = logging.getLogger("abe.sqs")

POLLED: Final = ("ApproximateReceiveCount", "SentTimestamp", "MessageGroupId")
"""What SQS itself tells about a message."""


_AGAIN: Final = 2
"""Seconds for which a poll waits for what may come again."""


class Poll:
    """A request that is under way, and who gets what it brings."""

    __slots__ = ("count", "owner")

    def __init__(self, count: int, owner: "Polls") -> None:
        self.count = count
        self.owner = owner


class Polls:
    """Polls a queue, as many times at once as messages flow, and never for more than was asked for.

    Args:
        transport: Asks SQS.
        name: The queue's name.
        url: Its address.
        take: Gets what they bring.
    """

    def __init__(
        self, transport: "SqsTransport", name: str, url: str, take: Callable[[Sequence[Message]], Awaitable[None]]
    ) -> None:
        self._transport = transport
        self._name = name
        self._take = take
        self._under_way: set[Poll] = set()
        self._most = 1
        self.url: str = url
        self.asked_for: int = 0
        """Messages that the polls under way may bring."""
        self.error: AbeError | None = None
        """What one of them failed with."""
        self.news: asyncio.Event = asyncio.Event()
        """Set whenever one ends."""

    def ask_for(self, count: int) -> None:
        """Have polls under way for that many messages more: those that a consumer of this process left behind, then new ones."""
        left_behind = self._transport.left_behind[self._name]
        while left_behind and left_behind[-1].count <= count:
            poll = left_behind.pop()
            poll.owner = self
            count -= self._began(poll)
        while count > 0 and len(self._under_way) < self._most:
            poll = Poll(min(BATCH, count), self)
            count -= self._began(poll)
            self._transport.in_background(_carry_out(poll))

    def leave(self) -> None:
        """Leave what is under way to the group's next consumer in this process."""
        self._transport.left_behind[self._name] += self._under_way
        self._under_way.clear()
        self.asked_for = 0
        self.news.set()

    async def ask(self, count: int) -> Sequence[Message]:
        """Ask SQS, and wait until there is something, or the time is up."""
        return await poll(self._transport, self.url, count)

    async def again(self, count: int) -> int:
        """Ask once more, for what may be delivered to us again, and return how many it brought. Not to be cancelled.

        Raises:
            AbeError: By the tables of errors.
        """
        messages = await poll(self._transport, self.url, count, wait=_AGAIN)
        await self._take(messages)
        return len(messages)

    async def brought(self, poll: Poll, messages: Sequence[Message]) -> None:
        """Have what a poll brought. One that brings all it may is joined by one more; each that brings less, as SQS likes to, even if
        there is more, leaves one fewer; and one that brings nothing leaves but one."""
        if not messages:
            self._most = 1
        elif len(messages) < poll.count:
            self._most = max(1, self._most - 1)
        else:
            self._most = min(self._transport.settings.pollers, self._most + 1)
        await self._take(messages)

    def failed(self, error: AbeError) -> None:
        """Know that a poll failed."""
        self.error = error

    def ended(self, poll: Poll) -> None:
        """Forget a poll."""
        if poll in self._under_way:
            self._under_way.discard(poll)
            self.asked_for -= poll.count
        elif poll in self._transport.left_behind[self._name]:
            self._transport.left_behind[self._name].remove(poll)
        self.news.set()

    def _began(self, poll: Poll) -> int:
        self._under_way.add(poll)
        self.asked_for += poll.count
        return poll.count


async def poll(transport: "SqsTransport", url: str, count: int, *, wait: int | None = None) -> Sequence[Message]:
    """Ask SQS for up to that many messages, and wait until there is one, or the time is up: that many seconds, or those of the settings.

    Raises:
        AbeError: By the tables of errors.
    """
    settings = transport.settings
    client = await transport.clients.polls()
    try:
        reply: Mapping[str, Any] = await client.receive_message(
            QueueUrl=url,
            MaxNumberOfMessages=count,
            WaitTimeSeconds=settings.wait if wait is None else wait,
            VisibilityTimeout=settings.visibility,
            MessageSystemAttributeNames=POLLED,
            MessageAttributeNames=("All",),
        )
    except CLIENT_ERRORS as exc:
        raise translate(exc, settings.address) from exc
    messages: Sequence[Message] = reply.get("Messages") or ()
    return messages


async def _carry_out(poll: Poll) -> None:
    """Poll. Whoever owns it in the end gets what it brings."""
    try:
        messages = await poll.owner.ask(poll.count)
        await poll.owner.brought(poll, messages)
    except AbeError as exc:
        poll.owner.failed(exc)
    except Exception as exc:  # noqa: BLE001 - a fault here must not leave the consumer waiting for what does not come
        _log.exception("unexpected exception where an answer of SQS was taken (a bug of the provider)")
        poll.owner.failed(BackendConnectionError(f"an answer of SQS could not be taken: {exc!r}"))
    finally:
        poll.owner.ended(poll)
