"""The whole block allocation table, a part at a time, as numpy columns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdserve.errors import CorruptImageError
from nbdserve.extents import ZERO, Int64Array
from nbdserve.formats.vhdx.layout import (
    BITMAP_BLOCK_SIZE,
    FULLY_PRESENT,
    NOT_PRESENT,
    OFFSET_MASK,
    PARTIALLY_PRESENT,
    STATE_MASK,
)
from nbdserve.formats.vhdx.structure import Structure
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, align_up

_CHUNK_ENTRIES: Final = 1 << 17
"""1 MiB of table in one turn of the event loop."""


@dataclass(slots=True)
class Entries:
    """Consecutive entries. What the file has a hole for is left out: entries of 0, which place nothing."""

    index: Int64Array
    state: npt.NDArray[np.uint8]
    host_offset: Int64Array
    """Of whatever state; at most 2^62, so that a length can be added."""
    is_bitmap: npt.NDArray[np.bool_]

    @property
    def placed(self) -> npt.NDArray[np.bool_]:
        """Those with a block in the file."""
        placed: npt.NDArray[np.bool_] = self.state == FULLY_PRESENT
        placed |= (self.state == PARTIALLY_PRESENT) & ~self.is_bitmap
        return placed

    def lengths(self, structure: Structure) -> Int64Array:
        """Bytes of the blocks."""
        return np.where(self.is_bitmap, BITMAP_BLOCK_SIZE, structure.parameters.block_size).astype(np.int64)


async def scan(file: Storage, structure: Structure) -> AsyncIterator[Entries]:
    """The entries of the table as it is in ``file``, ascending."""
    base = structure.bat.offset
    at, end = base, base + structure.parameters.bat_entries * 8
    while at < end:
        runs = await file.host_map(at, end - at)
        for start, length, kind in zip(runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), strict=True):
            if kind == ZERO:
                continue
            first, stop = (start - base) // 8, min(start + length - base + 7, end - base) // 8
            for number in range(first, stop, _CHUNK_ENTRIES):
                yield await _read(file, structure, number, min(_CHUNK_ENTRIES, stop - number))
                await asyncio.sleep(0)
        at = int(runs.start[-1] + runs.length[-1])


async def _read(file: Storage, structure: Structure, first: int, count: int) -> Entries:
    stored = await file.read(structure.bat.offset + first * 8, count * 8)
    return decode_entries(np.frombuffer(stored, "<u8").astype(np.uint64), first, structure)


def decode_entries(words: npt.NDArray[np.uint64], first: int, structure: Structure) -> Entries:
    """The entries from number ``first`` on."""
    group = structure.parameters.chunk_ratio + 1
    index = np.arange(first, first + len(words), dtype=np.int64)
    host_offset = np.minimum(words & np.uint64(OFFSET_MASK), np.uint64(1 << 62)).astype(np.int64)
    state = (words & np.uint64(STATE_MASK)).astype(np.uint8)
    return Entries(index, state, host_offset, index % group == group - 1)


async def end_of_blocks(file: Storage, structure: Structure) -> int:
    """Host offset behind all blocks and whatever else is in ``file``, a multiple of 1 MiB: where new blocks can be.

    CorruptImageError for a block that lies past the end of the file or on the image's own tables: writing would damage
    the tables, or give the place out a second time.
    """
    # A block device has its size, and not its content, to the end.
    end = align_up(file.size, MIB) if file.grows_zeroed else max(stop for _, stop in structure.places())
    async for entries in scan(file, structure):
        if not (entries.state != NOT_PRESENT).any():
            continue
        placed = entries.placed
        host_offset, length = entries.host_offset[placed], entries.lengths(structure)[placed]
        bad = host_offset >= file.size
        for start, stop in structure.places():
            bad |= (host_offset < stop) & (start < host_offset + length)
        if bad.any():
            at = int(bad.argmax())
            number = int(entries.index[placed][at])
            raise CorruptImageError(
                file.path,
                "the block is past the end of the file, or where the image's own tables are; it can only be read",
                field=f"BAT entry {number}",
                value=int(host_offset[at]),
            )
        if len(host_offset):
            end = max(end, int((host_offset + length).max()))
    return align_up(end, MIB)
