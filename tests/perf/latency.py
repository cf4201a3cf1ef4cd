"""``python -m tests.perf.latency``: how long a client's small reads take beside another client that writes in bulk.

One server and one sparse raw image on the disk. The reader has one 4 KiB read in flight, in the first MiB, which is in
the page cache; the writer (fio, too) goes through the rest. Small writes are done on the event loop of nbdserve, where
they must not wait for the disk: neither for a page to be read, nor for writeback once too much of the cache is dirty
(``/proc/sys/vm/dirty_ratio``; ``--size`` of more than that much of the memory reaches it). Exit code 1 when the
slowest of 1,000 reads takes longer than ``--limit``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from nbdserve.units import GIB, MIB, parse_size
from tests.perf.report import OURS
from tests.perf.servers import QEMU_NBD, ServerKind, installed_command, running

READ_AREA: Final = MIB
PERCENTILES: Final = ("50.000000", "99.000000", "99.900000")


@dataclass(frozen=True, slots=True)
class Writer:
    """What the other client does."""

    name: str
    pattern: str
    block_size: int
    depth: int


WRITERS: Final = (
    Writer("nothing", "", 0, 0),
    Writer("4 KiB random, depth 64", "randwrite", 4096, 64),
    Writer("64 KiB, depth 16", "write", 64 << 10, 16),
    Writer("1 MiB, depth 16", "write", MIB, 16),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Milliseconds of the reads at ``PERCENTILES``, of the slowest, and MiB/s written."""

    percentiles: tuple[float, ...]
    slowest: float
    reads: int
    written: float


def measure(kind: ServerKind, image: Path, writer: Writer, size: int, seconds: float) -> Outcome:
    """One server, one reader, one writer."""
    image.unlink(missing_ok=True)  # nobody waits for what is left of the last one
    with image.open("wb") as file:
        file.write(bytes(range(256)) * (READ_AREA // 256))
        file.truncate(size)
    with running(kind, image, "raw") as server:
        jobs: list[dict[str, Any]] = [{}, {}]
        reader = _fio(server.uri, "randread", 4096, 1, 0, READ_AREA, seconds)
        both = [reader, _writer_fio(server.uri, writer, size, seconds)]
        threads = [
            threading.Thread(target=_run, args=(jobs, number, words)) for number, words in enumerate(both) if words
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    image.unlink()
    if not all(jobs[: len(threads)]):
        raise RuntimeError(f"fio failed beside {kind.name}")
    latency = jobs[0]["read"]["clat_ns"]
    return Outcome(
        tuple(latency["percentile"][percentile] / 1e6 for percentile in PERCENTILES),
        latency["max"] / 1e6,
        jobs[0]["read"]["total_ios"],
        jobs[1]["write"]["bw_bytes"] / MIB if jobs[1] else 0.0,
    )


def _writer_fio(uri: str, writer: Writer, size: int, seconds: float) -> list[str]:
    if not writer.pattern:
        return []
    return _fio(uri, writer.pattern, writer.block_size, writer.depth, READ_AREA, size - READ_AREA, seconds)


def _fio(uri: str, pattern: str, block_size: int, depth: int, offset: int, size: int, seconds: float) -> list[str]:
    return [
        *("fio", f"--name={pattern}", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}", f"--bs={block_size}"),
        *(f"--iodepth={depth}", f"--offset={offset}", f"--size={size}", "--time_based", "--norandommap"),
        *(f"--runtime={round(seconds * 1000)}ms", "--randseed=7", "--output-format=json"),
    ]


def _run(jobs: list[dict[str, Any]], number: int, words: list[str]) -> None:
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    if "{" in said:
        jobs[number] = json.loads(said[said.index("{") :])["jobs"][0]


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; errors end with code 2."""
    parser = argparse.ArgumentParser(prog="python -m tests.perf.latency", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each run (default 5)")
    parser.add_argument("--size", type=parse_size, default=GIB, help="size of the image (default 1G)")
    parser.add_argument("--limit", type=float, default=20.0, help="milliseconds (default 20)")
    parser.add_argument(
        "--writers", nargs="+", default=[], metavar="TEXT", help="only those whose name contains a TEXT"
    )
    parser.add_argument("--servers", nargs="+", default=[OURS, QEMU_NBD.name], choices=[OURS, QEMU_NBD.name])
    parser.add_argument("--directory", type=Path, help="where the image is made (default: a temporary directory)")
    arguments = parser.parse_args(argv)
    if missing := [tool for tool in ("fio", "qemu-nbd") if not shutil.which(tool)]:
        parser.error(f"not installed: {', '.join(missing)}")
    if arguments.size < 2 * READ_AREA:
        parser.error("--size: 2M at least")
    return arguments


def main(argv: list[str]) -> int:
    """Measure and print; 1 when ours misses the limit."""
    arguments = parse_arguments(argv)
    kinds = [kind for kind in (ServerKind(OURS, installed_command()), QEMU_NBD) if kind.name in arguments.servers]
    wanted = arguments.writers or [""]
    table = Table(title=f"4 KiB reads in ms, {arguments.seconds:g} s each, {arguments.size // MIB} MiB image")
    for heading in ("beside", "server"):
        table.add_column(heading, no_wrap=True)
    for heading in ("p50", "p99", "p99.9", "slowest", "reads", "written MiB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    missed = False
    with tempfile.TemporaryDirectory(prefix="nbd-latency-", dir=arguments.directory) as directory:
        for writer in WRITERS:
            if not any(text in writer.name for text in wanted):
                continue
            for kind in kinds:
                outcome = measure(kind, Path(directory) / "disk.raw", writer, arguments.size, arguments.seconds)
                table.add_row(
                    *(writer.name, kind.name, *(f"{value:.2f}" for value in outcome.percentiles)),
                    *(f"{outcome.slowest:.1f}", f"{outcome.reads:,}", f"{outcome.written:,.0f}"),
                )
                missed = missed or (kind.name == OURS and outcome.percentiles[-1] > arguments.limit)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
