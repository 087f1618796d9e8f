"""Dead letters: any number of any size, in pages, by one look at a time; everything else goes on."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from abe.backends.message_queue.base import DeadLetter, Delivery, Disposition, Settlement
from abe.errors import BackpressureError, GroupMissingError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._browser import PAGE, PAGE_BYTES
from abe_backend_rabbitmq._channel import Outgoing
from abe_backend_rabbitmq._receiver import RabbitMQReceiver
from abe_backend_rabbitmq._transport import RabbitMQTransport
from abe_backend_rabbitmq._wire import Header
from abe_contract_tests import bounds

Collect = Callable[..., Awaitable[list[Delivery]]]

pytestmark = pytest.mark.xdist_group("rabbitmq")


def dead(delivery: Delivery) -> Settlement:
    return Settlement(delivery, Disposition.DEAD, reason="why")


async def bury(lab: Any, collect: Collect, count: int) -> tuple[RabbitMQTransport, RabbitMQReceiver]:
    transport = await lab.transport()
    await transport.declare("g", None, change=True)
    receiver = await lab.receiver(transport, prefetch=2000)
    for start in range(0, count, 250):
        await transport.send(lab.envelopes(min(250, count - start)))
    buried = await collect(receiver, count)
    for start in range(0, count, 500):
        assert not any(await receiver.settle([dead(delivery) for delivery in buried[start : start + 500]]))
    return transport, receiver


async def letters(transport: RabbitMQTransport) -> list[DeadLetter]:
    return [letter async for page in transport.dead_letters("g") for letter in page]


async def ids(transport: RabbitMQTransport) -> list[str]:
    return [letter.id for letter in await letters(transport)]


async def total(steps: AsyncGenerator[int]) -> int:
    return sum([count async for count in steps])


class TestDeadLetters:
    async def test_looking_at_them_changes_nothing(self, lab: Any, collect: Collect) -> None:
        transport, _ = await bury(lab, collect, 30)
        before = await ids(transport)
        async with aclosing(transport.dead_letters("g")) as pages:
            assert [letter.id for letter in await anext(pages)] == before[:8]
        assert await ids(transport) == before
        assert len(before) == 30

    async def test_more_than_a_page_is_replayed_in_order_and_starts_anew(self, lab: Any, collect: Collect) -> None:
        transport, receiver = await bury(lab, collect, 1201)
        order = await ids(transport)
        assert await total(transport.replay("g", None)) == 1201
        assert await letters(transport) == []
        again = await collect(receiver, 1201)
        assert {delivery.attempt for delivery in again} == {1}
        assert [receiver.metadata(delivery).id for delivery in again] == order

    async def test_two_that_look_at_once_see_all(self, lab: Any, collect: Collect) -> None:
        transport, _ = await bury(lab, collect, 50)
        other = await lab.transport()
        found = await asyncio.gather(*(letters(each) for each in (transport, other) for _ in range(3)))
        assert {len(each) for each in found} == {50}

    async def test_a_full_group_keeps_them_where_they_are(self, lab: Any, collect: Collect) -> None:
        transport = await lab.transport(max_backlog=4)
        await transport.declare("g", None, change=True)
        receiver = await lab.receiver(transport, prefetch=4)
        for _ in range(2):
            await transport.send(lab.envelopes(4))
            await receiver.settle([dead(delivery) for delivery in await collect(receiver, 4)])
        await receiver.close()
        before = await ids(transport)
        with pytest.raises(BackpressureError):
            await total(transport.replay("g", None))
        stats = await transport.stats("g")
        assert stats.waiting + stats.dead == 8
        assert await ids(transport) == before[-stats.dead :]

    async def test_a_group_that_does_not_exist_has_none_to_look_at(self, lab: Any) -> None:
        transport = await lab.transport()
        for steps in (transport.dead_letters("x"), transport.replay("x", None), transport.purge("x", ["id"])):
            with pytest.raises(GroupMissingError, match="'x'"):
                await anext(steps)


class TestLargeNumbers:
    @staticmethod
    async def fill(lab: Any, sizes: list[int]) -> RabbitMQTransport:
        """Put letters of these sizes, numbered, into a group's dead letters, as a broker or a consumer would."""
        transport: RabbitMQTransport = await lab.transport()
        await transport.declare("g", None, change=True)
        copies: list[Outgoing] = []
        for number, size in enumerate(sizes):
            envelope = msgspec.structs.replace(lab.envelope(body=b"x" * size), id=f"letter-{number}")
            properties = _wire.buried(Header(_wire.pack(envelope), "x", "k"), envelope.body, 1, "why", "")
            copies.append(Outgoing("", lab.names.dead("g"), properties, envelope.body, envelope.id))
            if len(copies) == 250 or number + 1 == len(sizes):
                assert not await transport._broker.publisher.move(copies)
                copies.clear()
        return transport

    async def test_no_letter_is_out_of_sight_and_their_order_stays(self, lab: Any) -> None:
        transport = await self.fill(lab, [2] * 2_600)
        expected = [f"letter-{number}" for number in range(2_600)]
        for _ in range(2):
            pages = [page async for page in transport.dead_letters("g")]
            assert [letter.id for page in pages for letter in page] == expected
            assert max(len(page) for page in pages) <= PAGE
        assert await total(transport.replay("g", ["letter-2599", "letter-7"])) == 2
        assert await total(transport.purge("g", ["letter-2598", "letter-8"])) == 2
        gone = {"letter-7", "letter-8", "letter-2598", "letter-2599"}
        assert await ids(transport) == [each for each in expected if each not in gone]

    async def test_a_look_over_many_channels_gives_back_in_order(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("abe_backend_rabbitmq._browser._CONSUMERS", 2)
        monkeypatch.setattr("abe_backend_rabbitmq._browser.PAGE", 10)
        transport = await self.fill(lab, [2] * 200)
        expected = [f"letter-{number}" for number in range(200)]
        assert await total(transport.purge("g", [f"letter-{number}" for number in range(3, 200, 7)])) == 29
        rest = [each for number, each in enumerate(expected) if number % 7 != 3]
        assert await ids(transport) == rest
        assert await total(transport.replay("g", None)) == len(rest)
        assert await ids(transport) == []

    async def test_a_page_is_bounded_in_bytes_whatever_comes_after_small_ones(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("abe_backend_rabbitmq._browser.PAGE_BYTES", PAGE_BYTES // 64)
        monkeypatch.setattr("abe_backend_rabbitmq._browser._MOST", PAGE_BYTES // 32)
        sizes = [2] * 700 + [20_000] * 60 + [2] * 40 + [200_000, 2, 2]
        transport = await self.fill(lab, sizes)
        for _ in range(2):
            seen: list[int] = []
            async for page in transport.dead_letters("g"):
                assert len(page) == 1 or sum(len(letter.body) for letter in page) <= PAGE_BYTES // 64
                seen += [len(letter.body) for letter in page]
            assert seen == sizes
        assert await total(transport.replay("g", None)) == len(sizes)

    async def test_letters_that_are_buried_meanwhile_are_not_met_again(self, lab: Any, collect: Collect) -> None:
        transport, receiver = await bury(lab, collect, 60)
        moved = 0
        async for count in transport.replay("g", None):
            moved += count
            again = await collect(receiver, count) if count else []
            assert not any(await receiver.settle([dead(delivery) for delivery in again]))
        assert moved == 60
        assert len(await ids(transport)) == 60

    async def test_a_look_that_is_left_early_changes_nothing(self, lab: Any) -> None:
        transport = await self.fill(lab, [2] * 100)
        for _ in range(3):
            async with aclosing(transport.dead_letters("g")) as pages:
                await anext(pages)
                await anext(pages)
            async with aclosing(transport.replay("g", ["letter-99"])) as steps:
                assert await anext(steps) == 0
        assert await ids(transport) == [f"letter-{number}" for number in range(100)]

    async def test_others_declare_and_subscribe_while_somebody_looks(self, lab: Any) -> None:
        transport = await self.fill(lab, [2] * 100)
        other = await lab.transport(publish_timeout=1.0)
        async with aclosing(transport.dead_letters("g")) as pages:
            await anext(pages)
            async with bounds.within(10):
                assert await other.declare("g", None, change=False) == ("#",)
                await other.declare("h", ("a.*",), change=False)
                await (await other.subscribe("g", 10)).close()
                assert set(await other.groups()) == {"g", "h"}
                await other.delete_group("h")
