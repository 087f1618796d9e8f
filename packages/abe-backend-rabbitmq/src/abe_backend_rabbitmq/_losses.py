"""Lost connections are no attempts: what was in our hands when a channel went comes back uncounted.

RabbitMQ counts a delivery that comes back for whatever reason, also where the message was only buffered. This process knows better: it is
still there, so that no message can have killed it. Pure.
"""

from typing import Final

from abe.backends.message_queue.base import Delivery
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._wire import Header

_MOST: Final = 65_536
"""Messages remembered: as many as one consumer can hold."""


class Losses:
    """How often each message was lost with a channel since its copy in the queue was made; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, str], int] = {}

    def note(self, group: str, header: Header, body: bytes) -> None:
        """Remember that a message was lost, and the broker counts it."""
        name = group, _wire.identity(header, body)
        times = self._times.pop(name, 0)  # the newest is the last
        if len(self._times) >= _MOST:
            del self._times[next(iter(self._times))]
        self._times[name] = times + 1

    def take_off(self, group: str, delivery: Delivery, header: Header) -> None:
        """Count a delivery as if what was lost had not been delivered."""
        if self._times:
            known = min(delivery.uncertain, self._times.get((group, _wire.identity(header, delivery.body)), 0))
            delivery.attempt -= known
            delivery.uncertain -= known

    def forget(self, group: str, header: Header, body: bytes) -> None:
        """A copy takes the message's place: the broker counts anew."""
        if self._times:
            self._times.pop((group, _wire.identity(header, body)), None)
