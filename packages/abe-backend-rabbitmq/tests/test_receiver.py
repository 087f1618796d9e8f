"""What counts as an attempt, and what is held for how long."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest

from abe import AsyncLoopConsumer, Message
from abe.backends.message_queue.base import Delivery, Disposition, Settlement
from abe.errors import BackendConnectionError, LeaseLostError
from abe_backend_rabbitmq._losses import Losses
from abe_backend_rabbitmq._pace import LONG, OVERDUE, TICKS, WAITED, Pace
from abe_backend_rabbitmq._wire import Header
from abe_contract_tests import bounds

pytestmark = pytest.mark.xdist_group("rabbitmq-node")

Until = Callable[..., Awaitable[None]]


class Link:
    """Relays to the node, and can be cut."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._credentials = parts.netloc.rpartition("@")[0]
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.url = ""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["Link"]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"amqp://{self._credentials}@127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """End every connection without a word."""
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, far_writer]
        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(_relay(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def _relay(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    except ConnectionError:
        pass
    finally:
        target.close()


@pytest.fixture
async def link(lab: Any) -> AsyncIterator[Link]:
    async with Link(lab.url).serve() as link:
        yield link


async def recovered(receiver: Any) -> None:
    """Wait for the loss to be noticed, and begin anew."""
    async with bounds.within(10):
        while True:
            try:
                await receiver.receive(1)
            except BackendConnectionError:
                break
        while True:
            try:
                await receiver.recover([])
            except BackendConnectionError:
                await asyncio.sleep(0.02)
            else:
                return


class TestLostConnections:
    async def test_under_a_flapping_link_every_message_is_handled_and_none_is_given_up(
        self, lab: Any, link: Link, until: Until
    ) -> None:
        """Each handler sees its link cut, eight times, with all the others waiting in the buffer."""
        backend = await lab.backend(url=link.url, groups={"g": ()})
        await asyncio.gather(*(backend.publish("k", {"n": number}) for number in range(20)))
        handled: Counter[int] = Counter()
        finished = asyncio.Event()
        cuts = 0

        async def handle(message: Message) -> None:
            nonlocal cuts
            if cuts < 8:
                cuts += 1
                link.cut()
                await until(lambda: message.lease_lost)
            handled[message["n"]] += 1
            if len(handled) == 20:
                finished.set()

        async with AsyncLoopConsumer(backend, "g", concurrency=2, prefetch=20) as consumer, bounds.within(60):
            running = asyncio.create_task(consumer.run(handle))
            await finished.wait()
            await consumer.shutdown()
            await running
        stats = await backend.stats("g")
        assert (stats.waiting, stats.dead) == (0, 0)

    async def test_what_was_in_our_hands_when_the_link_was_cut_comes_back_uncounted(
        self, lab: Any, link: Link, collect: Any
    ) -> None:
        transport = await lab.transport(url=link.url)
        await transport.declare("g", None, change=False)
        await transport.send(lab.envelopes(10))
        receiver = await lab.receiver(transport)
        for _ in range(6):  # more often than a message may be attempted
            found = await collect(receiver, 10)
            assert [(each.attempt, each.uncertain) for each in found] == [(1, 0)] * 10
            link.cut()
            await recovered(receiver)
        found = await collect(receiver, 10)
        assert not any(await receiver.settle([Settlement(each, Disposition.RETRY, delay=0.1) for each in found]))
        found = await collect(receiver, 10)
        assert [(each.attempt, each.uncertain) for each in found] == [(2, 0)] * 10
        await receiver.settle([Settlement(each, Disposition.RETRY) for each in found])
        found = await collect(receiver, 10)
        assert [each.attempt for each in found] == [3] * 10
        await receiver.ack(found, verify=True)

    async def test_a_handler_that_ends_after_its_link_was_cut_has_handled_its_message(
        self, lab: Any, link: Link, until: Until
    ) -> None:
        backend = await lab.backend(url=link.url, groups={"g": ()})
        direct = await lab.backend()
        await backend.publish("k", {"n": 1})
        runs = 0

        async with bounds.within(20), backend.consume(group="g") as subscription:
            async for message in subscription:
                runs += 1
                if message["n"] == 2:
                    break
                link.cut()
                await until(lambda message=message: message.lease_lost)
                await direct.publish("k", {"n": 2})
        assert runs == 2
        async with bounds.within(20), direct.consume(group="g") as subscription:
            async for message in subscription:
                assert message["n"] == 2
                break

    async def test_who_was_told_that_the_lease_was_lost_gets_the_message_again(
        self, lab: Any, link: Link, until: Until
    ) -> None:
        backend = await lab.backend(url=link.url, groups={"g": ()})
        await backend.publish("k", {"n": 1})
        async with bounds.within(20), backend.consume(group="g") as subscription:
            message = await subscription.receive()
            link.cut()
            await until(lambda: message.lease_lost)
            with pytest.raises(LeaseLostError):
                await message.ack()
            again = await subscription.receive()
            assert (again.id, again.attempt) == (message.id, 1)
            await again.ack()

    async def test_another_process_is_told_how_many_attempts_are_uncertain(
        self, lab: Any, link: Link, collect: Any
    ) -> None:
        transport, other = await lab.transport(url=link.url), await lab.transport()
        await transport.declare("g", None, change=False)
        await transport.send(lab.envelopes(3))
        receiver = await lab.receiver(transport)
        await collect(receiver, 3)
        link.cut()
        receiver = await lab.receiver(other)
        found = await collect(receiver, 3)
        assert [(each.attempt, each.uncertain) for each in found] == [(2, 1)] * 3
        await receiver.ack(found, verify=True)


def test_only_so_many_losses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abe_backend_rabbitmq._losses._MOST", 3)
    losses, headers = Losses(), [Header(b"\0\x80\1" + bytes((48 + n,)), "", "") for n in range(5)]
    for header in headers:
        losses.note("g", header, Delivery(b"", header, 1, 1))
        losses.note("g", header, Delivery(b"", header, 1, 1))
    counted = [Delivery(b"", header, 8, 1, uncertain=3) for header in headers]
    for delivery, header in zip(counted, headers, strict=True):
        losses.take_off("g", delivery, header)
    assert [(each.attempt, each.uncertain) for each in counted] == [(8, 3), (8, 3), (6, 1), (6, 1), (6, 1)]
    losses.forget("g", headers[4], b"")
    again = Delivery(b"", headers[4], 4, 1, uncertain=3)
    losses.take_off("g", again, headers[4])
    assert again.attempt == 4


def test_a_lost_delivery_that_was_an_attempt_is_certain() -> None:
    losses, header = Losses(), Header(b"\0\x80\x011", "", "")
    for counts in (True, False, True):
        losses.note("g", header, Delivery(b"", header, 1, 1), counts=counts)
    delivery = Delivery(b"", header, 6, 1, uncertain=4)
    losses.take_off("g", delivery, header)
    assert (delivery.attempt, delivery.uncertain) == (5, 1)


def test_only_so_many_handled_messages_are_remembered_and_each_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abe_backend_rabbitmq._losses._MOST_BEGUN", 3)
    losses, header = Losses(), Header(b"\0\x80\x011", "", "")
    begun = [Delivery(b"%d" % number, header, 1, 1) for number in range(4)]
    for delivery in begun:
        delivery.begun = True
        losses.note("g", header, delivery)
    again = [Delivery(b"%d" % number, header, 2, 2, uncertain=1) for number in range(4)]
    assert not any(losses.was_handled("g", delivery, header) for delivery in again)
    for delivery in begun:
        delivery.handled = True
    assert not any(losses.was_handled("other", delivery, header) for delivery in again)
    assert [losses.was_handled("g", delivery, header) for delivery in again] == [False, True, True, True]
    assert not any(losses.was_handled("g", delivery, header) for delivery in again)
    assert (losses._begun, losses._bytes) == ({}, 0)


def test_only_so_many_bytes_of_handled_messages_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abe_backend_rabbitmq._losses._MOST_BYTES", 100)
    losses, header = Losses(), Header(b"\0\x80\x011", "", "")
    for number in range(10):
        delivery = Delivery(b"%d" % number * 30, header, 1, 1)
        delivery.begun = delivery.handled = True
        losses.note("g", header, delivery)
        losses.note("g", header, delivery)  # lost twice, held once
    assert losses._bytes == 90
    assert losses.was_handled("g", Delivery(b"9" * 30, header, 2, 2), header)
    assert not losses.was_handled("g", Delivery(b"1" * 30, header, 2, 2), header)
    losses.forget("g", header, b"")
    assert (losses._begun, losses._bytes) == ({}, 0)


class TestLongHandlers:
    async def test_what_waits_is_given_back_before_the_broker_takes_it_and_comes_again_in_order(
        self, lab: Any, collect: Any, until: Until
    ) -> None:
        transport = await lab.transport()
        transport._broker.consumer_timeout = 2.4
        await transport.declare("g", None, change=False)
        envelopes = lab.envelopes(8)
        await transport.send(envelopes)
        receiver = await lab.receiver(transport, prefetch=5)
        handled: list[str] = []
        waiting: list[Delivery] = []
        again = 0
        async with bounds.within(30):
            while len(handled) < 8:
                waiting = [each for each in waiting if not each.lost]
                while not waiting:
                    waiting += await receiver.receive(5)
                first = waiting.pop(0)
                assert (first.attempt, first.uncertain) == (1, 0)
                first.begun = True
                if len(handled) < 3 and waiting:
                    await until(partial(getattr, waiting[-1], "lost"))  # the handler takes that long
                    again += 1
                assert receiver.in_flight <= 5
                assert not first.lost
                handled.append(receiver.metadata(first).id)
                assert not any(await receiver.ack([first], verify=True))
        assert handled == [each.id for each in envelopes]
        assert again
        assert await lab.waiting(lab.names.queue("g")) == 0

    async def test_who_is_slow_holds_less_and_who_is_fast_again_holds_all(
        self, lab: Any, collect: Any, until: Until
    ) -> None:
        transport = await lab.transport()
        transport._broker.consumer_timeout = 1.2
        await transport.declare("g", None, change=False)
        await transport.send(lab.envelopes(200))
        receiver = await lab.receiver(transport, prefetch=20)
        found = await collect(receiver, 20)
        found[0].begun = True
        await until(lambda: found[1].lost and receiver.in_flight == 2)
        assert not any(await receiver.ack([found[0]], verify=True))
        most = done = 0
        async with bounds.within(30):
            while most < 19:
                page = await receiver.receive(20)
                for each in page:
                    each.begun = True
                most = max(most, receiver.in_flight)
                done += len(page)
                assert receiver.in_flight <= 20
                assert not any(await receiver.ack(page, verify=False))
                if done > 100:
                    done = 0
                    await transport.send(lab.envelopes(100))

    async def test_a_message_that_its_handler_had_for_too_long_has_used_an_attempt_and_those_beside_it_have_not(
        self, lab: Any, collect: Any, until: Until
    ) -> None:
        transport = await lab.transport()
        transport._broker.consumer_timeout = 1.2
        await transport.declare("g", None, change=False)
        await transport.send([lab.envelope(body=b"%d" % number) for number in range(3)])
        receiver = await lab.receiver(transport, prefetch=3)
        found = await collect(receiver, 3)
        found[0].begun = True
        await until(lambda: receiver._consuming.pace.handled_for(1, LONG))
        found[1].begun = True
        receiver._drop(receiver._channel, "delivery acknowledgement on channel 1 timed out")
        await receiver.recover([])
        again = {each.body: each.attempt for each in await collect(receiver, 3)}
        assert again == {b"0": 2, b"1": 1, b"2": 1}

    async def test_stopping_while_it_takes_anew_gives_everything_back(
        self, lab: Any, collect: Any, until: Until
    ) -> None:
        transport = await lab.transport()
        await transport.declare("g", None, change=False)
        await transport.send(lab.envelopes(20))
        for pause in range(12):
            receiver = await transport.subscribe("g", 10)
            found = await collect(receiver, 5)
            found[0].begun = True
            receiver._consuming.adapt(receiver._consuming.consume_anew(3))
            for _ in range(pause):
                await asyncio.sleep(0)
            await receiver.stop()
            assert await receiver.receive(5) == ()
            await receiver.close()
        assert await lab.waiting(lab.names.queue("g")) == 20


def test_the_age_of_a_message_is_known_by_the_newest_of_each_tick() -> None:
    assert WAITED < OVERDUE < TICKS
    pace = Pace()
    assert not pace.held_for(1, 1)
    assert pace.settled_in(WAITED, 7) == 7
    for tick in range(1, OVERDUE + 5):
        pace.tick(10 * tick, 3 * tick, [tick, 1, 1000 if tick > 4 else 2])
    assert pace.held_for(10 * (OVERDUE + 4), 1)
    assert not pace.held_for(10 * (OVERDUE + 4) + 1, 1)
    assert pace.held_for(50, OVERDUE)
    assert not pace.held_for(51, OVERDUE)
    assert pace.settled_in(2, 3 * (OVERDUE + 4)) == 3
    assert pace.handled_for(1, OVERDUE + 4)
    assert pace.handled_for(1000, OVERDUE)
    assert not pace.handled_for(1000, OVERDUE + 1)
    assert not pace.handled_for(2, 1)
    pace.forget()
    assert not pace.held_for(1, 1)
    assert not pace.handled_for(1, 1)
