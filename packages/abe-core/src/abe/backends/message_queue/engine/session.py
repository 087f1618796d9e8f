"""The state of a backend while it is open in one event loop."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Final

from abe.backends.message_queue.base.clock import pause
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.names import check_patterns
from abe.backends.message_queue.base.transport import Receiver, Transport
from abe.backends.message_queue.engine.inbox import Inbox
from abe.backends.message_queue.engine.publisher import Publisher
from abe.errors import BackendClosedError, ConfigurationError
from abe.settings import QueueSettings

_log: Final = Log("abe.engine")

_FINISHING: Final = 0.9
"""The fraction of `close_timeout` for publishes and settlements in progress; the rest is for disconnecting."""


class Session:
    """A transport, its publisher and its inboxes, in the running event loop."""

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
        self.inboxes: dict[Inbox, None] = {}
        self.calls: dict[asyncio.Timeout, None] = {}
        """The timeouts of the calls in progress: closing ends them."""
        self._joining: set[asyncio.Task[Inbox]] = set()
        self._undeclared: Mapping[str, tuple[str, ...]] = settings.groups
        self._patterns: dict[str, tuple[str, ...]] = {}
        self._close_timeout = settings.close_timeout
        self._closing: asyncio.Task[None] | None = None
        self.ended: bool = False
        """Whether it is being closed."""
        self._ending = asyncio.Event()

    async def opened(self, *, groups: bool = True) -> None:
        """Return once the transport is connected, and (with `groups`) the groups of the settings exist.

        Raises:
            ConfigurationError: One of those groups has different patterns.
        """
        await self.transport.open()
        if groups and self._undeclared:
            for group, patterns in self._undeclared.items():
                await self.agree(group, check_patterns(patterns) if patterns else None, by="QUEUE_GROUPS")
            self._undeclared = {}

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        """Declare a group, and return its current patterns; see `Transport.declare`."""
        present = self._patterns[group] = await self.transport.declare(group, patterns, change=change)
        return present

    async def agree(self, group: str, patterns: tuple[str, ...] | None, *, by: str = "keys=") -> None:
        """Declare a group, with these patterns if it is new.

        Args:
            group: The group.
            patterns: Its patterns. None: its current ones.
            by: Where the patterns are from, for the error text.

        Raises:
            ConfigurationError: The group exists, with different patterns.
        """
        present = await self.declare(group, patterns, change=False)
        if patterns is not None and set(present) != set(patterns):
            raise ConfigurationError(
                f"group {group!r} has the key patterns {_listed(present)}, and {by} asks for {_listed(patterns)}. "
                f"Patterns belong to the group: omit them to use its current ones, change them for all of its consumers with "
                f"declare({group!r}, keys=[...]), or use another group"
            )

    async def restore(self, group: str) -> None:
        """Declare a group again that was deleted underneath its consumers, with its last known patterns."""
        await self.declare(group, self._patterns.get(group), change=False)

    async def pause(self, seconds: float) -> None:
        """Wait before a retry.

        Raises:
            BackendClosedError: The session is being closed.
        """
        if await pause(self._ending, seconds):
            raise BackendClosedError("the backend was closed")

    async def join(self, group: str, prefetch: int, inbox: Callable[[Receiver], Inbox]) -> Inbox:
        """Subscribe to a group, and return the inbox of its receiver.

        Subscribing is never interrupted half-way, as a half-made consumer would keep messages in flight. If its caller is cancelled, or
        the session is closed meanwhile, it completes and is closed before the transport is.

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
            joining.add_done_callback(_close_unwanted)
            raise

    async def close(self) -> None:
        """Finish publishes and settlements, end the subscriptions and disconnect. Concurrent callers share one close."""
        if self._closing is None:
            self._closing = self.loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _join(self, group: str, prefetch: int, inbox: Callable[[Receiver], Inbox]) -> Inbox:
        receiver = await self.transport.subscribe(group, prefetch)
        if self.ended:
            await receiver.close()
            raise BackendClosedError("the backend was closed")
        joined = inbox(receiver)
        self.inboxes[joined] = None
        return joined

    async def _close(self) -> None:
        """Close within `close_timeout`, even if the broker does not answer."""
        self.ended = True
        self._ending.set()
        began, part = self.loop.time(), _FINISHING * self._close_timeout
        closings = [self.publisher.close(part), *(inbox.close(part) for inbox in self.inboxes)]
        if self._joining:
            closings.append(_done(set(self._joining), part))
        try:
            # Wait for all of them: if one fails, the others still need the connection.
            outcomes = await asyncio.gather(*closings, return_exceptions=True)
        finally:
            try:
                async with asyncio.timeout_at(began + self._close_timeout):
                    await self.transport.close()
            except TimeoutError:
                _log.warning(
                    "the broker did not answer while the connection was being closed: the connection is abandoned"
                )
            finally:
                self._end_calls()
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    def _end_calls(self) -> None:
        # A client library may not wake its waiting callers when its connection is closed.
        for bound in self.calls:
            if not bound.expired():
                bound.reschedule(self.loop.time())
        for task in self._joining:
            task.cancel()


def _listed(patterns: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(patterns)))


async def _done(tasks: Collection[asyncio.Task[Inbox]], timeout: float) -> None:
    await asyncio.wait(tasks, timeout=timeout)


def _close_unwanted(joining: asyncio.Task[Inbox]) -> None:
    if not joining.cancelled() and joining.exception() is None:
        joining.result().close_soon()
