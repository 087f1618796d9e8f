"""What SQS does and no emulator can be made to do: throttling, batches that fail in part, answers that are lost or repeat themselves."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from abe.backends.message_queue.base import Publication
from abe.errors import ConfigurationError, PartialPublishError, PayloadTooLargeError
from abe_backend_sqs import SqsBackend, _wire
from abe_contract_tests import bounds

Refusal = Callable[..., web.Response]


@pytest.mark.parametrize("code", ["ThrottlingException", "RequestThrottled", "OverLimit"])
async def test_what_is_throttled_is_sent_again(lab: Any, refusal: Refusal, code: str) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        await backend.declare("g")
        lab.gate.times(3, "SendMessageBatch", lambda _: refusal(code))
        await backend.publish("order.created", {"n": 1}, id="order-1")
        tries = lab.gate.requests("SendMessageBatch")
        assert len(tries) == 4
        assert all(each["Entries"] == tries[0]["Entries"] for each in tries), "each with the same id"
        assert (await backend.stats("g")).waiting == 1


async def test_the_entries_of_a_batch_fail_each_on_its_own(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        await backend.declare("g")
        lab.gate.fails(1, "SendMessageBatch", (0, "InternalError", False), (1, "InvalidMessageContents", True))
        with pytest.raises(PartialPublishError) as caught:
            await backend.publish_many([Publication("k", {"n": n}, id=f"id-{n}") for n in range(3)])
        ((index, error),) = caught.value.failures
        assert (index, error.retryable, error.maybe_accepted) == (1, False, False)
        assert "InvalidMessageContents" in str(error)
        first, again = lab.gate.requests("SendMessageBatch")
        assert len(first["Entries"]) == 3
        assert [json.loads(each["MessageBody"]) for each in again["Entries"]] == [{"n": 0}], "only what may succeed"


async def test_a_deletion_that_failed_is_repeated(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        async with backend.consume(group="g") as messages:
            await backend.publish_many([("k", {"n": n}) for n in range(3)])
            held = [await messages.receive() for _ in range(3)]
            lab.gate.fails(2, "DeleteMessageBatch", *((n, "InternalError", False) for n in range(3)))
            await asyncio.gather(*(message.ack() for message in held))
            stats = await backend.stats("g")
        assert (stats.waiting, stats.in_flight) == (0, 0)


async def test_a_message_that_is_moved_is_not_copied_twice_because_its_deletion_failed(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend()
        async with backend.consume(group="g") as messages:
            await backend.publish("k", {"n": 1})
            message = await messages.receive()
            lab.gate.fails(2, "DeleteMessageBatch", (0, "InternalError", False))
            await message.reject("it is wrong")
        assert [letter.reason for letter in await backend.dead_letters("g").list()] == ["it is wrong"]


async def test_one_answer_that_holds_a_message_twice_is_one_delivery(lab: Any) -> None:
    def twice(body: dict[str, Any]) -> web.Response | None:
        return web.json_response({"Messages": body.get("Messages", []) * 2})

    async with bounds.within(15):
        backend = await lab.backend()
        await backend.declare("g")
        await backend.publish("k", {"n": 1})
        lab.gate.after["ReceiveMessage"] = twice
        async with backend.consume(group="g") as messages:
            message = await messages.receive()
            assert messages.take() is None
            await message.ack()
            assert (await backend.stats("g")).in_flight == 0


async def test_a_fifo_queue_takes_a_message_once_whose_confirm_was_lost(lab: Any, refusal: Refusal) -> None:
    lost = 1

    def lose(body: dict[str, Any]) -> web.Response | None:
        nonlocal lost
        lost -= 1
        return refusal("InternalError", 500) if lost >= 0 else None

    async with bounds.within(15):
        backend = await lab.backend(fifo=True)
        await backend.declare("g")
        lab.gate.after["SendMessageBatch"] = lose
        await backend.publish("k", {"n": 1})
        assert len(lab.gate.requests("SendMessageBatch")) == 2
        assert (await backend.stats("g")).waiting == 1


async def test_what_was_sent_behind_a_failure_does_not_overtake_it_in_a_fifo_queue(lab: Any) -> None:
    async with bounds.within(15):
        backend = await lab.backend(fifo=True)
        await backend.declare("g")
        lab.gate.fails(1, "SendMessageBatch", *((n, "InternalError", False) for n in range(10)))
        await backend.publish_many([("k", {"n": n}) for n in range(25)])
        seen: list[int] = []
        async with backend.consume(group="g") as messages:
            async for message in messages:
                seen.append(message["n"])
                if len(seen) == 25:
                    break
        assert seen == list(range(25))


async def test_a_poll_that_outlives_its_consumer_gives_back_what_it_brings(lab: Any) -> None:
    async with bounds.within(15):
        backend, publisher = await lab.backend(), await lab.backend()
        async with backend.consume(group="g"):
            while not lab.gate.requests("ReceiveMessage"):  # noqa: ASYNC110 - the server sets no event of ours
                await asyncio.sleep(0.01)
        await backend.disconnect()
        await publisher.publish("k", {"n": 1})
        async with publisher.consume(group="g") as messages, bounds.within(5):
            message = await messages.receive()
            assert (message["n"], message.attempt) == (1, 1)


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's, from 1 MiB
async def test_a_message_may_be_as_large_as_sqs_takes_it_but_for_what_is_kept_free(lab: Any) -> None:
    most = _wire.LIMIT - _wire.RESERVE
    async with bounds.within(20):
        backend = await lab.backend()
        await backend.declare("g")
        await backend.publish("k", {"n": 1}, id="i")
        (entry,) = lab.gate.requests("SendMessageBatch")[0]["Entries"]
        attribute = entry["MessageAttributes"]["abe"]
        size = len(entry["MessageBody"]) + len("abe") + len("String") + len(attribute["StringValue"])
        payload, name = {"text": "x" * 1_000_000}, "padding"
        room = most - size + len(entry["MessageBody"]) - len(json.dumps(payload, separators=(",", ":")))
        sixes, ones = divmod(room - len(',{"padding":""}'), 6)
        padding = "\x01" * sixes + "p" * ones  # in JSON a control character takes six bytes
        with pytest.raises(PayloadTooLargeError, match=str(most + 1)):
            await backend.publish("k", payload, id="i", headers={name: padding + "p"})
        assert len(lab.gate.requests("SendMessageBatch")) == 1, "nothing was sent"
        await backend.publish("k", payload, id="i", headers={name: padding})
        async with backend.consume(group="g") as messages:
            found = [await messages.receive() for _ in range(2)]
            (large,) = (message for message in found if "text" in message)
            assert large.headers == {name: padding}
            await large.reject("r" * 10_000)
        (letter,) = await backend.dead_letters("g").list()
        assert letter.headers == {name: padding}, "what was kept free is enough to bury it"


async def test_no_text_shows_a_credential(lab: Any, refusal: Refusal, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="abe")
    secret = "swordfish-8061"
    texts: list[str] = []
    with pytest.raises(ConfigurationError) as refused:
        lab.settings(endpoint_url=lab.gate.url.replace("http://", f"http://user:{secret}@"))
    texts.append(f"{refused.value} {refused.value!r}")
    async with bounds.within(20):
        for code, status in (("InvalidClientTokenId", 403), ("ThrottlingException", 400), ("InternalError", 500)):
            lab.gate.rules = [lambda *_, code=code, status=status: refusal(code, status)]
            backend = SqsBackend(
                lab.settings(
                    access_key_id=f"{secret}-id",
                    secret_access_key=secret,
                    session_token=f"{secret}-token",
                    publish_timeout=0.5,
                )
            )
            with pytest.raises(Exception) as caught:
                await backend.publish("k", {"n": 1})
            error: BaseException | None = caught.value
            while error is not None:
                texts.append(f"{error} {error!r}")
                error = error.__cause__
            texts.append(repr(backend.settings))
            await backend.disconnect()
    assert len(texts) >= 6
    assert secret not in " ".join(texts) + caplog.text
