"""What publishers are told, when a batch is decided in parts, when connecting takes long, and when a transport misbehaves."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Sequence

import pytest

from abe.backends.message_queue.base import Batching, Envelope, Outcomes
from abe.backends.message_queue.engine.batch import Batch
from abe.backends.message_queue.engine.publisher import Publisher
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import AbeError, BackendConnectionError, PublishRejectedError, PublishUnknownError
from abe.settings import QueueSettings
from abe.testing.memory import fresh_namespace
from abe_contract_tests.bounds import within

Answer = Callable[[Sequence[Envelope]], Awaitable[Outcomes]]


class FakeTransport:
    """Answers as the test says."""

    batching = Batching(messages=50, bytes=1 << 20, max_concurrent=2)

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.sent: list[str] = []

    async def send(self, envelopes: Sequence[Envelope]) -> Outcomes:
        self.sent += [envelope.key for envelope in envelopes]
        return await self.answer(envelopes)


async def connected() -> None:
    """Connect at once."""


def publisher(answer: Answer, *, opened: Callable[[], Awaitable[None]] = connected, **limits: int) -> Publisher:
    transport = FakeTransport(answer)
    made = Publisher(transport, opened, timeout=60.0, max_count=limits.get("max_count", 1000), max_bytes=1 << 30)  # type: ignore[arg-type]
    made.transport = transport  # type: ignore[attr-defined]
    return made


def envelope(key: str = "k") -> Envelope:
    return Envelope(key, key, b"{}", 0)


async def partly(envelopes: Sequence[Envelope]) -> Outcomes:
    """Take all but those with the key "throttled", which may be sent again."""
    await asyncio.sleep(0)
    return [BackendConnectionError("throttled") if each.key == "throttled" else None for each in envelopes]


async def test_what_is_confirmed_is_told_at_once_whatever_becomes_of_its_neighbours() -> None:
    under_test = publisher(partly)
    first = asyncio.create_task(under_test.publish(envelope("first")))  # a lone one: the next ones share a batch
    throttled = asyncio.create_task(under_test.publish(envelope("throttled")))
    neighbours = [asyncio.create_task(under_test.publish(envelope(key), 30.0)) for key in ("a", "b")]
    async with within(10):
        assert await asyncio.gather(first, *neighbours) == [None, None, None]
    assert not throttled.done()
    await under_test.close(0)
    assert isinstance(await throttled, PublishRejectedError)
    assert not under_test._room.count


async def test_who_runs_out_of_time_while_it_connects_is_not_published_afterwards() -> None:
    opening = asyncio.Event()

    async def opened() -> None:
        await opening.wait()

    async def take(_: Sequence[Envelope]) -> Outcomes:
        return ()

    under_test = publisher(take, opened=opened)
    patient = [asyncio.create_task(under_test.publish(envelope(key))) for key in ("a", "b")]
    async with within(10):
        hasty = await asyncio.gather(*(under_test.publish(envelope("late"), 0.01) for _ in range(2)))
    assert [type(outcome) for outcome in hasty] == [PublishRejectedError, PublishRejectedError]
    opening.set()
    async with within(10):
        assert await asyncio.gather(*patient) == [None, None]
    assert "late" not in under_test.transport.sent  # type: ignore[attr-defined]
    assert not under_test._room.count


@pytest.mark.parametrize("count", [1, 3])
async def test_a_wrong_number_of_outcomes_confirms_nothing(caplog: pytest.LogCaptureFixture, count: int) -> None:
    async def wrong(envelopes: Sequence[Envelope]) -> Outcomes:
        await asyncio.sleep(0)
        return [None] * (len(envelopes) + 1)

    under_test = publisher(wrong)
    async with within(10):
        outcomes = await asyncio.gather(*(under_test.publish(envelope()) for _ in range(count)))
    assert [type(outcome) for outcome in outcomes] == [PublishUnknownError] * count
    assert "a bug of the provider" in caplog.text
    await under_test.close(0)


async def test_closing_does_not_wait_for_a_transport_that_does_not_let_go() -> None:
    letting_go = asyncio.Event()

    async def stubborn(_: Sequence[Envelope]) -> Outcomes:
        try:
            await asyncio.Event().wait()
        finally:
            await letting_go.wait()
        return ()

    under_test = publisher(stubborn)
    publishing = [asyncio.create_task(under_test.publish(envelope())) for _ in range(3)]
    for _ in range(5):
        await asyncio.sleep(0)
    async with within(5):
        await under_test.close(0.1)
    letting_go.set()
    outcomes = await asyncio.gather(*publishing, return_exceptions=True)
    assert all(isinstance(outcome, AbeError) for outcome in outcomes)


async def test_who_leaves_while_its_batch_is_about_to_be_sent_is_not_published() -> None:
    gate = asyncio.Event()

    async def answer(_: Sequence[Envelope]) -> Outcomes:
        await gate.wait()
        return ()

    under_test = publisher(answer)
    transport: FakeTransport = under_test.transport  # type: ignore[attr-defined]
    transport.batching = under_test._limits = Batching(messages=50, bytes=1 << 20, max_concurrent=1)
    loop = asyncio.get_running_loop()
    first = asyncio.create_task(under_test.publish(envelope("first")))
    hurried = asyncio.create_task(under_test.publish(envelope("hurried"), 0.01))
    patient = asyncio.create_task(under_test.publish(envelope("patient")))
    await asyncio.sleep(0)
    over = loop.time() + 0.02
    while loop.time() < over:
        pass  # the loop is busy until its time is over
    loop.call_soon(gate.set)  # the first one's step comes just before the step that tells the hurried one
    async with within(5):
        outcomes = await asyncio.gather(first, hurried, patient)
    assert [type(outcome) for outcome in outcomes] == [type(None), PublishRejectedError, type(None)]
    assert transport.sent == ["first", "patient"]
    await under_test.close(1.0)


async def test_who_waits_behind_one_with_more_time_is_told_when_its_own_is_over() -> None:
    async def never(_: Sequence[Envelope]) -> Outcomes:
        await asyncio.Event().wait()
        return ()

    transport = FakeTransport(never)
    transport.batching = Batching(messages=50, bytes=1 << 20, max_concurrent=1)
    under_test = Publisher(transport, connected, timeout=0.05, max_count=1000, max_bytes=1 << 30)  # type: ignore[arg-type]
    patient = asyncio.create_task(under_test.publish(envelope("patient"), 600.0))
    await asyncio.sleep(0)
    async with within(5):
        usual = asyncio.create_task(under_test.publish(envelope("usual")))
        outcomes = [*await under_test.publish_many([envelope("many")] * 2), await usual]
    assert [type(outcome) for outcome in outcomes] == [PublishRejectedError] * 3
    assert transport.sent == ["patient"]
    patient.cancel()
    await asyncio.wait([patient])
    await under_test.close(1.0)


async def test_a_batch_behind_one_with_more_time_is_forgotten_once_it_is_published() -> None:
    async def all_but_patient(envelopes: Sequence[Envelope]) -> Outcomes:
        await (asyncio.Event().wait() if envelopes[0].id == "patient" else asyncio.sleep(0))
        return ()

    transport = FakeTransport(all_but_patient)
    transport.batching = Batching(messages=50, bytes=1 << 20, max_concurrent=2)
    under_test = Publisher(transport, connected, timeout=60.0, max_count=1000, max_bytes=1 << 30)  # type: ignore[arg-type]
    patient = asyncio.create_task(under_test.publish(envelope("patient"), 600.0))
    await asyncio.sleep(0)
    async with within(5):
        assert await under_test.publish_many([envelope("many")] * 200) == [None] * 200
    gc.collect()
    alive = [each.envelopes[0].id for each in gc.get_objects() if type(each) is Batch]
    assert alive == ["patient"]
    patient.cancel()
    await asyncio.wait([patient])
    await under_test.close(1.0)


async def test_those_who_wait_for_room_are_not_overtaken() -> None:
    async def take(_: Sequence[Envelope]) -> Outcomes:
        await asyncio.sleep(0.001)
        return ()

    under_test = publisher(take, max_count=20)
    counts = [0] * 60

    async def hammer(number: int) -> None:
        while sum(counts) < 40 * len(counts):
            assert await under_test.publish(envelope()) is None
            counts[number] += 1

    async with within(30):
        await asyncio.gather(*(hammer(number) for number in range(len(counts))))
    assert min(counts) > max(counts) / 2


async def test_a_lone_one_is_not_begun_before_those_who_were_woken() -> None:
    async def take(_: Sequence[Envelope]) -> Outcomes:
        await asyncio.sleep(0)
        return ()

    under_test = publisher(take, max_count=2)
    sent: list[str] = under_test.transport.sent  # type: ignore[attr-defined]
    assert await under_test.publish(envelope("first")) is None
    room = under_test._room
    for _ in range(2):
        room.enter(1)

    async def wait() -> None:
        assert await room.wait(asyncio.get_running_loop().time() + 60)
        sent.append("woken")

    waiting = [asyncio.create_task(wait()) for _ in range(2)]
    await asyncio.sleep(0)
    room.leave(2, 2)
    async with within(10):
        assert await under_test.publish(envelope("newcomer")) is None
        await asyncio.gather(*waiting)
    assert sent == ["first", "woken", "woken", "newcomer"]


async def test_a_loop_of_publishes_lets_others_run() -> None:
    backend = MemoryBackend(QueueSettings(namespace=fresh_namespace()))
    await backend.declare("g")
    other: list[int] = []

    async def tick() -> None:
        while True:
            other.append(1)
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    for number in range(1000):
        await backend.publish("k", {"n": number})
    ticking.cancel()
    assert len(other) >= 10
    await backend.disconnect()


class Text(str):
    """A string with more to it."""

    __slots__ = ()


async def test_texts_of_a_subclass_travel_as_plain_ones() -> None:
    backend = MemoryBackend(QueueSettings(namespace=fresh_namespace()))
    async with backend, backend.consume(group="g") as subscription, within(10):
        await backend.publish(Text("a.b"), {}, id=Text("id"), headers={Text("h"): Text("v")})
        message = await subscription.receive()
        found = [message.key, message.id, *message.headers, *message.headers.values()]
        assert found == ["a.b", "id", "h", "v"]
        assert {type(text) for text in found} == {str}
        await message.ack()


async def test_headers_that_a_handler_changes_are_its_own() -> None:
    backend = MemoryBackend(QueueSettings(namespace=fresh_namespace()))
    async with backend, within(10):
        await backend.declare("one")
        await backend.declare("two")
        await backend.publish("k", {}, headers={"h": "v"})
        for group in ("one", "two"):
            async with backend.consume(group=group) as subscription:
                message = await subscription.receive()
                assert message.headers == {"h": "v"}
                message.headers["h"] = "changed"  # type: ignore[index]
                await message.ack()


def test_messages_that_were_given_back_keep_no_event_loop_alive() -> None:
    settings = QueueSettings(namespace=fresh_namespace())
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def take(count: int) -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        async with MemoryBackend(settings) as backend, backend.consume(group="g", prefetch=count) as subscription:
            for _ in range(count):
                await subscription.receive()

    async def fill() -> None:
        async with MemoryBackend(settings) as backend:
            await backend.declare("g")
            await backend.publish_many([("k", {"n": number}) for number in range(5)])

    asyncio.run(fill())
    for count in (5, 4, 3):
        asyncio.run(take(count))
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3
