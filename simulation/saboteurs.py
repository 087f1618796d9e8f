"""Engines with one fault built in: how many worlds it takes until a fault is seen says how good the search is."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeAlias
from unittest.mock import patch

from abe.backends.message_queue import look_ahead, worker
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.transport import Disposition, Settlement
from abe.backends.message_queue.engine import (
    batch,
    fetcher,
    in_flight,
    inbox,
    leases,
    publisher,
    session,
    settler,
    subscription,
)
from abe.errors import AbeError

Fault: TypeAlias = Sequence[tuple[object, str, Any]]
"""What is replaced by what: an object, the name of its attribute, and the other value."""


@contextmanager
def sabotaged(name: str) -> Iterator[None]:
    """Have the engine work with this fault until the block ends.

    Args:
        name: One of `SABOTEURS`.
    """
    with ExitStack() as stack:
        for place, attribute, value in SABOTEURS[name]():
            stack.enter_context(patch.object(place, attribute, value))
        yield


def _never_renews() -> Fault:
    original = leases.LeaseKeeper.run

    async def run(self: leases.LeaseKeeper) -> None:
        self._lease = None
        await original(self)

    return [(leases.LeaseKeeper, "run", run)]


def _has_no_bound() -> Fault:
    return [(inbox.Inbox, "_room", lambda _: 3)]


def _acknowledges_nothing() -> Fault:
    async def attempt(self: settler.Settler, call: Any, items: Sequence[Any]) -> Sequence[AbeError | None]:
        return [None] * len(items)

    return [(settler.Settler, "_attempt", attempt)]


def _confirms_what_is_not_known() -> Fault:
    return [(publisher.Publisher, "_gave_up", lambda *_: None)]


def _rejects_what_is_not_known() -> Fault:
    original = publisher.Publisher._gave_up

    def gave_up(self: publisher.Publisher, unknown: bool, cause: AbeError | None, timeout: float) -> AbeError:
        return original(self, False, cause, timeout)

    return [(publisher.Publisher, "_gave_up", gave_up)]


def _forgets_a_doubt() -> Fault:
    """A message that an earlier try may have published is rejected when a later one is refused."""
    return [(batch.Batch, "doubtful", property(lambda _: frozenset(), lambda *_: None))]


def _sends_what_has_timed_out() -> Fault:
    def leave(self: publisher.Publisher, batch: batch.Batch, future: Any, timeout: float) -> None:
        future.set_result(self._gave_up(False, batch.error, timeout))

    return [(publisher.Publisher, "_leave", leave)]


def _forgets_what_is_dropped() -> Fault:
    return [(in_flight.InFlight, "dropped", lambda *_: None)]


def _recovers_what_is_in_hand() -> Fault:
    return [(in_flight.InFlight, "deliveries", lambda self: self._settler.deliveries())]


def _acknowledges_before_the_handler() -> Fault:
    original = inbox.Inbox.take

    def take(self: inbox.Inbox) -> Message | None:
        message = original(self)
        if message is not None:
            self._settler.ack(message._delivery)
        return message

    return [(inbox.Inbox, "take", take)]


def _acknowledges_what_fails() -> Fault:
    async def nack(self: in_flight.InFlight, message: Message, *_: object) -> None:
        await self._settle(message, "nack", None)

    return [(in_flight.InFlight, "nack", nack)]


def _acknowledges_what_cannot_be_decoded() -> Fault:
    def bury(self: in_flight.InFlight, delivery: Any, reason: str, error: str) -> None:
        if self.forget(delivery):
            self._settler.ack(delivery)

    return [(in_flight.InFlight, "bury", bury)]


def _hands_out_what_is_lost() -> Fault:
    def lose(self: in_flight.InFlight, deliveries: Any) -> None:
        """Take no note of it."""

    return [(in_flight.InFlight, "lose", lose)]


def _gives_up_too_early() -> Fault:
    original = in_flight.InFlight._failure

    def failure(self: in_flight.InFlight, delivery: Any, delay: float, reason: str, error: str) -> Settlement:
        settlement = original(self, delivery, delay, reason, error)
        if delivery.attempt == self._max_attempts - 1:
            return Settlement(delivery, Disposition.DEAD)
        return settlement

    return [(in_flight.InFlight, "_failure", failure)]


def _never_gives_up() -> Fault:
    def failure(self: in_flight.InFlight, delivery: Any, delay: float, reason: str, error: str) -> Settlement:
        return Settlement(delivery, Disposition.RETRY, delay=delay)

    return [(in_flight.InFlight, "_failure", failure)]


def _tries_suspects_beside_others() -> Fault:
    return [(inbox.Inbox, "_suspect", lambda *_: None), (inbox.Inbox, "_may_try", lambda *_: True)]


def _hands_out_the_newest_first() -> Fault:
    original = inbox.Inbox.take

    def take(self: inbox.Inbox) -> Message | None:
        self._buffer.rotate(1)
        return original(self)

    return [(inbox.Inbox, "take", take)]


def _handles_a_key_twice_at_once() -> Fault:
    async def next_one(self: Any, ahead: look_ahead.LookAhead, lane: object) -> Message:
        return await ahead.receive()

    return [(worker.Workers, "_next", next_one)]


def _wakes_nobody_for_one_message() -> Fault:
    original = inbox.Inbox._wake

    def wake(self: inbox.Inbox, count: int) -> None:
        if not self._buffer or len(self._buffer) > 1 or self._stopping:
            original(self, count)

    return [(inbox.Inbox, "_wake", wake)]


def _closes_without_a_bound() -> Fault:
    return [(session, "_FINISHING", 50.0), (inbox, "_SETTLING", 50.0)]


def _leaves_a_task() -> Fault:
    original = leases.LeaseKeeper.run

    async def run(self: leases.LeaseKeeper) -> None:
        try:
            await original(self)
        except asyncio.CancelledError:
            await original(self)

    return [(leases.LeaseKeeper, "run", run)]


def _never_resubscribes() -> Fault:
    async def repair(self: Any, error: Exception, failures: int) -> None:
        raise error

    return [(fetcher.Fetcher, "_repair", repair)]


def _receives_in_a_task_that_nobody_cancels() -> Fault:
    original = subscription.GroupSubscription._receive

    async def receive(self: subscription.GroupSubscription) -> Message:
        task = asyncio.create_task(original(self))
        return await asyncio.shield(task)

    return [(subscription.GroupSubscription, "_receive", receive)]


_ALL: Final = (
    _never_renews,
    _has_no_bound,
    _acknowledges_nothing,
    _confirms_what_is_not_known,
    _rejects_what_is_not_known,
    _forgets_a_doubt,
    _sends_what_has_timed_out,
    _forgets_what_is_dropped,
    _recovers_what_is_in_hand,
    _acknowledges_before_the_handler,
    _acknowledges_what_fails,
    _acknowledges_what_cannot_be_decoded,
    _hands_out_what_is_lost,
    _gives_up_too_early,
    _never_gives_up,
    _tries_suspects_beside_others,
    _hands_out_the_newest_first,
    _handles_a_key_twice_at_once,
    _wakes_nobody_for_one_message,
    _closes_without_a_bound,
    _leaves_a_task,
    _never_resubscribes,
    _receives_in_a_task_that_nobody_cancels,
)

SABOTEURS: Final[dict[str, Callable[[], Fault]]] = {each.__name__.strip("_"): each for each in _ALL}
"""Each fault by its name."""
