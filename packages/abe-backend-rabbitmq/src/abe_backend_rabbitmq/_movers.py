"""Moving delayed messages on when their time has come: whoever consumes a group sees to it, and several may at once.

Whoever consumes also hears here what others make.

RabbitMQ could do it by itself, by a time to live and an exchange for what outlived it. But what expires while a node starts, or while the
queue that it goes to is full or missing, is tried again after three minutes and holds up what comes behind it.

Each of these queues is first in, first out: all of it waits equally long there. A message near its time is taken and kept until then;
what has longer to wait is left in the queue.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

from aiormq.abc import DeliveredMessage

from abe.backends.message_queue.base import Delivery
from abe.errors import AbeError, UnroutableError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._broker import Broker
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._connection import run_to_completion
from abe_backend_rabbitmq._errors import ChannelNotFound, translated
from abe_backend_rabbitmq._topology import TICK
from abe_backend_rabbitmq._wire import Header

_log: Final = logging.getLogger("abe.rabbitmq")

_PREFETCH: Final = 32
_NEAR: Final = 1.0
"""Seconds before its time from which on a message is taken."""

_AGAIN: Final = 0.5
"""Seconds after which something that failed is tried again."""

_MUCH_LATER: Final = 60.0
"""Seconds after which a message that cannot be moved is tried again."""

_CLOSE_TIMEOUT: Final = 1.0
_PLACEHOLDER: Final = Delivery(b"", None, 1, 0), Header(b"", "", "")


class _Waiting(NamedTuple):
    tag: int
    until: float
    header: Header
    body: bytes


class _Level:
    """One of the queues in which a group's delayed messages wait.

    Args:
        movers: Those whose it is.
        group: The group.
        level: Which.
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
        """Messages that are taken, and not moved."""
        return len(self._taken)

    async def stop(self) -> None:
        """Give back what is taken."""
        self.give_up()
        await asyncio.wait([self._task], timeout=_CLOSE_TIMEOUT)
        self._task.cancel()

    def give_up(self) -> None:
        """Stop, as the queue is gone."""
        self._stopping.set()
        self._changed.set()

    def renew(self) -> None:
        """Consume anew."""
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
                    self._taken.clear()
                    if channel.closed is None:
                        channel.ended = None
                        await run_to_completion(channel.close())
            except AbeError as exc:
                _log.debug("delayed messages of group %r wait until somebody can move them: %s", self._group, exc)
                if isinstance(exc.__cause__, ChannelNotFound):
                    self._movers.gone(self._group)
                    return
            except Exception:  # noqa: BLE001 - nobody waits for this task, and the next try may go well
                _log.exception("delayed messages of group %r could not be moved; it is tried again", self._group)
            if pause > 0:
                await _at_most(self._stopping.wait(), pause)

    async def _move(self, channel: Channel) -> float:
        """Move what comes near its time. Return for how long nothing will."""
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
        """Put copies where they go next, and acknowledge those that are there: a crash between doubles them."""
        copies: list[Outgoing] = []
        sent: list[int] = []
        for each in ripe:
            try:
                copies.append(await self._copy(each.header, each.body))
            except AbeError:
                raise
            except Exception:  # noqa: BLE001 - it concerns this message, and none of the others
                _log.exception("a delayed message of group %r cannot be moved; it is tried again later", self._group)
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
    """The levels of the groups that are consumed here.

    Args:
        broker: Carries requests and news, publishes, and opens channels.
        made: Called with a group, and the version in which its queue was made.
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
        """See to a group's delayed messages, as somebody consumes it here."""
        self._consumers[group] += 1
        self._levels.setdefault(group, [])
        self._heard.set()
        if self._listening is None or self._listening.done():
            self._listening = asyncio.get_running_loop().create_task(self._listen())

    async def leave(self, group: str) -> None:
        """Leave it to others, if nobody consumes the group here any more."""
        self._consumers[group] -= 1
        if not self._consumers[group]:
            del self._consumers[group]
            levels = self._levels.pop(group, [])
            await asyncio.gather(*(level.stop() for level in levels))

    async def close(self) -> None:
        """Leave all of it."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening], timeout=_CLOSE_TIMEOUT)
        self._consumers.clear()
        levels = [level for group in self._levels.values() for level in group]
        self._levels.clear()
        await asyncio.gather(*(level.stop() for level in levels))

    def in_flight(self, group: str) -> int:
        """Return how many of a group's delayed messages are taken from their queues."""
        return sum(level.in_flight for level in self._levels.get(group, ()))

    def _built(self, group: str, count: int) -> None:
        """Take note that somebody made a group's levels, or made them again.

        A consumer of a queue that is deleted and at once made again is neither cancelled nor served: all of them begin anew.
        """
        for level in self._levels.get(group, ()):
            level.renew()
        self._see_to(group, count)

    def _see_to(self, group: str, count: int) -> None:
        levels = self._levels.get(group)
        if levels is not None:
            levels += [_Level(self, group, level) for level in range(len(levels), count)]

    def gone(self, group: str) -> None:
        """Take note that a level is not there: the group was deleted, or somebody deleted its queue."""
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
        self._gone.clear()

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except AbeError as exc:
                _log.debug("news of delayed messages cannot be heard: %s", exc)
            except Exception:  # noqa: BLE001 - nobody waits for this task, and the next try may go well
                _log.exception("news of delayed messages cannot be heard; it is tried again")
            await asyncio.sleep(_AGAIN)

    async def _listen_once(self) -> None:
        """Hear of levels that others make; what was made before is looked up, for each group that is consumed from now on."""
        connection = await self.broker.control.connection()
        channel: Any = await connection.plain()

        async def heard(message: DeliveredMessage) -> None:
            match message.body.decode(errors="replace").split(" "):
                case ["levels", group, count] if count.isdecimal():
                    self._built(group, int(count))
                case ["made", group, version] if version.isdecimal():
                    self._made(group, int(version))
                case _:
                    _log.debug("news that say nothing to this version")

        try:
            with translated(connection.address):
                # Named by us: the rights that are documented are rights to our names.
                queue = f"{self.broker.topology.news}:{id(channel):x}-{time.time_ns():x}"
                await run_to_completion(channel.queue_declare(queue, exclusive=True, auto_delete=True))
                await run_to_completion(channel.queue_bind(queue, self.broker.topology.news))
                await run_to_completion(channel.basic_consume(queue, heard, no_ack=True))
            self._heard.set()
            while not channel.is_closed and connection.alive:
                await _at_most(self._heard.wait(), 10 * _AGAIN)
                if self._heard.is_set() or self._gone:
                    self._heard.clear()
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
