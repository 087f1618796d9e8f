"""Records that handlers have begun on messages with nothing else in hand: evidence against a message that kills its process.

A record is an empty queue that expires. RabbitMQ counts deliveries that no client saw: its count alone is no evidence.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from abe.backends.message_queue.base import Delivery
from abe.errors import AbeError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._control import Control
from abe_backend_rabbitmq._topology import Topology
from abe_backend_rabbitmq._wire import Header

_LASTS: Final = 3_600_000
"""Milliseconds after which a record expires: the time a consumer has to come back after it was killed."""

_ARGUMENTS: Final[Mapping[str, Any]] = {"x-queue-type": "quorum", "x-expires": _LASTS}


class Tried:
    """The records of one namespace.

    Args:
        control: Carries the requests.
        topology: The names.
    """

    def __init__(self, control: Control, topology: Topology) -> None:
        self._control = control
        self._names = topology

    async def begin(self, group: str, name: str, delivery: Delivery) -> int:
        """Record that a handler begins, unless one has begun before; return how often that has happened, 0 or 1.

        Args:
            group: The message's group.
            name: The record's name, from the message.
            delivery: The message, as it was delivered.

        Raises:
            AbeError: The broker cannot be asked.
        """
        queue = self._names.tried(group, name)
        assert isinstance(delivery.header, Header)
        if not is_ours(delivery, delivery.header) and await self._control.count(queue) is not None:
            return 1
        await self._control.call(lambda channel: channel.queue_declare(queue, durable=True, arguments=dict(_ARGUMENTS)))
        return 0

    async def withdraw(self, group: str, delivery: Delivery, header: Header) -> None:
        """Delete the record of a message that returns to its queue without having been handled, or after a failure."""
        if delivery.alone == 0:
            with suppress(AbeError):
                await self.forget(group, name_of(delivery, header))

    async def forget(self, group: str, name: str) -> None:
        """Delete a record, if it is there; raises as `begin` does."""
        await self._control.call(lambda channel: channel.queue_delete(self._names.tried(group, name)))


def name_of(delivery: Delivery, header: Header) -> str:
    """Return the name of a message's record; empty: it is not to be handled alone.

    A copy has one of its own. Where there could be no copy, of a message that this process is to handle alone (`Losses`), it is made of
    what the message is at each delivery.
    """
    return _wire.alone(header) or ("" if delivery.alone is None else _wire.digest(header, delivery.body))


def is_ours(delivery: Delivery, header: Header) -> bool:
    """Return whether a copy has come back for nothing but connections and channels that this process lost."""
    uncertain, returned = _wire.doubts(header)
    return returned > 0 and delivery.uncertain <= uncertain
