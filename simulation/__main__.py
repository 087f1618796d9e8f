"""``python -m simulation``: runs worlds, and shows those in which something does not hold."""

import argparse
import sys
from functools import partial

from simulation.reductions import shrink
from simulation.saboteurs import SABOTEURS
from simulation.search import Findings, rate, search
from simulation.simulate import simulate

_STARTS = 5
_MOST = 300


def main() -> int:
    """Run what the arguments name; return 1 if something does not hold in one of the worlds."""
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("first", type=int, nargs="?", default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many seeds")
    parser.add_argument("--jobs", type=int, default=0, help="how many processes; 0: as many as there are processors")
    parser.add_argument("--keep-going", action="store_true", help="run the others after a failure")
    parser.add_argument("--trace", action="store_true", help="print what happened in the first world, line by line")
    parser.add_argument(
        "--without", action="append", default=[], metavar="WHAT", help="leave that out of the first world"
    )
    parser.add_argument(
        "--shrink", action="store_true", help="leave out all that the first world's failure does not need"
    )
    parser.add_argument(
        "--saboteurs", action="store_true", help="print how many worlds it takes until a built-in fault is seen"
    )
    arguments = parser.parse_args()
    if arguments.saboteurs:
        return _rate_saboteurs()
    if arguments.shrink or arguments.trace or arguments.without:
        return _look_at(arguments)
    return _search(range(arguments.first, arguments.first + arguments.count), arguments)


def _look_at(arguments: argparse.Namespace) -> int:
    """Run one world, and print it."""
    try:
        history = simulate(arguments.first, arguments.without)
        if arguments.shrink and history.violations:
            history = shrink(partial(simulate, arguments.first), history)
    except ValueError as exc:
        sys.exit(f"python -m simulation: {exc}")
    if arguments.trace:
        sys.stdout.write(history.trace())
    for violation in history.violations[:5]:
        print(f"seed {history.seed}: {violation}")
    if not history.violations:
        print(f"nothing fails: {history.command}")
    elif arguments.shrink:
        print(f"{len(history.trace().splitlines())} lines are left: {history.command}")
    return int(bool(history.violations))


def _search(seeds: range, arguments: argparse.Namespace) -> int:
    findings = Findings()
    for some in search(seeds, arguments.jobs):
        findings.add(some)
        for seed, (command, violations) in some.failed.items():
            for violation in violations[:5]:
                print(f"seed {seed}: {violation}")
            print(f"replay it: {command}", flush=True)
        if some.failed and not arguments.keep_going:
            break
    print(findings)
    return int(bool(findings.failed))


def _rate_saboteurs() -> int:
    print(f"{'worlds until it is seen':34} median   most of {_STARTS} searches")
    missed = 0
    for name in SABOTEURS:
        line = rate(name, starts=_STARTS, most=_MOST)
        missed += "not seen" in line
        print(line, flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
