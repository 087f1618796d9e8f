"""C-GRP: consumers have identities of their own."""

from contextlib import AsyncExitStack

from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import (
    LONG_LEASE,
    collect,
    expect_counts,
    numbered,
    numbers,
    until,
    until_empty,
)


@clause("C-GRP-06")
async def test_processes_have_identities_of_their_own_even_after_a_restart(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    # No lease may run out here: what a dead process held must stay with its name.
    lease = {"QUEUE_LEASE_SECONDS": LONG_LEASE}
    seen: list[int] = []
    async with contract.within(20), AsyncExitStack() as stack:
        await backend.declare("g")
        await backend.publish_many(contract.apart(numbered(3)))
        for n in range(3):
            worker = await stack.enter_async_context(contract.worker_with(lease, jobs.hold, group="g", prefetch=1))
            assert await worker.next_report() == "subscribed"
            report = await worker.next_report()
            # Had one the name of another, it would be handed the other's message, or the two would count as one.
            assert report["attempt"] == 1
            seen.append(report["n"])
            assert await oracle.consumers("g") in (n + 1, None)
            await expect_counts(contract, oracle, "g", in_flight=n + 1)
            if n == 1 and contract.declares("lease"):
                await worker.kill()
    assert sorted(seen) == [0, 1, 2]


@clause("C-GRP-06")
async def test_the_identities_of_dead_processes_are_cleaned_up(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within(20):
        await backend.declare("g")
        await backend.publish_many(numbered(2))
        for _ in range(2):
            async with contract.worker(jobs.hold, group="g", prefetch=1) as worker:
                await worker.next_report()
                await worker.next_report()
                await worker.kill()
        async with backend.consume(group="g") as subscription:
            await collect(subscription, 2)
            await until_empty(oracle, "g")

            async def only_us() -> bool:
                return await oracle.consumers("g") in (0, 1, None)

            # Ten leases after their death at the latest: an operator must be able to tell who is there.
            async with contract.within(10 * contract.lease):
                await until(only_us)
        assert await oracle.consumers("g") in (0, None)


@clause("C-GRP-06")
async def test_consumers_of_one_process_have_identities_of_their_own(contract: Contract) -> None:
    first, second = contract.backend(), contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await first.declare("g")
        await first.publish_many(contract.apart(numbered(3)))
        subscriptions = [each.consume(group="g", prefetch=1) for each in (first, first, second)]
        # Brokers may learn of a consumer with its first message only.
        held = [await subscription.receive() for subscription in subscriptions]
        assert await oracle.consumers("g") in (3, None)
        for subscription in subscriptions:
            await subscription.aclose()
        assert await oracle.consumers("g") in (0, None)
    assert sorted(numbers(held)) == [0, 1, 2]
