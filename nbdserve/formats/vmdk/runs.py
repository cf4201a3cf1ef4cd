"""The mapping as runs, vectorised: grain tables are read in batches, past the cache, and decoded with numpy."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from typing import Final

import numpy as np

from nbdserve.errors import RequestError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO, RunArray, RunStream
from nbdserve.formats.tables import AnyWords, read_tables
from nbdserve.formats.vmdk.extents import SECTOR_BITS, Extent, FlatExtent, SparseExtent
from nbdserve.formats.vmdk.layout import UNALLOCATED_ENTRY, ZEROED_ENTRY
from nbdserve.storage.base import Storage
from nbdserve.units import MIB

BATCH_BYTES: Final = 1 * MIB
"""Grain tables decoded in one turn of the event loop."""
_MOST_TABLES: Final = 4096
"""The same for tables of a few bytes, each of which may be a read."""


async def iter_runs(extents: Sequence[Extent], data: Storage, start: int, end: int) -> RunStream:
    """See ``FormatDriver.iter_runs``; ``data`` is the host space."""
    for extent in extents:
        low, high = max(start, extent.start), min(end, extent.start + extent.size)
        if low >= high:
            continue
        if isinstance(extent, FlatExtent):
            stream = _flat_runs(extent, data, low - extent.start, high - extent.start)
        elif isinstance(extent, SparseExtent):
            stream = _sparse_runs(extent, low - extent.start, high - extent.start)
        else:
            yield RunArray.of(low, high - low, ZERO)
            continue
        async for runs in stream:
            yield RunArray(runs.start + extent.start, runs.length, runs.kind, runs.host_offset)


async def _flat_runs(extent: FlatExtent, data: Storage, start: int, end: int) -> RunStream:
    """What the file says: a hole in it is a hole of the disk."""
    while start < end:
        runs = await data.host_map(start + extent.host_offset, end - start)
        begins = runs.start - extent.host_offset
        start = int(begins[-1] + runs.length[-1])
        yield RunArray(begins, runs.length, runs.kind, runs.start)


async def _sparse_runs(extent: SparseExtent, start: int, end: int) -> RunStream:
    coverage = extent.header.coverage
    most = max(1, min(_MOST_TABLES, BATCH_BYTES // extent.header.table_bytes))
    while start < end:
        first, stop = start // coverage, -(-end // coverage)
        used = extent.directory[first : min(stop, first + (1 << 16))] != 0
        if not used[0]:
            empty = int(used.argmax()) or len(used)
            until = min(end, (first + empty) * coverage)
            yield RunArray.of(start, until - start, UNALLOCATED)
        else:
            unused = ~used[:most]
            count = int(unused.argmax()) or len(unused)
            key = extent.first_key
            words = await read_tables(
                extent.file,
                extent.cache,
                range(key + first, key + first + count),
                extent.header.table_bytes,
                lambda number: extent.table_place(number - extent.first_key),
                extent.decode,
            )
            until = min(end, (first + count) * coverage)
            yield _decode(extent, words, first * coverage, start, until)
        start = until
        await asyncio.sleep(0)


def _decode(extent: SparseExtent, words: AnyWords, base: int, start: int, end: int) -> RunArray:
    """The runs of ``[start, end)``; ``words`` begins at ``base``."""
    grain = extent.header.grain_size
    first, last = (start - base) // grain, (end - 1 - base) // grain + 1
    words = words[first:last]
    placed = words > ZEROED_ENTRY
    bad = placed & (words >= extent.end + (1 << SECTOR_BITS) - 1 >> SECTOR_BITS)
    if not extent.zeroed_grains:
        bad |= words == ZEROED_ENTRY
    if bad.any():
        word = int(words[int(bad.argmax())])
        raise RequestError(errno.EIO, f"{extent.path}: invalid grain table entry {word:#x}")
    kind = np.full(len(words), ZERO, np.uint8)
    kind[words == UNALLOCATED_ENTRY] = UNALLOCATED
    kind[placed] = COMPRESSED if extent.header.compressed else DATA
    host_offset = (words.astype(np.int64) << SECTOR_BITS) + extent.host_base
    host_offset[~placed] = -1
    starts = base + (first + np.arange(len(words), dtype=np.int64)) * grain
    runs = RunArray(starts, np.full(len(words), grain, np.int64), kind, host_offset)
    runs.start[0] = start
    runs.length[0] -= start - (base + first * grain)
    if kind[0] == DATA:
        host_offset[0] += start - (base + first * grain)
    runs.length[-1] = end - runs.start[-1]
    return runs.coalesced()
