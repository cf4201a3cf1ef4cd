"""``python -m tests.crash``: the crash replay at any size, over all geometries or chosen ones."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.crash.scenario import CrashFailure, Plan, Tally, run_scenario
from tests.support.geometries import CRASH_GEOMETRIES, KITS, Geometry
from tests.support.workload import Mix


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 0 when no promise was broken."""
    options = _parse(arguments)
    chosen = [
        geometry
        for geometry in CRASH_GEOMETRIES
        if options.format in ("all", geometry.fmt) and (not options.geometry or geometry.name in options.geometry)
    ]
    if not chosen:
        print(f"no such geometry; there are: {', '.join(g.name for g in CRASH_GEOMETRIES)}", file=sys.stderr)
        return 2
    plan = Plan(
        operations=options.operations,
        states=options.states_per_run,
        qemu_every=options.qemu_every,
        mix=Mix(largest=options.largest, unaligned=options.unaligned),
        keep=Path(options.keep) if options.keep else None,
    )
    total, failures, started = Tally(), [], time.monotonic()
    seeds: Iterator[tuple[int, Geometry]] = (
        (seed, geometry) for seed in itertools.count(options.seed) for geometry in chosen
    )
    with ProcessPoolExecutor(options.jobs) as pool:
        expected = 0
        runs = {}
        while expected < options.states:
            seed, geometry = next(seeds)
            runs[pool.submit(run_scenario, geometry, seed, plan)] = (geometry, seed)
            expected += options.states_per_run
        for done, future in enumerate(as_completed(runs), 1):
            try:
                total.add(future.result())
            except (CrashFailure, Exception) as error:
                geometry, seed = runs[future]
                failures.append(f"--- {geometry.name} seed {seed}: {type(error).__name__}: {error}")
                print(failures[-1], flush=True)
            if done % 20 == 0:
                print(f"{done}/{len(runs)} runs, {total.states} states, {len(failures)} failures", flush=True)
    seconds = time.monotonic() - started
    print(
        f"{total.states} states in {seconds:.0f} s ({total.states / seconds:.0f}/s), {len(runs)} runs over "
        f"{len(chosen)} geometries; {total.leaky} with leaks, {total.judged_by_qemu} judged by qemu-img, "
        f"{total.continued} used on and crashed again; {len(failures)} failed runs"
    )
    print("by kind: " + ", ".join(f"{kind} {count}" for kind, count in total.by_kind.most_common()))
    print("barriers: " + ", ".join(f"{site} {count}" for site, count in total.sites.most_common()))
    return 1 if failures else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--format", default="all", choices=("all", *KITS))
    parser.add_argument("--geometry", action="append", help="only this one (may be given again)")
    parser.add_argument("--states", type=int, default=20000)
    parser.add_argument("--states-per-run", type=int, default=800)
    parser.add_argument("--operations", type=int, default=60, help="guest operations of a run")
    parser.add_argument("--largest", type=int, default=1 << 20, help="longest operation, bytes")
    parser.add_argument("--unaligned", type=float, default=0.15, help="share of changes that begin at any byte")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--qemu-every", type=int, default=20, help="qemu-img judges one state in so many; 1: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", help="a directory for the files of failing states")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
