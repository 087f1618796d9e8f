"""Subscribes to a group and makes the inbox of a subscription."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from abe.backends.message_queue.base.transport import Receiver, Receiving, Settling
from abe.backends.message_queue.engine.calls import Calls
from abe.backends.message_queue.engine.inbox import Inbox
from abe.backends.message_queue.engine.session import Session
from abe.errors import BackendClosedError, BackendConnectionError, GroupMissingError


class MakesInbox(Protocol):
    """Makes an inbox of a receiver."""

    def __call__(
        self,
        receiver: Receiver,
        *,
        prefetch: int,
        alone: bool,
        receiving: Receiving,
        settling: Settling,
        restore: Callable[[], Awaitable[object]],
        left: Callable[[Inbox], object],
    ) -> Inbox: ...


class Joining:
    """Subscribes to a group on behalf of one subscription: at first, and when another inbox replaces it.

    All of its inboxes belong to one session: when that ends, so does the subscription.

    Args:
        calls: Calls the transport.
        group: The group.
        patterns: Its key patterns, if it is new; None: every key. A later change of the group's patterns does not end the subscription.
        prefetch: Messages in flight at most.
        inbox: Makes an inbox.
    """

    def __init__(
        self, calls: Calls, group: str, patterns: tuple[str, ...] | None, prefetch: int, inbox: MakesInbox
    ) -> None:
        self._calls = calls
        self._group = group
        self._patterns = patterns
        self._prefetch = prefetch
        self._inbox = inbox
        self._session: Session | None = None

    async def __call__(self, alone: bool) -> Inbox:
        """Subscribe, and return the inbox.

        Args:
            alone: Whether the inbox is to have a single message in flight.

        Raises:
            BackendClosedError: The backend, or the session in which the subscription began, was closed.
            ConfigurationError: The group has different patterns.
        """
        if self._session not in (None, self._calls.here()):
            raise BackendClosedError("the backend was closed")
        prefetch = 1 if alone else self._prefetch

        async def join(session: Session) -> Inbox:
            inbox = partial(
                self._inbox,
                prefetch=prefetch,
                alone=alone,
                left=lambda left: session.inboxes.pop(left, None),
                receiving=session.transport.receiving,
                settling=session.transport.settling,
                restore=partial(session.restore, self._group),
            )
            if self._session is None:
                await session.agree(self._group, self._patterns)
            else:
                await session.declare(self._group, self._patterns, change=False)
            try:
                joined = await session.join(self._group, prefetch, inbox)
            except GroupMissingError as exc:  # deleted in between: declare it again, as after a lost connection
                text = f"group {self._group!r} was deleted while subscribing to it"
                raise BackendConnectionError(text) from exc
            self._session = session
            return joined

        return await self._calls.call(join)
