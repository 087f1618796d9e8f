"""Runs many worlds, on all processors, and counts what happened in them."""

import gc
import multiprocessing
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from time import process_time

from simulation.saboteurs import sabotaged
from simulation.simulate import simulate

_PART = 10
"""Worlds that a process runs before it tells what happened."""


@dataclass
class Findings:
    """What some worlds were like.

    Attributes:
        worlds: How many.
        callbacks: How many callbacks were run in them.
        seconds: Processor time.
        facts: How often things happened, by kind.
        failed: What did not hold, by seed: the command that shows it, and the violations.
    """

    worlds: int = 0
    callbacks: int = 0
    seconds: float = 0.0
    facts: Counter[str] = field(default_factory=Counter[str])
    failed: dict[int, tuple[str, list[str]]] = field(default_factory=dict[int, tuple[str, list[str]]])

    def add(self, other: "Findings") -> None:
        """Add those of other worlds."""
        self.worlds += other.worlds
        self.callbacks += other.callbacks
        self.seconds += other.seconds
        self.facts += other.facts
        self.failed |= other.failed

    def __str__(self) -> str:
        facts = self.facts
        return (
            f"{len(self.failed)} of {self.worlds} worlds failed: {facts['messages']} messages, {facts['deliveries']} deliveries, "
            f"{self.callbacks} callbacks, {1000 * self.seconds / max(1, self.worlds):.0f} ms a world, "
            f"{self.callbacks / max(0.001, self.seconds):.0f} callbacks a second of a processor"
        )


def run_worlds(seeds: Sequence[int]) -> Findings:
    """Run worlds in this process."""
    gc.collect()
    gc.freeze()  # a world is collected often: not what was there before
    findings = Findings()
    began = process_time()
    for seed in seeds:
        history = simulate(seed)
        findings.worlds += 1
        findings.callbacks += history.steps
        findings.facts.update(history.summary())
        if history.violations:
            findings.failed[seed] = history.command, history.violations
    findings.seconds = process_time() - began
    return findings


def search(seeds: Sequence[int], jobs: int) -> Iterator[Findings]:
    """Run worlds, and yield the findings in parts, as they come.

    Args:
        seeds: Which.
        jobs: How many processes run them; 0: as many as there are processors.
    """
    parts = [seeds[start : start + _PART] for start in range(0, len(seeds), _PART)]
    jobs = min(jobs or os.cpu_count() or 1, len(parts))
    if jobs <= 1:
        yield from map(run_worlds, parts)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(run_worlds, part) for part in parts]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def worlds_until_seen(saboteur: str, first: int, most: int) -> int | None:
    """Return how many worlds it takes until a built-in fault is seen; None: more than `most`.

    Args:
        saboteur: The fault's name.
        first: The first seed.
        most: When to give up.
    """
    with sabotaged(saboteur):
        for count in range(1, most + 1):
            if simulate(first + count - 1).violations:
                break
        else:
            return None
    assert not simulate(first + count - 1).violations, "the fault that was seen is another one"
    return count


def rate(saboteur: str, *, starts: int, most: int) -> str:
    """Return a line: how many worlds it takes until a fault is seen, the median and the most of some searches."""
    counts = [worlds_until_seen(saboteur, 100_000 * start, most) for start in range(starts)]
    seen = [count for count in counts if count is not None]
    if len(seen) < len(counts):
        return f"{saboteur:34} not seen in {most} worlds ({len(counts) - len(seen)} searches of {starts})"
    return f"{saboteur:34} {statistics.median(seen):>6.0f} {max(seen):>6}"
