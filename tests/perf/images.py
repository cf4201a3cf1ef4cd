"""The data: one disk of random bytes as raw, as qcow2, and spread over a chain of three qcow2 layers."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.perf.cases import CHAIN_TOP_PART, Case
from tests.perf.servers import QEMU_NBD, ServerKind, running

CHUNK = 64 << 20
CLUSTER = 64 << 10


@dataclass(frozen=True, slots=True)
class Images:
    """The files of one session, in ``directory``; each disk has ``size`` bytes."""

    directory: Path
    size: int

    def format(self, case: Case) -> str:
        """The format of the case's image."""
        return "raw" if case.image == "raw" else "qcow2"

    def serves(self, kind: ServerKind, case: Case) -> bool:
        """Whether the server takes part."""
        return self.format(case) in kind.formats and (kind.writes or not case.writes)

    def server(self, kind: ServerKind, case: Case) -> ServerKind:
        """``kind`` as it serves the case's image."""
        return kind

    def path(self, case: Case) -> Path:
        """The image of the case; a new empty layer for a case of first writes (the caller removes it)."""
        if not case.fresh:
            return self.directory / {"raw": "disk.raw", "qcow2": "disk.qcow2", "chain": "top.qcow2"}[case.image]
        fresh = self.directory / "fresh.qcow2"
        backing = self.directory / "middle.qcow2" if case.image == "chain" else None
        _create(fresh, self.size, backing)
        return fresh

    def warm(self, case: Case) -> None:
        """Read the case's files into the page cache: for reads as read-ahead does it, for writes page by page.

        Where a file system caches in large folios (ext4 since Linux 6.16), a 4 KiB write into one of 2 MiB costs 35 us
        in the kernel, into a single page 2 us. The first is all one would see, whoever serves.
        """
        buffer = bytearray(1 << 20)
        for path in self._files(case):
            with path.open("rb", buffering=0) as file:
                if case.writes:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                while file.readinto(buffer):
                    pass

    def settle(self, case: Case) -> None:
        """Write back what the case left dirty, so that the next run does not pay for it."""
        for path in self._files(case):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _files(self, case: Case) -> list[Path]:
        names = {
            "raw": ["disk.raw"],
            "qcow2": ["disk.qcow2"],
            "chain": ["disk.qcow2", "middle.qcow2", "top.qcow2"],
        }[case.image]
        return [self.directory / name for name in names]


def build(directory: Path, size: int, kinds: set[str]) -> Images:
    """Make the images the ``kinds`` (raw, qcow2, chain) need; what is there already with this size is kept."""
    images = Images(directory, size)
    directory.mkdir(parents=True, exist_ok=True)
    raw, disk = directory / "disk.raw", directory / "disk.qcow2"
    if not (raw.exists() and raw.stat().st_size == size):
        for stale in directory.glob("*.qcow2"):
            stale.unlink()
        _write_random(raw, size)
    if kinds & {"qcow2", "chain"} and not disk.exists():
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk))
    if "chain" in kinds and not (directory / "top.qcow2").exists():
        middle, top = directory / "middle.qcow2", directory / "top.qcow2"
        partial = directory / "top.partial"
        _create(middle, size, disk)
        fill(middle, size // 3, size)
        _create(partial, size, middle)
        fill(partial, size // CHAIN_TOP_PART, size // CHAIN_TOP_PART)
        fill(partial, size // 6, size)
        partial.rename(top)
    for path in (*directory.glob("*.raw"), *directory.glob("*.qcow2")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return images


def _write_random(path: Path, size: int) -> None:
    random = np.random.default_rng(1)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for offset in range(0, size, CHUNK):
            file.write(random.bytes(min(CHUNK, size - offset)))
    partial.rename(path)


def _create(path: Path, size: int, backing: Path | None) -> None:
    base = ["-b", str(backing), "-F", "qcow2"] if backing else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *base, str(path), str(size))


def fill(path: Path, amount: int, area: int) -> None:
    """Write ``amount`` random bytes as whole clusters at random places of the first ``area`` bytes."""
    with running(QEMU_NBD, path, "qcow2") as server:
        run(
            *("fio", "--name=fill", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randwrite", f"--bs={CLUSTER}"),
            *("--iodepth=16", f"--size={area}", f"--io_size={amount}", "--refill_buffers", "--end_fsync=1"),
        )


def run(*argv: str) -> None:
    """Run a tool. RuntimeError with what it printed when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed:\n{done.stdout}{done.stderr}")
