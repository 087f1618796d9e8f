"""Subtracts deliveries that were lost with their channel from a message's attempts. Pure.

RabbitMQ counts every delivery, also of a message that was only buffered. As this process is alive, no message has killed it.
"""

from typing import Final

from abe.backends.message_queue.base import Delivery
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._wire import Header

_MOST: Final = 65_536
"""Messages remembered: as many as one consumer can have in flight."""

_MOST_BEGUN: Final = 1_000
_MOST_BYTES: Final = 16 * 1024 * 1024
"""Deliveries remembered whose handlers had begun, and bytes of their bodies."""


class _Lost:
    __slots__ = ("alone", "begun", "counted", "times")

    def __init__(self) -> None:
        self.times = 0
        self.counted = 0
        self.alone = False
        self.begun: list[Delivery] = []


class Losses:
    """How often each message was lost with a channel since its copy in the queue was made, and which lost deliveries are in handlers.
    The oldest are forgotten first."""

    def __init__(self) -> None:
        self._lost: dict[tuple[str, str], _Lost] = {}
        self._begun: dict[int, tuple[_Lost, Delivery]] = {}
        self._bytes = 0

    def note(
        self, group: str, header: Header, delivery: Delivery, *, counts: bool = False, alone: bool = False
    ) -> None:
        """Remember a delivery that was lost.

        Args:
            group: The message's group.
            header: The message's header.
            delivery: The lost delivery.
            counts: Whether it is an attempt all the same: its handler has failed, or had it for too long.
            alone: Whether it is to be handled with nothing else in hand, and there is no copy that says so.
        """
        name = group, _wire.identity(header, delivery.body)
        lost = self._lost.pop(name, None) or _Lost()  # the newest is the last
        if len(self._lost) >= _MOST:
            del self._lost[next(iter(self._lost))]
        self._lost[name] = lost
        lost.times += not counts
        lost.counted += counts
        lost.alone = lost.alone or alone
        if delivery.begun and id(delivery) not in self._begun:
            lost.begun.append(delivery)
            self._begun[id(delivery)] = lost, delivery
            self._bytes += len(delivery.body)
            while self._begun and (len(self._begun) > _MOST_BEGUN or self._bytes > _MOST_BYTES):
                self._drop(*next(iter(self._begun.values())))

    def take_off(self, group: str, delivery: Delivery, header: Header) -> None:
        """Subtract the lost deliveries of a message from its attempt, and what is known to count from the uncertain ones."""
        if lost := self._find(group, header, delivery.body):
            known = min(delivery.uncertain, lost.times)
            delivery.attempt -= known
            delivery.uncertain -= known
            delivery.uncertain -= min(delivery.uncertain, lost.counted)
            if lost.alone:
                delivery.alone = 0

    def was_handled(self, group: str, delivery: Delivery, header: Header) -> bool:
        """Return whether a lost delivery of this message was handled to its end in this process. Each answers one redelivery."""
        lost = self._find(group, header, delivery.body)
        for before in lost.begun if lost else ():
            if before.handled and before.body == delivery.body:
                assert lost is not None
                self._drop(lost, before)
                return True
        return False

    def forget(self, group: str, header: Header, body: bytes) -> None:
        """Forget a message that a copy replaces: the broker counts the copy's deliveries from 0."""
        lost = self._lost.pop((group, _wire.identity(header, body)), None) if self._lost else None
        for delivery in tuple(lost.begun) if lost else ():
            self._drop(lost, delivery)

    def _drop(self, lost: _Lost | None, delivery: Delivery) -> None:
        if lost is not None and self._begun.pop(id(delivery), None) is not None:
            lost.begun.remove(delivery)
            self._bytes -= len(delivery.body)

    def _find(self, group: str, header: Header, body: bytes) -> _Lost | None:
        return self._lost.get((group, _wire.identity(header, body))) if self._lost else None
