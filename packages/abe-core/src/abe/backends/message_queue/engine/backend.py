"""A transport made into a backend: everything that must behave alike, whichever broker is underneath."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Generic, Self, cast

from abe.backends.message_queue.base.capabilities import Capabilities
from abe.backends.message_queue.base.clock import Clock, MonotonicClock
from abe.backends.message_queue.base.groups import GroupStats
from abe.backends.message_queue.base.middleware import Middleware, Publication, PublishNext, check_middleware
from abe.backends.message_queue.base.names import (
    check_count,
    check_patterns,
    check_seconds,
)
from abe.backends.message_queue.base.transport import Envelope, Transport
from abe.backends.message_queue.engine.calls import Calls
from abe.backends.message_queue.engine.dead_letters import DeadLetters
from abe.backends.message_queue.engine.inbox import Inbox
from abe.backends.message_queue.engine.joining import Joining
from abe.backends.message_queue.engine.outgoing import Outgoing
from abe.backends.message_queue.engine.subscription import GroupSubscription
from abe.codec import Codec, check_codec
from abe.errors import (
    AbeError,
    BackendClosedError,
    ConfigurationError,
    PartialPublishError,
    UnroutableError,
    UnsupportedCapabilityError,
)
from abe.settings import QueueSettings
from abe.types import MessageQueuePayload, Publishable

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # for the default, which type checkers know before Python 3.13 does

    SettingsT = TypeVar("SettingsT", bound=QueueSettings, default=QueueSettings)
else:
    from typing import TypeVar

    SettingsT = TypeVar("SettingsT", bound=QueueSettings)


class TransportBackend(ABC, Generic[SettingsT]):
    """A message queue on a transport. A provider names its capabilities and settings, and makes its transport; the rest is here.

    ``class MyBackend(TransportBackend[MySettings])`` names the class of the settings to type checkers, and `settings_type` at run time.

    It connects when it is first used, or by `connect`, reconnects by itself, and belongs to the event loop and process of its first
    use. When that loop is closed, the next use begins anew in the loop that runs then.

    Args:
        settings: The provider's settings; None: its defaults.
        codec: Payload to bytes and back.
        middleware: Wraps each publish, the first outermost.
        clock: What leases, delays and backoffs are measured by.

    Raises:
        ConfigurationError: An argument is of another kind; the text says what would be right.
    """

    settings_type: ClassVar[type[QueueSettings]] = QueueSettings
    """The class of the provider's settings."""

    capabilities: Capabilities
    """Declared on the class; an instance's own says what its settings make of it."""

    def __init__(
        self,
        settings: SettingsT | None = None,
        *,
        codec: Codec | None = None,
        middleware: Sequence[Middleware] = (),
        clock: Clock | None = None,
    ) -> None:
        wanted = self.settings_type
        if settings is None:
            settings = cast("SettingsT", wanted())
        elif not isinstance(settings, wanted):
            raise ConfigurationError(
                f"{type(self).__name__} takes its settings as {wanted.__name__}(...), not as a {type(settings).__name__}; "
                f"{type(self).__name__}.from_env() reads them from the environment"
            )
        self.settings: SettingsT = settings
        if self.capabilities.lease is not None:
            self.capabilities = replace(self.capabilities, lease=settings.lease)
        self.unroutable: int = 0
        """Messages published here that no group wanted, so far: groups existed, and the message is gone."""
        self._codec = check_codec(codec)
        self._clock = clock or MonotonicClock()
        self._send: PublishNext | None = None
        for layer in reversed(check_middleware(middleware)):
            self._send = partial(layer.publish, forward=self._send or self._forward)
        self._outgoing = Outgoing(type(self).__name__, self._codec)
        self._calls = Calls(self.make_transport, settings)

    @classmethod
    def from_env(
        cls,
        *,
        codec: Codec | None = None,
        middleware: Sequence[Middleware] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Make an instance whose settings are read from the environment. No I/O happens here.

        Args:
            codec: Payload to bytes and back.
            middleware: Wraps each publish, the first outermost.
            environ: What to read instead of the process's variables.

        Raises:
            ConfigurationError: A variable is missing or malformed; the text names it.
        """
        return cls(cast("SettingsT", cls.settings_type.from_env(environ)), codec=codec, middleware=middleware)

    @abstractmethod
    def make_transport(self) -> Transport:
        """Return a new transport, not connected yet, for the event loop that runs now."""

    async def publish(
        self,
        key: str,
        payload: Publishable,
        *,
        headers: Mapping[str, str] | None = None,
        id: str | None = None,
        delay: float | None = None,
        mandatory: bool = False,
        group: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Hand a message to the broker. Returning means that the broker has taken responsibility for it.

        Waits while too much is on its way. May be called by any number of tasks at once; a cancelled call leaves none or one copy.

        Args:
            key: What it is about: 1 to 200 bytes of UTF-8, words separated by dots.
            payload: A JSON object; or a dataclass, msgspec Struct, attrs or Pydantic instance, which becomes one. It is taken as it is now.
            headers: Strings that travel beside it.
            id: The message's id, for publishing it again after `PublishUnknownError`; made up when left out.
            delay: Seconds before which it must not be delivered.
            mandatory: Raise when groups exist and none of them wants the key.
            group: Deliver to this group alone, whatever its patterns. None: to every group that wants the key.
            timeout: Seconds within which it returns or raises; None: `publish_timeout` of the settings.

        Raises:
            PayloadError: The payload is not JSON (`PayloadTooLargeError`: or too large); nothing was sent.
            InvalidNameError: The key, the id or a header cannot be carried; nothing was sent.
            PublishRejectedError: The message is certainly not in the broker (`BackpressureError`: because something is full;
                `UnroutableError`: no group wants the key, and `mandatory`; or `group` does not exist).
            PublishUnknownError: The message may be in the broker, or not.
            UnsupportedCapabilityError: The delay is longer than this backend can hold.
            BackendClosedError: The backend was closed.
        """
        if self._send is not None:
            if not isinstance(payload, dict):
                payload = self._codec.decode(self._envelope(key, payload, headers, id, delay, group).body)
            return await self._send(Publication(key, payload, headers, id, delay or 0.0, mandatory, group, timeout))
        if timeout is not None:
            check_seconds("timeout", timeout)
        publisher = self._calls.here().publisher
        # Not by `_envelope`: a call less for each message.
        envelope = self._outgoing.envelope(self.capabilities, key, payload, headers, id, delay, group)
        outcome = await publisher.publish(envelope, timeout)
        if outcome is not None:
            self._judge(outcome, key, mandatory or group is not None)
        return None

    async def publish_many(self, items: Iterable[Publication | tuple[str, Publishable]]) -> None:
        """Publish messages, each confirmed on its own, in few round trips.

        Args:
            items: Publications, or (key, payload) pairs. All of them are encoded before the first is sent.

        Raises:
            PayloadError: One of them is not JSON; the text says which. Nothing was sent. Likewise `InvalidNameError`.
            PartialPublishError: Some were not published; it says which, and why. The others were.
        """
        publications = [
            item if isinstance(item, Publication) else Publication(item[0], cast("MessageQueuePayload", item[1]))
            for item in items
        ]
        results: Sequence[BaseException | None]
        send = self._send
        envelopes: list[Envelope] = []
        for index, item in enumerate(publications):
            try:
                check_seconds("timeout", item.timeout)
                envelopes.append(self._envelope(item.key, item.payload, item.headers, item.id, item.delay, item.group))
            except AbeError as exc:
                exc.args = (f"message #{index}: {exc}",)
                raise
        if send is not None:
            plain = (self._plain(item, envelope) for item, envelope in zip(publications, envelopes, strict=True))
            results = await asyncio.gather(*map(send, plain), return_exceptions=True)
        elif any(item.timeout is not None for item in publications):
            publish = self._calls.here().publisher.publish
            calls = (publish(envelope, item.timeout) for item, envelope in zip(publications, envelopes, strict=True))
            results = await asyncio.gather(*calls, return_exceptions=True)
        else:
            results = await self._calls.here().publisher.publish_many(envelopes)
        failures: list[tuple[int, AbeError]] = []
        for index, result in enumerate(results):
            item = publications[index]
            try:
                if isinstance(result, AbeError):
                    self._judge(result, item.key, item.mandatory or item.group is not None)
                elif result is not None:
                    raise result
            except AbeError as exc:
                failures.append((index, exc))
        if failures:
            raise PartialPublishError(failures, len(publications))

    def consume(
        self,
        *,
        group: str | None = None,
        keys: Sequence[str] | None = None,
        prefetch: int | None = None,
        max_attempts: int | None = None,
    ) -> GroupSubscription:
        """Return the messages of a group, to iterate over; see `Subscription`.

        Args:
            group: The group, which its consumers share; None: ``default``.
            keys: The key patterns of a new group; an existing one must have the same. None: what the group has; everything, for a new
                group. `declare` changes them.
            prefetch: Messages held at most; None: the setting.
            max_attempts: Deliveries before a message is dead; None: the setting.

        Raises:
            InvalidNameError: The group or a pattern is none that a broker can carry.
            UnsupportedCapabilityError: This backend has no groups, or no patterns.
            BackendClosedError: The backend was closed.
        """
        if self._calls.closed:
            raise BackendClosedError("the backend was closed; connect() opens it again")
        name, patterns = self._group(group), self._patterns(keys)
        prefetch = check_count("prefetch", self.settings.prefetch if prefetch is None else prefetch)
        attempts = check_count("max_attempts", self.settings.max_attempts if max_attempts is None else max_attempts)
        inbox = partial(
            Inbox,
            group=name,
            max_attempts=attempts,
            max_delay=self.capabilities.max_delay,
            lease=self.capabilities.lease,
            codec=self._codec,
            clock=self._clock,
            close_timeout=self.settings.close_timeout,
        )
        return GroupSubscription(Joining(self._calls, name, patterns, prefetch, inbox))

    async def connect(self) -> None:
        """Connect now rather than at first use, once and without retries; opens a closed backend again.

        Raises:
            BackendConnectionError: The broker cannot be reached.
            ConfigurationError: It refuses us, or is configured so that the contract cannot hold.
        """
        await self._calls.connect()

    async def disconnect(self) -> None:
        """Close: finish what is on its way, end the subscriptions, disconnect, each within `close_timeout`. May be called repeatedly."""
        await self._calls.close()

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.disconnect()  # nobody else will
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.disconnect()

    async def ping(self) -> None:
        """Ask the broker for a sign of life.

        Raises:
            BackendConnectionError: There is none.
        """
        await self._calls.call(lambda session: session.transport.ping(), patient=False)

    async def declare(self, group: str | None = None, keys: Sequence[str] | None = None) -> None:
        """Make a group exist ahead of its consumers, with exactly these key patterns from now on.

        Args:
            group: The group; None: ``default``.
            keys: Its key patterns. None: those that it has; everything, for a new group.
        """
        name, patterns = self._group(group), self._patterns(keys)
        await self._calls.call(lambda session: session.declare(name, patterns, change=True), groups=False)

    async def delete_group(self, group: str | None = None) -> None:
        """End a group: its messages, dead letters included, are gone. A no-op when there is none."""
        name = self._group(group)
        await self._calls.call(lambda session: session.transport.delete_group(name), groups=False)

    async def delete_namespace(self) -> None:
        """Remove everything that the namespace has in the broker: every group, message and dead letter. A no-op when there is nothing."""
        await self._calls.call(lambda session: session.transport.delete_namespace(), groups=False)

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Return the groups that exist, each with its key patterns."""
        return await self._calls.call(lambda session: session.transport.groups())

    async def stats(self, group: str | None = None) -> GroupStats:
        """Count a group's messages.

        Raises:
            GroupMissingError: There is no such group.
        """
        name = self._group(group)
        return await self._calls.call(lambda session: session.transport.stats(name))

    def dead_letters(self, group: str | None = None) -> DeadLetters:
        """Return the dead letters of a group, to list, show, replay and purge.

        Raises:
            UnsupportedCapabilityError: This backend keeps none.
        """
        if not self.capabilities.dead_letter:
            raise UnsupportedCapabilityError(f"{type(self).__name__} keeps no dead letters")
        return DeadLetters(self._calls.steps, self._group(group))

    def _plain(self, item: Publication, envelope: Envelope) -> Publication:
        """Return a publication as middleware knows it: its payload is a dict."""
        return (
            item
            if isinstance(cast("object", item.payload), dict)
            else replace(item, payload=self._codec.decode(envelope.body))
        )

    async def _forward(self, publication: Publication) -> None:
        p = publication
        envelope = self._envelope(p.key, p.payload, p.headers, p.id, p.delay, p.group)
        check_seconds("timeout", p.timeout)
        outcome = await self._calls.here().publisher.publish(envelope, p.timeout)
        if outcome is not None:
            self._judge(outcome, p.key, p.mandatory or p.group is not None)

    def _envelope(
        self,
        key: str,
        payload: Publishable,
        headers: Mapping[str, str] | None,
        id: str | None,
        delay: float | None,
        group: str | None,
    ) -> Envelope:
        return self._outgoing.envelope(self.capabilities, key, payload, headers, id, delay, group)

    def _judge(self, outcome: AbeError, key: str, mandatory: bool) -> None:
        if not isinstance(outcome, UnroutableError) or mandatory:
            raise outcome
        self.unroutable += 1
        self._outgoing.unwanted(key)

    def _group(self, group: str | None) -> str:
        return self._outgoing.group(self.capabilities, group)

    def _patterns(self, keys: Sequence[str] | None) -> tuple[str, ...] | None:
        if keys is not None and not self.capabilities.key_patterns:
            raise UnsupportedCapabilityError(f"keys={keys!r}: {type(self).__name__} delivers every key to every group")
        return None if keys is None else check_patterns(keys)
