"""``python -m tests.crash.kill``: a real server under load is killed with SIGKILL, again and again, on the same images.

Everything that was flushed is there, nothing shows another block's data, ``qemu-img check`` finds leaks at most.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from nbdserve.block.graph import open_image
from tests.support.geometries import DIFFERENTIAL_GEOMETRIES, Geometry, judge, make, named, spec_of
from tests.support.model import ModelDisk
from tests.support.nbd import Connections
from tests.support.workload import Mix, Workload, read_all

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
CONNECTIONS = 4
SERVER = (sys.executable, "-c", "import sys; from nbdserve.cli.main import main; sys.exit(main())")
START_SECONDS = 20.0


class KillFailure(AssertionError):
    """A promise was broken; the message says in which loop."""


@dataclass
class Result:
    """What was done."""

    loops: int = 0
    operations: int = 0
    flushes: int = 0
    seconds: float = 0.0
    geometries: set[str] = field(default_factory=set)


class Victim:
    """A server process on one image."""

    def __init__(self, image: Path, fmt: str, socket: Path) -> None:
        self.socket = socket
        socket.unlink(missing_ok=True)
        self.log = (socket.parent / "server.log").open("wb")
        self.process = subprocess.Popen(
            [*SERVER, "serve", "-f", fmt, "--discard", "unmap", "-k", socket, image],
            stdout=self.log,
            stderr=self.log,
        )

    async def connect(self) -> Connections:
        """Connect as soon as it listens."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise KillFailure(f"the server does not come up:\n{self.said()}")
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                return await Connections.connect(self.socket, CONNECTIONS)
            await asyncio.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()
        self.log.close()

    def said(self) -> str:
        """The end of its output."""
        return (self.socket.parent / "server.log").read_text(errors="replace")[-3000:]


async def kill_loops(geometry: Geometry, seed: int, loops: int, folder: Path) -> Result:
    """Kill the server ``loops`` times on one image; KillFailure at the first broken promise."""
    rng = random.Random(f"{geometry.name}/{seed}")
    path, guest = make(geometry, folder, seed)
    model = ModelDisk(len(guest), guest)
    result = Result(geometries={geometry.name})
    for loop in range(loops):
        victim = Victim(path, geometry.fmt, folder / "nbd.sock")
        try:
            await _load(victim, model, rng, result)
        finally:
            victim.kill()
        try:
            await _judge(path, geometry, model, folder)
        except Exception as error:
            raise KillFailure(
                f"geometry {geometry.name}, seed {seed}, kill {loop + 1}: {error}\n{victim.said()}"
            ) from error
        if "Traceback" in victim.said():
            raise KillFailure(f"geometry {geometry.name}, seed {seed}, kill {loop + 1}: {victim.said()}")
        result.loops += 1
    return result


async def _load(victim: Victim, model: ModelDisk, rng: random.Random, result: Result) -> None:
    """Work over several connections until the kill, which comes at any time."""
    disk = await victim.connect()
    killed = False
    flushes = 0

    def acknowledged(apply: object, *, acknowledges: bool = False) -> None:
        nonlocal flushes
        flushes += acknowledges

    mix = Mix(in_flight=12, largest=256 << 10, fua=0.1, flush=2)
    workload = Workload(
        disk,
        model,
        random.Random(rng.random()),
        mix=mix,
        note=acknowledged,
        on_error=lambda error: killed and isinstance(error, ConnectionError),
    )

    async def execute() -> None:
        nonlocal killed
        await asyncio.sleep(rng.choice((0.02, 0.1, 0.3, 0.6)) * (0.5 + rng.random()))
        killed = True
        workload.stop()
        victim.process.kill()

    execution = asyncio.create_task(execute())
    try:
        result.operations += await workload.run(1 << 30)
    finally:
        await execution
        await disk.close()
    result.flushes += flushes


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
    parser.add_argument("--folder", type=Path, help="where the images are made (default: the temporary directory)")
    options = parser.parse_args(arguments)
    try:
        result = run(options.loops, options.seed, tuple(options.geometry or GEOMETRIES), options.folder)
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
