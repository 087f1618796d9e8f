"""What becomes of a message whose handler failed: the policy's decision, a log line that says which message, and the settlement."""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, cast

from abe.backends.message_queue.base.backoff import ExponentialBackoff
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.minimal import PlainMessage
from abe.backends.message_queue.report import reason_of, shown, text_of
from abe.backends.message_queue.retry import Reject, RetryPolicy
from abe.errors import AlreadySettledError

_log: Final = logging.getLogger("abe.consumer")
_DEFAULT: Final = ExponentialBackoff()
_GIVEN_UP: Final = "it is given up: a dead letter"


class Failures:
    """Judges, logs and settles failed messages. Nothing that the application does can make it raise.

    Args:
        policy: The application's.
        max_attempts: Deliveries of one message in all.
        max_delay: The longest backoff that the broker can hold.
        stopping: Done when nobody is to wait for a settlement any more.
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
        """Settle a failed message. Returns when that is done, or goes on by itself as the consumer stops.

        Args:
            message: The message.
            exc: What its handler raised.
        """
        likeness, error = shown(exc)
        if not isinstance(message, Message) or isinstance(message, PlainMessage):  # nobody can be told
            told = "the handler failed, and the message is not retried: %s"
            _say(logging.ERROR, told, reason_of(exc), exc_info=likeness)
            return
        facts = _facts(message)
        if message.settled:
            told = "the handler had settled %s before it failed: %s"
            _say(logging.WARNING, told, _named(facts), reason_of(exc), exc_info=likeness, extra=facts)
            return
        decision = self._judge(exc, message.attempt, facts)
        self._tell(decision, likeness, facts)
        # A task of its own: settlements go on while the consumer stops, and closing the subscription bounds them.
        task = asyncio.create_task(_settle(message, decision, error, facts))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        await asyncio.wait([task, self._stopping], return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """End the settlements that the closed subscription left behind."""
        for task in self._settling:
            task.cancel()
        if self._settling:
            await asyncio.wait(self._settling)

    def _judge(self, exc: BaseException, attempt: int, facts: dict[str, Any]) -> "_Decision":
        after: float | None
        try:
            judged = self._policy.judge(exc, attempt)
            after = None if isinstance(judged, Reject) else float(cast("float", judged.after))
            reason = text_of(judged.reason)
        except KeyboardInterrupt:
            raise
        except BaseException as fault:  # noqa: BLE001 - the policy is the application's code: its faults must not stop the others' messages
            told = "the retry policy failed on %s, the default backoff is taken: %s"
            _say(logging.ERROR, told, _named(facts), reason_of(fault), exc_info=shown(fault)[0], extra=facts)
            return _Decision(min(_DEFAULT(attempt), self._max_delay), reason_of(exc))
        if after is not None and not 0 <= after <= self._max_delay:
            told = "a backoff of %r s is not possible, it is brought within 0 to %g s"
            _say(logging.WARNING, told, after, self._max_delay, extra=facts)
            after = self._max_delay if after > self._max_delay else 0.0
        return _Decision(after, reason)

    def _tell(self, decision: "_Decision", likeness: BaseException, facts: dict[str, Any]) -> None:
        level, then = logging.ERROR, _GIVEN_UP
        told = "the handler failed on %s, attempt %d of %d: %s (%s)"
        if decision.after is None:
            told = "the handler rejected %s, attempt %d of %d: %s (%s)"
        elif facts["attempt"] < self._max_attempts:
            level, then = logging.WARNING, f"it is tried again in {decision.after:.3g} s"
        attempt, reason = facts["attempt"], decision.reason
        _say(
            level,
            told,
            _named(facts),
            attempt,
            self._max_attempts,
            reason,
            then,
            exc_info=likeness,
            extra=facts,
        )


@dataclass(frozen=True, slots=True)
class _Decision:
    after: float | None
    """Seconds until it is tried again; None: it is rejected."""
    reason: str


async def _settle(message: Message, decision: _Decision, error: str, facts: dict[str, Any]) -> None:
    try:
        if decision.after is None:
            await message.reject(decision.reason, error=error)
        else:
            await message.nack(decision.after, reason=decision.reason, error=error)
    except AlreadySettledError:
        _say(logging.INFO, "%s was settled meanwhile", _named(facts), extra=facts)
    except Exception as failure:  # noqa: BLE001 - nobody else would see it: whoever failed takes the next message
        told = "%s failed and could not be given back, its lease will run out: %s"
        _say(logging.WARNING, told, _named(facts), reason_of(failure), extra=facts)


def _say(level: int, told: str, *arguments: object, **options: Any) -> None:
    # A filter of the application's that raises must not keep a message from being settled.
    with suppress(Exception):
        _log.log(level, told, *arguments, **options)


def _facts(message: Message) -> dict[str, Any]:
    """Return which message it is, as a log record's ``extra``."""
    try:
        id, key = message.id, message.key
    except Exception:  # noqa: BLE001 - an envelope that cannot be read must not keep its message from being settled
        id, key = "?", "?"
    return {"message_id": id, "key": key, "group": message.group, "attempt": message.attempt}


def _named(facts: dict[str, Any]) -> str:
    return f"message {facts['message_id']!r} (key {facts['key']!r}) of group {facts['group']!r}"
