"""A backend that records published messages, and delivers the messages that a test feeds it."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from abe.backends.message_queue.base.clock import Clock
from abe.backends.message_queue.base.middleware import Middleware, Publication, PublishNext, check_middleware, completed
from abe.backends.message_queue.base.names import check_patterns, check_seconds, matches
from abe.backends.message_queue.base.protocol import MessageQueueBackend
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.codec import Codec, check_codec
from abe.errors import AbeError
from abe.settings import QueueSettings
from abe.testing.memory import fresh_namespace
from abe.types import MessageQueuePayload, Publishable


class _Recorder(Middleware):
    """The innermost middleware: records each message instead of passing it to the broker."""

    def __init__(self) -> None:
        self.layers: Sequence[Middleware] = ()
        self.record: PublishNext

    async def publish(self, publication: Publication, forward: PublishNext) -> None:
        send = self.record
        for layer in reversed(self.layers):
            send = partial(completed, partial(layer.publish, forward=send), f"{type(layer).__name__}.publish()")
        await send(publication)


class _Exchangeable:
    """A codec that delegates to a replaceable one."""

    def __init__(self, codec: Codec | None) -> None:
        self.codec = check_codec(codec)

    def encode(self, payload: Any) -> bytes:
        return self.codec.encode(payload)

    def decode(self, body: bytes) -> MessageQueuePayload:
        return self.codec.decode(body)


class RecordingBackend(MemoryBackend):
    """Records the messages that the code under test publishes, and delivers none of them; consumers get the messages that the test feeds.

    Otherwise it is a memory backend in a unique namespace: it checks payloads, keys and headers as every backend does, and
    every kind of consumer runs on it, with retries and dead letters.

    Args:
        codec: Encodes and decodes payloads.
        middleware: Wraps each publish, the first outermost. The publication that it forwards is recorded.
        clock: The clock of leases, delays and backoffs; None: real time.
    """

    def __init__(
        self, *, codec: Codec | None = None, middleware: Sequence[Middleware] = (), clock: Clock | None = None
    ) -> None:
        self._exchangeable, self._recorder = _Exchangeable(codec), _Recorder()
        super().__init__(
            QueueSettings(namespace=fresh_namespace()),
            codec=self._exchangeable,
            middleware=[*check_middleware(middleware), self._recorder],
            clock=clock,
        )
        self._recorder.record = self._record
        self.published: list[Publication] = []
        """The published messages, the earliest first. Payloads are copies, as a consumer would get them."""
        self._errors: deque[AbeError] = deque()

    @classmethod
    def from_env(
        cls,
        *,
        codec: Codec | None = None,
        middleware: Sequence[Middleware] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Make an instance; the environment is ignored."""
        return cls(codec=codec, middleware=middleware)

    def loaded(self, *, codec: Codec | None = None, middleware: Sequence[Middleware] = ()) -> Self:
        """Return this instance, with the codec and middleware that the application now gave `load_backend`."""
        self._exchangeable.codec = check_codec(codec or self._exchangeable.codec)
        self._recorder.layers = check_middleware(middleware)
        return self

    async def _record(self, publication: Publication) -> None:
        self._calls.here()
        p = publication
        envelope = self._envelope(p.key, p.payload, p.headers, p.id, p.delay, p.group)
        check_seconds("timeout", p.timeout)
        if self._errors:
            raise self._errors.popleft()
        copy = self._exchangeable.decode(envelope.body)
        self.published.append(
            replace(
                p, payload=copy, headers=envelope.headers, id=envelope.id, delay=envelope.delay, group=envelope.group
            )
        )

    def fail_next(self, *errors: AbeError) -> None:
        """Make the next publishes raise these errors, one each, and record nothing."""
        self._errors.extend(errors)

    async def feed(
        self, key: str, payload: Publishable, *, headers: Mapping[str, str] | None = None, id: str | None = None
    ) -> None:
        """Deliver a message to each group; if there is no group yet, to the first one."""
        await self._forward(Publication(key, self._copy(payload), headers, id))

    def payloads(self, key: str = "#") -> list[MessageQueuePayload]:
        """Return the payloads published with `key`, a key or a key pattern; by default all."""
        check_patterns([key])
        return [publication.payload for publication in self.published if matches(key, publication.key)]

    def assert_published(
        self,
        key: str,
        payload: Publishable | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        times: int | None = None,
    ) -> Publication:
        """Assert that such a message was published, and return the latest.

        Args:
            key: Its key, or a key pattern.
            payload: Its whole payload, as given to `publish`; None: any.
            headers: Headers that it must have; it may have more.
            times: The exact number of such messages; None: at least one.

        Raises:
            AssertionError: The number is different; the text lists the published messages.
        """
        check_patterns([key])
        wanted = dict(headers or {})
        expected_payload = None if payload is None else self._copy(payload)
        found = [
            publication
            for publication in self.published
            if matches(key, publication.key)
            and (payload is None or publication.payload == expected_payload)
            and wanted.items() <= dict(publication.headers or {}).items()
        ]
        if times == 0:
            raise ValueError("to assert that nothing was published, call assert_not_published")
        if not found or times not in (None, len(found)):
            what = _describe(key, expected_payload, headers)
            expected = "at least once" if times is None else f"{times} times"
            raise AssertionError(
                f"{what} should have been published {expected}, and was {len(found)} times.\n{self._list()}"
            )
        return found[-1]

    def assert_not_published(self, key: str = "#") -> None:
        """Assert that nothing was published with `key`, a key or a key pattern; by default, nothing at all.

        Raises:
            AssertionError: Something was; the text lists the published messages.
        """
        if self.payloads(key):
            what = "nothing" if key == "#" else f"nothing with the key {key!r}"
            raise AssertionError(f"{what} should have been published.\n{self._list()}")

    def _copy(self, payload: Publishable) -> MessageQueuePayload:
        """Return a payload as a consumer would get it."""
        return self._exchangeable.decode(self._exchangeable.encode(payload))

    def _list(self) -> str:
        if not self.published:
            return "Published: nothing."
        lines = (f"  {_describe(item.key, item.payload, item.headers)}" for item in self.published)
        return "\n".join(("Published:", *lines))


def _describe(key: str, payload: MessageQueuePayload | None, headers: Mapping[str, str] | None) -> str:
    parts: list[Any] = [repr(key)]
    if payload is not None:
        parts.append(payload)
    if headers:
        parts.append(f"headers={dict(headers)}")
    return " ".join(map(str, parts))


if TYPE_CHECKING:
    _: type[MessageQueueBackend] = RecordingBackend
