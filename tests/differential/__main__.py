"""``python -m tests.differential``: rounds of random work against QEMU's tools, over all geometries in turn."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.differential.rounds import run_round
from tests.support.geometries import DIFFERENTIAL_GEOMETRIES, KITS


def main(arguments: list[str] | None = None) -> int:
    """Run the rounds; 0 when everybody agreed in all of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("NBDSERVE_ROUNDS", "100")))
    parser.add_argument("--ops", type=int, default=int(os.environ.get("NBDSERVE_OPS", "2000")))
    parser.add_argument("--format", default="all", choices=("all", *KITS))
    parser.add_argument("--geometry", action="append", help="only this one (may be given again)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="a directory for failing images")
    options = parser.parse_args(arguments)
    chosen = [
        geometry
        for geometry in DIFFERENTIAL_GEOMETRIES
        if options.format in ("all", geometry.fmt) and (not options.geometry or geometry.name in options.geometry)
    ]
    if not chosen:
        print(f"no such geometry; there are: {', '.join(g.name for g in DIFFERENTIAL_GEOMETRIES)}", file=sys.stderr)
        return 2
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    started, failures = time.monotonic(), 0
    with ProcessPoolExecutor(options.jobs) as pool:
        rounds = {}
        for number in range(options.rounds):
            geometry, seed = chosen[number % len(chosen)], options.seed + number
            rounds[pool.submit(run_round, geometry, seed, options.ops, options.keep)] = (geometry, seed)
        for done, future in enumerate(as_completed(rounds), 1):
            try:
                line = future.result()
            except Exception as error:
                failures += 1
                geometry, seed = rounds[future]
                line = f"FAILED {geometry.name} seed {seed}: {error}"
            print(f"{done}/{len(rounds)} {line}", flush=True)
    print(
        f"{len(rounds)} rounds of {options.ops} operations over {len(chosen)} geometries in "
        f"{time.monotonic() - started:.0f} s: {failures} failures"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
