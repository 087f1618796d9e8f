"""The memory transport behind a network that fails, and a backend of it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from abe.backends.message_queue.base import (
    Batching,
    DeadLetter,
    Delivery,
    Envelope,
    GroupStats,
    Metadata,
    Outcomes,
    Receiver,
    Receiving,
    Settlement,
    Settling,
    Transport,
)
from abe.backends.message_queue.base.middleware import Middleware
from abe.backends.message_queue.service import memory
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import AbeError, PublishUnknownError
from abe.settings import QueueSettings
from abe.testing.simulation.world import Host
from simulation.broker import Broker, number_of
from simulation.faults import Faults
from simulation.network import Connection

_T = TypeVar("_T")
_FOR_EVER = 1e9


class SimulatedBackend(MemoryBackend):
    """A backend of one host.

    Args:
        settings: The backend's.
        broker: The broker.
        host: Where it runs.
        faults: What happens to its requests.
        batching: How much `send` takes at a time.
        receiving: How many receives there are at once.
        settling: How much settlements take at a time.
        leased: Whether deliveries have leases.
        middleware: Wraps each publish.
    """

    def __init__(
        self,
        settings: QueueSettings,
        *,
        broker: Broker,
        host: Host,
        faults: Faults,
        batching: Batching,
        receiving: Receiving,
        settling: Settling,
        leased: bool,
        middleware: Sequence[Middleware],
    ) -> None:
        super().__init__(settings, clock=host.clock, middleware=middleware)
        if not leased:
            self.capabilities = replace(self.capabilities, lease=None)
        self._broker = broker
        self._host = host
        self._faults = faults
        self._batching = batching
        self._receiving = receiving
        self._settling = settling
        self.connections: list[Connection] = []
        """Those that were made: the transport's, and each receiver's."""

    def make_transport(self) -> Transport:
        """Return a transport over a new connection."""
        leased = self.capabilities.lease is not None
        settings = self.settings if leased else replace(self.settings, lease=_FOR_EVER)
        inner = memory.MemoryTransport(settings, self._broker)
        return FaultyTransport(inner, self.connect_one, self._batching, self._receiving, self._settling, leased=leased)

    def connect_one(self) -> Connection:
        """Return a new connection."""
        connection = Connection(self._broker, self._host, self._faults)
        self.connections.append(connection)
        return connection


class FaultyTransport:
    """The memory transport over a connection that fails.

    Args:
        inner: The memory transport.
        connect: Makes a connection.
        batching: As `Transport.batching`.
        receiving: As `Transport.receiving`.
        settling: As `Transport.settling`.
    """

    def __init__(
        self,
        inner: Transport,
        connect: Callable[[], Connection],
        batching: Batching,
        receiving: Receiving,
        settling: Settling,
        *,
        leased: bool,
    ) -> None:
        self.batching = batching
        self.receiving = receiving
        self.settling = settling
        self._inner = inner
        self._leased = leased
        self._connect = connect
        self._connection = connect()
        self._broker = self._connection.broker
        self._sent: dict[int, tuple[Envelope, AbeError | None]] = {}

    async def open(self) -> None:
        await self._connection.ask("open", self._inner.open)

    async def close(self) -> None:
        with suppress(AbeError):  # it disconnects all the same
            await self._connection.ask("close", self._inner.close)

    async def ping(self) -> None:
        await self._connection.ask("ping", self._inner.ping)

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        numbers = [number_of(envelope) for envelope in envelopes]
        history = self._broker.history
        history.note(self._connection.host.name, "send", " ".join(f"m{number}" for number in numbers))
        for envelope in envelopes:
            before, outcome = self._sent.get(id(envelope), (None, None))
            if before is envelope and (outcome is None or not outcome.retryable):
                history.violated(f"m{number_of(envelope)} is sent again after its final outcome {outcome!r}")
        limits = self.batching
        if len(envelopes) > limits.messages or sum(len(each.body) for each in envelopes[:-1]) >= limits.bytes:
            history.violated(f"{len(envelopes)} messages in one batch, of {limits.messages}, or too many bytes")
        faults = self._connection.faults
        partial = faults.draw() == "entry"

        async def work() -> Outcomes:
            if not partial:
                return await self._inner.send(envelopes)
            drawn = [faults.entry_of_send() for _ in envelopes]
            stored = iter(await self._inner.send([e for e, (_, store) in zip(envelopes, drawn, strict=True) if store]))
            outcomes = [(next(stored) if store else None, error) for error, store in drawn]
            return [error if error is not None else real for real, error in outcomes]

        try:
            outcomes = await self._connection.ask("send", work, PublishUnknownError)
        except AbeError as exc:
            for envelope in envelopes:
                self._sent[id(envelope)] = envelope, exc
            raise
        for envelope, result in zip(envelopes, outcomes, strict=True):
            self._sent[id(envelope)] = envelope, result
        if partial:
            told = [f"m{n} {type(each).__name__}" for n, each in zip(numbers, outcomes, strict=True) if each]
            history.note(self._connection.host.name, "partial", " ".join(told))
        return outcomes

    async def declare(self, group: str, patterns: tuple[str, ...] | None, *, change: bool) -> tuple[str, ...]:
        return await self._connection.ask("declare", lambda: self._inner.declare(group, patterns, change=change))

    async def delete_group(self, group: str) -> None:
        async def work() -> None:
            await self._inner.delete_group(group)
            self._broker.group_gone(group)

        await self._connection.ask("delete", work)

    async def delete_namespace(self) -> None:
        async def work() -> None:
            groups = list(await self._inner.groups())
            await self._inner.delete_namespace()
            for group in groups:
                self._broker.group_gone(group)

        await self._connection.ask("delete_all", work)

    async def groups(self) -> Mapping[str, tuple[str, ...]]:
        return await self._connection.ask("groups", self._inner.groups)

    async def subscribe(self, group: str, prefetch: int) -> Receiver:
        connection = self._connect()

        async def work() -> Receiver:
            receiver = await self._inner.subscribe(group, prefetch)
            self._broker.joined(receiver, connection.host.name, prefetch)
            return FaultyReceiver(receiver, connection, group, self, leased=self._leased)

        return await connection.ask("subscribe", work)

    async def stats(self, group: str) -> GroupStats:
        return await self._connection.ask("stats", lambda: self._inner.stats(group))

    async def dead_letters(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        async for page in self._steps("dead letters", self._inner.dead_letters(group)):
            yield page

    async def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        async for count in self._steps("replay", self._inner.replay(group, ids)):
            yield count

    async def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        async for count in self._steps("purge", self._inner.purge(group, ids)):
            yield count

    async def _steps(self, what: str, steps: AsyncGenerator[_T]) -> AsyncGenerator[_T]:
        async def step() -> list[_T]:
            return [each async for each in _first(steps)]

        while result := await self._connection.ask(what, step):
            yield result[0]


async def _first(steps: AsyncGenerator[_T]) -> AsyncGenerator[_T]:
    try:
        yield await anext(steps)
    except StopAsyncIteration:
        return


class _Call:
    """A receive, as the broker sees it."""

    def __init__(self) -> None:
        self.over = False
        """Whether nothing more is to be taken for it."""
        self.task: asyncio.Task[Any] | None = None
        """What waits for messages, in the broker's process."""
        self.taken: Sequence[Delivery] = ()

    def hang_up(self) -> None:
        """End it: the connection that asked is gone, or does not listen."""
        self.over = True
        if self.task is not None:
            self.task.cancel()


class FaultyReceiver:
    """The memory receiver over a connection that fails. Several receives at once are answered one after the other."""

    def __init__(
        self, inner: Receiver, connection: Connection, group: str, limits: FaultyTransport, *, leased: bool
    ) -> None:
        self._inner = inner
        self._connection = connection
        self._broker = connection.broker
        self._group = group
        self._most = limits.settling.messages
        self._receiving = limits.receiving
        self._leased = leased
        connection.broken = self._broken
        self._turn = asyncio.Lock()
        self._calls: list[_Call] = []
        self._failed: list[_Call] = []

    def metadata(self, delivery: Delivery) -> Metadata:
        return self._inner.metadata(delivery)

    async def receive(self, limit: int) -> Sequence[Delivery]:
        call = _Call()
        self._calls.append(call)
        limits = self._receiving
        if len(self._calls) > limits.max_concurrent or (limits.messages and limit > limits.messages):
            self._broker.history.violated(f"receive {len(self._calls)} at once, for {limit}: {limits} says otherwise")

        async def work() -> Sequence[Delivery]:
            if call.over:
                return ()
            call.task = asyncio.current_task()
            try:
                async with self._turn:
                    call.taken = await self._inner.receive(limit)
                    return call.taken
            finally:
                call.task = None

        try:
            deliveries = await self._connection.ask("receive", work, waits=True)
            if deliveries:
                self._connection.host.arrived()
            return deliveries
        except BaseException:
            self._failed.append(call)
            raise
        finally:
            self._calls.remove(call)

    async def ack(self, deliveries: Sequence[Delivery], *, verify: bool) -> Outcomes:
        async def carry_out(some: Sequence[Delivery]) -> Outcomes:
            outcomes = await self._inner.ack(some, verify=verify)
            self._broker.acked(some, outcomes)
            return outcomes

        return await self._settled("ack", deliveries, carry_out)

    async def settle(self, settlements: Sequence[Settlement]) -> Outcomes:
        async def carry_out(some: Sequence[Settlement]) -> Outcomes:
            items = self._broker.items(self._group, some)
            outcomes = await self._inner.settle(some)
            self._broker.settled(self._group, some, items, outcomes)
            return outcomes

        return await self._settled("settle", settlements, carry_out)

    async def renew(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        return self._told_lost(await self._connection.ask("renew", lambda: self._inner.renew(deliveries)))

    async def recover(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        async def work() -> Collection[Delivery]:
            self._connection.see_loss()
            failed, self._failed = self._failed, []
            for call in failed:
                call.hang_up()
            unseen = [delivery.native for call in failed for delivery in call.taken]
            keep = None if self._leased else {delivery.native for delivery in deliveries}
            self._broker.give_back(self._group, self._inner, unseen, keep)
            return await self._inner.recover(deliveries)

        return self._told_lost(await self._connection.ask("recover", work))

    async def stop(self) -> Sequence[Delivery] | None:
        await self._connection.ask("stop", self._inner.stop)
        return None

    async def close(self) -> None:
        async def work() -> None:
            self._hang_up()
            self._broker.left(self._group, self._inner)
            await self._inner.close()

        try:
            await self._connection.ask("leave", work)
        finally:
            self._connection.lost()  # the client disconnects, whatever became of the request

    async def _settled(
        self, what: str, items: Sequence[_T], carry_out: Callable[[Sequence[_T]], Coroutine[Any, Any, Outcomes]]
    ) -> Outcomes:
        if len(items) > self._most:
            self._broker.history.violated(f"{len(items)} settlements in one call, of {self._most}")
        faults = self._connection.faults
        partial = faults.draw() == "entry"

        async def work() -> Outcomes:
            if not partial:
                return await carry_out(items)
            drawn = [faults.entry_of_settlement() for _ in items]
            real = iter(await carry_out([item for item, (_, done) in zip(items, drawn, strict=True) if done]))
            outcomes = [(next(real) if done else None, error) for error, done in drawn]
            return [error if error is not None else each for each, error in outcomes]

        if partial:
            self._connection.trouble("partial", what)
        return await self._connection.ask(what, work)

    def _told_lost(self, deliveries: Collection[Delivery]) -> Collection[Delivery]:
        for delivery in deliveries:
            self._broker.history.deliveries[delivery.native].told_lost = True
        return deliveries

    def _broken(self) -> None:
        """Have the broker see that the connection is lost."""
        self._hang_up()
        if not self._leased:
            self._broker.lost(self._group, self._inner)

    def _hang_up(self) -> None:
        """End what waits for messages in the broker's process: the connection that asked for them is gone."""
        for call in (*self._calls, *self._failed):
            call.hang_up()
