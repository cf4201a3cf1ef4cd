"""dmg: tables in a property list and in a resource fork, every kind of chunk. Read-only.

Kinds that this QEMU may be built without are read by the builder's own account of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nbdserve.formats.dmg import layout, lzfse
from nbdserve.units import MIB
from tests.formats.dmg.build import image_of
from tests.support.geometries.geometry import Field, Geometry, Kit

STOCK = [layout.ZLIB, layout.RAW]
OTHERS = [layout.ADC, layout.BZIP2, *([layout.LZFSE] if lzfse.available() else [])]


def _make(source: Path, path: Path, kinds: list[int], resource_fork: bool) -> None:
    image = image_of(source.read_bytes(), kinds)
    image.resource_fork = resource_fork
    path.write_bytes(image.build())


def _geometry(name: str, size: int, kinds: list[int], *, resource_fork: bool = False) -> Geometry:
    make = partial(_make, kinds=kinds, resource_fork=resource_fork)
    stock = set(kinds) <= set(STOCK)
    return Geometry(f"dmg-{name}", size, "dmg", own=True, make_from=make, stock="r" if stock else "")


def _trailer(name: str, offset: int, size: int) -> Field:
    return Field(name, offset - 512, size, "big")


KIT = Kit(
    "dmg",
    readable=(
        _geometry("zlib", 2 * MIB, [layout.ZLIB]),
        _geometry("fork", 1 * MIB + 512, STOCK, resource_fork=True),
        _geometry("others", 2 * MIB, OTHERS),
    ),
    fields=(
        _trailer("magic", 0, 4),
        _trailer("version", 4, 4),
        _trailer("data_fork_offset", 24, 8),
        _trailer("data_fork_length", 32, 8),
        _trailer("rsrc_fork_offset", 40, 8),
        _trailer("rsrc_fork_length", 48, 8),
        _trailer("segment_number", 56, 4),
        _trailer("segment_count", 60, 4),
        _trailer("xml_offset", 216, 8),
        _trailer("xml_length", 224, 8),
        _trailer("sector_count", 492, 8),
    ),
)
