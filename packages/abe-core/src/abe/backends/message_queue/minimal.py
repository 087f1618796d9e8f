"""Wraps a provider that has only the three methods of the protocol as a full backend.

Such a provider takes one kind of settlement: the request for the next message. Every other method of a full backend raises
`UnsupportedCapabilityError`, unless the provider has a method of that name.
"""

import asyncio
import inspect
import sys
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, cast

from abe.backends.message_queue.base.capabilities import Capabilities, Durability
from abe.backends.message_queue.base.groups import GroupStats
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.middleware import Publication
from abe.backends.message_queue.base.names import check_seconds
from abe.backends.message_queue.base.protocol import DeadLetterBox, FullBackend, MessageQueueBackend
from abe.codec import JSONCodec
from abe.errors import (
    AbeError,
    BackendClosedError,
    BackendConnectionError,
    ConfigurationError,
    PartialPublishError,
    PublishUnknownError,
    UnsupportedCapabilityError,
)  # fmt: skip
from abe.types import Publishable

_log: Final = Log("abe.consumer")
_CLOSING: Final = 5.0
"""Seconds for a provider to close its iterator."""


def full(backend: MessageQueueBackend) -> FullBackend:
    """Return the backend if it is a full one, else a `MinimalBackend` around it."""
    return backend if isinstance(backend, FullBackend) else MinimalBackend(backend)


class MinimalBackend:
    """A full backend around a provider that has only ``publish``, ``consume`` and ``from_env``.

    ``isinstance`` takes it for an object of the provider's class, and it has the provider's other attributes.

    Args:
        provider: The provider's backend.
    """

    capabilities: Capabilities = Capabilities(
        groups=True,
        key_patterns=False,
        ordered=False,
        ordered_per_key=False,
        spurious_duplicates=True,
        dead_letter=False,
        max_delay=None,
        lease=None,
        redelivery_bound=None,
        silence_bound=None,
        publish_dedup=None,
        max_payload_bytes=sys.maxsize,
        durability=Durability.NONE,
    )
    """The promises of the protocol alone. The provider's real `max_payload_bytes` is unknown."""

    unroutable: int = 0

    def __init__(self, provider: MessageQueueBackend) -> None:
        self._provider = provider

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._provider)

    def __getattr__(self, name: str) -> Any:
        if name == "_provider":  # while it is being copied
            raise AttributeError(name)
        return getattr(self._provider, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_provider":
            super().__setattr__(name, value)
        else:
            setattr(self._provider, name, value)

    def __repr__(self) -> str:
        return f"<MinimalBackend around {self._provider!r}>"

    @classmethod
    def from_env(cls) -> Self:
        """Raise `ConfigurationError`: `load_backend` makes one."""
        raise ConfigurationError("a MinimalBackend wraps a provider's backend: use load_backend()")

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
        """Publish with the provider.

        Args:
            key: The message's key.
            payload: A JSON object, or an object that is encoded as one.
            headers: Passed on where the provider's method has such a parameter, as are `id`, `delay`, `mandatory` and `group`.
            timeout: Seconds within which it returns or raises; None: no limit besides the provider's own.

        Raises:
            UnsupportedCapabilityError: An argument was given that the provider's method does not have.
            PublishUnknownError: The provider took longer than `timeout`.
        """
        options = self._options(
            self._provider.publish,
            {"headers": headers, "id": id, "delay": delay or None, "mandatory": mandatory or None, "group": group},
        )
        check_seconds("timeout", timeout)
        plain = payload if isinstance(payload, dict) else _plain(payload)
        bound = asyncio.timeout(timeout)
        try:
            async with bound:
                await self._provider.publish(key, plain, **options)
        except TimeoutError:
            if not bound.expired():
                raise
            raise PublishUnknownError(f"{self._name} did not confirm the message within {timeout:g} s") from None

    async def publish_many(self, items: Iterable[Publication | tuple[str, Publishable]]) -> None:
        """Publish messages, one after the other.

        Raises:
            PartialPublishError: Some were not published; it lists them with their errors. The others were.
        """
        publications = [
            item if isinstance(item, Publication) else Publication(item[0], cast("dict[str, Any]", item[1]))
            for item in items
        ]
        failures: list[tuple[int, AbeError]] = []
        for index, item in enumerate(publications):
            options: dict[str, Any] = {"headers": item.headers, "id": item.id, "delay": item.delay, "group": item.group}
            try:
                await self.publish(item.key, item.payload, mandatory=item.mandatory, timeout=item.timeout, **options)
            except AbeError as exc:
                failures.append((index, exc))
            except Exception as exc:  # noqa: BLE001 - the others are published all the same, and the error lists those that were not
                error = PublishUnknownError(f"{self._name} failed: {exc!r}")
                error.__cause__ = exc
                failures.append((index, error))
        if failures:
            raise PartialPublishError(failures, len(publications))

    def consume(
        self,
        *,
        group: str | None = None,
        keys: Sequence[str] | None = None,
        prefetch: int | None = None,
        max_attempts: int | None = None,
    ) -> "MinimalSubscription":
        """Return the messages of a group, one at a time.

        Args:
            group: The group; None: the provider's own default.
            keys: Passed on where the provider's method has such a parameter, as are `prefetch` and `max_attempts`.

        Raises:
            UnsupportedCapabilityError: An argument was given that the provider's method does not have.
        """
        options = self._options(
            self._provider.consume, {"keys": keys, "prefetch": prefetch, "max_attempts": max_attempts}
        )
        return MinimalSubscription(self._provider.consume(group=group, **options))

    async def connect(self) -> None:
        """Connect, if the provider has such a method."""
        await self._if_any("connect")

    async def disconnect(self) -> None:
        """Disconnect, if the provider has such a method."""
        await self._if_any("disconnect")

    async def __aenter__(self) -> Self:
        if hasattr(type(self._provider), "__aenter__"):
            await cast("Any", self._provider).__aenter__()
        else:
            await self.connect()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if hasattr(type(self._provider), "__aexit__"):
            await cast("Any", self._provider).__aexit__(exc_type, exc, traceback)
        else:
            await self.disconnect()

    async def ping(self) -> None:
        """Check that the broker answers."""
        await self._own("ping")()

    async def declare(self, group: str | None = None, keys: Sequence[str] | None = None) -> None:
        """Create a group."""
        await self._own("declare")(group, keys)

    async def delete_group(self, group: str | None = None) -> None:
        """Delete a group."""
        await self._own("delete_group")(group)

    async def delete_namespace(self) -> None:
        """Delete everything that the namespace has in the broker."""
        await self._own("delete_namespace")()

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Return the groups that exist, each with its key patterns."""
        return cast("Mapping[str, tuple[str, ...]]", await self._own("groups")())

    async def stats(self, group: str | None = None) -> GroupStats:
        """Count a group's messages."""
        return cast("GroupStats", await self._own("stats")(group))

    def dead_letters(self, group: str | None = None) -> DeadLetterBox:
        """Return the dead letters of a group."""
        return cast("DeadLetterBox", self._own("dead_letters")(group))

    @property
    def _name(self) -> str:
        return type(self._provider).__name__

    def _options(self, method: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that were given, if the provider's method takes all of them."""
        options = {name: value for name, value in given.items() if value is not None}
        if options:
            parameters = inspect.signature(method).parameters
            any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
            for name in options:
                if not any_name and name not in parameters:
                    self._unsupported(f"{method.__name__}({name}=...)")
        return options

    def _own(self, method: str) -> Any:
        own = getattr(self._provider, method, None)
        return own if callable(own) else self._unsupported(f"{method}()")

    async def _if_any(self, method: str) -> None:
        own: Any = getattr(self._provider, method, None)
        if callable(own) and inspect.isawaitable(done := own()):
            await done

    def _unsupported(self, what: str) -> NoReturn:
        raise UnsupportedCapabilityError(f"{self._name} has only the three methods of the protocol: {what} needs more")


class PlainMessage(Message):
    """A message of a provider that takes no settlement, except by the request for the next message."""

    __slots__ = ()

    async def ack(self) -> None:
        """Do nothing: the request for the next message acknowledges it."""

    async def nack(self, delay: float | None = None, *, reason: str = "", error: str = "") -> None:
        """Raise `UnsupportedCapabilityError`."""
        raise UnsupportedCapabilityError("this provider cannot take a message back")

    async def reject(self, reason: str = "rejected", *, error: str = "") -> None:
        """Raise `UnsupportedCapabilityError`."""
        raise UnsupportedCapabilityError("this provider keeps no dead letters")

    async def extend(self, seconds: float) -> None:
        """Raise `UnsupportedCapabilityError`."""
        raise UnsupportedCapabilityError("this provider has no leases")


class MinimalSubscription:
    """One message at a time from an async iterator.

    Args:
        messages: The result of the provider's `consume`.

    Raises:
        ConfigurationError: It is not an async iterator.
    """

    def __init__(self, messages: AsyncIterable[dict[str, Any]]) -> None:
        given: Any = messages
        if not isinstance(given, AsyncIterable):
            if asyncio.iscoroutine(given):
                given.close()
            raise ConfigurationError(
                f"the provider's consume() must return an async iterator, not a {type(given).__name__}: write it as an async generator"
            )
        self._iterator: AsyncIterator[dict[str, Any]] = aiter(messages)
        self._asking: asyncio.Future[dict[str, Any]] | None = None
        self._asked: list[asyncio.Future[dict[str, Any]]] = []  # the same, for the finalizer
        # A subscription that is dropped after a cancelled wait must not leave a task behind that takes a message.
        weakref.finalize(self, _cancel_soon, self._asked).atexit = False
        self._waiting = False
        self._stopped = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        try:
            return await self.receive()
        except BackendClosedError:
            raise StopAsyncIteration from None

    def take(self) -> Message | None:
        """Return None: messages are never buffered."""
        return None

    async def receive(self) -> Message:
        """Wait for the iterator's next message."""
        if self._stopped:
            raise BackendClosedError("the subscription was closed")
        if self._waiting:
            raise RuntimeError("this subscription is being asked for its next message already: it has one at a time")
        if self._asking is None:
            self._asking = asyncio.ensure_future(anext(self._iterator))
            self._asked[:] = [self._asking]
        asking, self._waiting = self._asking, True
        try:
            await asyncio.wait([asking])
        finally:
            self._waiting = False
        self._asking = None
        self._asked.clear()
        if asking.cancelled() and not self._stopped:
            raise BackendConnectionError("the provider's own wait for a message was cancelled")
        if asking.cancelled():
            raise BackendClosedError("the subscription was closed")
        try:
            message = asking.result()
        except StopAsyncIteration:
            raise BackendClosedError("the provider has no more messages") from None
        # A provider's own subclass of dict is passed on unchanged.
        return PlainMessage(message) if type(message) is dict else cast("Message", message)

    def ack_soon(self, message: Message) -> None:
        """Do nothing: the request for the next message acknowledges it."""

    async def release(self, message: Message) -> None:
        """Do nothing: the provider cannot take a message back."""

    async def halt(self) -> None:
        """Stop receiving."""
        await self.stop()

    async def stop(self) -> None:
        """End the wait for a message."""
        self._stopped = True
        if (asking := self._asking) is not None:
            asking.cancel()
            await asyncio.wait([asking], timeout=_CLOSING)

    async def aclose(self) -> None:
        """Close the iterator, if it has an `aclose`."""
        await self.stop()
        if self._asking is not None and not self._asking.done():
            _log.warning("the provider ignored the cancellation of its wait for a message, and is abandoned")
            return
        if (close := getattr(self._iterator, "aclose", None)) is not None:
            try:
                async with asyncio.timeout(_CLOSING):
                    await close()
            except TimeoutError:
                _log.warning("the provider did not close its iterator within %g s", _CLOSING)


def _cancel_soon(asked: "Sequence[asyncio.Future[Any]]") -> None:
    for asking in asked:
        with suppress(RuntimeError):  # its event loop is closed
            asking.get_loop().call_soon_threadsafe(asking.cancel)


def _plain(payload: Publishable) -> dict[str, Any]:
    return JSONCodec().decode(JSONCodec().encode(cast("dict[str, Any]", payload)))


if TYPE_CHECKING:
    _: type[FullBackend] = MinimalBackend
