"""Changing the size of a raw-cow image: its bitmap is the end of its file, so it grows and shrinks in place."""

from __future__ import annotations

from dataclasses import replace

from nbdserve.errors import ConfigError
from nbdserve.formats.raw_cow.bitmap import Bitmap
from nbdserve.formats.raw_cow.create import check_size
from nbdserve.formats.raw_cow.header import HeaderSector
from nbdserve.formats.raw_cow.layout import Header
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil


async def resize_raw_cow(
    storage: Storage,
    raw: Storage,
    sector: HeaderSector,
    header: Header,
    bitmap: Bitmap,
    size: int,
    *,
    below: int | None,
) -> Header:
    """The new header, on disk, of an idle image whose bitmap is on disk. What is new reads as zeroes.

    ``below`` is the size of the layer below, None without one. ConfigError for a size that cannot be.
    """
    if size % SECTOR_SIZE:
        raise ConfigError(f"{storage.path}: a size of {size} bytes: must be a multiple of {SECTOR_SIZE}")
    new = replace(header, size=size)
    check_size(new)
    if size > header.size:
        await _grow(storage, raw, header, new, bitmap, below=below or 0)
        await sector.patch(size=size)
    elif size < header.size:
        await sector.patch(size=size)
        await _shrink(storage, raw, header, new, bitmap)
    return new


async def _grow(storage: Storage, raw: Storage, header: Header, new: Header, bitmap: Bitmap, *, below: int) -> None:
    """The raw file and the bitmap as the larger disk has them, stable before the header says so.

    Crash before that: bits are set behind the last cluster, which mean nothing. The raw file may hold something past
    the old end of the disk, and the layer below may be longer than the disk was: neither may become visible.
    """
    unit = header.cluster_size
    last_end = min(align_up(header.size, unit), new.size)
    last_is_shared = last_end > header.size and not bitmap.count(bitmap.clusters - 1, bitmap.clusters)
    if last_is_shared and below > header.size:
        raise ConfigError(
            f"{storage.path}: the layer below is longer than the disk, and would show behind its last {unit} bytes: "
            "write something there first, so that they are in the raw file"
        )
    zeroes = min(align_up(max(below, header.size), unit), new.size)
    if bitmap.stray():
        bitmap.clear(bitmap.clusters, len(bitmap.bits) << 3)
    if raw.size < new.size:
        await raw.truncate(new.size)
    if not last_is_shared or zeroes > last_end:
        start = header.size if not last_is_shared else last_end
        await raw.zero(start, zeroes - start)
    await raw.flush()
    old_sectors = len(bitmap.bits) // SECTOR_SIZE
    bitmap.resize(new.clusters)
    if zeroes > last_end:
        bitmap.set(div_ceil(header.size, unit), div_ceil(zeroes, unit))
    await storage.truncate(max(storage.size, header.end_offset))
    bitmap.dirty.update(range(old_sectors, len(bitmap.bits) // SECTOR_SIZE))
    await _write(storage, bitmap)


async def _shrink(storage: Storage, raw: Storage, header: Header, new: Header, bitmap: Bitmap) -> None:
    """Bits and bytes behind the new end go, now that no header shows them. A longer raw file keeps its end."""
    bitmap.resize(new.clusters)
    await _write(storage, bitmap)
    await storage.truncate(new.end_offset)
    if raw.size == header.size:
        await raw.truncate(new.size)
    await raw.flush()
    await storage.flush()


async def _write(storage: Storage, bitmap: Bitmap) -> None:
    if bitmap.dirty:
        await storage.write_stable(bitmap.pieces(bitmap.dirty))
        bitmap.dirty.clear()
