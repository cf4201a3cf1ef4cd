"""Changing the size of a raw-cow image: its bitmap is the end of its file, so it grows and shrinks in place."""

from __future__ import annotations

from dataclasses import replace

from nbdserve.errors import ConfigError
from nbdserve.formats.raw_cow.bitmap import Bitmap
from nbdserve.formats.raw_cow.create import check_size
from nbdserve.formats.raw_cow.header import HeaderSector
from nbdserve.formats.raw_cow.layout import Header
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up


async def resize_raw_cow(
    storage: Storage, raw: Storage, sector: HeaderSector, header: Header, bitmap: Bitmap, size: int
) -> Header:
    """The new header, on disk, of an idle image whose bitmap is on disk. What is new reads as zeroes.

    ConfigError for a size that cannot be.
    """
    if size % SECTOR_SIZE:
        raise ConfigError(f"{storage.path}: a size of {size} bytes: must be a multiple of {SECTOR_SIZE}")
    new = replace(header, size=size, backing_limit=min(header.backing_limit, size))
    check_size(new)
    if size > header.size:
        await _grow(storage, raw, header, new, bitmap)
        await sector.patch(size=size)
    elif size < header.size:
        await sector.patch(size=size, backing_limit=new.backing_limit)
        await _shrink(storage, raw, header, new, bitmap)
    return new


async def _grow(storage: Storage, raw: Storage, header: Header, new: Header, bitmap: Bitmap) -> None:
    """The raw file and the bitmap as the larger disk has them, stable before the header says so.

    Crash before that: bits are clear behind the last cluster, and the file is too long. The raw file may hold something
    past the old end of the disk, which must not become visible in a last cluster that is in the raw file.
    """
    if bitmap.stray():
        bitmap.clear(bitmap.clusters, len(bitmap.bits) << 3)
    last_end = min(align_up(header.size, header.cluster_size), new.size)
    if raw.size < new.size:
        await raw.truncate(new.size)
    if last_end > header.size and bitmap.count(bitmap.clusters - 1, bitmap.clusters):
        await raw.zero(header.size, last_end - header.size)
    await raw.flush()
    old_sectors = len(bitmap.bits) // SECTOR_SIZE
    bitmap.resize(new.clusters)
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
