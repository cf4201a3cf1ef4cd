"""Images that are wrong in a known place, made of a small good one; for the tests of ``image check``."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.images import create, run

CLUSTER = 65536
L1, L2, BLOCK, TABLE = 0x30000, 0x40000, 0x20000, 0x10000
"""Where QEMU puts the tables of the images made here."""


@dataclass(frozen=True)
class Broken:
    """``data`` written at ``offset`` of the good image ``base``."""

    name: str
    base: str
    offset: int = 0
    data: str = ""


CASES = [
    Broken("good", "plain"),
    Broken("snapshots", "snapshots"),
    Broken("bitmaps", "bitmaps"),
    Broken("compressed", "compressed"),
    Broken("bitmaps dropped by an old program", "bitmaps", 88, "00" * 8),
    Broken("data COPIED missing", "plain", L2 + 8, "00"),
    Broken("L2 COPIED missing", "plain", L1, "00"),
    Broken("two entries for one cluster", "plain", L2 + 8, "8000000000050000"),
    Broken("data outside the file", "plain", L2 + 8, "8000000f00050000"),
    Broken("misaligned data", "plain", L2 + 8, "8000000000050200"),
    Broken("misaligned preallocated zero", "plain", L2 + 8, "8000000000050201"),
    Broken("reserved bit in L2", "plain", L2 + 8, "8100000000060000"),
    Broken("reserved bit in L1", "plain", L1, "8100000000040000"),
    Broken("L2 outside the file", "plain", L1, "80000000f0040000"),
    Broken("refcount 0", "plain", BLOCK + 12, "0000"),
    Broken("refcount 2", "plain", BLOCK + 12, "0002"),
    Broken("refcount past the file", "plain", BLOCK + 48, "0002"),
    Broken("compressed and COPIED", "plain", L2 + 8, "c000000000060000"),
    Broken("compressed in the middle", "plain", L2 + 8, "4000000000060000"),
    Broken("compressed over two clusters", "plain", L2 + 8, "404000000006ff80"),
    Broken("block with reserved bits", "plain", TABLE, "0000000000020001"),
    Broken("block misaligned", "plain", TABLE, "0000000000020200"),
    Broken("block outside", "plain", TABLE, "00000000f0020000"),
    Broken("no block", "plain", TABLE, "00" * 8),
    Broken("block twice", "plain", TABLE + 8, "0000000000020000"),
    Broken("dirty", "plain", 72, "0000000000000001"),
    Broken("corrupt", "plain", 72, "0000000000000002"),
    Broken("subclusters zero and allocated", "subclusters", L2 + 8, "ff" * 8),
    Broken("subclusters of nothing", "subclusters", L2 + 40, "0000000000000001"),
    Broken("data file: COPIED missing", "data file", L2 + 8, "00"),
    Broken("data file: one place twice", "data file", L2 + 8, "8000000000020000"),
    Broken("data file: compressed", "data file", L2 + 16, "4000000000060000"),
    Broken("narrow refcounts overflow", "narrow", L2 + 16, "8000000000060000"),
    Broken("two L1 entries for one L2", "wide", L1 + 8, "8000000000040000"),
]


def make_good_images(directory: Path) -> None:
    """The images that CASES are made of."""

    def io(name: str, *commands: str) -> None:
        run("qemu-io", *(part for command in commands for part in ("-c", command)), directory / name, cwd=directory)

    for name, options, size in (
        ("plain", "", 10 << 20),
        ("snapshots", "", 2 << 30),
        ("bitmaps", "", 2 << 30),
        ("subclusters", "extended_l2=on", 10 << 20),
        ("data file", "data_file=data", 10 << 20),
        ("narrow", "refcount_bits=1", 10 << 20),
        ("wide", "", 2 << 30),
    ):
        create(directory / name, size, options=options)
    io("plain", "write 0 640k")
    io("snapshots", "write 0 64k", "write 128k 64k", "write 64k 64k", "write 1G 64k", "write -z 1536M 64k")
    run("qemu-img", "snapshot", "-c", "one", directory / "snapshots")
    io("snapshots", "write 0 128k", "write 512M 64k")
    run("qemu-img", "snapshot", "-c", "two", directory / "snapshots")
    io("snapshots", "write 64k 64k")
    run("qemu-img", "bitmap", "--add", directory / "bitmaps", "one")
    run("qemu-img", "bitmap", "--add", directory / "bitmaps", "two")
    io("bitmaps", "write 5M 1M")
    io("subclusters", "write 0 64k", "write 70k 2k")
    io("data file", "write 0 10M")
    io("narrow", "write 0 1M")
    io("wide", "write 0 64k", "write 1G 64k")
    source = directory / "source"
    source.write_bytes(bytes(range(256)) * 4096)
    run("qemu-img", "convert", "-f", "raw", "-c", "-O", "qcow2", source, directory / "compressed")
    io("compressed", "write 128k 64k")


def make(case: Broken, directory: Path, target: Path) -> None:
    """``case`` as the file ``target``, from the good images in ``directory``."""
    shutil.copy(directory / case.base, target)
    with target.open("r+b") as file:
        file.seek(case.offset)
        file.write(bytes.fromhex(case.data))


def qemu_check(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and counters of ``qemu-img check``."""
    done = subprocess.run(
        ["qemu-img", "check", "--output", "json", *options, path],
        capture_output=True,
        text=True,
        check=False,
        cwd=path.parent,
    )
    counters = json.loads(done.stdout) if done.stdout.strip() else {}
    return done.returncode, {name: count for name, count in counters.items() if name not in ("filename", "format")}
