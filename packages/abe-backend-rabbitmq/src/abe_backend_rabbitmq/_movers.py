"""Moves delayed messages on when they are due: each process that consumes a group does it for the group, several may at once.

RabbitMQ could do it by a time to live and a dead-letter exchange. But a message that expires while a node starts, or while its target queue
is full or missing, is retried after three minutes, and blocks those behind it.

1. A level is a queue, first in, first out, in which all messages wait equally long. A mover consumes it.
2. It keeps a message in flight that is near its time (`_NEAR`). If the first one has longer to wait, it closes its channel, which
   returns what it took, and consumes again shortly before that time.
3. At that time it publishes a copy: to a lower level if the delay is not over, otherwise to the group's queue. Once that is confirmed, it
   acknowledges the message. A crash in between duplicates it.
4. A process that declares a queue or level announces it by the exchange `news`, and all processes that consume listen to it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

from aiormq.abc import DeliveredMessage

from abe.backends.message_queue.base import Delivery
from abe.backends.message_queue.base.log import Log
from abe.backends.message_queue.base.tasks import gather_all
from abe.errors import AbeError, UnroutableError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._broker import Broker
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import run_to_completion
from abe_backend_rabbitmq._errors import ChannelNotFound, translated
from abe_backend_rabbitmq._topology import TICK
from abe_backend_rabbitmq._wire import Header

_log: Final = Log("abe.rabbitmq")

_PREFETCH: Final = 32
_NEAR: Final = 1.0
"""Seconds before its time from which a message is kept in flight."""

_AGAIN: Final = 0.5
"""Seconds after which a failure is retried."""

_RARELY: Final = 30.0
"""Seconds after which the groups' levels are looked for without any news."""

_MUCH_LATER: Final = 60.0
"""Seconds after which a message that cannot be moved is retried."""

_CLOSE_TIMEOUT: Final = 1.0
_PLACEHOLDER: Final = Delivery(b"", None, 1, 0), Header(b"", "", "")


class _Waiting(NamedTuple):
    tag: int
    until: float
    header: Header
    body: bytes


class _Level:
    """The mover of one level of a group.

    Args:
        movers: Its owner.
        group: The group.
        level: The level's number.
    """

    def __init__(self, movers: "Movers", group: str, level: int) -> None:
        self._movers = movers
        self._broker = movers.broker
        self._group = group
        self._level = level
        self._queue = movers.broker.topology.waiting(group, level)
        self._taken: list[_Waiting] = []
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._renewing = False
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def in_flight(self) -> int:
        """Messages that are taken, and not moved yet."""
        return len(self._taken)

    async def stop(self) -> None:
        """Stop, and return the messages that are taken."""
        self.give_up()
        await asyncio.wait([self._task], timeout=_CLOSE_TIMEOUT)
        self._task.cancel()

    def give_up(self) -> None:
        """Stop without waiting: the queue does not exist."""
        self._stopping.set()
        self._changed.set()

    def renew(self) -> None:
        """Consume again, on a new channel."""
        self._renewing = True
        self._changed.set()

    async def _run(self) -> None:
        while not self._stopping.is_set():
            pause = _AGAIN
            try:
                channel = await self._broker.consume_channel()
                try:
                    pause = await self._move(channel)
                finally:
                    channel.ended, is_open = None, channel.closed is None
                    channel.lose("its messages go back")  # first: one that arrives meanwhile is not of the next channel
                    self._taken.clear()
                    if is_open:
                        await run_to_completion(channel.close())
            except AbeError as exc:
                _log.debug("delayed messages of group %r cannot be moved now: %s", self._group, exc)
                if isinstance(exc.__cause__, ChannelNotFound):
                    self._movers.gone(self._group)
                    return
            except Exception:  # noqa: BLE001 - no caller awaits this task, and a retry may succeed
                _log.exception("delayed messages of group %r could not be moved; retrying", self._group)
            if pause > 0:
                await _at_most(self._stopping.wait(), pause)

    async def _move(self, channel: Channel) -> float:
        """Consume the level, and move messages when they are due. Return the seconds after which to consume again."""
        self._renewing = False
        cancelled: list[str] = []

        def cancel(_: object) -> None:
            cancelled.append("the queue was deleted or moved")
            self._changed.set()

        channel.ended = self._changed.set
        channel.native.on_consumer_cancel_callbacks.add(cancel)

        def deliver(tag: int, header: Header, body: bytes, redelivered: bool) -> None:
            longest = TICK * 2**self._level
            now = time.time()
            until = _wire.until(header) / 1000 or now + longest
            channel.in_flight[tag] = _PLACEHOLDER
            self._taken.append(_Waiting(tag, min(until, now + longest), header, body))
            self._changed.set()

        with translated(self._group):
            await run_to_completion(channel.consume(self._queue, _PREFETCH, deliver))
        while not (self._stopping.is_set() or self._renewing or channel.closed or cancelled):
            self._changed.clear()
            now = time.time()
            ripe = [each for each in self._taken if each.until <= now]
            if ripe:
                if not await self._carry(channel, ripe):
                    await _at_most(self._stopping.wait(), _AGAIN)
                continue
            if not self._taken:
                await self._changed.wait()
                continue
            left = min(each.until for each in self._taken) - now
            if left > _NEAR:
                return left - _NEAR / 2
            await _at_most(self._changed.wait(), left)
        return 0.0 if self._stopping.is_set() or self._renewing else _AGAIN

    async def _carry(self, channel: Channel, ripe: Sequence[_Waiting]) -> bool:
        """Publish copies, and acknowledge messages whose copies are confirmed; return whether all are."""
        copies: list[Outgoing] = []
        sent: list[int] = []
        for each in ripe:
            try:
                copies.append(await self._copy(each.header, each.body))
            except AbeError:
                raise
            except Exception:  # noqa: BLE001 - it affects this message only
                _log.exception("a delayed message of group %r cannot be moved now; it is retried later", self._group)
                self._taken.remove(each)
                self._taken.append(each._replace(until=each.until + _MUCH_LATER))
            else:
                sent.append(each.tag)
        outcomes = await self._broker.publisher.move(copies, bounded=True)
        done = {tag for i, tag in enumerate(sent) if not outcomes or outcomes[i] is None}
        self._taken = [each for each in self._taken if each.tag not in done]
        await channel.ack(sorted(done))
        if any(isinstance(outcome, UnroutableError) for outcome in outcomes):
            self._broker.delays.forget(self._group)
        return len(done) == len(sent)

    async def _copy(self, header: Header, body: bytes) -> Outgoing:
        names, group, due = self._broker.topology, self._group, _wire.due(header)
        left = due / 1000 - time.time()
        extra: tuple[tuple[str, int], ...] = ()
        exchange, key = "", names.queue(group)
        if left > 0:
            place = await self._broker.delays.place(group, left, due)
            exchange, key, extra = names.delay, f"0.{place.key}", place.headers
        properties = _wire.copy(header, body, _wire.counted(header), *extra)
        return Outgoing(exchange, key, properties, body, _wire.message_id(properties))


class Movers:
    """The movers of all levels of the groups that this process consumes.

    Args:
        broker: Carries requests and news, publishes, and opens channels.
        made: Called with a group, and the registry's version in which its queue was declared.
    """

    def __init__(self, broker: Broker, made: Callable[[str, int], object]) -> None:
        self.broker = broker
        self._made = made
        self._gone: set[str] = set()
        self._consumers: Counter[str] = Counter()
        self._levels: dict[str, list[_Level]] = {}
        self._listening: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()

    def join(self, group: str) -> None:
        """Register a consumer of a group; the first one starts the group's movers."""
        self._consumers[group] += 1
        self._levels.setdefault(group, [])
        self._heard.set()
        if self._listening is None or self._listening.done():
            self._listening = asyncio.get_running_loop().create_task(self._listen())

    async def leave(self, group: str) -> None:
        """Remove a consumer of a group; the last one stops the group's movers."""
        self._consumers[group] -= 1
        if not self._consumers[group]:
            del self._consumers[group]
            levels = self._levels.pop(group, [])
            await gather_all(*(level.stop() for level in levels))

    async def close(self) -> None:
        """Stop all movers."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening], timeout=_CLOSE_TIMEOUT)
        self._consumers.clear()
        levels = [level for group in self._levels.values() for level in group]
        self._levels.clear()
        await gather_all(*(level.stop() for level in levels))

    def in_flight(self, group: str) -> int:
        """Return how many of a group's delayed messages are taken from their queues."""
        return sum(level.in_flight for level in self._levels.get(group, ()))

    def _built(self, group: str, count: int) -> None:
        """Handle the news that a process declared a group's levels, perhaps again.

        RabbitMQ neither cancels nor serves a consumer whose queue was deleted and at once declared again: all movers consume again.
        """
        for level in self._levels.get(group, ()):
            level.renew()
        self._see_to(group, count)

    def _see_to(self, group: str, count: int) -> None:
        levels = self._levels.get(group)
        if levels is not None:
            levels += [_Level(self, group, level) for level in range(len(levels), count)]

    def gone(self, group: str) -> None:
        """Handle a level whose queue does not exist: the group was deleted, or its queue."""
        for level in self._levels.get(group, ()):
            level.give_up()
        if group in self._levels:
            self._levels[group] = []
            self._gone.add(group)

    async def _look(self) -> None:
        for group, entry in (await self.broker.groups.now()).groups.items():
            if group in self._gone and entry.levels:
                await self.broker.groups.build(group, entry.levels - 1)
            self._see_to(group, entry.levels)
            self._made(group, entry.made)
            self._gone.discard(group)

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except AbeError as exc:
                _log.debug("news of delayed messages cannot be received now: %s", exc)
            except Exception:  # noqa: BLE001 - no caller awaits this task, and a retry may succeed
                _log.exception("news of delayed messages could not be received; retrying")
            await asyncio.sleep(_AGAIN)

    async def _listen_once(self) -> None:
        """Listen to the news; what was declared before is read from the registry, for each group that is consumed from now on."""
        connection = await self.broker.control.connection()
        channel: Any = await connection.plain()

        async def heard(message: DeliveredMessage) -> None:
            match message.body.decode(errors="replace").split(" "):
                case ["levels", group, count] if count.isdecimal():
                    self._built(group, int(count))
                case ["made", group, version] if version.isdecimal():
                    self._made(group, int(version))
                case _:
                    _log.debug("news of an unknown kind are ignored")

        try:
            with translated(connection.address):
                # Named by us: the documented rights are rights to our names.
                queue = f"{self.broker.topology.news}:{id(channel):x}-{time.time_ns():x}"
                await run_to_completion(channel.queue_declare(queue, exclusive=True, auto_delete=True))
                await run_to_completion(channel.queue_bind(queue, self.broker.topology.news))
                await run_to_completion(channel.basic_consume(queue, heard, no_ack=True))
            self._heard.set()
            loop = asyncio.get_running_loop()
            looked_at = loop.time()
            while not channel.is_closed and connection.alive:
                await _at_most(self._heard.wait(), 10 * _AGAIN)
                late = loop.time() - looked_at > _RARELY
                if late:  # the exchange may have been deleted and declared again, or the queue deleted
                    with translated(connection.address):
                        await run_to_completion(channel.queue_bind(queue, self.broker.topology.news))
                if late or self._heard.is_set() or self._gone:
                    self._heard.clear()
                    looked_at = loop.time()
                    await self._look()
        finally:
            if not channel.is_closed and connection.alive:
                with translated(connection.address):
                    await run_to_completion(channel.close())


async def _at_most(waiting: Awaitable[object], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await waiting
    except TimeoutError:
        return
