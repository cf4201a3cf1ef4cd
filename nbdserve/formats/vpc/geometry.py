"""Cylinders, heads and sectors: which sizes a VHD can have (appendix "CHS Calculation" of the specification)."""

from __future__ import annotations

from typing import Final, TypeAlias

from nbdserve.errors import ConfigError
from nbdserve.units import SECTOR_SIZE, div_ceil

Geometry: TypeAlias = tuple[int, int, int]
"""``(cylinders, heads, sectors per track)``."""

MAX_GEOMETRY: Final[Geometry] = (65535, 16, 255)
MAX_GEOMETRY_SECTORS: Final = 65535 * 16 * 255
"""What the largest geometry covers, 127.5 GiB; an image that has it can be larger."""
MAX_SECTORS: Final = (2040 << 30) // SECTOR_SIZE
"""Of any image."""


def geometry_of(size_sectors: int) -> Geometry:
    """The geometry the specification computes for a disk; it may cover a little less."""
    total = min(size_sectors, MAX_GEOMETRY_SECTORS)
    if total >= 65535 * 16 * 63:
        sectors, heads = 255, 16
        tracks = total // sectors
    else:
        sectors = 17
        tracks = total // sectors
        heads = max(4, div_ceil(tracks, 1024))
        if tracks >= heads * 1024 or heads > 16:
            sectors, heads = 31, 16
            tracks = total // sectors
        if tracks >= heads * 1024:
            sectors, heads = 63, 16
            tracks = total // sectors
    return tracks // heads, heads, sectors


def fitting_geometry(size: int) -> Geometry:
    """The geometry qemu-img gives a disk of ``size`` bytes: the first that covers it, or the largest there is."""
    wanted = min(div_ceil(size, SECTOR_SIZE), MAX_GEOMETRY_SECTORS)
    total = wanted
    while True:
        cylinders, heads, sectors = found = geometry_of(total)
        if cylinders * heads * sectors >= wanted:
            return found
        total += 1


def image_size(size: int, *, exact: bool) -> tuple[int, Geometry]:
    """Virtual size in bytes and geometry of an image that is to have ``size`` bytes.

    ``exact`` is qemu-img's force_size: whole sectors, and the largest geometry, which says nothing. ConfigError over
    2040 GiB.
    """
    geometry = MAX_GEOMETRY if exact else fitting_geometry(size)
    covered = geometry[0] * geometry[1] * geometry[2]
    total = div_ceil(size, SECTOR_SIZE) if covered == MAX_GEOMETRY_SECTORS else covered
    if total > MAX_SECTORS:
        raise ConfigError(f"size={size}: a VHD has at most 2040 GiB")
    return total * SECTOR_SIZE, geometry
