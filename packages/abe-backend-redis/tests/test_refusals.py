"""A user with fewer rights than the README's: newer commands are done without, what cannot be done is told at once."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from abe import AsyncLoopConsumer
from abe.backends.message_queue.base import Delivery, Disposition, Settlement
from abe.errors import ConfigurationError, PermissionDeniedError
from abe_contract_tests import bounds

Collect = Callable[..., Awaitable[list[Delivery]]]

NEWER = ("xackdel", "unlink", "scan", "client|id", "client|unblock")
"""Commands that the provider can do without."""


async def user(lab: Any, *rules: str) -> dict[str, Any]:
    await lab.redis.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", *rules)
    return {"username": "app", "password": "secret"}


class TestNewerCommands:
    @pytest.mark.parametrize("name", NEWER)
    async def test_one_that_is_refused_is_done_without(
        self, launch: Any, lab_at: Any, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        lab = lab_at(launch(server="redis8").url)
        caplog.set_level(logging.WARNING)
        backend = await lab.backend(**await user(lab, f"-{name}"))
        await backend.declare("g")
        for number in range(100):
            await backend.publish("k", {"n": number})
        numbers: list[int] = []

        async def handle(message: dict[str, Any]) -> None:
            numbers.append(message["n"])
            if len(numbers) == 100:
                await consumer.shutdown()

        async with bounds.within(10), AsyncLoopConsumer(backend, "g", concurrency=10) as consumer:
            await consumer.run(handle)
        assert sorted(numbers) == list(range(100))
        stats = await backend.stats("g")
        assert (stats.waiting, stats.in_flight, stats.dead) == (0, 0, 0)
        await backend.delete_namespace()
        assert not await lab.redis.exists(*lab.names.all_of("g"), lab.names.groups, lab.names.version)
        assert caplog.messages == []

    async def test_xackdel_is_asked_for_once(self, launch: Any, lab_at: Any, collect: Collect) -> None:
        lab = lab_at(launch(server="redis8").url)
        transport = await lab.transport(**await user(lab, "-xackdel"))
        assert transport._broker.has_xackdel
        await transport.declare("g", None, change=False)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(20))
        for delivery in await collect(receiver, 20):
            assert not any(await receiver.ack([delivery], verify=False))
        assert not transport._broker.has_xackdel
        assert await lab.redis.xlen(lab.names.queue("g")) == 0
        assert await lab.pending() == 0
        refused = (await lab.redis.info("errorstats"))["errorstat_NOPERM"]["count"]
        assert int(refused) == 1


class TestPublishing:
    async def test_what_one_message_may_not_is_no_matter_of_the_others(self, launch: Any, lab_at: Any) -> None:
        """What was stored is confirmed, and what was refused is certainly absent."""
        for make in ("system", "redis8", "valkey"):
            lab = lab_at(launch(server=make).url)
            transport = await lab.transport(**await user(lab, "-zadd"))
            await transport.declare("g", None, change=False)
            batch = [lab.envelope(), lab.envelope(delay=5), lab.envelope(), lab.envelope(delay=5)]
            for envelopes in (batch, batch[::-1]):
                outcomes = await transport.send(envelopes)
                refused = [PermissionDeniedError if envelope.delay else type(None) for envelope in envelopes]
                assert [type(outcome) for outcome in outcomes] == refused
                assert not any(outcome.maybe_accepted for outcome in outcomes if outcome is not None)
            assert (await transport.stats("g")).waiting == 4

    async def test_a_message_that_some_groups_have_is_told_apart(self, one_lab: Any) -> None:
        transport = await one_lab.transport()
        await transport.declare("a", None, change=False)
        await transport.declare("b", ("b",), change=False)
        await one_lab.redis.delete(one_lab.names.queue("b"))
        await one_lab.redis.set(one_lab.names.queue("b"), "somebody else's")
        outcomes = await transport.send([one_lab.envelope("a"), one_lab.envelope("b"), one_lab.envelope("a")])
        assert [type(outcome) for outcome in outcomes] == [type(None), ConfigurationError, type(None)]
        assert outcomes[1].maybe_accepted
        assert (await transport.stats("a")).waiting == 3

    async def test_publish_many_names_the_refused(self, launch: Any, lab_at: Any) -> None:
        lab = lab_at(launch().url)
        backend = await lab.backend(**await user(lab, "-zadd"), groups={"g": ()})
        outcomes = await asyncio.gather(
            *(backend.publish("k", {"n": n}, delay=5 if n % 2 else None) for n in range(10)), return_exceptions=True
        )
        assert [isinstance(outcome, PermissionDeniedError) for outcome in outcomes] == [False, True] * 5
        assert (await backend.stats("g")).waiting == 5


class TestForGood:
    @pytest.mark.parametrize("name", ["xdel", "xack"])
    @pytest.mark.parametrize("verify", [True, False])
    async def test_an_acknowledgement_that_is_refused_says_so_at_once(
        self, launch: Any, lab_at: Any, collect: Collect, name: str, verify: bool
    ) -> None:
        lab = lab_at(launch().url)
        transport = await lab.transport(**await user(lab, f"-{name}"))
        await transport.declare("g", None, change=False)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(2))
        held = await collect(receiver, 2)
        if verify:
            for outcome in await receiver.ack(held, verify=True):
                assert isinstance(outcome, PermissionDeniedError)
                assert "rights" in str(outcome)
        else:
            with pytest.raises(PermissionDeniedError, match="rights"):
                await receiver.ack(held, verify=False)

    @pytest.mark.parametrize(
        ("name", "disposition", "delay"),
        [
            ("xadd", Disposition.DEAD, 0.0),
            ("xadd", Disposition.RETRY, 0.0),
            ("zadd", Disposition.RETRY, 5.0),
            ("xclaim", Disposition.RELEASE, 0.0),
        ],
    )
    async def test_a_settlement_that_is_refused_says_so_at_once(
        self, launch: Any, lab_at: Any, collect: Collect, name: str, disposition: Disposition, delay: float
    ) -> None:
        lab = lab_at(launch().url)
        rights = await user(lab)
        transport = await lab.transport(**rights)
        await transport.declare("g", None, change=False)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(2))
        held = await collect(receiver, 2)
        await user(lab, f"-{name}")
        for outcome in await receiver.settle([Settlement(each, disposition, delay=delay) for each in held]):
            assert isinstance(outcome, PermissionDeniedError)
            assert "rights" in str(outcome)
        assert await lab.pending() == 2

    async def test_the_others_of_a_batch_are_settled_and_not_taken_for_lost(
        self, launch: Any, lab_at: Any, collect: Collect
    ) -> None:
        lab = lab_at(launch().url)
        transport = await lab.transport(**await user(lab))
        await transport.declare("g", None, change=False)
        receiver = await lab.receiver(transport)
        await transport.send(lab.envelopes(3))
        first, second, third = await collect(receiver, 3)
        await user(lab, "-zadd")
        batch = [
            Settlement(first, Disposition.RETRY),
            Settlement(second, Disposition.RETRY, delay=60),
            Settlement(third, Disposition.DEAD),
        ]
        outcomes = await receiver.settle(batch)
        assert [type(outcome) for outcome in outcomes] == [type(None), PermissionDeniedError, type(None)]
        await user(lab)
        assert await receiver.settle(batch[1:2]) == [None]
        stats = await transport.stats("g")
        assert (stats.waiting, stats.in_flight, stats.delayed, stats.dead) == (1, 0, 1, 1)
