# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of requests, by hand: ``python -m tests.liveness --help``."""

from __future__ import annotations

import argparse
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.liveness.process import Nursery
from tests.liveness.run import PATIENCE, Outcome, attempt, shrink
from tests.liveness.steps import DISKS, UNRULY, Sequence, load, make_sequence


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.liveness", description=__doc__)
    parser.add_argument("--seed", type=int, help="one sequence, or the first of --count")
    parser.add_argument("--count", type=int, help="so many sequences (default: 1)", default=1)
    parser.add_argument("--steps", type=Path, metavar="FILE", help="a sequence that was written")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=4, help="at once (default: %(default)s)")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a finding")
    parser.add_argument("--shrink", type=int, default=0, metavar="N", help="try N shorter ones")
    parser.add_argument("--verbose", "-v", action="store_true", help="print each step")
    parser.add_argument("--disks", action="store_true", help="with disks that are slow")
    options = parser.parse_args()
    if options.steps is not None:
        sequences = [load(options.steps.read_text())]
    else:
        first = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
        devices = DISKS if options.disks else UNRULY
        seeds = range(first, first + options.count)
        sequences = [make_sequence(seed, options.patience, devices) for seed in seeds]
        print(f"seeds {first} to {first + options.count - 1}")
    nursery, findings, began = Nursery(), 0, time.monotonic()

    def run(sequence: Sequence) -> Outcome | None:
        return None if findings and not options.keep_going else attempt(nursery, sequence)

    with ThreadPoolExecutor(options.jobs) as pool:
        for sequence, outcome in zip(sequences, pool.map(run, sequences), strict=True):
            if outcome is None:
                continue
            if options.verbose and not outcome.finding:
                print(f"seed {sequence.seed}", *outcome.story, sep="\n")
            if outcome.finding:
                findings += 1
                print(outcome.report(), flush=True)
                if options.shrink:
                    shorter = shrink(nursery, outcome, options.shrink)
                    print("shorter:", shorter.report(), shorter.sequence.dump(), sep="\n")
    print(f"{len(sequences)} sequences, {findings} findings, {time.monotonic() - began:.0f} s")
    nursery.close()
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
