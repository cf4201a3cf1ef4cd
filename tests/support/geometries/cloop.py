"""cloop: blocks of several sizes. Read-only."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nbdserve.units import KIB, MIB
from tests.formats.test_cloop import build
from tests.support.geometries.geometry import Field, Geometry, Kit


def _make(source: Path, path: Path, block_size: int) -> None:
    path.write_bytes(build(source.read_bytes(), block_size))


def _geometry(name: str, size: int, block_size: int) -> Geometry:
    return Geometry(
        f"cloop-{name}", size, "cloop", own=True, make_from=partial(_make, block_size=block_size), stock="r"
    )


KIT = Kit(
    "cloop",
    readable=(
        _geometry("512", 200 * 512, 512),
        _geometry("64k", 2 * MIB, 64 * KIB),
        _geometry("odd", 30 * (33 * KIB + 512), 33 * KIB + 512),
        _geometry("1m", 3 * MIB, MIB),
    ),
    fields=(
        Field("block_size", 128, 4, "big"),
        Field("n_blocks", 132, 4, "big"),
        Field("offsets[0]", 136, 8, "big"),
        Field("offsets[1]", 144, 8, "big"),
        Field("offsets[2]", 152, 8, "big"),
    ),
)
