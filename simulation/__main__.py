"""``python -m simulation``: runs worlds, and shows those in which something does not hold."""

import argparse
import gc
import sys
import time

from simulation.simulate import simulate


def main() -> int:
    """Run the seeds that the arguments name; return 1 if something does not hold in one of them."""
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("first", type=int, nargs="?", default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many seeds, one after the other")
    parser.add_argument("--trace", action="store_true", help="print what happened, line by line")
    parser.add_argument("--keep-going", action="store_true", help="run the others after a failure")
    arguments = parser.parse_args()
    gc.collect()
    gc.freeze()
    failed = 0
    began = time.process_time()
    for seed in range(arguments.first, arguments.first + arguments.count):
        history = simulate(seed)
        if arguments.trace:
            sys.stdout.write(history.trace())
        if not history.violations:
            continue
        failed += 1
        for violation in history.violations[:5]:
            print(f"seed {seed}: {violation}")
        print(f"replay it: {history.command}", flush=True)
        if not arguments.keep_going:
            break
    seconds = time.process_time() - began
    print(
        f"{failed} of {seed - arguments.first + 1} worlds failed, {1000 * seconds / (seed - arguments.first + 1):.0f} ms each"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
