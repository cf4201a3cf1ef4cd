"""``python -m tests.perf.convert``: image commands of nbdserve and qemu-img in turn, on the same images.

The disk is half data, in stretches of 64 KiB to 4 MiB. Warm, the sources are in the page cache; cold, they are dropped
from it before each run. The figure is the median of the rounds; exit code 1 when a ratio misses its floor.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbdserve.units import KIB, MIB, parse_size
from tests.perf.images import run
from tests.perf.servers import program


@dataclass(frozen=True, slots=True)
class Command:
    """A command line both understand, with names of files in the directory; ``target`` is made by it."""

    name: str
    words: str
    floor: float
    """The most of qemu-img's time that it may take."""
    target: str = ""


COMMANDS = (
    Command("raw to qcow2", "convert -f raw -O qcow2 disk.raw target", 0.8, "target"),
    Command("qcow2 to raw", "convert -f qcow2 -O raw disk.qcow2 target", 0.8, "target"),
    Command("qcow2 to vmdk", "convert -f qcow2 -O vmdk disk.qcow2 target", 0.8, "target"),
    Command("-c zlib", "convert -c -f raw -O qcow2 disk.raw target", 0.7, "target"),
    Command("-c zstd", "convert -c -f raw -O qcow2 -o compression_type=zstd disk.raw target", 0.7, "target"),
    Command("compare", "compare -f raw -F qcow2 disk.raw disk.qcow2", 1.0),
    Command("map", "map --output json -f qcow2 disk.qcow2", 1.0),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One run: seconds, of the clock and of processors, and MiB of memory at most."""

    seconds: float
    cpu_seconds: float
    peak_rss_mib: float


def build(directory: Path, size: int) -> None:
    """``disk.raw``, half of it data of which half can be compressed away, and ``disk.qcow2`` with the same content."""
    raw, choose = directory / "disk.raw", random.Random(1)
    if raw.exists() and raw.stat().st_size == size:
        return
    pages = np.random.default_rng(1).integers(0, 256, (8192, 4096), np.uint8)
    pages[:, 2048:] = 65
    data = memoryview(pages.reshape(-1).data)
    with raw.open("wb", buffering=0) as file:
        position = 0
        while position < size:
            length = min(choose.choice((64, 256, 1024, 4096)) * KIB, size - position)
            start = choose.randrange(0, len(data) - length, 4096)
            os.pwrite(file.fileno(), data[start : start + length], position)
            position += 2 * length
        file.truncate(size)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(directory / "disk.qcow2"))


def cache(directory: Path, *, warm: bool) -> None:
    """Bring the sources into the page cache, or out of it."""
    for path in (directory / "disk.raw", directory / "disk.qcow2"):
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            if warm:
                buffer = bytearray(MIB)
                while file.readinto(buffer):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(tool: list[str], command: Command, directory: Path) -> Figure:
    """Run it once. RuntimeError when it fails."""
    # As installed: with the compiled modules beside the sources.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [*tool, *command.words.split()], cwd=directory, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{tool[0]} {command.words} failed")
    if command.target:
        (directory / command.target).unlink()
    return Figure(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def compared(command: Command, directory: Path, rounds: int, *, warm: bool) -> bool:
    """Measure and print one command; whether it holds its floor."""
    tools = {"nbdserve": [program(), "image"], "qemu-img": ["qemu-img"]}
    figures: dict[str, list[Figure]] = {name: [] for name in tools}
    for number in range(rounds + 1):  # the first one warms up
        for name in sorted(tools, reverse=bool(number % 2)):
            cache(directory, warm=warm)
            figure = measure(tools[name], command, directory)
            if number:
                figures[name].append(figure)
    ours, theirs = (statistics.median(figure.seconds for figure in figures[name]) for name in tools)
    cpu = [statistics.median(figure.cpu_seconds for figure in figures[name]) for name in tools]
    memory = max(figure.peak_rss_mib for figure in figures["nbdserve"])
    print(
        f"{command.name:14} {'warm' if warm else 'cold'}  {ours:7.2f} s {theirs:7.2f} s  {ours / theirs:5.2f} "
        f"({command.floor:.1f})  CPU {cpu[0]:.2f} {cpu[1]:.2f} s  {memory:4.0f} MiB",
        flush=True,
    )
    return ours / theirs <= command.floor


def main(argv: list[str]) -> int:
    """Measure and print; 1 when a floor is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.perf.convert", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=parse_size("8G"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commands", nargs="+", default=[], metavar="TEXT", help="those whose name contains a TEXT")
    parser.add_argument("--caches", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--directory", type=Path, help="keep the images here and use them again (default: temporary)")
    arguments = parser.parse_args(argv)
    chosen = [
        command
        for command in COMMANDS
        if not arguments.commands or any(text in command.name for text in arguments.commands)
    ]
    with tempfile.TemporaryDirectory(prefix="convert-perf-") as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        build(directory, arguments.size)
        print("command        cache  nbdserve  qemu-img  ratio (floor)")
        held = [
            compared(command, directory, arguments.rounds, warm=name == "warm")
            for command in chosen
            for name in arguments.caches
        ]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
