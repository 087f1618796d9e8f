"""The dead letters of a group: listed, replayed and purged a page at a time, by one process at a time for each group."""

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager

from abe.backends.message_queue.base import DeadLetter
from abe.backends.message_queue.base.routing import group_missing
from abe.errors import AbeError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._broker import Broker
from abe_backend_rabbitmq._browser import Browser, Found
from abe_backend_rabbitmq._control import Lock
from abe_backend_rabbitmq._publisher import moved
from abe_backend_rabbitmq._wire import Header


class DeadLetters:
    """Lists, replays and purges the dead letters of all groups.

    Args:
        broker: Carries requests, and publishes the copies of replayed messages.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._control = broker.control
        self._names = broker.topology
        self._timeout = broker.settings.publish_timeout
        self._locks: dict[str, Lock] = {}

    async def pages(self, group: str) -> AsyncGenerator[Sequence[DeadLetter]]:
        """See `Transport.dead_letters`."""
        async with self._look(group) as browser:
            while browser is not None and (page := await browser.page()):
                yield [_wire.dead_letter(header, body) for _, header, body in page]

    async def replay(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Publish copies to the group's queue, then remove the dead letters: a crash in between duplicates them, and loses none."""
        queue = self._names.queue(group)
        async with self._look(group) as browser:
            while browser is not None and (page := await browser.page()):
                chosen = _chosen(page, ids)
                outcomes = await self._broker.publisher.move(
                    [moved("", queue, header, body) for _, header, body in chosen], bounded=True
                )
                done = [tag for i, (tag, _, _) in enumerate(chosen) if not outcomes or outcomes[i] is None]
                await browser.remove(done)
                yield len(done)
                for error in outcomes:
                    if error is not None:
                        raise error

    async def purge(self, group: str, ids: Collection[str] | None) -> AsyncGenerator[int]:
        """Remove dead letters: those with the ids, or all."""
        async with self._look(group) as browser:
            if browser is not None and ids is None:
                queue = self._names.dead(group)
                yield (await self._control.call(lambda channel: channel.queue_purge(queue))).message_count or 0
                return
            while browser is not None and (page := await browser.page()):
                chosen = _chosen(page, ids)
                await browser.remove([tag for tag, _, _ in chosen])
                yield len(chosen)

    @asynccontextmanager
    async def _look(self, group: str) -> AsyncGenerator[Browser | None, None]:
        """Browse a group's dead letters; None: there are none.

        Two browsers at once would each see a part, so a lock is held. No other operation needs it.

        Raises:
            GroupMissingError: There is no such group.
            BackendConnectionError: Another process browses them for too long, or the connection was lost.
        """
        queue = self._names.dead(group)
        if await self._control.count(queue) is None:
            if await self._control.count(self._names.queue(group)) is None:
                raise group_missing(group)
            yield None
            return
        lock = self._locks.setdefault(group, Lock(self._control, self._names.look(group), self._timeout))
        async with lock.held() as connection:
            browser = Browser(self._control, connection, queue, await self._control.count(queue, connection) or 0)
            try:
                yield browser
            except (GeneratorExit, AbeError):
                await browser.rest(self._timeout / 2)
                raise
            finally:
                await browser.close()


def _chosen(page: Sequence[Found], ids: Collection[str] | None) -> Sequence[Found]:
    if ids is None:
        return page
    return [found for found in page if _letter_id(found[1], found[2]) in ids]


def _letter_id(header: Header, body: bytes) -> str:
    return _wire.dead_letter(header, body).id
