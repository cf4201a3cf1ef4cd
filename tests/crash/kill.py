"""``python -m tests.crash.kill``: a real server under load is killed with SIGKILL, again and again, on the same images.

Everything that was flushed is there, nothing shows another block's data, ``qemu-img check`` finds leaks at most.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from nbdserve.block.graph import open_image
from tests.crash import kill_jobs
from tests.crash.victim import KillFailure, Result, Victim, load
from tests.support.geometries import DIFFERENTIAL_GEOMETRIES, Geometry, judge, make, named, spec_of
from tests.support.model import ModelDisk
from tests.support.workload import read_all

GEOMETRIES = (
    "64k-backing",
    "4k",
    "512-rb64",
    "64k-ext-snapshot",
    "4k-snapshot",
    "64k-data-raw",
    "4k-v2-backing",
    "raw",
)


async def kill_loops(geometry: Geometry, seed: int, loops: int, folder: Path) -> Result:
    """Kill the server ``loops`` times on one image; KillFailure at the first broken promise."""
    rng = random.Random(f"{geometry.name}/{seed}")
    path, guest = make(geometry, folder, seed)
    model = ModelDisk(len(guest), guest)
    result = Result(geometries={geometry.name})
    for loop in range(loops):
        victim = Victim(path, geometry.fmt, folder / "nbd.sock")
        try:
            await load(victim, model, rng, result)
        finally:
            victim.kill()
        try:
            await _judge(path, geometry, model, folder)
        except Exception as error:
            raise KillFailure(
                f"geometry {geometry.name}, seed {seed}, kill {loop + 1}: {error}\n{victim.said()}"
            ) from error
        if victim.complains:
            raise KillFailure(f"geometry {geometry.name}, seed {seed}, kill {loop + 1}: {victim.said()}")
        result.loops += 1
    return result


async def _judge(path: Path, geometry: Geometry, model: ModelDisk, folder: Path) -> None:
    node = await open_image(spec_of(geometry, path, read_only=True))
    try:
        content = await read_all(node, node.size)
    finally:
        await node.close()
    model.check_crash(content)
    judge(geometry, path, folder, content)
    model.adopt(content)


def run(loops: int, seed: int, names: tuple[str, ...] = GEOMETRIES, folder: Path | None = None) -> Result:
    """``loops`` kills, shared out among the geometries."""
    total, started = Result(), time.monotonic()
    for number, name in enumerate(names):
        share = loops // len(names) + (number < loops % len(names))
        if not share:
            continue
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            result = asyncio.run(kill_loops(named(DIFFERENTIAL_GEOMETRIES, name), seed, share, Path(directory)))
        total.loops += result.loops
        total.operations += result.operations
        total.flushes += result.flushes
        total.geometries |= result.geometries
        print(f"{name}: {result.loops} kills, {result.operations} operations", flush=True)
    total.seconds = time.monotonic() - started
    return total


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 0 when no promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.kill", description=__doc__)
    parser.add_argument("--loops", type=int, default=int(os.environ.get("NBDSERVE_KILLS", "200")))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--geometry", action="append", help="only this one (may be given again)")
    parser.add_argument(
        "--jobs", nargs="*", choices=kill_jobs.KINDS, help="while a job runs, of each or of these kinds"
    )
    parser.add_argument("--terminate", action="store_true", help="with --jobs: SIGTERM, for a good end")
    parser.add_argument("--folder", type=Path, help="where the images are made (default: the temporary directory)")
    options = parser.parse_args(arguments)
    try:
        if options.jobs is None:
            result = run(options.loops, options.seed, tuple(options.geometry or GEOMETRIES), options.folder)
        else:
            kinds = tuple(options.jobs or kill_jobs.KINDS)
            number = signal.SIGTERM if options.terminate else signal.SIGKILL
            result = kill_jobs.run(options.loops, options.seed, kinds, options.folder, number=number)
    except KillFailure as failure:
        print(f"FAILED: {failure}")
        return 1
    print(
        f"{result.loops} kills over {len(result.geometries)} geometries in {result.seconds:.0f} s: "
        f"{result.operations} operations, {result.flushes} acknowledged flushes and FUAs, 0 broken promises"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
