"""The transport alone: the primitives that the engine builds on, each in a few lines that show where it went wrong."""

import asyncio
import time

import pytest

from abe.errors import BackpressureError, GroupMissingError, UnroutableError
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite.kit import Kit, dead, release, retry
from abe_contract_tests.suite.steps import CLOCKS


@clause("C-HDR-01", transport=True)
async def test_a_delivery_brings_all_that_was_sent(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        assert await transport.declare("g", None, change=False) == ("#",)
        receiver = await kit.receiver(transport)
        sent = kit.envelope("orders.created", headers={"h": "\u00fc"}, body=b"{}")
        assert await kit.send(transport, sent) == [None]
        [delivery] = await kit.take(receiver, 1)
        assert (delivery.body, delivery.attempt, delivery.fault, delivery.lost) == (sent.body, 1, None, False)
        assert receiver.metadata(delivery) == (sent.id, sent.key, sent.published_at, sent.headers)


@clause("C-DLV-07", transport=True)
async def test_each_group_gets_what_its_patterns_match(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("all", None, change=True)
        await transport.declare("orders", ("orders.*",), change=True)
        await transport.declare("two", ("orders.#", "users.#"), change=True)
        sent = [kit.envelope(key) for key in ("orders.created", "users.x.y", "orders", "other")]
        assert await kit.send(transport, *sent) == [None] * 4
        for group, count in {"all": 4, "orders": 1, "two": 3}.items():
            await kit.expect(transport, group, waiting=count)


@clause("C-PUB-02", capability="key_patterns", transport=True)
async def test_what_no_group_wants_is_an_outcome_of_its_own(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("orders", ("orders.*",), change=True)
        outcomes = await kit.send(transport, *(kit.envelope(key) for key in ("orders.x", "users.x", "orders.y")))
        assert [type(outcome) for outcome in outcomes] == [type(None), UnroutableError, type(None)]
        await kit.expect(transport, "orders", waiting=2)


@clause("C-PUB-11", transport=True)
async def test_a_message_for_one_group_reaches_no_other(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("other", None, change=True)
        alone = kit.envelope(group="g")
        assert [type(outcome) for outcome in await kit.send(transport, alone)] == [UnroutableError]
        await transport.declare("g", None, change=True)
        assert await kit.send(transport, alone) == [None]
        await kit.expect(transport, "g", waiting=1)
        await kit.expect(transport, "other", waiting=0)


@clause("C-ORD-01", transport=True)
async def test_order_is_kept_within_and_across_batches(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport)
        sent = kit.envelopes(contract.many(700))
        await kit.send(transport, *sent)
        received = await kit.drain(transport, receiver, len(sent))
        assert [receiver.metadata(each).id for each in received] == [envelope.id for envelope in sent]


@clause("C-GRP-08", transport=True)
async def test_patterns_are_those_of_the_first_unless_they_are_changed(contract: Contract) -> None:
    async with Kit(contract) as kit:
        one, other = await kit.transport(), await kit.transport()
        assert set(await one.declare("g", ("a.*", "b.*"), change=False)) == {"a.*", "b.*"}
        assert set(await other.declare("g", ("c.*",), change=False)) == {"a.*", "b.*"}
        assert set(await other.declare("g", None, change=True)) == {"a.*", "b.*"}
        assert set(await other.declare("g", ("b.*", "c.*"), change=True)) == {"b.*", "c.*"}
        assert {group: set(patterns) for group, patterns in (await one.groups()).items()} == {"g": {"b.*", "c.*"}}
        outcomes = await kit.send(one, *(kit.envelope(key) for key in ("a.x", "b.x", "c.x")))
        assert [type(outcome) for outcome in outcomes] == [UnroutableError, type(None), type(None)]


@clause("C-PUB-09", transport=True)
async def test_a_group_takes_no_more_than_its_backlog(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport(QUEUE_MAX_BACKLOG="10")
        await transport.declare("g", None, change=True)
        outcomes = await kit.send(transport, *kit.envelopes(25))
        async with contract.within():
            while contract.harness.approximate and outcomes[-1] is None:  # the limit is as late as the count
                outcomes += await kit.send(transport, kit.envelope())
        accepted = outcomes.count(None)
        assert {type(outcome) for outcome in outcomes} == {type(None), BackpressureError}
        assert outcomes[:10] == [None] * 10
        assert accepted == 10 or contract.harness.approximate
        receiver = await kit.receiver(transport, prefetch=4)
        await kit.drain(transport, receiver, accepted - 6)
        left = kit.envelopes(4)
        async with contract.within():
            while left:  # a broker may say late that there is room again
                outcomes = await kit.send(transport, *left)
                left = [each for each, outcome in zip(left, outcomes, strict=True) if outcome is not None]
        await kit.drain(transport, receiver, 10)


@clause("C-GRP-07", transport=True)
async def test_the_first_group_gets_what_was_parked_in_its_order(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        sent = kit.envelopes(contract.many(1500))
        await kit.send(transport, *sent)
        await transport.declare("first", None, change=True)
        await transport.declare("second", None, change=True)
        receiver = await kit.receiver(transport, "first", prefetch=2000)
        received = [receiver.metadata(delivery).id for delivery in await kit.drain(transport, receiver, len(sent))]
        assert sorted(received) == [envelope.id for envelope in sent]
        if contract.capabilities.ordered:
            assert received == sorted(received)
        await kit.expect(transport, "second", waiting=0)


@clause("C-GRP-07", capability="key_patterns", transport=True)
async def test_patterns_choose_among_what_is_parked(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        count = contract.many(1200) // 3
        sent = [kit.envelope(f"{'b' if number % 3 else 'a'}.{number}") for number in range(3 * count)]
        await kit.send(transport, *sent)
        async with contract.within():
            await transport.declare("a", ("a.*",), change=True)
        receiver = await kit.receiver(transport, "a")
        received = {
            receiver.metadata(delivery).key.partition(".")[0]
            for delivery in await kit.drain(transport, receiver, count)
        }
        assert received == {"a"}
        async with contract.within():
            await transport.declare("rest", None, change=True)
        await kit.expect(transport, "rest", waiting=2 * count)


@clause("C-DLY-01", transport=True)
async def test_what_is_parked_keeps_its_time(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        sent = time.monotonic()
        await kit.send(transport, kit.envelope("late", delay=60), kit.envelope("soon", delay=1.0))
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport)
        [delivery] = await kit.take(receiver, 1)
        assert receiver.metadata(delivery).key == "soon"
        assert time.monotonic() - sent >= 1.0 - CLOCKS
        await kit.expect_soon(transport, "g", delayed=1)


@clause("C-DLY-01", transport=True)
async def test_a_delayed_message_waits_in_the_broker_and_comes_soon_after(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport)
        sent = time.monotonic()
        assert await kit.send(transport, kit.envelope("late", delay=1.0), kit.envelope("now")) == [None, None]
        [now] = await kit.drain(transport, receiver, 1)
        async with contract.within(1.0, "redelivery_bound"):
            [late] = await kit.take(receiver, 1)
        assert time.monotonic() - sent >= 1.0 - CLOCKS
        assert [receiver.metadata(each).key for each in (now, late)] == ["now", "late"]


@clause("C-ACK-01", transport=True)
async def test_what_is_acknowledged_is_gone_whatever_the_order(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport)
        await kit.send(transport, *kit.envelopes(5))
        taken = await kit.take(receiver, 5)
        assert not any(await receiver.ack([taken[3], taken[0], taken[1]], verify=False))
        assert not any(await receiver.ack([taken[4], taken[2]], verify=True))
        await kit.expect(transport, "g", waiting=0, in_flight=0)
        await receiver.close()
        await kit.expect(transport, "g", waiting=0, in_flight=0, dead=0)


@clause("C-RED-04", transport=True)
async def test_a_retry_counts_as_an_attempt_and_a_release_does_not(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport)
        sent = kit.envelope("orders.x", headers={"h": "v"})
        await kit.send(transport, sent)
        for settlement, attempt in ((release, 1), (retry, 1), (release, 2), (retry, 2)):
            [delivery] = await kit.take(receiver, 1)
            assert (delivery.attempt, delivery.body) == (attempt, sent.body)
            assert receiver.metadata(delivery) == (sent.id, sent.key, sent.published_at, sent.headers)
            await kit.settle(transport, receiver, settlement(delivery))
        [delivery] = await kit.take(receiver, 1)
        assert delivery.attempt == 3


@clause("C-RED-01", transport=True)
async def test_a_retry_waits_for_its_time_in_the_broker(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport)
        await kit.send(transport, *kit.envelopes(1))
        [delivery] = await kit.take(receiver, 1)
        settled = time.monotonic()
        await kit.settle(transport, receiver, retry(delivery, 1.0))
        await receiver.stop()
        await receiver.close()
        [again] = await kit.take(await kit.receiver(transport), 1)  # another consumer gets it
        assert time.monotonic() - settled >= 1.0 - CLOCKS
        assert again.attempt == 2


@clause("C-PSN-02", capability="dead_letter", transport=True)
async def test_a_dead_letter_keeps_everything(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport)
        sent = kit.envelope("a.b", headers={"h": "v"}, body=b"\x00\xff")
        await kit.send(transport, sent)
        [delivery] = await kit.take(receiver, 1)
        before = time.time()
        await kit.settle(transport, receiver, dead(delivery, "why", "trace"))
        [letter] = await kit.letters(transport)
        assert (letter.id, letter.key, letter.body, letter.headers) == (sent.id, "a.b", sent.body, {"h": "v"})
        assert (letter.attempts, letter.reason, letter.error) == (1, "why", "trace")
        assert letter.published_at == sent.published_at / 1000
        assert before - 1 < letter.dead_at < time.time() + 1


@clause("C-PSN-03", capability="dead_letter", transport=True)
async def test_the_letters_with_these_ids_are_moved_and_no_others(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport)
        sent = kit.envelopes(10)
        await kit.send(transport, *sent)
        await kit.bury(transport, receiver, 10)
        ids = [envelope.id for envelope in sent]
        assert await kit.total(transport.replay("g", [ids[3], "no such id"])) == 1
        assert await kit.total(transport.purge("g", [ids[3], ids[5]])) == 1
        [again] = await kit.take(receiver, 1)
        assert (receiver.metadata(again).id, again.attempt) == (ids[3], 1)
        left = {letter.id for letter in await kit.letters(transport)}
        assert left == set(ids) - {ids[3], ids[5]}


@clause("C-PSN-03", capability="dead_letter", transport=True)
async def test_more_than_a_page_is_listed_replayed_and_purged(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport, prefetch=2000)
        count = contract.many(1201)
        sent = kit.envelopes(count)
        await kit.send(transport, *sent)
        await kit.bury(transport, receiver, count)
        assert {letter.id for letter in await kit.letters(transport)} == {envelope.id for envelope in sent}
        assert await kit.total(transport.replay("g", None)) == count
        assert await kit.letters(transport) == []
        again = await kit.bury(transport, receiver, count)
        assert {(delivery.attempt, delivery.fault) for delivery in again} == {(1, None)}
        assert await kit.total(transport.purge("g", None)) == count
        assert await kit.total(transport.purge("g", None)) == 0
        await kit.expect(transport, "g", waiting=0, in_flight=0, dead=0)


@clause("C-GRP-09", transport=True)
async def test_the_statistics_tell_where_each_message_is(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport, prefetch=6)
        await kit.send(transport, *kit.envelopes(10), *kit.envelopes(2, "late", delay=60))
        taken = await kit.take(receiver, 6)
        await receiver.stop()
        await kit.settle(transport, receiver, dead(taken[2]), retry(taken[3], 60.0))
        waits = {"in_flight": 5, "delayed": 2} if contract.harness.retries_in_flight else {"in_flight": 4, "delayed": 3}
        await kit.expect(transport, "g", waiting=4, dead=1, **waits)


@clause("C-GRP-09", transport=True)
async def test_what_is_asked_of_a_group_that_does_not_exist_names_it(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        for call in (
            transport.stats("absent"),
            transport.subscribe("absent", 10),
            kit.letters(transport, "absent"),
            kit.total(transport.replay("absent", None)),
            kit.total(transport.purge("absent", ["x"])),
        ):
            with pytest.raises(GroupMissingError, match="'absent'"):
                await call
        await transport.delete_group("absent")
        assert await transport.groups() == {}


@clause("C-GRP-09", transport=True)
async def test_nothing_is_left_of_a_deleted_namespace(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await kit.send(transport, *kit.envelopes(3))
        await transport.declare("g", ("other",), change=True)
        await kit.send(transport, kit.envelope("other", delay=60), kit.envelope("other"))
        await transport.delete_group("g")
        assert await transport.groups() == {}
        async with contract.within():
            await transport.delete_namespace()
            await transport.delete_namespace()
        await transport.declare("g", None, change=True)
        await kit.expect(transport, "g", waiting=0, delayed=0)


@clause("C-RED-05", transport=True)
async def test_closing_gives_everything_back(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        closing = await kit.receiver(transport)
        sent = kit.envelopes(5)
        await kit.send(transport, *sent)
        taken = await kit.take(closing, 5)
        await closing.stop()
        await kit.settle(transport, closing, *map(release, taken))
        async with contract.within():
            await closing.close()
        other = await kit.receiver(transport)
        again = await kit.take(other, 5)
        assert {other.metadata(delivery).id for delivery in again} == {envelope.id for envelope in sent}
        assert {delivery.attempt for delivery in again} == {1}


@clause("C-CLS-02", transport=True)
async def test_stopping_ends_a_receive_that_waits(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport)
        at_once = transport.receiving.max_concurrent
        receiving = [asyncio.create_task(receiver.receive(1)) for _ in range(at_once)]
        await asyncio.sleep(0)
        async with contract.within(1):
            await receiver.stop()
            assert [list(await each) for each in receiving] == [[]] * at_once
            assert list(await receiver.receive(1)) == []
        await kit.send(transport, kit.envelope())
        [delivery] = await kit.take(await kit.receiver(transport), 1)
        assert delivery.attempt == 1, "a request that goes on without its receive takes no attempt"


@clause("C-CAN-01", transport=True)
async def test_recovering_gives_back_what_a_cancelled_receive_may_have_been_given(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        await transport.declare("g", None, change=True)
        receiver = await kit.receiver(transport)
        sent = kit.envelopes(20)
        await kit.send(transport, *sent)
        held = await kit.take(receiver, 3)
        receiving = asyncio.create_task(receiver.receive(10))
        await asyncio.sleep(0)
        receiving.cancel()
        await asyncio.wait([receiving])
        if not receiving.cancelled():
            held += receiving.result()  # it had ended before it could be cancelled
        async with contract.within():
            lost = list(await receiver.recover(held))
        ours = [delivery for delivery in held if delivery not in lost]
        await kit.ack(transport, receiver, ours)
        rest = await kit.drain(transport, receiver, 20 - len(ours))
        assert {receiver.metadata(delivery).id for delivery in [*ours, *rest]} == {envelope.id for envelope in sent}


@clause("C-CLS-01", transport=True)
async def test_ping_asks_the_broker(contract: Contract) -> None:
    async with Kit(contract) as kit:
        transport = await kit.transport()
        async with contract.within():
            await transport.ping()
