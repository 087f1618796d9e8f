"""C-MEM: a backlog waits in the broker, not in the client."""

import asyncio

from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import collect, expect_at_most, expect_counts, numbered, until

BACKLOG = 200_000
CHUNK = 10_000
PREFETCH = 50
PAYLOAD = "x" * 150
CONSTANT = 16 * 1024 * 1024
"""Bytes for buffers, the allocator and late imports: the backlog's payloads alone are about twice as much."""


@clause("C-MEM-01")
async def test_a_backlog_of_200000_leaves_a_stalled_client_small(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(60):
        await backend.declare("g")
        await backend.publish("order.created", {"n": -1})
        async with contract.worker(jobs.stall, group="g", prefetch=PREFETCH) as worker:
            assert await worker.next_report() == "stalled"
            await worker.send("how much?")
            before = await worker.next_report()
            backlog = contract.many(BACKLOG)
            for start in range(0, backlog, CHUNK):
                await backend.publish_many(
                    [("order.created", {"n": n, "text": PAYLOAD}) for n in range(start, min(start + CHUNK, backlog))]
                )
            await worker.send("how much?")
            growth = await worker.next_report() - before
            await expect_counts(contract, oracle, "g", total=backlog + 1)
            await expect_at_most(contract, oracle, "g", PREFETCH)
            assert growth <= PREFETCH * len(PAYLOAD) + CONSTANT, f"{growth / 1e6:.0f} MB"
        await backend.delete_group("g")


@clause("C-MEM-01")
async def test_a_client_holds_no_more_than_its_limit_of_a_backlog(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(20):
        await backend.declare("g")
        count = contract.many(5_000)
        await backend.publish_many(contract.apart(numbered(count)))
        async with backend.consume(group="g", prefetch=PREFETCH) as stalled:
            await stalled.receive()
            held = 1
            # Whatever the client fetched is at hand or held by now, once it has all it may have.
            while stalled.take() is not None:
                held += 1
            assert held <= PREFETCH

            async def only_what_it_holds() -> bool:
                counts = await oracle.counts("g")
                return counts.in_flight == counts.total <= PREFETCH

            async with backend.consume(group="g", prefetch=500) as others:
                # It takes all that the stalled one leaves to it, and what comes twice where the broker says that it may.
                taking = asyncio.ensure_future(collect(others, 2 * count))
                await until(only_what_it_holds)
                taking.cancel()
                await asyncio.wait([taking])
        await backend.delete_group("g")
