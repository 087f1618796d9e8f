"""Settlements other than acknowledgements: a copy replaces the message, or the message returns to its queue."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from abe.backends.message_queue.base import Delivery, Disposition, Outcomes, Settlement
from abe.backends.message_queue.base.log import Log
from abe.errors import AbeError, BackpressureError, UnroutableError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._broker import Broker
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._errors import BlockedError, RabbitMQError, lost, translated
from abe_backend_rabbitmq._tried import is_ours
from abe_backend_rabbitmq._wire import Header

_log: Final = Log("abe.rabbitmq")

_LONGEST: Final = 20.0
"""Seconds that a message stays in flight while the broker takes no copies."""

_GIVEN_UP: Final = 10.0
"""The same for a dead letter, which would lose its reason."""

_MOMENT: Final = 1.0
"""The same where more messages than `room` wait."""


_Failures: TypeAlias = dict[Delivery, AbeError]


class Settlements:
    """Carries out the settlements of one receiver, on one channel.

    Args:
        broker: Publishes the copies.
        group: The group.
        channel: Where the messages were delivered.
        room: How many messages may wait for their copies: fewer than the prefetch, or no others would be delivered.
    """

    def __init__(self, broker: Broker, group: str, channel: Channel, room: int) -> None:
        self._broker = broker
        self._group = group
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._room = room
        self._hurried = asyncio.Event()

    def hurry(self) -> None:
        """Wait for copies no more: the consumer closes."""
        self._hurried.set()

    async def carry_out(self, settlements: Sequence[Settlement], tag_of: Callable[[Delivery], int | None]) -> Outcomes:
        """Publish copies, and acknowledge the messages once they are confirmed; or return messages to their queue."""
        failures: _Failures = {}
        copied: list[tuple[Settlement, int]] = []
        for settlement in settlements:
            tag = tag_of(settlement.delivery)
            if tag is None:
                failures[settlement.delivery] = lost()
            elif settlement.disposition is Disposition.RETURN:
                await self._requeue(settlement, tag, *self._channel.in_flight[tag])
            else:
                settlement.delivery.begun = True  # `Consuming` must not return it any more
                copied.append((settlement, tag))
        publisher = self._broker.publisher
        outcomes: Outcomes = ()
        while copied:
            if publisher.blocked:
                copied = await self._without_copies(copied, failures)
                continue
            try:
                outcomes = await self._move(copied)
            except BlockedError:
                continue
            except AbeError as exc:
                outcomes = [exc] * len(copied)
            break
        await self._finish(copied, outcomes, failures)
        return [failures.get(settlement.delivery) for settlement in settlements] if failures else ()

    async def _without_copies(
        self, copied: Sequence[tuple[Settlement, int]], failures: _Failures
    ) -> list[tuple[Settlement, int]]:
        """Settle while the broker is short of memory or disk and takes no copies: draining its queues ends the shortage.

        A message to retry stays in flight for its delay, and then returns to its queue; a dead one is left to the queue's own
        dead-lettering, which keeps no reason. Both wait for the end of the shortage as long as there is room.

        Returns:
            Those that are left when it ends.
        """
        publisher, loop = self._broker.publisher, self._loop
        crowded = self._room < len(copied)
        self._room -= len(copied)
        most, now = _MOMENT if crowded else _LONGEST, loop.time()
        dead = Disposition.DEAD
        left = [
            (now + min(_GIVEN_UP if each.disposition is dead else each.delay, most), each, tag) for each, tag in copied
        ]
        ends = [asyncio.ensure_future(publisher.unblocked()), asyncio.ensure_future(self._hurried.wait())]
        try:
            while left and publisher.blocked:
                now = loop.time()
                due = [(each, tag) for at, each, tag in left if at <= now or self._hurried.is_set()]
                left = [] if self._hurried.is_set() else [item for item in left if item[0] > now]
                for each, tag in due:
                    await self._leave_to_the_broker(each, tag, failures)
                if left:
                    timeout = max(0.0, min(at for at, _, _ in left) - loop.time())
                    await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._room += len(copied)
            for end in ends:
                end.cancel()
        return [(each, tag) for _, each, tag in left]

    async def _leave_to_the_broker(self, settlement: Settlement, tag: int, failures: _Failures) -> None:
        channel = self._channel
        if channel.closed is not None or tag not in channel.in_flight:
            failures[settlement.delivery] = lost()
            return
        delivery, header = channel.in_flight[tag]
        if settlement.disposition is Disposition.DEAD:
            _log.warning(
                "message %s of group %r becomes a dead letter without its reason: rabbitmq takes no copy of it now",
                _wire.message_id(header.properties),
                self._group,
            )
            channel.discard(tag)
            return
        await self._requeue(settlement, tag, delivery, header)

    async def _finish(
        self,
        copied: Sequence[tuple[Settlement, int]],
        outcomes: Outcomes,
        failures: _Failures,
    ) -> None:
        """Acknowledge messages whose copies are confirmed. Return the others, unless their settlement can be retried."""
        done: list[int] = []
        channel, losses = self._channel, self._broker.losses
        for i, (settlement, tag) in enumerate(copied):
            error = outcomes[i] if outcomes else None
            if channel.closed is not None or tag not in channel.in_flight:
                failures[settlement.delivery] = lost()
                continue
            delivery, header = channel.in_flight[tag]
            if error is None:
                losses.forget(self._group, header, delivery.body)
                done.append(tag)
                continue
            at_once = settlement.disposition is not Disposition.DEAD and not settlement.delay
            full = at_once and isinstance(error, BackpressureError)
            if error.retryable and not full:
                failures[settlement.delivery] = error  # it stays in flight for the retry
                continue
            if not full and settlement.disposition is not Disposition.RELEASE:
                failures[settlement.delivery] = error
            await self._requeue(settlement, tag, delivery, header)
        with translated(self._group):
            await channel.ack(done)

    async def _requeue(self, settlement: Settlement, tag: int, delivery: Delivery, header: Header) -> None:
        """Return a message to its queue without a copy. Only this process knows then whether the delivery was an attempt."""
        counts = settlement.disposition in (Disposition.RETRY, Disposition.DEAD)
        await self._broker.tried.withdraw(self._group, delivery, header)
        self._broker.losses.note(self._group, header, delivery, counts=counts, alone=settlement.alone)
        await self._channel.requeue(tag)

    async def _move(self, copied: Sequence[tuple[Settlement, int]]) -> Outcomes:
        """Publish the copies. Target queues that were deleted are declared again, once."""
        outcomes: list[AbeError | None] = [lost()] * len(copied)
        places: Sequence[int] = range(len(copied))
        for last in (False, True):
            copies: list[Outgoing] = []
            sent: list[int] = []
            for place in places:
                settlement, tag = copied[place]
                held = self._channel.in_flight.get(tag)
                if held is None:
                    continue
                try:
                    copies.append(await self._copy(settlement, *held))
                except Exception as exc:  # noqa: BLE001 - it affects this message only
                    outcomes[place] = self._no_copy(exc)
                else:
                    sent.append(place)
            found = await self._broker.publisher.move(copies)
            for i, place in enumerate(sent):
                outcomes[place] = found[i] if found else None
            missing = [place for place in sent if isinstance(outcomes[place], UnroutableError)]
            if last or not missing:
                break
            self._broker.delays.forget()
            await self._broker.groups.restore(self._group)
            places = missing
        return outcomes if any(outcomes) else ()

    def _no_copy(self, exc: Exception) -> AbeError:
        """Return why there is no copy of a message."""
        if isinstance(exc, AbeError):
            return exc
        _log.error("a message of group %r cannot be copied: it goes back to its queue", self._group, exc_info=exc)
        return RabbitMQError(f"the message cannot be copied: {type(exc).__name__}")

    async def _copy(self, settlement: Settlement, delivery: Delivery, header: Header) -> Outgoing:
        body, attempt = delivery.body, delivery.attempt
        exchange, key = "", self._broker.topology.queue(self._group)
        if settlement.disposition is Disposition.RETRY:
            extra: Sequence[tuple[str, str | int]] = ()
            if settlement.delay > 0:
                place = await self._broker.place(self._group, settlement.delay)
                exchange, key, extra = self._broker.topology.delay, f"0.{place.key}", place.headers
            # A process that settles it was not killed by it: what was uncertain is forgotten.
            properties = _wire.copy(header, body, attempt - delivery.uncertain, *extra)
        elif settlement.disposition is Disposition.RELEASE:
            properties = _wire.copy(header, body, attempt - 1, *_doubts(settlement, header))
        else:
            exchange, key = "", self._broker.topology.dead(self._group)
            properties = _wire.buried(header, body, attempt, settlement.reason, settlement.error)
        return Outgoing(exchange, key, properties, body, _wire.message_id(properties))


def _doubts(settlement: Settlement, header: Header) -> Sequence[tuple[str, str | int]]:
    """Return the headers by which a copy that is given back keeps apart what is uncertain about its attempts."""
    delivery = settlement.delivery
    name = _wire.alone(header)
    if settlement.alone or delivery.alone == 0 or (name and is_ours(delivery, header)):
        name = secrets.token_hex(8)  # what was recorded under the other name is not held against it
    found: list[tuple[str, str | int]] = [("abe-uncertain", delivery.uncertain)] if delivery.uncertain else []
    return [*found, ("abe-alone", name)] if name else found
