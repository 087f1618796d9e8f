"""`AsyncLoopConsumer`: runs a handler for each message of a group."""

import asyncio
from collections.abc import Coroutine, Generator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.consumer import EventConsumer
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.middleware import Middleware, check_middleware, completed
from abe.backends.message_queue.base.names import (
    DEFAULT_GROUP,
    check_count,
    check_group,
    check_patterns,
    check_seconds,
)
from abe.backends.message_queue.base.protocol import MessageQueueBackend
from abe.backends.message_queue.base.subscription import Subscription
from abe.backends.message_queue.failures import Failures
from abe.backends.message_queue.handler import AnyHandler, CheckedHandler, Handle
from abe.backends.message_queue.look_ahead import LookAhead
from abe.backends.message_queue.minimal import MinimalBackend, full
from abe.backends.message_queue.report import reason_of, shown
from abe.backends.message_queue.retry import RetryPolicy
from abe.backends.message_queue.threads import Threads
from abe.backends.message_queue.time_limit import TimeLimit
from abe.backends.message_queue.worker import WORKS_FOR, Workers
from abe.errors import AbeError, BackendClosedError, ConfigurationError, UnsupportedCapabilityError
from abe.settings import QueueSettings
from abe.types import MessageQueueBackendProtocol

_log: Final = Log("abe.consumer")
_RECONNECT: Final = ExponentialBackoff(initial=0.1, maximum=10.0)
_PREFETCH: Final = 4
"""Prefetched messages per worker: enough to keep the workers busy while one batch travels and another is confirmed."""


class Started:
    """Set once a consumer has subscribed: every publish that starts after that reaches its group. Awaiting it calls `wait`."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._error: BaseException | None = None

    def is_set(self) -> bool:
        """Whether it has subscribed."""
        return self._event.is_set() and self._error is None

    async def wait(self) -> None:
        """Wait until it has subscribed.

        Raises:
            BackendClosedError: The consumer was shut down or cancelled first.
            AbeError: `run` failed first, with this error.
        """
        await self._event.wait()
        if self._error is not None:
            raise self._error

    def __await__(self) -> Generator[Any, Any, None]:
        return self.wait().__await__()

    def _set(self, error: BaseException | None = None) -> None:
        if not self._event.is_set():
            self._error = error
            self._event.set()


class _Run:
    """The state of one call of `run`. It exists from the call on, so `shutdown` works before the task's first step."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.ended = asyncio.Event()
        self.started = Started()
        self.begun = False


class AsyncLoopConsumer:
    """Runs a handler over a group's messages, with a fixed set of workers.

    A message is acknowledged after its handler returned, and never before. Any exception of a handler, ``SystemExit`` included, is logged,
    and its message is retried after the policy's backoff or becomes a dead letter; other messages are not affected. Three things end the
    consumer: ``KeyboardInterrupt``, after its message is settled; an exception that the application's signal handler raises while a message
    handler runs, after the message is given back; and a fatal error of the backend (credentials, configuration), which `run` logs and
    raises. Each message has its own context: what a handler sets in a ContextVar ends with the message.

    With a backend that has only the protocol's three methods, it handles one message at a time, without retries, and logs a warning.

    To add behaviour around the handler, pass middleware, or override `handle`.

    Args:
        backend: Where messages come from.
        group: The group to consume; None: ``default``.
        concurrency: Messages handled at once.
        retry: How failed messages are retried; None: the backend's number of attempts, with exponential backoff.
        timeout: Seconds that a handler may take; then it is cancelled, and the message fails. A synchronous handler's thread cannot be
            stopped: the message fails, and one thread fewer is available until it returns. With none left, the consumer unsubscribes.
        grace: Seconds that handlers get to finish in `shutdown`.
        ordered_by_key: Handle messages of one key one after the other, in the order received, and different keys concurrently. The
            successors of a message that is retried overtake it. While messages of a busy key fill the prefetch, it grows, up to about
            1,000 messages in all, so that other keys are handled.
        middleware: Wraps the handler, the first outermost.
        keys: The key patterns that the group wants; None: see ``consume``.
        prefetch: Messages in flight at most; None: four times the concurrency.
        handler: The handler for `run` when it is called without one.

    Raises:
        ConfigurationError: An argument is out of range, or the handler has a wrong signature.
    """

    def __init__(
        self,
        backend: MessageQueueBackend,
        group: str | None = None,
        *,
        concurrency: int = 1,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        grace: float = 25.0,
        ordered_by_key: bool = False,
        middleware: Sequence[Middleware] = (),
        keys: Sequence[str] | None = None,
        prefetch: int | None = None,
        handler: AnyHandler | None = None,
    ) -> None:
        _check_backend(backend)
        check_count("concurrency", concurrency)
        if prefetch is not None:
            check_count("prefetch", prefetch)
        if retry is not None and not isinstance(retry, RetryPolicy):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"retry must be a RetryPolicy, not {retry!r}")
        check_seconds("timeout", timeout)
        check_seconds("grace", grace, zero=True)
        self._backend = full(backend)
        self._group = group
        self._concurrency = concurrency
        self._policy = retry or RetryPolicy()
        self._timeout = timeout
        self._grace = grace
        self._ordered = ordered_by_key
        self._middleware = check_middleware(middleware)
        self._keys = keys
        self._prefetch = _PREFETCH * concurrency if prefetch is None else prefetch
        self._handler = None if handler is None else CheckedHandler(handler)
        self._latest = _Run()
        self._exited = False
        self._minimal = isinstance(self._backend, MinimalBackend)
        if not self._minimal:
            check_group(group)
            self._keys = None if keys is None else check_patterns(keys)
        elif retry or concurrency > 1 or ordered_by_key or keys is not None or prefetch is not None:
            raise UnsupportedCapabilityError(
                f"{backend.__class__.__name__} has only the three methods of the protocol: "
                "retry, concurrency, ordered_by_key, keys and prefetch need more"
            )

    async def handle(self, message: Message, handler: Handle) -> None:
        """Handle one message; override it to wrap every handler call.

        Returning means success, an exception means failure. An override may settle the message itself (``ack``, ``nack``, ``reject``): the
        first settlement wins.

        Args:
            message: The message.
            handler: The application's handler, made async, within its time limit.
        """
        await handler(message)

    @property
    def started(self) -> Started:
        """Await it to wait for the subscription: ``await consumer.started``. It raises the error of a `run` that failed before that."""
        return self._latest.started

    def run(self, handler: AnyHandler | None = None) -> Coroutine[Any, Any, None]:
        """Handle messages until cancelled, or until `shutdown` is done.

        While the broker is unreachable, it retries with backoff. Any other error ends it: it is logged, and raised.

        Args:
            handler: The handler; None: the constructor's.

        Raises:
            ConfigurationError: The handler has a wrong signature (logged at the call), or the broker refuses the configuration.
            AbeError: Another error that a retry does not help.
        """
        # Not an async function: a `shutdown` that comes before the task's first step must stop this run too.
        if self._latest.ended.is_set() or (self._latest.stopping.is_set() and not self._latest.begun):
            self._latest = _Run()
        try:
            checked = self._checked(handler)
        except ConfigurationError as exc:
            _log.error("the consumer of group %r cannot run: %s", self._group or DEFAULT_GROUP, exc)
            return self._refused(self._latest, exc)
        return self._run(self._latest, checked)

    async def shutdown(self) -> None:
        """Stop taking messages, let running handlers finish within the grace period, acknowledge, and return when `run` has ended.

        Handlers that are not finished by then are cancelled, and their messages given back. Called from a handler, or from a task that it
        started, it returns at once, as the handler has to finish first.
        """
        run = self._latest
        run.stopping.set()
        if not run.begun:
            run.started._set(BackendClosedError("the consumer was shut down before it had subscribed"))  # pyright: ignore[reportPrivateUsage]
        elif WORKS_FOR.get() is not run:
            await run.ended.wait()

    async def __aenter__(self) -> Self:
        self._exited = False
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exited = True
        await self.shutdown()

    def _checked(self, handler: AnyHandler | None) -> CheckedHandler:
        if handler is not None:
            return CheckedHandler(handler)
        if self._handler is None:
            raise ConfigurationError("there is no handler: give one to run(), or to the constructor")
        return self._handler

    async def _refused(self, run: _Run, error: ConfigurationError) -> None:
        if not run.begun:
            run.started._set(error)  # pyright: ignore[reportPrivateUsage]
            run.ended.set()
        raise error

    async def _run(self, run: _Run, handler: CheckedHandler) -> None:
        if run.begun:
            raise RuntimeError("this consumer is already running: make a second one to run two")
        if self._exited or run.stopping.is_set():
            # `shutdown`, or the end of the `async with` block, came before this task's first step.
            run.started._set(BackendClosedError("the consumer was shut down before it had subscribed"))  # pyright: ignore[reportPrivateUsage]
            run.ended.set()
            return
        run.begun = True
        error: BaseException = BackendClosedError("the consumer ended before it had subscribed")
        try:
            await self._consume(run, handler)
        except Exception as exc:
            error = exc
            template = "the consumer of group %r has ended: %s"
            _log.error(template, self._group or DEFAULT_GROUP, reason_of(exc), exc_info=shown(exc)[0])
            raise
        finally:
            run.started._set(error)  # pyright: ignore[reportPrivateUsage]
            run.ended.set()

    async def _consume(self, run: _Run, handler: CheckedHandler) -> None:
        limit = None if self._timeout is None else TimeLimit(self._timeout)
        threads = Threads(self._concurrency, self._group or DEFAULT_GROUP) if handler.in_thread else None
        call = self._wrapped(handler.bound(threads, limit))
        stopping = asyncio.create_task(run.stopping.wait())
        try:
            while (subscription := await self._subscribe(stopping, again=run.started.is_set())) is not None:
                run.started._set()  # pyright: ignore[reportPrivateUsage]
                await self._work(run, subscription, call, threads, stopping)
                if threads is None or not threads.exhausted:
                    return
                # The subscription is closed meanwhile, so that other consumers get its messages.
                waiting = asyncio.create_task(threads.available())
                try:
                    await asyncio.wait([stopping, waiting], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    waiting.cancel()
        finally:
            stopping.cancel()
            if limit is not None:
                limit.close()
            if threads is not None:
                threads.close()

    def _wrapped(self, limited: Handle) -> Handle:
        overridden = type(self).handle is not AsyncLoopConsumer.handle
        if not overridden and not self._middleware:
            return limited  # the workers check what it returns
        call: Handle = partial(completed, limited, "the handler")
        if overridden:
            call = partial(completed, partial(self.handle, handler=call), f"{type(self).__name__}.handle()")
        for layer in reversed(self._middleware):
            call = partial(completed, partial(layer.handle, forward=call), f"{type(layer).__name__}.handle()")
        return call

    async def _work(
        self,
        run: _Run,
        subscription: Subscription,
        call: Handle,
        threads: Threads | None,
        stopping: "asyncio.Task[Any]",
    ) -> None:
        group = self._group or DEFAULT_GROUP
        failures = Failures(self._policy, self._max_attempts, self._max_delay, stopping)
        source: Subscription | LookAhead = subscription
        if self._ordered:
            source = LookAhead(subscription, self._prefetch, self._another, group)
        workers = Workers(
            source,
            call,
            failures,
            threads,
            concurrency=self._concurrency,
            run=run,
            stop_taking=run.stopping,
        )
        _log.info("consuming group %r, %d messages at once", group, self._concurrency)
        try:
            await workers.run(stopping, self._grace)
        finally:
            await source.aclose()
            await failures.close()
            _log.info("stopped consuming group %r", group)

    @property
    def _max_attempts(self) -> int:
        settings = getattr(self._backend, "settings", None)
        default = settings.max_attempts if isinstance(settings, QueueSettings) else QueueSettings().max_attempts
        return self._policy.max_attempts or default

    @property
    def _max_delay(self) -> float:
        return self._backend.capabilities.max_delay or 0.0

    def _subscription(self, prefetch: int, keys: Sequence[str] | None) -> Subscription:
        return self._backend.consume(group=self._group, keys=keys, prefetch=prefetch, max_attempts=self._max_attempts)

    async def _entered(self, prefetch: int, keys: Sequence[str] | None) -> Subscription:
        subscription = self._subscription(prefetch, keys)
        try:
            await subscription.__aenter__()
        except BaseException:
            await subscription.aclose()
            raise
        return subscription

    async def _another(self, prefetch: int) -> Subscription:
        """Subscribe again. The group's patterns may have been changed meanwhile: that does not end a consumer."""
        try:
            return await self._entered(prefetch, self._keys)
        except ConfigurationError:
            if self._keys is None:
                raise
            return await self._entered(prefetch, None)

    async def _subscribe(self, stopping: "asyncio.Task[Any]", *, again: bool) -> Subscription | None:
        """Subscribe, retrying while the broker is unreachable; None when `shutdown` came first."""
        if self._minimal:
            _log.warning(
                "%s has only the three methods of the protocol: messages are handled one at a time, and failed ones are "
                "logged, not retried",
                self._backend.__class__.__name__,
            )
            return None if stopping.done() else self._backend.consume(group=self._group)
        tries, keys = 0, self._keys
        while not stopping.done():
            subscription = self._subscription(self._prefetch, keys)
            entering = asyncio.create_task(subscription.__aenter__())
            entered: Subscription | None = None
            try:
                await asyncio.wait([entering, stopping], return_when=asyncio.FIRST_COMPLETED)
                if entering.done():
                    entered = entering.result()
                    return entered
            except AbeError as exc:
                if again and keys is not None and isinstance(exc, ConfigurationError):
                    keys = None  # the group's patterns may have been changed meanwhile: see `_another`
                    continue
                if not exc.retryable:
                    raise
                tries += 1
                _log.warning("subscribing to group %r failed, retrying: %s", self._group or DEFAULT_GROUP, exc)
                await asyncio.wait([stopping], timeout=_RECONNECT(tries))
            finally:
                if entered is None:  # also when this task was cancelled in the loop turn in which `entering` ended
                    entering.cancel()
                    await subscription.aclose()
                    await asyncio.gather(entering, return_exceptions=True)  # retrieves its exception
        return None


def _check_backend(backend: object) -> None:
    if isinstance(backend, type):
        raise ConfigurationError(f"{backend.__name__} is a class: give an instance of it, as load_backend() returns")
    if not isinstance(backend, MessageQueueBackendProtocol):
        raise ConfigurationError(
            f"a consumer needs a backend, as load_backend() returns, not {type(backend).__name__}: an address belongs in its settings"
        )


if TYPE_CHECKING:
    _: type[EventConsumer] = AsyncLoopConsumer
