"""Dead letters in numbers: looked at in pages, shown again at once, and moved once each."""

import asyncio
import json
from collections import Counter
from contextlib import aclosing
from typing import Any

import pytest
from aiohttp import web

from abe import AsyncLoopConsumer, Reject
from abe_backend_sqs import SqsBackend
from abe_contract_tests import bounds


async def bury(lab: Any, count: int, size: int = 0) -> None:
    """Put dead letters where they are kept, the oldest first."""
    url = await lab.url("dead", "g")

    def entry(n: int) -> dict[str, Any]:
        said = {"abe": [1, f"id-{n}", "k", 1], "abe-dead": [5, "why", "", n]}
        return {
            "Id": str(n),
            "MessageBody": json.dumps({"n": n, "x": "x" * size}),
            "MessageAttributes": {
                name: {"DataType": "String", "StringValue": json.dumps(value)} for name, value in said.items()
            },
        }

    step = 10 if size < 100_000 else 1
    for start in range(0, count, step):
        entries = [entry(n) for n in range(start, min(count, start + step))]
        await lab.ask("send_message_batch", QueueUrl=url, Entries=entries)


async def hidden(lab: Any) -> int:
    name = "ApproximateNumberOfMessagesNotVisible"
    found = await lab.ask("get_queue_attributes", QueueUrl=await lab.url("dead", "g"), AttributeNames=[name])
    return int(found["Attributes"][name])


async def test_a_few_of_many_are_listed_without_looking_at_all(lab: Any) -> None:
    """A list of 10 of 1,200 took all of them, within the time of one publish, and raised."""
    async with bounds.within(60):
        backend: SqsBackend = await lab.backend()
        await backend.declare("g")
        await bury(lab, 1_200)
        lab.gate.seen.clear()
        letters = await backend.dead_letters("g").list(10)
        assert [letter.id for letter in letters] == [f"id-{n}" for n in range(10)]
        assert len(lab.gate.requests("ReceiveMessage")) < 20
        assert await hidden(lab) == 0, "they are shown again"


async def test_all_of_many_are_gone_through_in_order_and_shown_again(lab: Any) -> None:
    async with bounds.within(60):
        backend: SqsBackend = await lab.backend()
        await backend.declare("g")
        await bury(lab, 450)
        letters = [letter.id async for letter in backend.dead_letters("g")]
        assert letters == [f"id-{n}" for n in range(450)]
        assert (await backend.dead_letters("g").get("id-449")) is not None
        assert await hidden(lab) == 0


async def test_who_leaves_in_the_middle_leaves_nothing_out_of_sight(lab: Any) -> None:
    async with bounds.within(60):
        transport = await lab.transport()
        await transport.declare("g", None, change=False)
        await bury(lab, 250)
        async with aclosing(transport.dead_letters("g")) as pages:
            async for page in pages:
                assert 1 <= len(page) <= 500
                assert await hidden(lab) > 0
                break
        assert await hidden(lab) == 0
        looking = asyncio.create_task(_all(transport))
        while not await hidden(lab):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
        looking.cancel()
        await asyncio.wait([looking])
        while await hidden(lab):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _all(transport: Any) -> None:
    async with aclosing(transport.dead_letters("g")) as pages:
        async for _ in pages:
            await asyncio.Event().wait()


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
async def test_a_page_is_bounded_in_bytes(lab: Any) -> None:
    async with bounds.within(60):
        transport = await lab.transport()
        await transport.declare("g", None, change=False)
        await bury(lab, 12, size=900_000)
        async with aclosing(transport.dead_letters("g")) as pages:
            sizes = [sum(len(letter.body) for letter in page) async for page in pages]
        assert sum(sizes) > 10_000_000
        assert max(sizes) <= 4 << 20


async def test_a_replay_does_not_meet_its_own_letters_again(lab: Any) -> None:
    """Sixty letters beside a consumer that still fails were 710 runs, one of them twelve."""
    runs: Counter[int] = Counter()

    async def fail(message: Any) -> None:
        runs[message["n"]] += 1
        raise Reject("still")

    async with bounds.within(60):
        backend: SqsBackend = await lab.backend()
        await backend.declare("g")
        await bury(lab, 120)
        async with AsyncLoopConsumer(backend, "g", concurrency=10) as consumer:
            running = asyncio.create_task(consumer.run(fail))
            progress: list[int] = []
            assert await backend.dead_letters("g").replay_all(progress=progress.append) == 120
            assert progress[-1] == 120
            while (await backend.stats("g")).dead < 120:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)
            await consumer.shutdown()
            await running
        assert runs == dict.fromkeys(range(120), 1)
        assert await backend.dead_letters("g").purge_all() == 120
        assert await backend.dead_letters("g").list() == []


async def test_letters_are_replayed_and_purged_by_their_ids(lab: Any) -> None:
    async with bounds.within(60):
        backend: SqsBackend = await lab.backend()
        await backend.declare("g")
        await bury(lab, 230)
        letters = backend.dead_letters("g")
        assert await letters.replay("id-0", "id-229", "none") == 2
        assert await letters.purge("id-1", "id-228") == 2
        assert (await backend.stats("g")).waiting == 2
        assert len(await letters.list(500)) == 226


async def test_dead_letters_are_found_whatever_sqs_counts(lab: Any) -> None:
    async with bounds.within(20):
        backend = await lab.backend(registry_ttl=1.0)
        async with backend.consume(group="g") as messages:
            await backend.publish("k", {"n": 1})
            await (await messages.receive()).reject("no")
        attributes = {f"ApproximateNumberOfMessages{each}": "0" for each in ("", "NotVisible", "Delayed")}
        lab.gate.times(
            1,
            "GetQueueAttributes",
            lambda body: web.json_response({"Attributes": attributes}) if "-dead-" in body["QueueUrl"] else None,
        )
        assert len(await backend.dead_letters("g").list()) == 1
