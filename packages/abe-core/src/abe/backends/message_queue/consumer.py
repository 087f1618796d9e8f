"""`AsyncLoopConsumer`: runs a handler for each message of a group."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from traceback import format_exception
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, cast

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.consumer import EventConsumer
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.middleware import Middleware
from abe.backends.message_queue.base.names import DEFAULT_GROUP, check_count, check_seconds
from abe.backends.message_queue.base.protocol import FullBackend, MessageQueueBackend
from abe.backends.message_queue.base.subscription import Subscription
from abe.backends.message_queue.handler import Handle, adapt
from abe.backends.message_queue.minimal import MinimalSubscription
from abe.backends.message_queue.retry import Reject, Retry, RetryPolicy
from abe.backends.message_queue.time_limit import TimeLimit
from abe.errors import (
    AbeError,
    AlreadySettledError,
    BackendClosedError,
    ConfigurationError,
    DecodeError,
    UnsupportedCapabilityError,
)
from abe.types import EventHandlerFunc, EventHandlerProtocol, MessageQueueMessage

_log: Final = logging.getLogger("abe.consumer")
_RECONNECT: Final = ExponentialBackoff(initial=0.1, maximum=10.0)
_PREFETCH: Final = 4
"""Messages held for each that is handled at once: while one batch travels and another is confirmed, the workers have work."""

_STUBBORN: Final = 5.0
"""Seconds for which a cancelled handler is waited for."""


class AsyncLoopConsumer:
    """Runs a handler over a group's messages, by a fixed set of workers.

    A message is acknowledged after its handler returned, and never before. A handler's exception is logged, and the message is tried
    again after the policy's backoff, or moved to the dead letters. A fatal error of the backend (credentials, configuration) ends `run`. A
    backend that offers only the three methods of the protocol is run one message at a time, without retries; it says so in the log.

    To add behaviour around the handler, pass middleware, or override `handle`.

    Args:
        backend: Where messages come from.
        group: The group to consume; None: ``default``.
        concurrency: Messages handled at once.
        retry: What becomes of failed messages; None: five attempts with exponential backoff.
        timeout: Seconds that a handler may take; it is cancelled then, and the message fails. A synchronous handler's thread cannot be
            stopped: the message fails, and the thread runs on.
        grace: Seconds that handlers get to finish in `shutdown`.
        ordered_by_key: Handle messages of one key one after the other, in the order received, while other keys run beside them. A message
            that has to be retried lets its successors pass.
        middleware: Wraps the handler, the first outermost.
        keys: The key patterns that the group wants; None: see ``consume``.
        prefetch: Messages held at most; None: four times the concurrency.

    Raises:
        ConfigurationError: An argument is out of range.
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
    ) -> None:
        check_count("concurrency", concurrency)
        if prefetch is not None:
            check_count("prefetch", prefetch)
        if retry is not None and not isinstance(retry, RetryPolicy):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"retry must be a RetryPolicy, not {retry!r}")
        check_seconds("timeout", timeout)
        check_seconds("grace", grace, zero=True)
        self._backend = backend
        self._group = group
        self._concurrency = concurrency
        self._policy = retry or RetryPolicy()
        self._timeout = timeout
        self._grace = grace
        self._ordered = ordered_by_key
        self._middleware = middleware
        self._keys = keys
        self._prefetch = _PREFETCH * concurrency if prefetch is None else prefetch
        self._running = False
        self._left = False
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        if not isinstance(backend, FullBackend) and (
            retry or concurrency > 1 or ordered_by_key or keys is not None or prefetch is not None
        ):
            raise UnsupportedCapabilityError(
                f"{type(backend).__name__} has only the three methods of the protocol: "
                "retry, concurrency, ordered_by_key, keys and prefetch need more"
            )

    async def handle(self, message: Message, handler: Handle) -> None:
        """Handle one message; override it to wrap every handler call.

        Returning means success, an exception means failure. An override may settle the message itself (``ack``, ``nack``, ``reject``): the
        first settlement wins.

        Args:
            message: The message; a plain dict, from a backend that has no more.
            handler: The application's handler, made async, within its time limit.
        """
        await handler(message)

    async def run(self, handler: EventHandlerFunc | EventHandlerProtocol) -> None:
        """Handle messages until cancelled, or until `shutdown` is done.

        While the broker cannot be reached it tries again, with backoff.

        Raises:
            ConfigurationError: The handler cannot be one; the text says why. Or the broker refuses us.
            AbeError: Another error that a retry does not help.
        """
        if self._running:
            raise RuntimeError("this consumer is running already: make another one to run two")
        if self._left:
            return  # its `async with` was left before this task had its first turn
        executors: list[Executor] = []
        limited = adapt(handler, partial(self._threads, executors))
        limit = None
        if self._timeout is not None:
            limit = TimeLimit(self._timeout)
            limited = partial(limit.run, limited)
        overridden = type(self).handle is not AsyncLoopConsumer.handle
        call: Handle = partial(self.handle, handler=limited) if overridden else limited
        for layer in reversed(self._middleware):
            call = partial(layer.handle, forward=call)
        self._running = True
        self._stopping, self._stopped = asyncio.Event(), asyncio.Event()
        try:
            await self._run(call)
        finally:
            if limit is not None:
                limit.close()
            for executor in executors:
                executor.shutdown(wait=False, cancel_futures=True)
            self._running = False
            self._stopped.set()

    async def shutdown(self) -> None:
        """Take nothing new, let the handlers that run finish within the grace period, acknowledge, and return when `run` has ended.

        What is not finished by then is cancelled, and given back. Called by a handler, it returns at once: the handler has to
        finish first.
        """
        self._stopping.set()
        if self._running and asyncio.current_task() not in self._workers:
            await self._stopped.wait()

    async def __aenter__(self) -> Self:
        self._left = False
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left = True
        await self.shutdown()

    def _threads(self, executors: list[Executor]) -> Executor:
        executors.append(ThreadPoolExecutor(self._concurrency, thread_name_prefix="abe-handler"))
        return executors[-1]

    async def _run(self, call: Handle) -> None:
        subscription = await self._subscribe()
        if subscription is None:
            return
        _log.info("consuming group %r, %d messages at once", self._group or DEFAULT_GROUP, self._concurrency)
        try:
            await self._work(subscription, call)
        finally:
            await subscription.aclose()
            _log.info("group %r is consumed no more by this consumer", self._group or DEFAULT_GROUP)

    async def _subscribe(self) -> Subscription | None:
        """Subscribe, however long the broker is away; None when `shutdown` came first."""
        if not isinstance(self._backend, FullBackend):
            _log.warning(
                "%s has only the three methods of the protocol: messages are handled one at a time, and one whose handler fails "
                "is logged and not retried",
                type(self._backend).__name__,
            )
            return MinimalSubscription(aiter(self._backend.consume(group=self._group)))
        backend = self._backend
        stopping = asyncio.create_task(self._stopping.wait())
        tries = 0
        try:
            while not stopping.done():
                subscription = backend.consume(
                    group=self._group,
                    keys=self._keys,
                    prefetch=self._prefetch,
                    max_attempts=self._policy.max_attempts,
                )
                entering = asyncio.create_task(subscription.__aenter__())
                try:
                    await asyncio.wait([entering, stopping], return_when=asyncio.FIRST_COMPLETED)
                    if entering.done():
                        return entering.result()
                except AbeError as exc:
                    if not exc.retryable:
                        raise
                    tries += 1
                    _log.warning("group %r cannot be subscribed to, trying again: %s", self._group, exc)
                    await asyncio.wait([stopping], timeout=_RECONNECT(tries))
                finally:
                    if not entering.done():
                        entering.cancel()
                        await subscription.aclose()
            return None
        finally:
            stopping.cancel()

    async def _work(self, subscription: Subscription, call: Handle) -> None:
        lanes: dict[str, deque[Message]] | None = {} if self._ordered else None
        self._workers = workers = [
            asyncio.create_task(self._worker(subscription, call, lanes)) for _ in range(self._concurrency)
        ]
        stopping = asyncio.create_task(self._stopping.wait())
        giving_back: asyncio.Task[None] | None = None
        try:
            done, _ = await asyncio.wait([*workers, stopping], return_when=asyncio.FIRST_COMPLETED)
            # A worker that ended by itself found the subscription closed, or raised something fatal.
            if all(task.exception() is None for task in done):
                giving_back = asyncio.create_task(subscription.stop())
                _, late = await asyncio.wait(workers, timeout=self._grace)
                if late:
                    _log.warning(
                        "%d handlers did not finish within %g s: they are cancelled, their messages go back",
                        len(late),
                        self._grace,
                    )
        finally:
            self._stopping.set()
            for task in (stopping, giving_back, *workers):
                if task is not None:
                    task.cancel()  # a stop that waits for the broker goes on within the subscription, which `aclose` bounds
            if giving_back is not None:
                await asyncio.gather(giving_back, return_exceptions=True)
            _, stubborn = await asyncio.wait(workers, timeout=_STUBBORN)
            if stubborn:
                _log.error("%d handlers ignore their cancellation and are left behind", len(stubborn))
            self._workers = []
        for task in workers:
            if task.done() and not task.cancelled():
                task.result()

    async def _worker(self, subscription: Subscription, call: Handle, lanes: dict[str, deque[Message]] | None) -> None:
        take = subscription.take
        streak = 0
        while not self._stopping.is_set():
            message = take()
            if message is None:
                try:
                    message = await subscription.receive()
                except BackendClosedError:
                    return
            if lanes is None:
                await self._one(subscription, call, message)
            else:
                await self._lane(subscription, call, message, lanes)
            streak += 1
            if not streak & 63:
                await asyncio.sleep(0)  # a handler that never suspends must not keep the loop to itself

    async def _one(self, subscription: Subscription, call: Handle, message: Message) -> None:
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        try:
            await call(message)
        except Exception as exc:  # noqa: BLE001 - whatever a handler raises is its failure, and is logged
            await self._failed(message, exc)
        except asyncio.CancelledError:
            if task.cancelling() > before:
                raise
            # Not us: something that the handler waited for was cancelled.
            await self._failed(message, RuntimeError("something that the handler awaited was cancelled"))
        else:
            subscription.ack_soon(message)

    async def _lane(
        self, subscription: Subscription, call: Handle, message: Message, lanes: dict[str, deque[Message]]
    ) -> None:
        try:
            key = message.key
        except DecodeError as exc:
            return await self._failed(message, exc)
        if key in lanes:
            lanes[key].append(message)  # whoever handles this key now will come to it
            return None
        lane = lanes[key] = deque([message])
        started = False
        try:
            while lane:
                message = lane.popleft()
                if message.lease_lost:
                    continue  # it waited here for too long, and somebody else has it
                if self._stopping.is_set() and started:
                    await subscription.release(message)
                else:
                    started = True
                    await self._one(subscription, call, message)
        finally:
            del lanes[key]
        return None

    async def _failed(self, message: MessageQueueMessage, exc: Exception) -> None:
        if not isinstance(message, Message):
            _log.error("the handler failed, and the message is not retried: %s", exc, exc_info=exc)
            return
        verdict = self._judge(message, exc)
        error = "".join(format_exception(exc))
        try:
            if isinstance(verdict, Reject):
                _log.error("a message of group %r is rejected: %s", message.group, verdict.reason, exc_info=exc)
                await message.reject(verdict.reason, error=error)
            else:
                _log.error(
                    "the handler failed on a message of group %r, attempt %d of %d: %s",
                    message.group,
                    message.attempt,
                    self._policy.max_attempts,
                    verdict.reason,
                    exc_info=exc,
                )
                await message.nack(verdict.after, reason=verdict.reason, error=error)
        except AlreadySettledError:
            _log.info("the handler had settled the message before it failed")
        except AbeError as failure:
            _log.warning("the failed message could not be given back, its lease will run out: %s", failure)

    def _judge(self, message: Message, exc: Exception) -> Retry | Reject:
        try:
            verdict = self._within(self._policy.judge(exc, message.attempt))
        except Exception as fault:  # noqa: BLE001 - the policy is the application's code: its faults must not stop the others' messages
            _log.error("the retry policy failed, the default backoff is taken: %s", fault, exc_info=fault)
            return Retry(reason=f"{type(exc).__name__}: {exc}")
        return verdict

    def _within(self, verdict: Retry | Reject) -> Retry | Reject:
        longest = cast("FullBackend", self._backend).capabilities.max_delay or 0.0
        if isinstance(verdict, Retry) and verdict.after is not None and not 0 <= verdict.after <= longest:
            _log.warning("a backoff of %r s is not possible, it is brought within 0 to %g s", verdict.after, longest)
            return Retry(after=longest if verdict.after > longest else 0.0, reason=verdict.reason)
        return verdict


if TYPE_CHECKING:
    _: type[EventConsumer] = AsyncLoopConsumer
