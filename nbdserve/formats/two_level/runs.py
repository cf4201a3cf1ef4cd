"""The whole mapping as runs, vectorised: slices of L2 tables are read in batches, past the cache."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdserve.errors import RequestError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, RunArray, RunStream
from nbdserve.formats.tables import Words, read_tables
from nbdserve.formats.two_level.entries import BAD_ENTRY, kinds_of
from nbdserve.units import MIB

if TYPE_CHECKING:
    from nbdserve.formats.two_level.image import TwoLevelImage

BATCH_BYTES: Final = 2 * MIB
"""Tables decoded in one turn of the event loop."""


async def iter_runs(driver: TwoLevelImage, start: int, end: int) -> RunStream:
    """See ``FormatDriver.iter_runs``. ``[start, end)`` is inside the disk."""
    geometry = driver.geometry
    most = max(1, BATCH_BYTES // geometry.slice_bytes)
    while start < end:
        l1_index = start >> geometry.l1_shift
        used = driver.l1.words[l1_index : (end - 1 >> geometry.l1_shift) + 1][: 1 << 16] != 0
        if not used[0]:
            empty = int(used.argmax()) or len(used)
            until = min(end, (l1_index + empty) << geometry.l1_shift)
            yield RunArray.of(start, until - start, UNALLOCATED)
        else:
            tables = int((~used).argmax()) or len(used)
            first = start >> geometry.slice_shift
            stop = min(first + most, (l1_index + tables) << geometry.slices_per_table_bits)
            stop = min(stop, (end - 1 >> geometry.slice_shift) + 1)
            words = await read_tables(
                driver.storage,
                driver.cache,
                range(first, stop),
                geometry.slice_bytes,
                driver.slice_offset,
                driver.decode_slices,
            )
            until = min(end, stop << geometry.slice_shift)
            yield _runs(driver, words, first << geometry.slice_shift, start, until)
        start = until
        await asyncio.sleep(0)


def _runs(driver: TwoLevelImage, words: Words, base: int, start: int, end: int) -> RunArray:
    """The runs of ``[start, end)``; ``words`` begins at the guest offset ``base``."""
    unit = driver.cluster_size
    first, last = (start - base) // unit, (end - 1 - base) // unit + 1
    words = words[first:last]
    base += first * unit
    if (bad := words == BAD_ENTRY).any():
        offset = base + int(bad.argmax()) * unit
        raise RequestError(errno.EIO, f"{driver.path}: the L2 entry for guest offset {offset:#x} is invalid")
    kind = kinds_of(words)
    host_offset = np.where(kind == DATA, words, np.uint64(0)).astype(np.int64)
    host_offset[kind != DATA] = -1
    packed = np.flatnonzero(kind == COMPRESSED)
    if len(packed):
        mask = np.uint64((1 << 63 - driver.geometry.cluster_bits) - 1)
        host_offset[packed] = (words[packed] & mask).astype(np.int64)
    starts = base + np.arange(len(words), dtype=np.int64) * unit
    lengths = np.full(len(words), unit, np.int64)
    # The ends of the range may be inside a cluster.
    skipped = start - base
    starts[0] += skipped
    lengths[0] -= skipped
    if kind[0] == DATA:
        host_offset[0] += skipped
    lengths[-1] = end - starts[-1]
    return RunArray(starts, lengths, kind, host_offset).coalesced()
