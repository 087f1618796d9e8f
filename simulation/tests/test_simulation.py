"""Worlds in which everything holds, and worlds with a fault of ours, which the oracle sees."""

import os
import shlex
import subprocess
import sys
from functools import partial

import pytest
from simulation import simulate
from simulation.faults import EVENTS, KINDS
from simulation.history import History
from simulation.reductions import shrink
from simulation.saboteurs import SABOTEURS, sabotaged
from simulation.scenario import draw_scenario
from simulation.search import Findings, search, worlds_until_seen

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


@pytest.mark.thorough
@pytest.mark.parametrize("name", SABOTEURS)
def test_a_fault_of_the_engine_is_seen(name: str) -> None:
    assert worlds_until_seen(name, 0, 150) is not None


def test_a_world_that_fails_is_made_smaller_and_can_be_run_again() -> None:
    with sabotaged("acknowledges_what_fails"):
        whole = next(history for seed in range(50) if (history := simulate(seed)).violations)
        small = shrink(partial(simulate, whole.seed), whole)
        again = simulate(whole.seed, small.reductions)
    assert small.violations
    assert len(small.trace().splitlines()) < len(whole.trace().splitlines()) / 2
    assert again.trace() == small.trace()
    assert f"--without {shlex.quote(small.reductions[0])}" in small.command
    assert not simulate(whole.seed, small.reductions).violations


def test_what_leaves_out_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'nonsense' leaves out nothing of this world; possible is: .*half the time"):
        simulate(0, ["nonsense"])


def test_worlds_are_run_by_several_processes_and_counted() -> None:
    findings = Findings()
    for some in search(range(20), jobs=2):
        findings.add(some)
    assert findings.worlds == 20
    assert not findings.failed
    assert findings.callbacks == sum(simulate(seed).steps for seed in range(20))
