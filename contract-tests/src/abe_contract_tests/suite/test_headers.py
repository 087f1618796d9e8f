"""C-HDR: what travels beside the payload."""

import time

import pytest

from abe.backends.message_queue.base import Publication
from abe.errors import ConfigurationError
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.steps import collect, expect_counts, numbered, until_dead

HEADERS = {
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "Content-Type": "text/plain",
    "content-type": "another header than the one above",
    "empty": "",
    "é": "ü\U0001f600",
    "with space": " leading, trailing and \t\n inside ",
    "quotes": "\"\\'",
    "json": '{"a": [1]}',
    "number": "1",
    "nul": "\0",
    "a\0b": "a\0c",
    "a.b:c/d": "*#",
    "x" * 200: "long name",
}


@clause("C-HDR-01")
async def test_headers_id_key_and_time_arrive_with_the_message(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(), backend.consume(group="g") as subscription:
        before = time.time()
        await backend.publish("order.created.é", {"n": 1}, headers=HEADERS, id="order/1 é")
        after = time.time()
        (message,) = await collect(subscription, 1)
    assert dict(message.headers) == HEADERS
    assert (message.id, message.key, message.group) == ("order/1 é", "order.created.é", "g")
    # Milliseconds travel.
    assert before - 0.001 <= message.published_at <= after
    assert message == {"n": 1}


@clause("C-HDR-01")
async def test_they_arrive_with_every_delivery_and_with_each_of_many(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(), backend.consume(group="g") as subscription:
        await backend.publish_many(
            [Publication(f"k.{n}", {"n": n}, headers={"n": str(n)}, id=f"id-{n}") for n in range(100)]
        )
        first = [await subscription.receive() for _ in range(5)]
        times = {message.id: message.published_at for message in first}
        for message in first:
            await message.nack(delay=0)
        messages = await collect(subscription, 100)
    for message in messages:
        n = message["n"]
        assert (message.id, message.key, message.headers) == (f"id-{n}", f"k.{n}", {"n": str(n)})
        assert message.published_at == times.get(message.id, message.published_at)
    assert {message.id for message in messages if message.attempt == 2} == set(times)


@clause("C-HDR-01")
async def test_a_message_without_an_id_gets_one_of_its_own(contract: Contract) -> None:
    backend, other = contract.backend(), contract.backend()
    async with contract.within(), backend.consume(group="g") as subscription:
        await backend.publish_many(numbered(100))
        for n in range(100, 150):
            await other.publish("order.created", {"n": n})
        messages = await collect(subscription, 150)
    assert len({message.id for message in messages}) == 150
    assert all(message.id for message in messages)
    assert all(message.headers == {} for message in messages)


@clause("C-HDR-01")
async def test_headers_up_to_16_kib_arrive_and_more_are_refused(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(), backend.consume(group="g") as subscription:
        largest = {"name": "v" * (16 * 1024 - 4)}
        await backend.publish("order.created", {"n": 1}, headers=largest)
        (message,) = await collect(subscription, 1)
        assert dict(message.headers) == largest
        with pytest.raises(ConfigurationError, match="header"):
            await backend.publish("order.created", {"n": 2}, headers={"name": "v" * (16 * 1024 - 3)})
        await expect_counts(contract, await contract.oracle(), "g", total=0)


@clause("C-HDR-01")
async def test_what_cannot_travel_is_refused_before_anything_is_sent(contract: Contract) -> None:
    backend = contract.backend()
    bad_headers = [{"n": 1}, {1: "n"}, {"": "empty name"}, {"n": None}, {"n": "\ud800"}, {"n": b"bytes"}]
    async with contract.within():
        await backend.declare("g")
        for headers in bad_headers:
            with pytest.raises(ConfigurationError):
                await backend.publish("order.created", {"n": 1}, headers=headers)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        for key in ("", "k" * 201, "é" * 101, "\ud800", 1, None):
            with pytest.raises(ConfigurationError, match="key"):
                await backend.publish(key, {"n": 1})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigurationError, match="1"):
            await backend.publish_many([("good", {"n": 1}), ("", {"n": 2})])
        await expect_counts(contract, await contract.oracle(), "g", total=0)


@clause("C-HDR-01")
async def test_ids_that_differ_behind_a_nul_character_are_different_ids(contract: Contract) -> None:
    backend = contract.backend()
    ids = ["\0", "\0\0", "id", "id\0", "id\0a", "id\0b"]
    async with contract.within(), backend.consume(group="g", max_attempts=1) as subscription:
        await backend.publish_many([Publication("k\0", {"n": n}, id=id) for n, id in enumerate(ids)])
        messages = await collect(subscription, len(ids))
        assert {message["n"]: message.id for message in messages} == dict(enumerate(ids))
        assert {message.key for message in messages} == {"k\0"}


@clause("C-HDR-01", capability="dead_letter")
async def test_a_dead_letter_is_found_by_an_id_with_a_nul_character(contract: Contract) -> None:
    backend = contract.backend()
    ids = ["id", "id\0", "id\0a"]
    letters = backend.dead_letters("g")
    async with contract.within():
        async with backend.consume(group="g") as subscription:
            await backend.publish_many([Publication("k\0", {"n": n}, id=id) for n, id in enumerate(ids)])
            for _ in ids:
                await (await subscription.receive()).reject("no \0")
            await until_dead(await contract.oracle(), "g", len(ids))
        letter = await letters.get("id\0")
        assert letter is not None
        assert (letter.id, letter.key, letter.reason) == ("id\0", "k\0", "no \0")
        assert await letters.replay("id\0") == 1
        assert sorted([each.id for each in await letters.list()]) == ["id", "id\0a"]
        assert await letters.purge("id\0a") == 1
        async with backend.consume(group="g") as subscription:
            assert [message.id for message in await collect(subscription, 1)] == ["id\0"]


@clause("C-HDR-01", capability="dead_letter")
async def test_a_dead_letter_keeps_them(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        async with backend.consume(group="g") as subscription:
            await backend.publish("order.created.é", {"n": 1}, headers=HEADERS, id="order/1 é")
            message = await subscription.receive()
            published_at = message.published_at
            await message.reject("no")
            await until_dead(await contract.oracle(), "g", 1)
        (letter,) = await backend.dead_letters("g").list()
    assert dict(letter.headers) == HEADERS
    assert (letter.id, letter.key, letter.published_at) == ("order/1 é", "order.created.é", published_at)
