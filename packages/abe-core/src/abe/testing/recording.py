"""A backend that records what is published, and delivers what a test feeds it."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from abe.backends.message_queue.base.clock import Clock
from abe.backends.message_queue.base.middleware import Middleware, Publication
from abe.backends.message_queue.base.names import matches
from abe.backends.message_queue.base.protocol import MessageQueueBackend
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.codec import Codec
from abe.errors import AbeError, PartialPublishError
from abe.settings import QueueSettings
from abe.testing.memory import fresh_namespace
from abe.types import MessageQueuePayload


class RecordingBackend(MemoryBackend):
    """Records what the code under test publishes, and delivers none of it; consumers get what the test feeds.

    Apart from that it is a memory backend on a namespace of its own: payloads, keys and headers are checked as every
    backend checks them, and consumers of every kind run on it, retries and dead letters included.

    Args:
        codec: Payload to bytes and back.
        middleware: Wraps each publish, the first outermost.
        clock: What leases, delays and backoffs are measured by; None: real time.
    """

    def __init__(
        self, *, codec: Codec | None = None, middleware: Sequence[Middleware] = (), clock: Clock | None = None
    ) -> None:
        super().__init__(QueueSettings(namespace=fresh_namespace()), codec=codec, middleware=middleware, clock=clock)
        self.published: list[Publication] = []
        """What was published, the earliest first. Payloads are copies, as they would have been sent."""
        self._errors: deque[AbeError] = deque()

    @classmethod
    def from_env(
        cls,
        *,
        codec: Codec | None = None,
        middleware: Sequence[Middleware] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Make an instance; the environment has no say."""
        return cls(codec=codec, middleware=middleware)

    async def publish(
        self,
        key: str,
        payload: MessageQueuePayload,
        *,
        headers: Mapping[str, str] | None = None,
        id: str | None = None,
        delay: float | None = None,
        mandatory: bool = False,
        group: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Check the message as every backend does, and record it; see `TransportBackend.publish`."""
        self._here()
        envelope = self._envelope(key, payload, headers, id, delay, group)
        if self._errors:
            raise self._errors.popleft()
        copy = self._codec.decode(envelope.body)
        self.published.append(
            Publication(key, copy, envelope.headers, envelope.id, envelope.delay, mandatory, envelope.group, timeout)
        )

    async def publish_many(self, items: Iterable[Publication | tuple[str, MessageQueuePayload]]) -> None:
        """Check and record messages; see `TransportBackend.publish_many`."""
        publications = [item if isinstance(item, Publication) else Publication(*item) for item in items]
        for p in publications:
            self._envelope(p.key, p.payload, p.headers, p.id, p.delay, p.group)
        failures: list[tuple[int, AbeError]] = []
        for index, p in enumerate(publications):
            try:
                await self.publish(
                    p.key,
                    p.payload,
                    headers=p.headers,
                    id=p.id,
                    delay=p.delay or None,
                    mandatory=p.mandatory,
                    group=p.group,
                    timeout=p.timeout,
                )
            except AbeError as exc:
                failures.append((index, exc))
        if failures:
            raise PartialPublishError(failures, len(publications))

    def fail_next(self, *errors: AbeError) -> None:
        """Let the next publishes raise these errors, one each, and record nothing."""
        self._errors.extend(errors)

    async def feed(
        self, key: str, payload: MessageQueuePayload, *, headers: Mapping[str, str] | None = None, id: str | None = None
    ) -> None:
        """Give each group a copy of a message; while there is no group, the first one to come gets it."""
        await super().publish(key, payload, headers=headers, id=id)

    def payloads(self, key: str = "#") -> list[MessageQueuePayload]:
        """Return what was published under `key`, a key or a key pattern; everything, when left out."""
        return [publication.payload for publication in self.published if matches(key, publication.key)]

    def assert_published(
        self,
        key: str,
        payload: MessageQueuePayload | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        times: int | None = None,
    ) -> Publication:
        """Assert that such a message was published, and return the latest.

        Args:
            key: Its key, or a key pattern.
            payload: All of its payload; None: any.
            headers: Headers that it must have; it may have more.
            times: How many there must be; None: at least one.

        Raises:
            AssertionError: There is none, or not that many; the text shows what there is.
        """
        wanted = dict(headers or {})
        found = [
            publication
            for publication in self.published
            if matches(key, publication.key)
            and (payload is None or publication.payload == payload)
            and wanted.items() <= dict(publication.headers or {}).items()
        ]
        if times == 0:
            raise ValueError("to assert that nothing was published, call assert_not_published")
        if not found or times not in (None, len(found)):
            what = _describe(key, payload, headers)
            expected = "at least once" if times is None else f"{times} times"
            raise AssertionError(
                f"{what} should have been published {expected}, and was {len(found)} times.\n{self._list()}"
            )
        return found[-1]

    def assert_not_published(self, key: str = "#") -> None:
        """Assert that nothing was published under `key`, a key or a key pattern; nothing at all, when left out.

        Raises:
            AssertionError: Something was; the text shows it.
        """
        if self.payloads(key):
            what = "nothing" if key == "#" else f"nothing with the key {key!r}"
            raise AssertionError(f"{what} should have been published.\n{self._list()}")

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
