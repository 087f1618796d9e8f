"""What the transport and its receivers share: the connections, the groups, the publisher, the delays."""

from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import GroupMissingError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import Link
from abe_backend_rabbitmq._control import Control
from abe_backend_rabbitmq._delays import Delays, Place
from abe_backend_rabbitmq._groups import Groups
from abe_backend_rabbitmq._losses import Losses
from abe_backend_rabbitmq._pace import CONSUMER_TIMEOUT
from abe_backend_rabbitmq._parked import Parked
from abe_backend_rabbitmq._publisher import Publisher
from abe_backend_rabbitmq._registry import RegistryKeeper
from abe_backend_rabbitmq._settings import RabbitMQSettings
from abe_backend_rabbitmq._topology import Topology
from abe_backend_rabbitmq._tried import Tried


class Broker:
    """One namespace in one vhost.

    It has three connections: one publishes, one consumes, one carries requests (control). A broker that is short of memory stops reading
    from connections that publish; acknowledgements and requests must not wait for that.

    Args:
        settings: The provider's settings.
    """

    def __init__(self, settings: RabbitMQSettings) -> None:
        timeout = settings.publish_timeout
        self.settings = settings
        self.topology = Topology(settings.namespace, settings.exchange, settings.max_backlog)
        self.losses = Losses()
        self.consumer_timeout = CONSUMER_TIMEOUT
        """The node's `consumer_timeout` in seconds: RabbitMQ's default, until an error of the node names another."""
        self.control = Control(Link(settings, "abe-control"))
        self.tried = Tried(self.control, self.topology)
        self.publisher = Publisher(settings, self.prepare)
        self.delays = Delays(self.topology, lambda group, level: self.groups.build(group, level))
        self.registry = RegistryKeeper(self.control, self.topology, timeout, self._check_writable)
        self.groups = Groups(self.control, self.registry, self.delays, self.topology, self._tell)
        self.parked = Parked(self.control, self.publisher, self.registry, self.delays, self.topology, timeout)
        self._consuming = Link(settings, "abe-consume")

    async def close(self) -> None:
        """Close the connections. Call `RegistryKeeper.close` first, which cancels the registry's tasks."""
        await gather_all(self.publisher.close(), self._consuming.close(), self.control.close())

    async def prepare(self) -> None:
        """Declare the exchanges and queues that every namespace has."""
        await self.groups.prepare(await self.control.connection())

    async def consume_channel(self) -> Channel:
        """Open a channel on the connection to consume."""
        return await (await self._consuming.get()).channel()

    async def place(self, group: str, delay: float) -> Place:
        """Return where a delayed message waits; declare the group again if it was deleted underneath."""
        try:
            return await self.delays.place(group, delay)
        except GroupMissingError:
            await self.groups.restore(group)
            return await self.delays.place(group, delay)

    async def _tell(self, news: str) -> None:
        """Announce news to all consumers of the namespace; there need be none."""
        await self.publisher.move([Outgoing(self.topology.news, "", _wire.NEWS, news.encode(), "")])

    async def _check_writable(self) -> None:
        """Check that the broker accepts messages, by publishing one. (It accepts one without a body even while it is blocked.)

        Raises:
            BlockedError: The broker is short of memory or disk.
        """
        await self._tell("writing")
