"""The whole mapping as runs, vectorised over the table and, in differencing images, the sector bitmaps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdserve.extents import DATA, UNALLOCATED, Int64Array, RunArray, RunStream
from nbdserve.formats.vpc.image import BAD
from nbdserve.formats.vpc.layout import UNUSED
from nbdserve.units import MIB, SECTOR_SIZE

if TYPE_CHECKING:
    from nbdserve.formats.vpc.differencing import DifferencingDriver
    from nbdserve.formats.vpc.driver import VpcDriver

_BLOCKS: Final = 1 << 16
"""Table entries looked at in one turn of the event loop."""
_BITMAP_BYTES: Final = MIB // 8
"""Of sector bitmaps, read together."""
_BYTES: Final = 1 << 14
"""Of these, looked at in one turn: 131072 sectors, of which a single block can have 32 times as many."""


async def iter_block_runs(driver: VpcDriver, start: int, end: int) -> RunStream:
    """See ``FormatDriver.iter_runs``. ``[start, end)`` is inside the disk."""
    unit = driver.header.block_size
    for first, last in _ranges(start, end, unit, _BLOCKS):
        kind, place = _blocks(driver, first, last)
        place[kind == DATA] += driver.header.bitmap_size
        yield _cut(np.arange(first, last, dtype=np.int64) * unit, unit, kind, place, start, end)
        await asyncio.sleep(0)


async def iter_sector_runs(driver: DifferencingDriver, start: int, end: int) -> RunStream:
    """The same with a look at the bitmaps, which are read past the cache where they are not in it."""
    header = driver.header
    unit = header.block_size
    for first, last in _ranges(start, end, unit, _BLOCKS):
        kind, place = _blocks(driver, first, last)
        if not (kind == DATA).any():
            yield RunArray.of(max(start, first * unit), min(end, last * unit) - max(start, first * unit), UNALLOCATED)
            continue
        most = max(1, _BITMAP_BYTES // header.bitmap_size)
        for at in range(0, last - first, most):
            count = min(most, last - first - at)
            bits = await _read_bitmaps(driver, first + at, place[at : at + count])
            sectors = unit // SECTOR_SIZE
            packed = bits[:, : sectors // 8].reshape(-1)
            for low in range(0, len(packed), _BYTES):
                here = np.unpackbits(packed[low : low + _BYTES]).astype(bool)
                block, inside = np.divmod(np.arange(low * 8, low * 8 + len(here), dtype=np.int64), sectors)
                starts = (first + at + block) * unit + inside * SECTOR_SIZE
                offsets = place[at + block] + header.bitmap_size + inside * SECTOR_SIZE
                offsets[~here] = -1
                piece_start, piece_end = max(start, int(starts[0])), min(end, int(starts[-1]) + SECTOR_SIZE)
                if piece_start < piece_end:
                    kinds = np.where(here, np.uint8(DATA), np.uint8(UNALLOCATED))
                    yield _cut(starts, SECTOR_SIZE, kinds, offsets, piece_start, piece_end)
                await asyncio.sleep(0)


def _ranges(start: int, end: int, unit: int, most: int) -> Iterator[tuple[int, int]]:
    """The blocks of ``[start, end)``, at most ``most`` at a time, as ``[first, last)``."""
    first, last = start // unit, -(-end // unit) if end > start else start // unit
    while first < last:
        stop = min(last, first + most)
        yield first, stop
        first = stop


def _blocks(driver: VpcDriver, first: int, last: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint8]], Int64Array]:
    """Kind and host offset (of the bitmap, or -1) of the blocks ``[first, last)``."""
    words = driver.table.words[first:last]
    bad = words == BAD
    if bad.any():
        driver.refuse_block(first + int(bad.argmax()))
    used = words != UNUSED
    place = words.astype(np.int64) * SECTOR_SIZE
    place[~used] = -1
    return np.where(used, np.uint8(DATA), np.uint8(UNALLOCATED)), place


async def _read_bitmaps(
    driver: DifferencingDriver, first: int, places: Int64Array
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """A row per block, as they are in memory where they are; no bit is set where there is no block."""
    size = driver.header.bitmap_size
    stored = bytearray(len(places) * size)
    view = memoryview(stored)
    reads = []
    for number, place in enumerate(places.tolist()):
        part = view[number * size : (number + 1) * size]
        if place >= 0 and driver.bitmaps.peek(first + number) is None and not driver.storage.try_read_into(place, part):
            reads.append(driver.storage.read_into(place, part))
    if reads:
        await asyncio.gather(*reads)
    for number in range(len(places)):
        bitmap = driver.bitmaps.peek(first + number)  # also one that came, and was changed, while others were read
        if bitmap is not None:
            view[number * size : (number + 1) * size] = bitmap.bits
    return np.frombuffer(stored, np.uint8).reshape(len(places), size)


def _cut(
    starts: Int64Array,
    unit: int,
    kind: np.ndarray[tuple[int], np.dtype[np.uint8]],
    host_offset: Int64Array,
    start: int,
    end: int,
) -> RunArray:
    """Units of one length as runs, of which the first begins at ``start`` or before and the last ends at ``end``."""
    runs = RunArray(starts, np.full(len(starts), unit, np.int64), kind, host_offset).coalesced()
    keep = (runs.start + runs.length > start) & (runs.start < end)
    begin = np.maximum(runs.start[keep], start)
    stop = np.minimum(runs.start[keep] + runs.length[keep], end)
    moved = runs.host_offset[keep]
    moved = np.where(moved >= 0, moved + begin - runs.start[keep], moved)
    return RunArray(begin, stop - begin, runs.kind[keep], moved)
