"""``python -m tests.jobs``: live jobs under random writes, as many rounds as wanted."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from tests.jobs.rounds import KINDS, LiveFailure, run_round


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.jobs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="of each kind")
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--keep", type=Path, help="leave the images of a failing round in this directory")
    arguments = parser.parse_args()
    failures = 0
    for kind in arguments.kinds:
        ends: dict[str, int] = {}
        for seed in range(arguments.first, arguments.first + arguments.rounds):
            try:
                line = run_round(kind, seed, arguments.keep)
            except LiveFailure as failure:
                failures += 1
                traceback.print_exception(failure)
                continue
            end = line.partition(", ")[0]
            ends[end] = ends.get(end, 0) + 1
        print(", ".join(f"{end} {count}" for end, count in sorted(ends.items())), flush=True)
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
