"""An application's processes in simulated worlds."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from abe import AsyncLoopConsumer, ConfigurationError, FullBackend, Message, PublishUnknownError, RetryPolicy
from abe.testing import Simulation, simulate
from abe.testing.simulation import seams

ORDERS = 10


class Bank:
    """Remembers what was charged; it is told the order, and may be asked twice."""

    def __init__(self) -> None:
        self.charges: Counter[int] = Counter()

    async def forgetful(self, message: Message) -> None:
        """Charge an order, unless that is done; two may look at once."""
        if not self.charges[message["order"]]:
            await asyncio.sleep(0.3)
            self.charges[message["order"]] += 1

    async def careful(self, message: Message) -> None:
        """Charge an order once."""
        await asyncio.sleep(0.3)
        self.charges[message["order"]] = 1


async def sell(simulation: Simulation, bank: Bank, *, careful: bool) -> None:
    async def billing(backend: FullBackend) -> None:
        await AsyncLoopConsumer(backend, "billing").run(bank.careful if careful else bank.forgetful)

    await simulation.backend.declare("billing")
    for name in ("a", "b"):
        simulation.process(billing, name=name)
    for order in range(ORDERS):
        await simulation.backend.publish("order.created", {"order": order})
    await simulation.settled()
    assert bank.charges == Counter(range(ORDERS))


def test_what_holds_whatever_happens_holds_in_every_world() -> None:
    faults: list[str] = []

    async def scenario(simulation: Simulation) -> None:
        await sell(simulation, Bank(), careful=True)
        faults.extend(simulation.faults)

    began = time.perf_counter()
    simulate(scenario, seeds=range(30))
    assert any("is killed" in fault for fault in faults)
    assert any("stands still for" in fault for fault in faults)
    assert time.perf_counter() - began < 30 * 30, "leases and standstills take no real time"


def test_a_world_that_fails_says_its_seed_and_what_happened_and_can_be_run_again() -> None:
    def fails(seeds: range | list[int]) -> AssertionError:
        with pytest.raises(AssertionError) as caught:
            simulate(lambda simulation: sell(simulation, Bank(), careful=False), seeds=seeds)
        return caught.value

    (note,) = fails(range(200)).__notes__
    seed = int(note.split("seed ")[1].split()[0])
    assert f"in the world of seed {seed} (seeds=[{seed}] runs it again)" in note
    assert "stands still for" in note
    assert fails([seed]).__notes__ == [note]


def test_a_process_that_was_killed_begins_again_and_is_done_when_it_has_returned() -> None:
    lives: Counter[int] = Counter()

    async def scenario(simulation: Simulation) -> None:
        async def publisher(backend: FullBackend) -> None:
            lives[simulation.seed] += 1
            for number in range(ORDERS):
                for tries in range(100):
                    try:
                        await backend.publish("k", {"n": number}, id=str(number))
                    except PublishUnknownError:
                        assert tries < 99
                    else:
                        break
                await asyncio.sleep(0.5)

        seen: set[int] = set()

        async def consumer(backend: FullBackend) -> None:
            await AsyncLoopConsumer(backend, "g").run(lambda message: seen.add(message["n"]))

        await simulation.backend.declare("g")
        simulation.process(consumer)
        await simulation.process(publisher)
        await simulation.settled()
        assert seen == set(range(ORDERS))
        assert simulation.time() >= 0.5 * ORDERS

    simulate(scenario, seeds=range(20))
    assert set(lives) == set(range(20))
    assert max(lives.values()) > 1


def test_answers_to_publishes_are_lost() -> None:
    copies: Counter[int] = Counter()

    async def scenario(simulation: Simulation) -> None:
        async def publisher(backend: FullBackend) -> None:
            for number in range(ORDERS):
                with suppress(PublishUnknownError):  # it was published, and stood still for the rest of its time
                    await backend.publish("k", {"n": number})

        await simulation.backend.declare("g")
        await simulation.process(publisher)
        copies[(await simulation.backend.stats("g")).waiting] += 1

    simulate(scenario, seeds=range(30))
    assert min(copies) >= ORDERS - 1
    assert max(copies) > ORDERS


def test_what_a_process_raises_ends_its_world() -> None:
    async def scenario(simulation: Simulation) -> None:
        async def broken(_: FullBackend) -> None:
            raise LookupError("no such table")

        await simulation.process(broken, name="importer")

    with pytest.raises(LookupError, match="no such table") as caught:
        simulate(scenario)
    assert "importer fails with LookupError" in caught.value.__notes__[0]


def test_what_nobody_awaits_ends_its_world_too() -> None:
    async def scenario(simulation: Simulation) -> None:
        async def forgetful(_: FullBackend) -> None:
            async def broken() -> None:
                raise LookupError("no such table")

            keep.append(asyncio.create_task(broken()))
            await asyncio.sleep(1)
            keep.clear()

        keep: list[asyncio.Task[None]] = []
        await simulation.process(forgetful, name="importer")

    with pytest.raises(RuntimeError, match="in importer: Task exception was never retrieved: LookupError"):
        simulate(scenario)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr)
def test_whatever_ends_a_process_is_raised_with_a_note(error: BaseException) -> None:
    async def scenario(simulation: Simulation) -> None:
        async def broken(_: FullBackend) -> None:
            raise error

        try:
            await simulation.process(broken, name="importer")
        finally:
            await asyncio.Event().wait()  # what the scenario then does is no matter

    wanted = RuntimeError if isinstance(error, asyncio.CancelledError) else type(error)
    with pytest.raises(wanted) as caught:
        simulate(scenario, seeds=[1])
    assert "seed 1" in caught.value.__notes__[0]


def test_a_process_ends_as_programs_do() -> None:
    ended: list[str] = []

    async def scenario(simulation: Simulation) -> None:
        async def leaves(_: FullBackend) -> None:
            async def ticks() -> None:
                try:
                    await asyncio.sleep(3600)
                finally:
                    ended.append("task")

            async def numbers() -> AsyncIterator[int]:
                try:
                    yield 1
                finally:
                    await asyncio.sleep(0)
                    ended.append("generator")

            task = asyncio.create_task(ticks())
            async for _number in numbers():
                break
            await asyncio.sleep(0.01)
            assert not task.done()

        await simulation.process(leaves)

    simulate(scenario, seeds=[3])
    assert ended[-2:] == ["generator", "task"]


def test_what_never_ends_is_told() -> None:
    async def left(simulation: Simulation) -> None:
        await simulation.backend.publish("k", {})
        await simulation.backend.declare("g", ["k"])
        await simulation.backend.publish("k", {})
        await simulation.settled(within=60)

    with pytest.raises(TimeoutError, match="after 60 s: 2 messages of group 'g' wait"):
        simulate(left, seeds=[1])

    async def waits(_: Simulation) -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing is ready"):
        simulate(waits, seeds=[1])


@pytest.mark.parametrize("greenlet", [True, False])
def test_synchronous_handlers_need_greenlet(monkeypatch: pytest.MonkeyPatch, greenlet: bool) -> None:
    if not greenlet:
        monkeypatch.setattr(seams, "_GREENLET", None)

    async def scenario(simulation: Simulation) -> None:
        seen: Counter[int] = Counter()

        def handler(message: Message) -> None:
            seen[message["n"]] += 1
            if seen[message["n"]] == 1:
                raise ValueError("once more")

        async def consumer(backend: FullBackend) -> None:
            policy = RetryPolicy(max_attempts=9)
            await AsyncLoopConsumer(backend, "g", concurrency=2, retry=policy).run(handler)

        await simulation.backend.declare("g")
        simulation.process(consumer)
        await simulation.backend.publish("k", {"n": 1})
        await simulation.settled()
        assert seen[1] >= 2

    if greenlet:
        simulate(scenario, seeds=range(5))
    else:
        with pytest.raises(ConfigurationError, match=r"abe-core\[simulation\]"):
            simulate(scenario, seeds=range(5))


def test_a_thread_of_the_applications_own_is_refused() -> None:
    async def scenario(_: Simulation) -> None:
        await asyncio.to_thread(time.sleep, 0)

    with pytest.raises(RuntimeError, match="its time is virtual"):
        simulate(scenario, seeds=[1])


async def test_it_is_not_for_coroutines() -> None:
    async def scenario(_: Simulation) -> None:
        """Do nothing."""

    with pytest.raises(RuntimeError, match="from a plain function"):
        simulate(scenario)
