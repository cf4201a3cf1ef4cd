"""bochs growing disks, of both versions. Read-only."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nbdserve.units import KIB, MIB, SECTOR_SIZE
from tests.formats.test_bochs import build
from tests.support.geometries.geometry import Field, Geometry, Kit


def _make(source: Path, path: Path, extent: int, version: int) -> None:
    content = source.read_bytes()
    sectors = {
        at // SECTOR_SIZE: content[at : at + SECTOR_SIZE]
        for at in range(0, len(content), SECTOR_SIZE)
        if any(content[at : at + SECTOR_SIZE])
    }
    path.write_bytes(build(len(content), sectors, extent=extent, version=version))


def _geometry(name: str, size: int, extent: int, version: int) -> Geometry:
    make = partial(_make, extent=extent, version=version)
    return Geometry(f"bochs-{name}", size, "bochs", own=True, make_from=make, stock="r")


KIT = Kit(
    "bochs",
    readable=(
        _geometry("512", 256 * KIB, 512, 2),
        _geometry("4k-old", 1 * MIB + 512, 4 * KIB, 1),
        _geometry("1m", 4 * MIB, MIB, 2),
    ),
    fields=(
        Field("version", 64, 4),
        Field("header_size", 68, 4),
        Field("catalog", 72, 4),
        Field("bitmap", 76, 4),
        Field("extent", 80, 4),
        Field("timestamp", 84, 4),
        Field("disk", 88, 8),
        Field("catalog[0]", 512, 4),
        Field("catalog[1]", 516, 4),
    ),
)
