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


class Broker:
    """One namespace in one vhost.

    There is a connection to publish, one to consume, and one for what is rare: a broker that is short of memory stops reading from those
    that publish, and acknowledgements and requests must go on.

    Args:
        settings: Where to, and as whom.
    """

    def __init__(self, settings: RabbitMQSettings) -> None:
        timeout = settings.publish_timeout
        self.settings = settings
        self.topology = Topology(settings.namespace, settings.exchange, settings.max_backlog)
        self.losses = Losses()
        self.consumer_timeout = CONSUMER_TIMEOUT
        """The node's, in seconds, as far as we know."""
        self.control = Control(Link(settings, "abe-control"))
        self.publisher = Publisher(settings, self.prepare)
        self.delays = Delays(self.topology, lambda group, level: self.groups.build(group, level))
        self.registry = RegistryKeeper(self.control, self.topology, timeout, self._check_writable)
        self.groups = Groups(self.control, self.registry, self.delays, self.topology, self._tell)
        self.parked = Parked(self.control, self.publisher, self.registry, self.delays, self.topology, timeout)
        self._consuming = Link(settings, "abe-consume")

    async def close(self) -> None:
        """Disconnect. What is under way for the registry must have been given up before, by `RegistryKeeper.close`."""
        await gather_all(self.publisher.close(), self._consuming.close(), self.control.close())

    async def prepare(self) -> None:
        """Make what every namespace has."""
        await self.groups.prepare(await self.control.connection())

    async def consume_channel(self) -> Channel:
        """Open a channel on the connection to consume."""
        return await (await self._consuming.get()).channel()

    async def place(self, group: str, delay: float) -> Place:
        """Return where a message waits; a group that was deleted underneath is made again."""
        try:
            return await self.delays.place(group, delay)
        except GroupMissingError:
            await self.groups.restore(group)
            return await self.delays.place(group, delay)

    async def _tell(self, news: str) -> None:
        """Tell everybody who consumes; nobody needs to listen."""
        await self.publisher.move([Outgoing(self.topology.news, "", _wire.NEWS, news.encode(), "")])

    async def _check_writable(self) -> None:
        """Find out whether the broker takes messages. (One without a body is taken even while it does not.)

        Raises:
            BlockedError: It is short of memory or disk.
        """
        await self._tell("writing")
