"""What a backend has while it is open in one event loop."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Final

from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.base.names import check_patterns
from abe.backends.message_queue.base.transport import Receiver, Transport
from abe.backends.message_queue.engine.inbox import Inbox
from abe.backends.message_queue.engine.publisher import Publisher
from abe.errors import BackendClosedError, ConfigurationError
from abe.settings import QueueSettings

_log: Final = logging.getLogger("abe.engine")

_FINISHING: Final = 0.9
"""The part of the time to close that is for what is under way; the rest is for disconnecting."""


class Session:
    """A transport, its publisher and the inboxes that take from it, all of the running event loop."""

    def __init__(self, transport: Transport, settings: QueueSettings) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.transport = transport
        self.publisher: Publisher = Publisher(
            transport,
            self.opened,
            timeout=settings.publish_timeout,
            max_count=settings.max_unconfirmed,
            max_bytes=settings.max_unconfirmed_bytes,
        )
        self.inboxes: set[Inbox] = set()
        self.calls: set[asyncio.Timeout] = set()
        """The bounds of the calls that are under way: closing ends them."""
        self._joining: set[asyncio.Task[Inbox]] = set()
        self._undeclared: Mapping[str, tuple[str, ...]] = settings.groups
        self._patterns: dict[str, tuple[str, ...]] = {}
        self._close_timeout = settings.close_timeout
        self._closing: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()

    async def opened(self, *, groups: bool = True) -> None:
        """Return once the transport is connected, and the groups of the settings exist, if they must.

        Raises:
            ConfigurationError: One of those groups has other patterns.
        """
        await self.transport.open()
        if groups and self._undeclared:
            for group, patterns in self._undeclared.items():
                await self.agree(group, check_patterns(patterns) if patterns else None, by="QUEUE_GROUPS")
            self._undeclared = {}

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Make a group exist, and return the patterns that it has now; see `Transport.declare`."""
        present = self._patterns[group] = await self.transport.declare(group, patterns, change=change)
        return present

    async def agree(self, group: str, patterns: tuple[str, ...] | None, *, by: str = "keys=") -> None:
        """Make a group exist, with these patterns if it is new.

        Args:
            group: The group.
            patterns: Its patterns. None: those that it has.
            by: What asks for them.

        Raises:
            ConfigurationError: It exists, and has other patterns.
        """
        present = await self.declare(group, patterns, change=False)
        if patterns is not None and set(present) != set(patterns):
            raise ConfigurationError(
                f"group {group!r} has the key patterns {_listed(present)}, and {by} asks for {_listed(patterns)}. "
                f"Patterns belong to the group: leave them out to take what it has, change them for all of its consumers with "
                f"declare({group!r}, keys=[...]), or use a group of another name"
            )

    async def restore(self, group: str) -> None:
        """Make a group again that was deleted underneath its consumers, with the patterns that it had when we last knew."""
        await self.declare(group, self._patterns.get(group), change=False)

    @property
    def ended(self) -> bool:
        """Whether it is being closed."""
        return self._ended.is_set()

    async def pause(self, seconds: float) -> None:
        """Wait before another try.

        Raises:
            BackendClosedError: The session is being closed: there will be none.
        """
        if await pause(self._ended, seconds):
            raise BackendClosedError("the backend was closed")

    async def join(self, group: str, prefetch: int, inbox: Callable[[Receiver], Inbox]) -> Inbox:
        """Take part in a group, and return the inbox that is made of the receiver.

        Half a consumer holds messages that nobody sees. So one whose caller is cancelled, or that comes when the session is being closed,
        is made all the same, and leaves again before the transport is closed.

        Raises:
            BackendClosedError: The session is being closed.
        """
        if self.ended:
            raise BackendClosedError("the backend was closed")
        joining = self.loop.create_task(self._join(group, prefetch, inbox))
        self._joining.add(joining)
        joining.add_done_callback(self._joining.discard)
        try:
            return await asyncio.shield(joining)
        except asyncio.CancelledError:
            joining.add_done_callback(_leave)
            raise

    async def close(self) -> None:
        """Finish what is on its way, end the subscriptions, and disconnect, whatever the broker does."""
        if self._closing is None:
            self._closing = self.loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _join(self, group: str, prefetch: int, inbox: Callable[[Receiver], Inbox]) -> Inbox:
        receiver = await self.transport.subscribe(group, prefetch)
        if self.ended:
            await receiver.close()
            raise BackendClosedError("the backend was closed")
        joined = inbox(receiver)
        self.inboxes.add(joined)
        return joined

    async def _close(self) -> None:
        """Close within `close_timeout`, whatever the broker does."""
        self._ended.set()
        began, part = self.loop.time(), _FINISHING * self._close_timeout
        ways = [self.publisher.close(part), *(inbox.close(part) for inbox in self.inboxes)]
        if self._joining:
            ways.append(_done(set(self._joining), part))
        try:
            # Each to its end: one that fails must not have the others lose their connection.
            outcomes = await asyncio.gather(*ways, return_exceptions=True)
        finally:
            try:
                async with asyncio.timeout_at(began + self._close_timeout):
                    await self.transport.close()
            except TimeoutError:
                _log.warning("the broker did not answer while the connection was closed: it is given up")
            finally:
                self._end_calls()
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    def _end_calls(self) -> None:
        # A client library may leave those who wait for its answer alone when its connection is closed.
        for bound in self.calls:
            if not bound.expired():
                bound.reschedule(self.loop.time())
        for task in self._joining:
            task.cancel()


def _listed(patterns: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(patterns)))


async def _done(tasks: Collection[asyncio.Task[Inbox]], timeout: float) -> None:
    await asyncio.wait(tasks, timeout=timeout)


def _leave(joining: asyncio.Task[Inbox]) -> None:
    if not joining.cancelled() and joining.exception() is None:
        joining.result().close_soon()
