"""What a channel promises, on a real node."""

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast
from uuid import uuid4

import pytest
import uvloop
from yarl import URL

from abe.backends.message_queue.base import Delivery, Envelope
from abe.errors import BackendConnectionError, BackpressureError, PublishUnknownError, UnroutableError
from abe_backend_rabbitmq import RabbitMQSettings, _wire
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import Connection
from abe_backend_rabbitmq._wire import Header
from abe_contract_tests import bounds
from abe_contract_tests.services._process import ProcessService

pytestmark = pytest.mark.xdist_group("rabbitmq-node")

QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": 100}
Connect = Callable[..., Awaitable[Connection]]
Until = Callable[..., Awaitable[None]]


@asynccontextmanager
async def connecting(node: ProcessService) -> AsyncIterator[Connect]:
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    async with AsyncExitStack() as stack:

        async def make(url: str = "", *, heartbeat: float = 20.0) -> Connection:
            url = url or node.url
            connection = Connection(RabbitMQSettings(url=url, heartbeat=heartbeat), url, "test")
            await connection.open()
            stack.push_async_callback(connection.close)
            return connection

        yield make


@asynccontextmanager
async def making_queue(node: ProcessService) -> AsyncIterator[str]:
    connection = Connection(RabbitMQSettings(url=node.url), node.url, "test")
    await connection.open()
    name = f"test-{uuid4().hex}"
    channel = await connection.plain()
    await channel.queue_declare(name, durable=True, arguments=cast("Any", QUORUM))
    yield name
    await channel.queue_delete(name)
    await connection.close()


@pytest.fixture
async def connect(node: ProcessService) -> AsyncIterator[Connect]:
    """Connect to the shared node, or to a proxy before it."""
    async with connecting(node) as connect:
        yield connect


@pytest.fixture
async def queue(node: ProcessService) -> AsyncIterator[str]:
    """An empty quorum queue."""
    async with making_queue(node) as queue:
        yield queue


class Proxy:
    """Relays to the node; what comes back can be cut into pieces, cut off, or held."""

    def __init__(self, url: str) -> None:
        self._target = URL(url)
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard = asyncio.Event()
        self.url = ""
        self.piece: Callable[[], int] | None = None
        self.budget: int | None = None
        self._heard.set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Proxy"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = str(self._target.with_port(server.sockets[0].getsockname()[1]))
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def mute(self) -> None:
        """Read nothing more from the client, and let nothing through to it."""
        self._heard.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._target.host, self._target.port)
        for work in (self._up(reader, far_writer), self._down(far_reader, writer)):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._heard.wait()
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                while data:
                    await self._heard.wait()
                    size = len(data) if self.piece is None else self.piece()
                    if self.budget is not None:
                        size = min(size, self.budget)
                        self.budget -= len(data[:size])
                    writer.write(data[:size])
                    data = data[size:]
                    await writer.drain()
                    if self.budget == 0:
                        writer.close()
                        return
                    await asyncio.sleep(0)
        except ConnectionError:
            pass
        finally:
            writer.close()


class Inbox:
    """Holds what a channel delivers."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.got: list[tuple[int, Header, bytes, bool]] = []

    def __call__(self, tag: int, header: Header, body: bytes, redelivered: bool) -> None:
        self.channel.in_flight[tag] = _wire.delivery(tag, header, body, redelivered), header
        self.got.append((tag, header, body, redelivered))


_serial = itertools.count()


def outgoing(key: str, body: bytes = b"{}", *, headers: dict[str, str] | None = None, exchange: str = "") -> Outgoing:
    id = f"id-{next(_serial)}"
    return Outgoing(exchange, key, _wire.pack(Envelope(id, key, body, 1_700_000_000_000, headers)), body, id)


async def waiting(connection: Connection, queue: str) -> int:
    channel = await connection.plain()
    count = (await channel.queue_declare(queue, passive=True)).message_count
    await channel.close()
    return count or 0


def kinds(outcomes: Any, count: int) -> list[type | None]:
    return [None if outcome is None else type(outcome) for outcome in outcomes or [None] * count]


async def mixed(connection: Connection, queue: str, until: Until, count: int) -> None:
    """Publish what is taken, what is returned and what is refused, in all sizes, beside requests, deliveries and what settles them."""
    rnd = random.Random(1)
    full = f"{queue}-full"
    plain = await connection.plain()
    await plain.queue_declare(
        full, durable=True, arguments=QUORUM | {"x-max-length": 2, "x-overflow": "reject-publish"}
    )
    subscriber, publisher = await connection.channel(), await connection.channel()
    got: dict[str, tuple[Any, bytes]] = {}
    again: Counter[str] = Counter()
    settling: set[asyncio.Task[None]] = set()

    async def settle(tag: int, id: str, body: bytes, delivery: Delivery, header: Header) -> None:
        await asyncio.sleep(rnd.random() / 50)
        if rnd.random() < 0.2 and again[id] < 5:
            again[id] += 1
            await subscriber.requeue(tag)
            return
        metadata = _wire.metadata(header, body)
        assert delivery.attempt == again[id] + 1
        assert metadata.id == id
        got[id] = metadata.headers, body
        await subscriber.ack([tag])
        if rnd.random() < 0.2:
            await subscriber.ack([tag])  # settled twice: the second is left out

    def deliver(tag: int, header: Header, body: bytes, redelivered: bool) -> None:
        delivery = _wire.delivery(tag, header, body, redelivered)
        subscriber.in_flight[tag] = delivery, header
        task = asyncio.create_task(settle(tag, _wire.message_id(header.properties), body, delivery, header))
        settling.add(task)
        task.add_done_callback(settling.discard)

    tag = await subscriber.consume(queue, 50, deliver)
    want: dict[str, tuple[Any, bytes]] = {}
    flights: list[tuple[list[str], asyncio.Future[Any]]] = []
    number = 0
    while number < count:
        batch, fate = [], []
        for _ in range(rnd.randrange(1, 9)):
            number += 1
            to = "nowhere" if number % 7 == 3 else full if number % 11 == 5 else queue
            size = 300_000 if count > 500 and number % 100 == 50 else rnd.choice((0, 1, 200, 4096))
            headers = {"name": "é", "long": "x" * rnd.randrange(50)} if rnd.random() < 0.8 else None
            message = outgoing(to, rnd.randbytes(size), headers=headers)
            batch.append(message)
            fate.append(to)
            if to == queue:
                want[message.id] = headers, message.body
        flights.append((fate, publisher.publish(batch)))
        if number % 13 == 0:
            await plain.queue_declare(queue, passive=True)
        await asyncio.sleep(0)
    found: Counter[tuple[str, type | None]] = Counter()
    for fate, future in flights:
        found.update(zip(fate, kinds(await future, len(fate)), strict=True))
    assert found["nowhere", UnroutableError] == sum(fate.count("nowhere") for fate, _ in flights)
    assert found[queue, None] == len(want)
    assert found[full, None] >= 2
    assert found[full, None] + found[full, BackpressureError] == sum(fate.count(full) for fate, _ in flights)
    async with bounds.within(10):  # a queue says that it is full a little after it is
        while kinds(await publisher.publish([outgoing(full), outgoing("nowhere")]), 2) != [
            BackpressureError,
            UnroutableError,
        ]:
            pass
    await until(lambda: len(got) == len(want))
    assert got == want
    assert sum(again.values()) > 0
    await until(lambda: not settling)
    await subscriber.native.basic_cancel(tag)
    await subscriber.close()
    await publisher.close()
    assert await waiting(connection, queue) == 0
    assert connection.alive
    await plain.queue_delete(full)


async def test_traffic_of_every_kind_on_one_connection(connect: Connect, queue: str, until: Until) -> None:
    await mixed(await connect(), queue, until, 600)


@pytest.mark.parametrize("longest", [9, 3000])
async def test_traffic_of_every_kind_in_small_pieces(
    connect: Connect, node: ProcessService, queue: str, until: Until, longest: int
) -> None:
    rnd = random.Random(3)
    async with Proxy(node.url).serve() as proxy:
        connection = await connect(proxy.url)
        proxy.piece = lambda: rnd.randrange(1, longest + 1)
        await mixed(connection, queue, until, 600 if longest > 100 else 150)
        await connection.close()


async def test_a_consumer_that_the_broker_cancels_is_told(connect: Connect, until: Until) -> None:
    connection = await connect()
    channel, control = await connection.channel(), await connection.plain()
    name = f"test-{uuid4().hex}"
    await control.queue_declare(name, durable=True, arguments=cast("Any", QUORUM))
    cancelled: list[Any] = []
    channel.native.on_consumer_cancel_callbacks.add(cancelled.append)
    tag = await channel.consume(name, 10, Inbox(channel))
    await control.queue_delete(name)
    await until(lambda: cancelled)
    assert cancelled[0].consumer_tag == tag
    assert (channel.closed, connection.alive) == (None, True)


async def test_a_channel_that_the_broker_closes_takes_no_other_with_it(
    connect: Connect, queue: str, until: Until
) -> None:
    connection = await connect()
    channel, other = await connection.channel(), await connection.channel()
    ended: list[str | None] = []
    channel.ended = lambda: ended.append(channel.closed)
    inbox = Inbox(channel)
    await channel.consume(queue, 10, inbox)
    assert not await other.publish([outgoing(queue), outgoing(queue)])
    await until(lambda: len(inbox.got) == 2)
    delivery, header = channel.in_flight[1]
    channel.in_flight[12345] = delivery, header
    await channel.ack([12345])  # a tag that the broker does not know
    await until(lambda: channel.closed is not None)
    assert "PRECONDITION_FAILED" in str(channel.closed)
    assert ended == [channel.closed]
    assert delivery.lost
    assert not channel.in_flight
    await channel.ack([1])
    with pytest.raises(BackendConnectionError, match="PRECONDITION_FAILED"):
        channel.publish([outgoing(queue)])
    assert kinds(await other.publish([outgoing("nowhere"), outgoing(queue)]), 2) == [UnroutableError, None]
    assert connection.alive
    again = await connection.channel()
    inbox = Inbox(again)
    await again.consume(queue, 10, inbox)
    await until(lambda: len(inbox.got) == 3)
    assert [redelivered for _, _, _, redelivered in inbox.got[:2]] == [
        True,
        True,
    ]  # the queue may have sent the third to the dying one


async def test_what_is_published_to_nothing_is_unknown_and_the_channel_goes(connect: Connect) -> None:
    channel = await (await connect()).channel()
    outcomes = await channel.publish([outgoing("k", exchange=f"no-{uuid4().hex}")])
    assert kinds(outcomes, 1) == [PublishUnknownError]
    assert "NOT_FOUND" in str(outcomes[0])
    assert channel.closed is not None


@pytest.mark.parametrize("cut", [3_000, 8_011, 20_011])
async def test_a_connection_that_is_cut_in_a_frame_leaves_nothing_in_doubt_that_is_certain(
    connect: Connect, node: ProcessService, queue: str, until: Until, cut: int
) -> None:
    feeder = await (await connect()).channel()
    assert not await feeder.publish([outgoing(queue, b"b" * 200) for _ in range(100)])
    async with Proxy(node.url).serve() as proxy:
        connection = await connect(proxy.url)
        channel = await connection.channel()
        inbox = Inbox(channel)
        proxy.budget = cut
        future = channel.publish([outgoing("nowhere"), *(outgoing(queue, b"b" * 200) for _ in range(100))])
        await channel.consume(queue, 200, inbox)
        await until(lambda: channel.closed is not None)
        outcomes = kinds(await future, 101)
        assert set(outcomes) <= {None, UnroutableError, PublishUnknownError}
        assert len(inbox.got) < 200
        assert not channel.in_flight
        with pytest.raises(BackendConnectionError):
            channel.publish([outgoing(queue)])
        await until(lambda: not connection.alive)
    known = sum(outcome is None for outcome in outcomes)
    control = await connect()
    count = 0
    async with bounds.within(10):
        while count < 100 + known:
            count = await waiting(control, queue)
    assert count <= 200


async def test_deliveries_of_a_lost_connection_are_marked_lost(
    connect: Connect, node: ProcessService, queue: str, until: Until
) -> None:
    async with Proxy(node.url).serve() as proxy:
        connection = await connect(proxy.url)
        channel = await connection.channel()
        inbox = Inbox(channel)
        await channel.consume(queue, 10, inbox)
        assert not await channel.publish([outgoing(queue) for _ in range(5)])
        await until(lambda: len(inbox.got) == 5)
        deliveries = [delivery for delivery, _ in channel.in_flight.values()]
        await channel.ack([1, 2])
        proxy.budget = 1
        future = channel.publish([outgoing(queue)])
        await until(lambda: channel.closed is not None)
        assert [delivery.lost for delivery in deliveries] == [False, False, True, True, True]
        assert kinds(await future, 1) == [PublishUnknownError]
        await channel.ack([3, 4, 5])
        await channel.requeue(3)


@pytest.mark.parametrize("size", [200, 2_000_000], ids=["small", "more than the socket takes"])
async def test_a_broker_that_falls_silent_is_given_up(
    connect: Connect, node: ProcessService, queue: str, size: int
) -> None:
    async with Proxy(node.url).serve() as proxy:
        connection = await connect(proxy.url, heartbeat=1)
        channel = await connection.channel()
        proxy.mute()
        async with bounds.within(20):
            outcomes = await channel.publish([outgoing(queue, b"x" * size) for _ in range(10)])
        assert kinds(outcomes, 10) == [PublishUnknownError] * 10
        assert channel.closed is not None
        assert not connection.alive


async def test_a_busy_connection_is_not_taken_for_a_silent_one(connect: Connect, queue: str) -> None:
    """aiormq gives up after 6 s without a frame. It sees none of these confirms."""
    connection = await connect(heartbeat=1)
    channel = await connection.channel()
    loop = asyncio.get_running_loop()
    end = loop.time() + 8
    while loop.time() < end:
        assert not await channel.publish([outgoing(queue)])
        await asyncio.sleep(0.02)  # slower than a heartbeat is late, faster than one is sent
    assert (channel.closed, connection.alive) == (None, True)


async def test_a_close_beside_acknowledgements_costs_neither_those_before_it_nor_the_connection(
    connect: Connect, queue: str, until: Until
) -> None:
    connection = await connect()
    feeder, control = await connection.channel(), await connection.plain()
    for _ in range(5):
        assert not await feeder.publish([outgoing(queue) for _ in range(200)])
        channel = await connection.channel()
        inbox = Inbox(channel)
        consumer = await channel.consume(queue, 0, inbox)
        await until(lambda inbox=inbox: len(inbox.got) == 200)
        tags = [tag for tag, _, _, _ in inbox.got]
        await asyncio.gather(*(channel.ack(tags[start::10]) for start in range(5)))
        await channel.native.basic_cancel(consumer)  # its answer comes after the queue has seen what came before
        await asyncio.gather(
            *(channel.ack(tags[start::10]) for start in (5, 6)),
            channel.close(),
            *(channel.ack(tags[start::10]) for start in (7, 8, 9)),
        )
        assert connection.alive
        async with bounds.within(10):
            while not (left := (await control.queue_declare(queue, passive=True)).message_count):
                pass
        assert 60 <= (left or 0) <= 100
        await control.queue_purge(queue)


async def test_a_message_whose_callback_raises_comes_again(
    connect: Connect, queue: str, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    connection = await connect()
    channel = await connection.channel()
    inbox = Inbox(channel)
    failures: list[bytes] = []

    def deliver(tag: int, header: Header, body: bytes, redelivered: bool) -> None:
        if body == b"bad" and len(failures) < 3:
            failures.append(body)
            raise KeyError("of no use")
        inbox(tag, header, body, redelivered)

    await channel.consume(queue, 10, deliver)
    assert not await channel.publish([outgoing(queue, body) for body in (b"good", b"bad", b"better")])
    await until(lambda: len(inbox.got) == 3)
    assert sorted(body for _, _, body, _ in inbox.got) == [b"bad", b"better", b"good"]
    assert len(failures) == 3
    assert "goes back to its queue" in caplog.text
    await channel.ack([tag for tag, _, _, _ in inbox.got])
    await channel.native.basic_qos(prefetch_count=1)
    await channel.close()
    assert await waiting(connection, queue) == 0


async def test_messages_of_one_id_have_each_their_own_outcome(connect: Connect, queue: str) -> None:
    channel = await (await connect()).channel()
    one = outgoing(queue)
    batch = [one, one._replace(key="nowhere"), one, one._replace(key="elsewhere"), one._replace(key="nowhere")]
    outcomes = await channel.publish(batch)
    assert kinds(outcomes, 5) == [None, UnroutableError, None, UnroutableError, UnroutableError]


async def test_settlements_do_not_wait_for_ever_for_a_connection_that_is_gone(
    connect: Connect, node: ProcessService, queue: str, until: Until
) -> None:
    async with Proxy(node.url).serve() as proxy:
        connection = await connect(proxy.url)
        channel = await connection.channel()
        inbox = Inbox(channel)
        await channel.consume(queue, 0, inbox)
        assert not await channel.publish([outgoing(queue) for _ in range(200)])
        await until(lambda: len(inbox.got) == 200)
        acks = [asyncio.ensure_future(channel.ack([tag])) for tag in range(200, 1, -1)]
        await connection.close()
        async with bounds.within(5):
            await asyncio.gather(*acks, return_exceptions=True)
            await channel.close()


@pytest.mark.parametrize("longest", [None, 3000])
def test_traffic_of_every_kind_by_another_event_loop(node: ProcessService, until: Until, longest: int | None) -> None:
    """Transports of uvloop are none of asyncio's classes."""
    rnd = random.Random(3)

    async def traffic() -> None:
        async with connecting(node) as connect, making_queue(node) as queue, Proxy(node.url).serve() as proxy:
            connection = await connect(proxy.url)
            proxy.piece = longest and (lambda: rnd.randrange(1, longest + 1))
            await mixed(connection, queue, until, 600)
            channel = await connection.channel()
            proxy.budget, proxy.piece = 1, None
            assert kinds(await channel.publish([outgoing(queue)]), 1) == [PublishUnknownError]
            await until(lambda: not connection.alive)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(traffic())
