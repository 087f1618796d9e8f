"""The delay ladder: a queue for each binary digit of a delay, made when it is first needed. See the README."""

from aiormq.abc import AbstractChannel

from abe_backend_rabbitmq._control import Control
from abe_backend_rabbitmq._topology import Topology, ladder


class Ladder:
    """Knows which rungs there are.

    Args:
        control: Carries the requests.
        topology: The names.
    """

    def __init__(self, control: Control, topology: Topology) -> None:
        self._control = control
        self._names = topology
        self._shared = -1
        self._groups: dict[str, int] = {}

    async def digits(self, group: str, delay: float) -> str:
        """Return the words of a routing key that lead to a group after a delay, once there are the queues to wait in.

        Args:
            group: The group.
            delay: Seconds, above 0.
        """
        level, digits = ladder(delay)
        if self._groups.get(group, -1) < level:
            await self._control.call(lambda channel: self._build(channel, group, level))
        return f"{digits}.{group}"

    async def retry(self, group: str, delay: float) -> tuple[str, str]:
        """Return the exchange and the routing key that bring a message back to its group after a delay."""
        return self._names.delay, f"0.{await self.digits(group, delay)}"

    def forget(self, group: str | None = None) -> None:
        """Make them anew when they are needed next: one was deleted."""
        if group is None:
            self._shared = -1
            self._groups.clear()
        else:
            self._groups.pop(group, None)

    async def _build(self, channel: AbstractChannel, group: str, level: int) -> None:
        names = self._names
        for rung in range(self._shared + 1, level + 1):
            await channel.exchange_declare(names.rung(rung), exchange_type="topic", durable=True)
            await channel.exchange_bind(
                destination=names.rung(rung - 1), source=names.rung(rung), routing_key=names.climb(rung)
            )
            await channel.exchange_bind(destination=names.rung(rung), source=names.delay, routing_key=names.leap(rung))
            self._shared = rung
        for rung in range(self._groups.get(group, -1) + 1, level + 1):
            queue = names.waiting(group, rung)
            await channel.queue_declare(queue, durable=True, arguments=dict(names.waiting_arguments(rung)))
            await channel.queue_bind(queue, names.rung(rung), names.wait(group, rung))
            self._groups[group] = rung
