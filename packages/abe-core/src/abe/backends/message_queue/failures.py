"""Handles a message whose handler failed: asks the retry policy, logs the failure, settles the message."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Final, cast

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.minimal import PlainMessage
from abe.backends.message_queue.report import reason_of, shown, text_of
from abe.backends.message_queue.retry import Reject, RetryPolicy
from abe.errors import AlreadySettledError

_log: Final = Log("abe.consumer")
_DEFAULT: Final = ExponentialBackoff()
_GIVEN_UP: Final = "moved to the dead letters"


class Failures:
    """Judges, logs and settles failed messages. Never raises because of application code.

    Args:
        policy: The retry policy.
        max_attempts: Deliveries of one message in all.
        max_delay: The broker's longest delay, in seconds.
        stopping: Done when `failed` must no longer wait for settlements.
    """

    def __init__(
        self, policy: RetryPolicy, max_attempts: int, max_delay: float, stopping: "asyncio.Future[Any]"
    ) -> None:
        self._policy = policy
        self._max_attempts = max_attempts
        self._max_delay = max_delay
        self._stopping = stopping
        self._settling: set[asyncio.Task[None]] = set()

    async def failed(self, message: object, exc: BaseException) -> None:
        """Settle a failed message. Returns when that is done; when the consumer stops, it returns and a task completes the settlement.

        Args:
            message: The message.
            exc: The exception that its handler raised.
        """
        printable, error = shown(exc)
        if not isinstance(message, Message) or isinstance(message, PlainMessage):  # the provider takes no settlement
            template = "the handler failed, and the message is not retried: %s"
            _log.error(template, reason_of(exc), exc_info=printable)
            return
        facts = _facts(message)
        if message.settled:
            template = "the handler settled %s and then failed: %s"
            _log.warning(template, _named(facts), reason_of(exc), exc_info=printable, extra=facts)
            return
        decision = self._judge(exc, message.attempt, facts)
        delivery = message._delivery  # pyright: ignore[reportPrivateUsage]
        self._report(decision, delivery.attempt - delivery.uncertain, printable, facts)
        # A task of its own: settlements continue while the consumer stops, and closing the subscription bounds them.
        task = asyncio.create_task(_settle(message, decision, error, facts))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        await asyncio.wait([task, self._stopping], return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Cancel the settlements that are still pending after the subscription was closed."""
        for task in self._settling:
            task.cancel()
        if self._settling:
            await asyncio.wait(self._settling)

    def _judge(self, exc: BaseException, attempt: int, facts: dict[str, Any]) -> "_Decision":
        after: float | None
        try:
            judged = self._policy.judge(exc, attempt)
            after = None if isinstance(judged, Reject) else float(cast("float", judged.after))
            reason = text_of(judged.reason, exc)
        except KeyboardInterrupt:
            raise
        except BaseException as fault:  # noqa: BLE001 - the policy is application code: its failure must not stop other messages
            template = "the retry policy failed on %s, using the default backoff: %s"
            _log.error(template, _named(facts), reason_of(fault), exc_info=shown(fault)[0], extra=facts)
            return _Decision(min(_DEFAULT(attempt), self._max_delay), reason_of(exc))
        if after is not None and not 0 <= after <= self._max_delay:
            template = "a backoff of %r s is not possible, limiting it to 0 to %g s"
            _log.warning(template, after, self._max_delay, extra=facts)
            after = self._max_delay if after > self._max_delay else 0.0
        return _Decision(after, reason)

    def _report(self, decision: "_Decision", attempt: int, printable: BaseException, facts: dict[str, Any]) -> None:
        level, then = logging.ERROR, _GIVEN_UP
        template = "the handler failed on %s, attempt %d of %d: %s (%s)"
        if decision.after is None:
            template = "the handler rejected %s, attempt %d of %d: %s (%s)"
        elif attempt < self._max_attempts:
            level, then = logging.WARNING, f"retrying in {decision.after:.3g} s"
        arguments = _named(facts), attempt, self._max_attempts, decision.reason, then
        _log.log(level, template, *arguments, exc_info=printable, extra=facts)


@dataclass(frozen=True, slots=True)
class _Decision:
    after: float | None
    """Seconds until the retry; None: rejected."""
    reason: str


async def _settle(message: Message, decision: _Decision, error: str, facts: dict[str, Any]) -> None:
    try:
        if decision.after is None:
            await message.reject(decision.reason, error=error)
        else:
            await message.nack(decision.after, reason=decision.reason, error=error)
    except AlreadySettledError:
        _log.info("%s was settled meanwhile", _named(facts), extra=facts)
    except Exception as failure:  # noqa: BLE001 - this task's only observer is the log
        template = "%s failed and could not be settled, it is delivered again when its lease runs out: %s"
        _log.warning(template, _named(facts), reason_of(failure), extra=facts)


def _facts(message: Message) -> dict[str, Any]:
    """Return the log record's ``extra`` that identifies the message."""
    try:
        id, key = message.id, message.key
    except Exception:  # noqa: BLE001 - an unreadable envelope must not prevent the settlement
        id, key = "?", "?"
    return {"message_id": id, "key": key, "group": message.group, "attempt": message.attempt}


def _named(facts: dict[str, Any]) -> str:
    return f"message {facts['message_id']!r} (key {facts['key']!r}) of group {facts['group']!r}"
