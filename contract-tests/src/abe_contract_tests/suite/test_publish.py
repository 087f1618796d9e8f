"""C-PUB: what a publish that returned, failed, or was refused means."""

import asyncio
from typing import Any

import pytest

from abe.errors import (
    AbeError,
    BackpressureError,
    PayloadError,
    PayloadTooLargeError,
    PublishRejectedError,
    PublishUnknownError,
    UnroutableError,
)
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import (
    collect,
    collect_distinct,
    expect_counts,
    numbered,
    numbers,
    unreachable_backend,
    until_empty,
)

NOT_JSON: Any = {"when": {1, 2, 3}}


@clause("C-PUB-01")
async def test_publish_returns_when_the_broker_holds_the_message(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        for published in range(1, 21):
            await backend.publish("order.created", {"n": published})
            await expect_counts(contract, oracle, "g", waiting=published)


@clause("C-PUB-01")
async def test_what_a_killed_publisher_had_confirmed_is_delivered(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        await backend.declare("g")
        async with contract.worker(jobs.publish_for_ever, key="order.created") as publisher:
            confirmed = [await publisher.next_report() for _ in range(20)]
            await publisher.kill()
        async with backend.consume(group="g") as subscription:
            seen = await collect_distinct(subscription, confirmed)
    assert set(confirmed) <= set(seen)


@clause("C-PUB-02", capability="key_patterns")
async def test_an_unroutable_mandatory_message_is_rejected_and_absent(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g", keys=["order.#"])
        with pytest.raises(UnroutableError) as caught:
            await backend.publish("invoice.sent", {"n": 1}, mandatory=True)
        assert isinstance(caught.value, PublishRejectedError)
        assert not caught.value.maybe_accepted
        assert not caught.value.retryable
        await backend.publish("order.created", {"n": 2}, mandatory=True)
        await expect_counts(contract, oracle, "g", total=1)


@clause("C-PUB-02")
async def test_a_message_refused_for_the_backlog_is_rejected_and_absent(contract: Contract) -> None:
    backend = contract.backend(QUEUE_MAX_BACKLOG="1")
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await backend.publish("order.created", {"n": 1})
        with pytest.raises(PublishRejectedError) as caught:
            await backend.publish("order.created", {"n": 2})
        assert not caught.value.maybe_accepted
        assert caught.value.retryable
        await expect_counts(contract, oracle, "g", total=1)


@clause("C-PUB-02")
async def test_rejected_and_unknown_are_two_types_and_each_says_what_it_means(contract: Contract) -> None:
    assert not issubclass(PublishRejectedError, PublishUnknownError)
    assert not issubclass(PublishUnknownError, PublishRejectedError)
    assert PublishUnknownError("").maybe_accepted
    assert not PublishRejectedError("").maybe_accepted
    if not contract.harness.networked:
        return
    backend = unreachable_backend(contract, QUEUE_PUBLISH_TIMEOUT_SECONDS="0.5")
    async with contract.within():
        with pytest.raises(AbeError) as caught:
            await backend.publish("order.created", {"n": 1})
    # Nothing was ever sent, so it is certainly absent: "unknown" would make the caller publish a second copy one day.
    assert not isinstance(caught.value, PublishUnknownError)
    assert not caught.value.maybe_accepted
    assert caught.value.retryable


@clause("C-PUB-02")
async def test_whatever_a_publish_that_ran_out_of_time_says_is_true(contract: Contract) -> None:
    checker = contract.backend()
    oracle = await contract.oracle()
    account = contract.accounting()
    async with contract.within(20):
        await checker.declare("g")
        # From far too short to long enough, so that time runs out before, during and after the way to the broker.
        for timeout in (1e-6, 1e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 2e-3, 1e-2):
            backend = contract.backend(QUEUE_PUBLISH_TIMEOUT_SECONDS=f"{timeout:f}")
            for _ in range(15):
                await account.publish(backend, "order.created", {"timeout": timeout})
            await backend.disconnect()
        async with checker.consume(group="g") as subscription:
            while (await oracle.counts("g")).total:
                if (message := subscription.take()) is not None:
                    account.delivered(message)
                    await message.ack()
                await asyncio.sleep(0)
    account.check(duplicates_allowed=True)
    if contract.harness.networked:
        assert account.errors, "nothing ran out of time, so that nothing was shown"
    for identity, error in account.errors.items():
        unknown = isinstance(error, PublishUnknownError)
        assert error.maybe_accepted is unknown
        assert account.outcomes[identity] == ("unknown" if unknown else "rejected")


@clause("C-PUB-03", capability="publish_dedup")
async def test_the_same_id_published_again_is_delivered_once(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        for _ in range(3):
            await backend.publish("order.created", {"n": 1}, id="order-1")
        await backend.publish("order.created", {"n": 2}, id="order-2")
        async with backend.consume(group="g") as subscription:
            seen = await collect_distinct(subscription, [1, 2])
            await until_empty(oracle, "g")
            assert subscription.take() is None
    assert seen == {1: 1, 2: 1}


@clause("C-PUB-04")
async def test_messages_of_an_existing_group_wait_for_a_consumer(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within():
        async with backend.consume(group="g"):
            pass
        await backend.publish_many(numbered(30))
        await backend.disconnect()
        later = contract.backend()
        async with later.consume(group="g") as subscription:
            assert sorted(numbers(await collect(subscription, 30))) == list(range(30))


@clause("C-PUB-05")
async def test_100_tasks_publish_through_one_instance(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()

    each = contract.many(2_000) // 100

    async def publish(task: int) -> None:
        for n in range(each):
            await backend.publish(
                f"task.{task}", {"task": task, "n": n, "text": f"{task}/{n}"}, headers={"task": str(task)}
            )

    async with contract.within(20):
        await backend.declare("g")
        async with asyncio.TaskGroup() as tasks:
            for task in range(100):
                tasks.create_task(publish(task))
        await expect_counts(contract, oracle, "g", waiting=100 * each)
        async with backend.consume(group="g", prefetch=200) as subscription:
            messages = await collect(subscription, 100 * each)
            # One that came twice may have come in place of another.
            while (
                contract.capabilities.spurious_duplicates
                and len({message["text"] for message in messages}) < 100 * each
            ):
                messages += await collect(subscription, 1)
    assert {(message["task"], message["n"]) for message in messages} == {
        (task, n) for task in range(100) for n in range(each)
    }
    for message in messages:
        task = message["task"]
        assert (message.key, message.headers, message["text"]) == (
            f"task.{task}",
            {"task": str(task)},
            f"{task}/{message['n']}",
        )


@clause("C-PUB-06")
async def test_a_payload_changed_while_it_is_published_is_delivered_as_it_was(contract: Contract) -> None:
    backend = contract.backend()
    payloads: list[dict[str, Any]] = [{"n": n, "items": [{"price": n}]} for n in range(50)]
    async with contract.within():
        await backend.declare("g")
        publishing = [asyncio.create_task(backend.publish("order.created", payload)) for payload in payloads]
        await asyncio.sleep(0)  # each publish has been called, and none of those that need the broker has returned
        for payload in payloads:
            payload["items"][0]["price"] = "changed"
            payload["added"] = True
        await asyncio.gather(*publishing)
        async with backend.consume(group="g") as subscription:
            messages = await collect(subscription, 50)
    assert sorted(messages, key=lambda message: message["n"]) == [{"n": n, "items": [{"price": n}]} for n in range(50)]


@clause("C-PUB-06")
async def test_a_payload_changed_after_publish_or_by_a_failed_handler_is_delivered_as_it_was(
    contract: Contract,
) -> None:
    backend = contract.backend()
    payload: dict[str, Any] = {"items": [{"price": 1}]}
    original: dict[str, Any] = {"items": [{"price": 1}]}
    async with contract.within():
        await backend.declare("g")
        await backend.publish("order.created", payload)
        payload["items"][0]["price"] = 2
        async with backend.consume(group="g") as subscription:
            first = await subscription.receive()
            assert first == original
            first["items"][0]["price"] = 3
            first["failed"] = True
            await first.nack(delay=0)
            second = await subscription.receive()
            assert second == original
            assert second.attempt == 2
            await second.ack()


@clause("C-PUB-06", capability="groups")
async def test_what_one_group_does_to_its_copy_no_other_group_sees(contract: Contract) -> None:
    backend = contract.backend()
    async with contract.within(), backend.consume(group="a") as ours, backend.consume(group="b") as theirs:
        await backend.publish("order.created", {"items": [{"price": 1}]})
        message = await ours.receive()
        message["items"][0]["price"] = 2
        assert (await theirs.receive()) == {"items": [{"price": 1}]}


@clause("C-PUB-07")
async def test_a_payload_that_is_not_json_is_refused_and_leaves_nothing(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        with pytest.raises(PayloadError) as caught:
            await backend.publish("order.created", NOT_JSON)
        assert not caught.value.maybe_accepted
        assert not caught.value.retryable
        with pytest.raises(PayloadError, match="7"):
            await backend.publish_many([*numbered(7), ("order.created", NOT_JSON), *numbered(2)])
        await expect_counts(contract, oracle, "g", total=0)
        await backend.publish("order.created", {"n": 1})
        await expect_counts(contract, oracle, "g", total=1)


@clause("C-PUB-07", "C-PUB-08")
async def test_a_payload_is_refused_before_any_io(contract: Contract) -> None:
    backend = unreachable_backend(contract) if contract.harness.networked else contract.backend()
    # With no broker, and no other task running between, the refusal can only come from here: publish never suspends.
    for payload, error in (
        (NOT_JSON, PayloadError),
        (sized(contract.capabilities.max_payload_bytes + 1), PayloadTooLargeError),
    ):
        publish = backend.publish("order.created", payload)
        try:
            with pytest.raises(error):
                publish.send(None)
        finally:
            publish.close()


@clause("C-PUB-08")
async def test_a_payload_up_to_the_declared_size_arrives_and_one_byte_more_is_refused(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    limit = contract.capabilities.max_payload_bytes
    async with contract.within(20):
        await backend.declare("g")
        with pytest.raises(PayloadTooLargeError) as caught:
            await backend.publish("blob", sized(limit + 1))
        assert not caught.value.retryable
        await expect_counts(contract, oracle, "g", total=0)
        async with backend.consume(group="g") as subscription:
            for size in (limit - 1, limit):
                await backend.publish("blob", sized(size))
                message = await subscription.receive()
                # Compared as a truth value: a failure must not print megabytes.
                assert (message == sized(size)) is True
                await message.ack()


@clause("C-PUB-09")
async def test_a_group_at_its_backlog_refuses_loudly_and_drops_nothing(contract: Contract) -> None:
    backend = contract.backend(QUEUE_MAX_BACKLOG="5")
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        for _, payload in numbered(5):
            await backend.publish("order.created", payload)
        with pytest.raises(BackpressureError) as caught:
            await backend.publish("order.created", {"n": 5})
        assert caught.value.retryable
        await expect_counts(contract, oracle, "g", waiting=5)
        async with backend.consume(group="g") as subscription:
            assert sorted(numbers(await collect(subscription, 5))) == [0, 1, 2, 3, 4]
            await until_empty(oracle, "g")
            await backend.publish("order.created", {"n": 6})
            assert numbers(await collect(subscription, 1)) == [6]


@clause("C-PUB-09")
async def test_no_retention_trims_what_waits_or_is_held(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(20):
        await backend.declare("g")
        await backend.publish("order.created", {"n": -1})
        async with backend.consume(group="g", prefetch=1) as holder:
            held = await holder.receive()
            count = contract.many(12_000)
            await backend.publish_many(numbered(count))
            counts = await oracle.counts("g")
            assert counts.total == count + 1
            await held.nack(delay=0)
        await expect_counts(contract, oracle, "g", total=count + 1)
        await backend.delete_group("g")


def sized(size: int) -> dict[str, Any]:
    """Return a payload that is that many bytes of JSON."""
    return {"x": "a" * (size - len('{"x":""}'))}
