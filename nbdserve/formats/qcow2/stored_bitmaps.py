"""Reading the dirty bitmaps stored in an image (qcow2 specification, "Bitmaps").

A bitmap has a table of one level, whose entries name the clusters with its bits, or say that all of a cluster's bits
are alike.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from nbdserve.bitmaps.bitmap import MAX_GRANULARITY, MAX_NAME, MIN_GRANULARITY, DirtyBitmap
from nbdserve.errors import CorruptImageError, UnsupportedImageError
from nbdserve.formats.qcow2.bitmap_directory import (
    DIRTY_TRACKING,
    FLAG_AUTO,
    FLAG_EXTRA_COMPATIBLE,
    FLAG_IN_USE,
    MAX_BITMAP_BYTES,
    BitmapEntry,
    read_bitmap_directory,
)
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.layout import OFFSET_MASK
from nbdserve.formats.tables import decode_words
from nbdserve.storage.base import Storage
from nbdserve.units import div_ceil

ALL_ONES: Final = 1
"""Of a table entry that names no cluster: its part of the bitmap is all set, else all clear."""
MAX_STORED_BITS: Final = MAX_BITMAP_BYTES * 8
_RESERVED: Final = ~(OFFSET_MASK | ALL_ONES) & ((1 << 64) - 1)
_KNOWN_FLAGS: Final = FLAG_IN_USE | FLAG_AUTO | FLAG_EXTRA_COMPATIBLE


async def read_stored_bitmap(storage: Storage, header: Header, name: str) -> DirtyBitmap | None:
    """The bitmap of that name, read-only; inconsistent, and empty, when whoever wrote the image last did not store it.

    None when there is none. CorruptImageError or UnsupportedImageError when it cannot be made out; OSError.
    """
    entry = next((entry for entry in await read_bitmap_directory(storage, header) if entry.name == name), None)
    return None if entry is None else await load_bitmap(storage, header, entry)


async def load_bitmap(storage: Storage, header: Header, entry: BitmapEntry) -> DirtyBitmap:
    """The bitmap that ``entry`` stands for; as ``read_stored_bitmap``."""
    check_entry(entry, storage, header)
    bitmap = DirtyBitmap(entry.name, header.size, entry.granularity)
    bitmap.persistent = bitmap.read_only = True
    bitmap.disabled = not entry.auto
    if entry.in_use:
        bitmap.inconsistent = bitmap.disabled = True
    else:
        await _load(bitmap, entry, storage, header)
    return bitmap


def check_entry(entry: BitmapEntry, storage: Storage, header: Header) -> None:
    """CorruptImageError or UnsupportedImageError for an entry that QEMU does not open, either.

    The size of one that is in use need not be right.
    """
    field = f"bitmap {entry.name!r}"

    def corrupt(problem: str, what: str, value: int) -> CorruptImageError:
        return CorruptImageError(storage.path, problem, field=f"{field} {what}", value=value)

    if entry.kind != DIRTY_TRACKING:
        raise UnsupportedImageError(
            storage.path, "only 1, a dirty bitmap, is known", field=f"{field} type", value=entry.kind
        )
    if entry.flags & ~_KNOWN_FLAGS or (entry.extra and not entry.flags & FLAG_EXTRA_COMPATIBLE):
        raise UnsupportedImageError(
            storage.path, "it asks for what is not known", field=f"{field} flags", value=entry.flags
        )
    name_bytes = len(entry.name.encode("utf-8", "surrogateescape"))
    if not 1 <= name_bytes <= MAX_NAME:
        raise corrupt(f"must be from 1 to {MAX_NAME} bytes", "name length", name_bytes)
    if not MIN_GRANULARITY <= entry.granularity <= MAX_GRANULARITY:
        raise corrupt("must be from 512 to 2 GiB", "granularity", entry.granularity)
    bits = div_ceil(header.size, entry.granularity)
    fits = div_ceil(div_ceil(bits, 8), header.cluster_size) == entry.table_entries
    if max(bits, entry.table_entries << header.cluster_bits + 3) > MAX_STORED_BITS or not (fits or entry.in_use):
        raise corrupt(f"does not fit a disk of {header.size} bytes", "table size", entry.table_entries)
    end = entry.table_offset + entry.table_entries * 8
    if entry.table_offset % header.cluster_size or (entry.table_entries and end > storage.size):
        raise corrupt("outside the file, or in the middle of a cluster", "table offset", entry.table_offset)


async def _load(bitmap: DirtyBitmap, entry: BitmapEntry, storage: Storage, header: Header) -> None:
    table = decode_words(await storage.read(entry.table_offset, entry.table_entries * 8))
    bits, cluster_size = bitmap.bits, header.cluster_size
    for index in np.flatnonzero(table).tolist():
        word, at = int(table[index]), index * cluster_size
        length = min(cluster_size, div_ceil(bits.size, 8) - at)
        host_offset = word & OFFSET_MASK
        if word == ALL_ONES:
            bits.set(at * 8, min((at + length) * 8, bits.size))
        elif word & (_RESERVED | ALL_ONES) or host_offset % cluster_size or host_offset + length > storage.size:
            raise CorruptImageError(
                storage.path,
                "reserved bits are set, or its cluster is not in the file",
                field=f"bitmap {bitmap.name!r} table entry {index}",
                value=word,
            )
        else:
            bits.load(at, await storage.read(host_offset, length))
