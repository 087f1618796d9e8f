"""Settlements other than acknowledgements: a copy takes the message's place, or the broker takes it back."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from abe.backends.message_queue.base import Delivery, Failures, Receipt, Settlement, Verb
from abe.errors import AbeError, UnroutableError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._errors import RabbitMQError, lost, translated
from abe_backend_rabbitmq._wire import Header

if TYPE_CHECKING:
    from abe_backend_rabbitmq._transport import RabbitMQTransport

_log: Final = logging.getLogger("abe.rabbitmq")

_TIMEOUT: Final = 25.0
"""Seconds for which a settlement is tried by way of a copy. The engine gives up after 30, and nobody would give the message back then."""


class Settlements:
    """Carries out the settlements of one receiver, on one channel.

    Args:
        transport: Publishes the copies.
        group: The group.
        channel: Where the messages were delivered.
    """

    def __init__(self, transport: "RabbitMQTransport", group: str, channel: Channel) -> None:
        self._transport = transport
        self._group = group
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._failing: dict[int, float] = {}
        self._requeued: set[Receipt] = set()

    async def carry_out(self, settlements: Sequence[Settlement], tag_of: Callable[[Receipt], int | None]) -> Failures:
        """Publish a copy, have it confirmed, then acknowledge; or have the broker take the message back.

        Raises:
            BackendConnectionError: None of the copies was accepted for sure: to be tried again.
        """
        failures: dict[Receipt, AbeError] = {}
        copied: list[tuple[Settlement, int]] = []
        channel = self._channel
        for settlement in settlements:
            tag = tag_of(settlement.receipt)
            if settlement.receipt in self._requeued:
                self._requeued.discard(settlement.receipt)
            elif tag is None:
                failures[settlement.receipt] = lost()
            elif settlement.verb is Verb.RETRY and settlement.delay <= 0:
                await channel.requeue(tag)
            else:
                channel.held[tag][0].begun = True  # decided: it is taken back no more
                copied.append((settlement, tag))
        if not copied:
            return failures
        try:
            outcomes = await self._move(copied)
        except AbeError as exc:
            if exc.retryable and not self._too_late([tag for _, tag in copied]):
                again = {settlement.receipt for settlement, _ in copied}
                self._requeued |= {each.receipt for each in settlements} - again - failures.keys()
                raise
            outcomes = [exc] * len(copied)
        await self._finish(copied, outcomes, failures)
        return failures

    async def _finish(
        self,
        copied: Sequence[tuple[Settlement, int]],
        outcomes: Sequence[AbeError | None],
        failures: dict[Receipt, AbeError],
    ) -> None:
        """Acknowledge those whose copy is there, and give the others back."""
        done: list[int] = []
        channel, losses = self._channel, self._transport.losses
        for i, (settlement, tag) in enumerate(copied):
            error = outcomes[i] if outcomes else None
            self._failing.pop(tag, None)
            if channel.closed is not None or tag not in channel.held:
                failures[settlement.receipt] = lost()
                continue
            delivery, header = channel.held[tag]
            if error is None:
                losses.forget(self._group, header, delivery.body)
                done.append(tag)
                continue
            if settlement.verb is Verb.RELEASE:  # the broker counts it, and nobody else does
                losses.note(self._group, header, delivery.body)
            else:
                failures[settlement.receipt] = error
            await channel.requeue(tag)
        with translated(self._group):
            await channel.ack(done)

    async def _move(self, copied: Sequence[tuple[Settlement, int]]) -> Sequence[AbeError | None]:
        """Publish what takes the messages' places. Queues that it goes to and that were deleted are made again, once."""
        outcomes: list[AbeError | None] = [lost()] * len(copied)
        places: Sequence[int] = range(len(copied))
        for last in (False, True):
            copies: list[Outgoing] = []
            sent: list[int] = []
            for place in places:
                settlement, tag = copied[place]
                held = self._channel.held.get(tag)
                if held is None:
                    continue
                try:
                    copies.append(await self._copy(settlement, *held))
                except Exception as exc:  # noqa: BLE001 - it concerns this message, and no other of the batch
                    outcomes[place] = self._no_copy(exc)
                else:
                    sent.append(place)
            found = await self._transport.outlet.move(copies)
            for i, place in enumerate(sent):
                outcomes[place] = found[i] if found else None
            missing = [place for place in sent if isinstance(outcomes[place], UnroutableError)]
            if last or not missing:
                break
            self._transport.ladder.forget()
            await self._transport.restore(self._group)
            places = missing
        return outcomes if any(outcomes) else ()

    def _no_copy(self, exc: Exception) -> AbeError:
        """Return why there is no copy of a message.

        Raises:
            AbeError: It may work the next time.
        """
        if isinstance(exc, AbeError):
            if exc.retryable:
                raise exc
            return exc
        _log.error("a message of group %r cannot be copied: it goes back to its queue", self._group, exc_info=exc)
        return RabbitMQError(f"the message cannot be copied: {type(exc).__name__}")

    def _too_late(self, tags: Sequence[int]) -> bool:
        now = self._loop.time()
        return any(now - self._failing.setdefault(tag, now) > _TIMEOUT for tag in tags)

    async def _copy(self, settlement: Settlement, delivery: Delivery, header: Header) -> Outgoing:
        body, attempt = delivery.body, delivery.attempt
        if settlement.verb is Verb.RETRY:
            place = await self._transport.place(self._group, settlement.delay)
            exchange, key = self._transport.topology.delay, f"0.{place.key}"
            properties = _wire.copy(header, body, attempt, *place.headers)
        elif settlement.verb is Verb.RELEASE:
            exchange, key = "", self._transport.topology.queue(self._group)
            if settlement.attempts is not None:
                properties = _wire.copy(header, body, settlement.attempts)
            else:
                uncertain = [("abe-uncertain", delivery.uncertain)] if delivery.uncertain else []
                properties = _wire.copy(header, body, attempt - 1, *uncertain)
        else:
            exchange, key = "", self._transport.topology.dead(self._group)
            properties = _wire.buried(header, body, attempt, settlement.reason, settlement.error)
        return Outgoing(exchange, key, properties, body, _wire.message_id(properties))
