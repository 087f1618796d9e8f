"""Makes a backend of a transport: everything that behaves alike on all brokers."""

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
from abe.backends.message_queue.base.middleware import Middleware, Publication, PublishNext, check_middleware, completed
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
    """A message queue on a transport. A provider declares its capabilities and settings, and makes its transport.

    ``class MyBackend(TransportBackend[MySettings])`` names the class of the settings to type checkers, and `settings_type` at run time.

    It connects at its first use, or by `connect`, reconnects by itself, and belongs to the event loop and process of its first
    use. Once that loop is closed, the next use opens it again in the loop that runs then.

    Args:
        settings: The provider's settings; None: its defaults.
        codec: Encodes and decodes payloads.
        middleware: Wraps each publish, the first outermost.
        clock: The clock of leases, delays and backoffs.

    Raises:
        ConfigurationError: An argument has a wrong type; the text says what is expected.
    """

    settings_type: ClassVar[type[QueueSettings]] = QueueSettings
    """The class of the provider's settings."""

    capabilities: Capabilities
    """Declared on the class; those of an instance depend on its settings."""

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
        """How many messages published here were dropped, as groups existed and none of them wanted the key."""
        self._codec = check_codec(codec)
        self._clock = clock or MonotonicClock()
        self._send: PublishNext | None = None
        for layer in reversed(check_middleware(middleware)):
            forward = partial(layer.publish, forward=self._send or self._forward)
            self._send = partial(completed, forward, f"{type(layer).__name__}.publish()")
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
            codec: Encodes and decodes payloads.
            middleware: Wraps each publish, the first outermost.
            environ: Variables to read instead of ``os.environ``.

        Raises:
            ConfigurationError: A variable is missing or malformed; the text names it.
        """
        return cls(cast("SettingsT", cls.settings_type.from_env(environ)), codec=codec, middleware=middleware)

    @abstractmethod
    def make_transport(self) -> Transport:
        """Return a new transport, not yet connected, for the running event loop."""

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

        Waits while too many messages are unconfirmed. Any number of tasks may call it concurrently; a cancelled call publishes the
        message once or not at all.

        Args:
            key: The message's key: 1 to 200 bytes of UTF-8, words separated by dots.
            payload: A JSON object; or a dataclass, msgspec Struct, attrs or Pydantic instance, which is encoded as one
                before the call waits.
            headers: Strings sent with the message.
            id: The message's id, to publish it again after `PublishUnknownError`; generated by default.
            delay: Seconds before it is delivered.
            mandatory: Raise if groups exist and none of them wants the key.
            group: Deliver to this group alone, whatever its patterns. None: to every group that wants the key.
            timeout: Seconds within which it returns or raises; None: `publish_timeout` of the settings.

        Raises:
            PayloadError: The payload is not JSON (`PayloadTooLargeError`: or too large); nothing was sent.
            InvalidNameError: The key, the id or a header is invalid; nothing was sent.
            PublishRejectedError: The message is certainly not in the broker (`BackpressureError`: a limit is reached;
                `UnroutableError`: `mandatory`, and no group wants the key; or `group` does not exist).
            PublishUnknownError: The message may be in the broker or not.
            UnsupportedCapabilityError: The delay is longer than the backend's `max_delay`.
            BackendClosedError: The backend was closed.
        """
        if self._send is not None:
            if not isinstance(payload, dict):
                payload = self._codec.decode(self._envelope(key, payload, headers, id, delay, group).body)
            return await self._send(Publication(key, payload, headers, id, delay or 0.0, mandatory, group, timeout))
        if timeout is not None:
            check_seconds("timeout", timeout)
        publisher = self._calls.here().publisher
        # Not by `_envelope`: saves a call per message.
        envelope = self._outgoing.envelope(self.capabilities, key, payload, headers, id, delay, group)
        outcome = await publisher.publish(envelope, timeout)
        if outcome is not None:
            self._judge(outcome, key, mandatory or group is not None)
        return None

    async def publish_many(self, items: Iterable[Publication | tuple[str, Publishable]]) -> None:
        """Publish messages in few round trips, each confirmed individually.

        Args:
            items: Publications, or (key, payload) pairs. All of them are encoded before the first is sent.

        Raises:
            PayloadError: One of them is not JSON; the text says which. Nothing was sent. Likewise `InvalidNameError`.
            PartialPublishError: Some were not published; it lists them with their errors. The others were.
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
            keys: The key patterns of a new group; an existing one must have the same. None: the group's own; for a new group, every key.
                `declare` changes them.
            prefetch: Messages in flight at most; None: the setting.
            max_attempts: Deliveries before a message becomes a dead letter; None: the setting.

        Raises:
            InvalidNameError: The group's name or a pattern is invalid.
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
        """Connect now instead of at the first use, without retries; opens a closed backend again.

        Raises:
            BackendConnectionError: The broker is unreachable.
            ConfigurationError: The broker refuses the credentials, or its configuration cannot fulfil the contract.
        """
        await self._calls.connect()

    async def disconnect(self) -> None:
        """Finish publishes and settlements, end the subscriptions and disconnect, within `close_timeout`. May be called repeatedly."""
        await self._calls.close()

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except BaseException:
            await self.disconnect()  # __aexit__ is not called
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.disconnect()

    async def ping(self) -> None:
        """Check that the broker answers.

        Raises:
            BackendConnectionError: It does not.
        """
        await self._calls.call(lambda session: session.transport.ping(), patient=False)

    async def declare(self, group: str | None = None, keys: Sequence[str] | None = None) -> None:
        """Create a group ahead of its consumers, or change its key patterns.

        Args:
            group: The group; None: ``default``.
            keys: Its key patterns from now on. None: its current ones; for a new group, every key.
        """
        name, patterns = self._group(group), self._patterns(keys)
        await self._calls.call(lambda session: session.declare(name, patterns, change=True), groups=False)

    async def delete_group(self, group: str | None = None) -> None:
        """Delete a group with its messages and dead letters. A no-op if it does not exist."""
        name = self._group(group)
        await self._calls.call(lambda session: session.transport.delete_group(name), groups=False)

    async def delete_namespace(self) -> None:
        """Delete everything that the namespace has in the broker: groups, messages, dead letters. A no-op if there is nothing."""
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
        """Return a publication for middleware, with a dict as payload."""
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
