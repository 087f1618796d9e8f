"""What a consumer has in flight: the deliveries that are its own, and how each is settled."""

import asyncio
import logging
from collections.abc import Collection
from typing import Final

from abe.backends.message_queue.base.backoff import Backoff, ExponentialBackoff
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.message import Message
from abe.backends.message_queue.base.names import check_seconds
from abe.backends.message_queue.base.transport import Delivery, Disposition, Metadata, Receiver, Settlement
from abe.backends.message_queue.engine.settler import Settler
from abe.errors import AbeError, AlreadySettledError, DecodeError, LeaseLostError, UnsupportedCapabilityError

_log: Final = Log("abe.engine")
_RETRY: Final[Backoff] = ExponentialBackoff()

_DROPPED: Final = 1.0
"""Seconds after which a message that the application dropped is given back: who is about to close gives it back uncounted."""


class InFlight:
    """The deliveries of one inbox, as their messages see it (`MessageSource`).

    Args:
        receiver: The broker's side.
        settler: Carries settlements to it.
        group: The group's name.
        max_attempts: Deliveries of one message before it is dead.
        max_delay: The longest delay that the broker can hold, in seconds; None: no delay at all.
        lease: Seconds; None where the broker has no leases.
    """

    def __init__(
        self,
        receiver: Receiver,
        settler: Settler,
        *,
        group: str,
        max_attempts: int,
        max_delay: float | None,
        lease: float | None,
    ) -> None:
        self.group = group
        self.live: dict[Delivery, None] = {}
        """Buffered, or handed out and not settled."""
        self.closing = False
        """Whether what is not settled is about to be given back."""
        self._receiver = receiver
        self._settler = settler
        self._max_attempts = max_attempts
        self._max_delay = max_delay
        self._lease = lease
        self._loop = asyncio.get_running_loop()

    def deliveries(self) -> list[Delivery]:
        """Return what the broker counts as ours, as far as we know."""
        return [*self.live, *self._settler.deliveries()]

    def count(self) -> int:
        """Return how many messages the broker counts as ours."""
        return len(self.live) + self._settler.outstanding

    def lose(self, deliveries: Collection[Delivery]) -> None:
        """Note that these are not ours any more. One that was settled meanwhile is not lost, but done."""
        lost = [delivery for delivery in deliveries if self.forget(delivery)]
        for delivery in lost:
            delivery.lost = True
        if lost:
            _log.warning(
                "%d leases of group %r were lost: these messages will be delivered again", len(lost), self.group
            )

    def forget(self, delivery: Delivery) -> bool:
        """Take a delivery out of what is ours; return whether it was."""
        ours = delivery in self.live
        if ours:
            del self.live[delivery]
        return ours

    def bury(self, delivery: Delivery, reason: str, error: str) -> None:
        """Have a delivery that no handler is to see moved to the dead letters."""
        if self.forget(delivery):
            self._settler.submit(delivery, Settlement(delivery, Disposition.DEAD, reason=reason, error=_text(error)))
            self._tell(logging.ERROR, delivery, f"goes to the dead letters ({reason}): {error}")

    def give_back(self, delivery: Delivery, *, alone: bool = False) -> "asyncio.Future[AbeError | None] | None":
        """Give a delivery back as if it had never been taken; return the future outcome, None if it is not ours.

        Args:
            delivery: Which.
            alone: Whether it is to be handled with nothing else in hand.
        """
        if not self.forget(delivery) or delivery.lost:
            return None
        if alone:  # uncertain attempts beyond the limit say nothing more
            beyond = delivery.attempt - 1 - self._max_attempts
            delivery.attempt, delivery.uncertain = delivery.attempt - beyond, delivery.uncertain - beyond
        return self._settler.submit(delivery, Settlement(delivery, Disposition.RELEASE, alone=alone))

    async def give_back_all(self, deliveries: Collection[Delivery]) -> None:
        """Give these back, and wait until that was carried out."""
        if waiters := [waiter for delivery in deliveries if (waiter := self.give_back(delivery)) is not None]:
            await asyncio.wait(waiters)

    def metadata(self, message: Message) -> Metadata:
        """Return what travelled beside the body.

        Raises:
            DecodeError: It cannot be read.
        """
        return self._metadata(_delivery(message))

    def lease_lost(self, message: Message) -> bool:
        """Whether the message is known not to be ours any more: its lease was lost, or closing gave it back."""
        delivery = _delivery(message)
        # In this order: a thread may ask while the message is settled, which is noted before it leaves `live`.
        ours = delivery in self.live or message._settled is not None  # pyright: ignore[reportPrivateUsage]
        return delivery.lost or not ours

    def dropped(self, message: Message) -> None:
        """Note that this message was dropped without being settled; called from the thread that collects it."""
        delivery = _delivery(message)
        try:
            self._loop.call_soon_threadsafe(self._loop.call_later, _DROPPED, self._retry_dropped, delivery)
        except RuntimeError:
            return  # the event loop is closed: the lease runs out, or the connection ends

    def ack_soon(self, message: Message) -> None:
        """Acknowledge with the next batch; a failure is logged."""
        if message._settled is None:  # pyright: ignore[reportPrivateUsage]
            message._settled = "ack"  # pyright: ignore[reportPrivateUsage]
            delivery = message._delivery  # pyright: ignore[reportPrivateUsage]
            delivery.handled = True
            if delivery in self.live:
                del self.live[delivery]
                self._settler.ack(delivery)
            else:
                self._tell(logging.WARNING, delivery, "was handled, but its lease was lost: it may be handled again")

    async def ack(self, message: Message) -> None:
        """Acknowledge; see `Message.ack`."""
        await self._settle(message, "ack", None)

    async def nack(self, message: Message, delay: float | None, reason: str, error: str) -> None:
        """Have it delivered again, or bury it; see `Message.nack`."""
        delivery = _delivery(message)
        if delay is None:
            delay = _RETRY(delivery.attempt)
        check_seconds("nack: delay", delay, zero=True)
        if delay and (self._max_delay is None or delay > self._max_delay):
            raise UnsupportedCapabilityError(
                f"nack(delay={delay:g}): this backend can delay by at most {self._max_delay or 0:g} s"
            )
        await self._settle(message, "nack", self._failure(delivery, delay, reason, error))

    async def reject(self, message: Message, reason: str, error: str) -> None:
        """Bury it; see `Message.reject`."""
        settlement = Settlement(_delivery(message), Disposition.DEAD, reason=_text(reason), error=_text(error))
        await self._settle(message, "reject", settlement)

    async def release(self, message: Message) -> None:
        """Give a message back as if it had never been taken. Nothing happens when it is settled already."""
        if message._settled is None:  # pyright: ignore[reportPrivateUsage]
            await self._settle(message, "release", Settlement(_delivery(message), Disposition.RELEASE))

    async def extend(self, message: Message, seconds: float) -> None:
        """Start the lease anew; see `Message.extend`."""
        delivery = _delivery(message)
        check_seconds("extend: seconds", seconds)
        if self._lease is None:
            return
        if seconds > self._lease:
            raise UnsupportedCapabilityError(
                f"extend({seconds:g}): the lease is {self._lease:g} s. It is renewed by itself as long as the event loop runs; "
                f"set QUEUE_LEASE_SECONDS higher if the loop must be kept busy for longer"
            )
        if delivery.lost or delivery not in self.live:
            raise LeaseLostError("the message is not ours any more")
        self.lose(await self._receiver.renew(self.deliveries()))  # a provider may take what is left out for given up
        if delivery.lost:
            raise LeaseLostError("the message is not ours any more: its lease had run out")

    def _metadata(self, delivery: Delivery) -> Metadata:
        if not isinstance(delivery.header, Metadata):
            try:
                delivery.header = self._receiver.metadata(delivery)
            except DecodeError:
                raise
            except Exception as exc:
                raise DecodeError(f"the envelope cannot be read ({type(exc).__name__})") from exc
        return delivery.header

    def _tell(self, level: int, delivery: Delivery, what: str) -> None:
        """Log what becomes of a message, saying which it is."""
        try:
            metadata = self._metadata(delivery)
        except DecodeError:
            metadata = Metadata("?", "?")
        facts = {
            "message_id": metadata.id,
            "key": metadata.key,
            "group": self.group,
            "attempt": delivery.attempt,
        }
        template = "message %r (key %r) of group %r, attempt %d, %s"
        _log.log(level, template, *facts.values(), what, extra=facts)

    def _failure(self, delivery: Delivery, delay: float, reason: str, error: str) -> Settlement:
        reason, error = _text(reason), _text(error)
        if delivery.attempt - delivery.uncertain >= self._max_attempts:
            return Settlement(delivery, Disposition.DEAD, reason=reason or "max_attempts", error=error)
        return Settlement(delivery, Disposition.RETRY, delay=delay, reason=reason, error=error)

    def _retry_dropped(self, delivery: Delivery) -> None:
        if self.closing or not self.forget(delivery):
            return
        delay = min(_RETRY(delivery.attempt), self._max_delay or 0.0)
        self._settler.submit(delivery, self._failure(delivery, delay, "dropped without being settled", ""))
        self._tell(logging.WARNING, delivery, "was taken and dropped without being settled: it is delivered again")

    async def _settle(self, message: Message, how: str, settlement: Settlement | None) -> None:
        delivery = _delivery(message)
        if not _decide(message, how):
            await self._settler.carried_out(delivery)
            if delivery.lost:
                raise LeaseLostError(f"{how}: it was asked for before, and could not be carried out")
            return
        if not self.forget(delivery):
            delivery.lost = True
            raise LeaseLostError(
                f"{how}: the message is not ours any more: its lease was lost, or its subscription was closed"
            )
        error = await self._settler.submit(delivery, settlement)
        if error is not None:
            raise error


def _delivery(message: Message) -> Delivery:
    return message._delivery  # pyright: ignore[reportPrivateUsage]


def _text(text: str) -> str:
    """Return what every broker can carry: an exception's text may hold lone surrogates, from file names for one."""
    return text.encode("utf-8", "backslashreplace").decode()


def _decide(message: Message, how: str) -> bool:
    """Whether this is the first settlement.

    Raises:
        AlreadySettledError: It was settled otherwise.
    """
    before = message._settled  # pyright: ignore[reportPrivateUsage]
    if before is None:
        message._settled = how  # pyright: ignore[reportPrivateUsage]
        return True
    if before != how:
        raise AlreadySettledError(f"{how}: the message was settled before, with {before}")
    return False
