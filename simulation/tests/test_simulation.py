"""Worlds in which everything holds, and worlds with a fault of ours, which the oracle sees."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from simulation import simulate
from simulation.faults import EVENTS, KINDS
from simulation.history import History
from simulation.scenario import draw_scenario

from abe.backends.message_queue.engine import in_flight, inbox, leases, publisher, settler
from abe.errors import AbeError

SEEDS = 24
"""How many worlds the tests run. ``python -m simulation`` runs others."""


def told(history: History) -> str:
    """Return what does not hold in a world, and how to see it again."""
    ends = history.trace().splitlines()[-60:]
    return "\n".join([*ends, *history.violations, f"replay it: {history.command}"])


@pytest.mark.parametrize("seed", range(SEEDS))
def test_everything_holds(seed: int) -> None:
    history = simulate(seed)
    assert not history.violations, told(history)


def test_worlds_are_of_many_kinds() -> None:
    worlds = [draw_scenario(seed, "namespace") for seed in range(SEEDS)]
    assert {kind for world in worlds for kind in world.plan.rates} == set(KINDS)
    assert {event for world in worlds for event in world.plan.events} == set(EVENTS)
    consumers = [plan for world in worlds for host in world.hosts for plan in host.consumers]
    assert {plan.kind for plan in consumers} == {"loop", "iterate", "explicit"}
    assert {world.leased for world in worlds} == {world.shuffled for world in worlds} == {True, False}
    assert any(world.plan.harmless for world in worlds)


def test_the_same_seed_gives_the_same_trace() -> None:
    first = simulate(7).trace()
    simulate(8)
    assert simulate(7).trace() == first
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    command = [sys.executable, "-m", "simulation", "7", "--trace"]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    assert other.stdout.startswith(first)


def _never_renews(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(self: leases.LeaseKeeper) -> None:
        self._lease = None
        await original(self)

    original = leases.LeaseKeeper.run
    monkeypatch.setattr(leases.LeaseKeeper, "run", run)


def _has_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox.Inbox, "_room", lambda _: 3)


def _acknowledges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def attempt(self: settler.Settler, call: Any, items: Sequence[Any]) -> Sequence[AbeError | None]:
        return [None] * len(items)

    monkeypatch.setattr(settler.Settler, "_attempt", attempt)


def _confirms_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher.Publisher, "_gave_up", lambda *_: None)


def _rejects_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    original = publisher.Publisher._gave_up
    monkeypatch.setattr(
        publisher.Publisher, "_gave_up", lambda self, unknown, cause, timeout: original(self, False, cause, timeout)
    )


def _forgets_what_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight.InFlight, "dropped", lambda *_: None)


def _recovers_what_is_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight.InFlight, "deliveries", lambda self: self._settler.deliveries())


SABOTEURS = [
    _never_renews,
    _has_no_bound,
    _acknowledges_nothing,
    _confirms_what_is_not_known,
    _rejects_what_is_not_known,
    _forgets_what_is_dropped,
    _recovers_what_is_in_hand,
]


@pytest.mark.thorough
@pytest.mark.parametrize("sabotage", SABOTEURS, ids=lambda each: each.__name__.strip("_"))
def test_a_fault_of_the_engine_is_seen(
    sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    assert any(simulate(seed).violations for seed in range(60))
