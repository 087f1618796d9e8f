"""The requests for messages that are under way for one consumer.

A poll is never cancelled: messages that SQS had put into its answer would be lost until their leases run out, and an attempt with
them. A consumer that stops detaches its polls: the group's next consumer in this process takes them over. What a poll brings before
that goes to the consumer that began it, which gives it back.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final

from abe.errors import AbeError, BackendConnectionError
from abe_backend_sqs._queue import Queue
from abe_backend_sqs._wire import BATCH, Message

_log: Final = logging.getLogger("abe.sqs")

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
        queue: The queue.
        detached: Polls of this queue whose consumers are gone.
        run: Runs what must not be cancelled with the one who asked for it.
        take: Gets what they bring.
    """

    def __init__(
        self,
        queue: Queue,
        detached: list[Poll],
        run: Callable[[Coroutine[Any, Any, None]], object],
        take: Callable[[Sequence[Message]], Awaitable[None]],
    ) -> None:
        self._detached = detached
        self._run = run
        self._take = take
        self._settings = queue.clients.settings
        self._under_way: set[Poll] = set()
        self._max_concurrent = 1
        self.queue: Queue = queue
        self.asked_for: int = 0
        """Messages that the polls under way may bring."""
        self.error: AbeError | None = None
        """What one of them failed with."""
        self.news: asyncio.Event = asyncio.Event()
        """Set whenever one ends."""

    def ask_for(self, count: int) -> None:
        """Have polls under way for that many messages more: detached ones of another consumer, then new ones."""
        while self._detached and self._detached[-1].count <= count:
            poll = self._detached.pop()
            poll.owner = self
            count -= self._began(poll)
        while count > 0 and len(self._under_way) < self._max_concurrent:
            poll = Poll(min(BATCH, count), self)
            count -= self._began(poll)
            self._run(_carry_out(poll))

    def detach(self) -> None:
        """Let the group's next consumer in this process take over what is under way."""
        self._detached += self._under_way
        self._under_way.clear()
        self.asked_for = 0
        self.news.set()

    async def again(self, count: int) -> int:
        """Ask once more, for what may be delivered to us again, and return how many it brought. Not to be cancelled.

        Raises:
            AbeError: By the tables of errors.
        """
        messages = await self.queue.poll(count, _AGAIN)
        await self._take(messages)
        return len(messages)

    async def brought(self, poll: Poll, messages: Sequence[Message]) -> None:
        """Have what a poll brought. A full poll adds a poller, a partial one, as SQS likes to answer even if there is more, removes one,
        and an empty one resets to one."""
        if not messages:
            self._max_concurrent = 1
        elif len(messages) < poll.count:
            self._max_concurrent = max(1, self._max_concurrent - 1)
        else:
            self._max_concurrent = min(self._settings.pollers, self._max_concurrent + 1)
        await self._take(messages)

    def ended(self, poll: Poll) -> None:
        """Forget a poll."""
        if poll in self._under_way:
            self._under_way.discard(poll)
            self.asked_for -= poll.count
        elif poll in self._detached:
            self._detached.remove(poll)
        self.news.set()

    def _began(self, poll: Poll) -> int:
        self._under_way.add(poll)
        self.asked_for += poll.count
        return poll.count


async def _carry_out(poll: Poll) -> None:
    """Poll. Its owner at the end gets what it brings."""
    try:
        messages = await poll.owner.queue.poll(poll.count)
        await poll.owner.brought(poll, messages)
    except AbeError as exc:
        poll.owner.error = exc
    except Exception as exc:  # noqa: BLE001 - a fault here must not leave the consumer waiting for what does not come
        _log.exception("unexpected exception where an answer of SQS was taken (a bug of the provider)")
        poll.owner.error = BackendConnectionError(f"an answer of SQS could not be taken: {exc!r}")
    finally:
        poll.owner.ended(poll)
