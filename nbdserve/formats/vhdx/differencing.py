"""Differencing VHDX images: a block can be here in part, and a bitmap says of each sector whether it is.

The unit of the mapping is the logical sector: what is written to a block of which nothing is here needs nothing from
the parent, and reading finds the rest there.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from nbdserve.errors import RequestError
from nbdserve.extents import DATA, UNALLOCATED, Run, RunArray, RunStream
from nbdserve.formats.base import Allocation, BackingReference, FormatDriver
from nbdserve.formats.tables import L2Cache, L2Table
from nbdserve.formats.vhdx.bat_scan import scan
from nbdserve.formats.vhdx.bitmaps import PART_BITS, all_set, clear_words, run_at, runs_of, set_bits
from nbdserve.formats.vhdx.driver import VhdxDriver
from nbdserve.formats.vhdx.image import STORED, TABLE_BYTES, TABLE_ENTRY_BITS
from nbdserve.formats.vhdx.layout import (
    BITMAP_BLOCK_SIZE,
    FULLY_PRESENT,
    NOT_PRESENT,
    OFFSET_MASK,
    PARTIALLY_PRESENT,
    STATE_MASK,
    UNMAPPED,
    Parameters,
)
from nbdserve.formats.vhdx.runs import PARTIAL
from nbdserve.formats.vhdx.structure import Structure
from nbdserve.formats.walk import loaded_runs
from nbdserve.storage.base import Storage
from nbdserve.units import MIB

_INDEX_MASK: Final = (1 << TABLE_ENTRY_BITS) - 1
_BIT_MASK: Final = (1 << PART_BITS) - 1
_PARTS_PER_BITMAP_BITS: Final = 4
"""log2 of the cached parts in a sector bitmap block (1 MiB)."""

Part = tuple[L2Table, int]
"""A cached part of a sector bitmap, and a bit in it."""


class DifferencingDriver(VhdxDriver):
    """One open differencing image."""

    def __init__(self, storage: Storage, structure: Structure, options: Mapping[str, Any]) -> None:
        super().__init__(storage, structure, options)
        self.granularity = structure.parameters.sector_size
        self._forget_bitmaps()
        self._sector_bits = self.granularity.bit_length() - 1
        self._preparing = asyncio.Lock()

    def _forget_bitmaps(self) -> None:
        """None is in memory, from now on."""
        self.bitmaps = L2Cache(TABLE_BYTES, stored=STORED)
        """Sector bitmaps, in parts of TABLE_BYTES by number."""
        self._recent_bitmaps = self.bitmaps.recent

    def _changed_tables(self) -> list[L2Cache]:
        """Bits first: a block is not shown before the bits that say what of it is here."""
        return [self.bitmaps, self.bat]

    # --- reading ---------------------------------------------------------------------------------------------------

    def _bitmap_entry(self, block: int) -> int | None:
        """The BAT entry of the sector bitmap that covers ``block``; None if it is not in memory."""
        index = self.structure.parameters.bitmap_index(block >> self._ratio_bits)
        table = self.bat.find(index >> TABLE_ENTRY_BITS)
        return None if table is None else table.entries[index & _INDEX_MASK]

    def _part(self, offset: int) -> Part | None:
        """The bit of the sector at ``offset``; None if it is not in memory."""
        sector = offset >> self._sector_bits
        table = self.bitmaps.find(sector >> PART_BITS)
        return None if table is None else (table, sector & _BIT_MASK)

    def _lookup_other(self, table: L2Table, block: int, offset: int, length: int) -> Run | None:
        entry = table.entries[self._index(block) & _INDEX_MASK]
        if entry & STATE_MASK != PARTIALLY_PRESENT:
            return super()._lookup_other(table, block, offset, length)
        sector = offset >> self._sector_bits
        bits = self._recent_bitmaps.get(sector >> PART_BITS) or self.bitmaps.find(sector >> PART_BITS)
        if bits is None:
            return None
        inside = offset & self._block_mask
        rest = self._block_mask + 1 - inside
        if length > rest:  # noqa: PLR1730 - a call costs more than the rest of this method
            length = rest
        sectors = ((offset + length - 1) >> self._sector_bits) - sector + 1
        here, same = run_at(bits, sector & _BIT_MASK, sectors)
        if same < sectors:
            length = ((sector + same) << self._sector_bits) - offset
        if not here:
            return UNALLOCATED, length, -1
        host_offset = (entry & OFFSET_MASK) + inside
        if host_offset + length > self.host_limit or host_offset < MIB:
            length = self._inside_file(block, entry, host_offset, length)
        return DATA, length, host_offset

    async def load(self, offset: int) -> None:
        """The parts of table and bitmap that ``offset`` needs; before the first change, what has to be done first."""
        await super().load(offset)
        block = offset >> self._block_bits
        table = await self.load_bat(self._index(block))
        if table.entries[self._index(block) & _INDEX_MASK] & STATE_MASK == PARTIALLY_PRESENT:
            await self._load_part(offset)

    async def _load_part(self, offset: int) -> Part:
        """The bit of the sector at ``offset``. RequestError(EIO) when there is no bitmap where there has to be one."""
        block = offset >> self._block_bits
        number = offset >> self._sector_bits >> PART_BITS
        while (part := self._part(offset)) is None:
            await self.load_bat(self.structure.parameters.bitmap_index(block >> self._ratio_bits))
            entry = self._bitmap_entry(block)
            if entry is None:
                continue
            host_offset = entry & OFFSET_MASK
            if entry & STATE_MASK != FULLY_PRESENT or not MIB <= host_offset <= self.host_limit - BITMAP_BLOCK_SIZE:
                raise RequestError(
                    errno.EIO,
                    f"{self.path}: invalid BAT entry {entry:#x} for the sector bitmap of guest offset {offset:#x}",
                )
            inside = (number & (1 << _PARTS_PER_BITMAP_BITS) - 1) * TABLE_BYTES
            await self._load_table(self.bitmaps, number, host_offset + inside)
        return part

    async def split_partial(self, runs: RunArray) -> RunStream:
        """Blocks that are here in part become the runs of their bits."""
        first = 0
        for at in [*np.flatnonzero(runs.kind == PARTIAL).tolist(), len(runs)]:
            if at > first:
                cut = slice(first, at)
                whole = RunArray(runs.start[cut], runs.length[cut], runs.kind[cut], runs.host_offset[cut])
                yield whole.coalesced()
            if at < len(runs):
                start, length, host_offset = int(runs.start[at]), int(runs.length[at]), int(runs.host_offset[at])
                yield await self._split_block(start, length, host_offset)
            first = at + 1

    async def _split_block(self, start: int, length: int, host_offset: int) -> RunArray:
        skip = start & self.granularity - 1
        table, bit = await self._load_part(start)
        begins, here = runs_of(table, bit, bit + ((skip + length + self.granularity - 1) >> self._sector_bits))
        starts = np.maximum((begins << self._sector_bits) - skip, 0)
        lengths = np.diff(np.append(starts, length))
        kind = np.where(here, DATA, UNALLOCATED).astype(np.uint8)
        return RunArray(start + starts, lengths, kind, np.where(here, host_offset + starts, -1))

    # --- changing --------------------------------------------------------------------------------------------------

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """Sectors of a block that is here in part, or of a new one; or new blocks as a whole."""
        if not self.has_backing:
            return super().allocate(offset, length)
        found = self._find(offset) if self._may_change() else None
        if found is None:
            return None
        table, index, entry = found
        state = entry & STATE_MASK
        inside = offset & self._block_mask
        if not inside and state <= UNMAPPED and (length >= self.cluster_size or offset + length == self.size):
            covered = length if offset + length == self.size else length & ~self._block_mask
            return super().allocate(offset, covered)
        length = min(length, self.cluster_size - inside)
        if state == FULLY_PRESENT:
            # Zeroed in ``prepare``, because what was there said zeroes and not the parent: nothing is to be published.
            return Allocation(offset, length, (entry & OFFSET_MASK) + inside, False, None)
        part = self._part(offset)
        if state not in (NOT_PRESENT, PARTIALLY_PRESENT) or part is None or not self._bitmap_entry_is_there(offset):
            return None
        bits, bit = part
        if state == PARTIALLY_PRESENT:
            here, sectors = run_at(bits, bit, (length + self.granularity - 1) >> self._sector_bits)
            assert not here
            length = min(length, sectors << self._sector_bits)
            host_offset, new = entry & OFFSET_MASK, False
        else:
            host_offset, new = self._take(1)[0], True
        table.pins += 1
        bits.pins += 1
        return Allocation(offset, length, host_offset + inside, False, (table, index, host_offset, bits, bit, new))

    def _bitmap_entry_is_there(self, offset: int) -> bool:
        entry = self._bitmap_entry(offset >> self._block_bits)
        return entry is not None and entry & STATE_MASK == FULLY_PRESENT

    def publish(self, allocation: Allocation) -> None:
        """Set the bits, and show the block."""
        token = allocation.token
        if token is None:
            return
        if len(token) != 6:
            super().publish(allocation)
            return
        table, index, host_offset, bits, bit, new = token
        first = bit - ((allocation.offset & self._block_mask) >> self._sector_bits)
        end = first + (self.cluster_size >> self._sector_bits)
        if new:
            clear_words(bits, first, end)  # bits of a block that is not here mean nothing, and may be left over
        sectors = (allocation.length + self.granularity - 1) >> self._sector_bits
        set_bits(bits, bit, bit + sectors)
        state = FULLY_PRESENT if all_set(bits, first, end) else PARTIALLY_PRESENT
        entry = host_offset | state
        if table.entries[index] != entry:
            table.store(index, entry)
        table.pins -= 1
        bits.pins -= 1

    def abandon(self, allocation: Allocation) -> None:
        """What is new is free again after the next commit."""
        token = allocation.token
        if token is None:
            return
        if len(token) != 6:
            super().abandon(allocation)
            return
        table, _, host_offset, bits, _, new = token
        table.pins -= 1
        bits.pins -= 1
        if new:
            self.space.free(host_offset, self.cluster_size >> 20)

    async def prepare(self, offset: int, length: int) -> None:
        """The tables, a sector bitmap for the chunk, and whole blocks of zeroes where the mapping says zeroes."""
        await super().prepare(offset, length)
        if not self.has_backing:
            return
        async with self._preparing:
            block = offset >> self._block_bits
            state = (await self.load_bat(self._index(block))).entries[self._index(block) & _INDEX_MASK] & STATE_MASK
            if state in (NOT_PRESENT, PARTIALLY_PRESENT):
                await self._ensure_bitmap(block)
                await self._load_part(offset)
            elif state <= UNMAPPED:
                await self._materialise(block)

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """As of any image; without a parent the unit is the block."""
        await super().set_backing(reference, backing)
        self.granularity = self.structure.parameters.sector_size if self.has_backing else self.cluster_size

    async def _prepare_parent(self, wanted: Parameters) -> None:
        """Without a parent every block is here as a whole or not at all, and there are no sector bitmaps.

        What a block does not have is zeroed while no bit shows it, and stable before an entry does. The bitmaps go when
        none is needed any more: of what the log holds, a crash may leave any number of the first entries.
        """
        await super()._prepare_parent(wanted)
        if wanted.has_parent:
            return
        await self._cover_blocks()
        async for entries in scan(self.storage, self.structure):
            for index in entries.index[(entries.state == PARTIALLY_PRESENT) & ~entries.is_bitmap].tolist():
                await self._complete(index)
        await self._commit.settle()
        async for entries in scan(self.storage, self.structure):
            for index in entries.index[entries.is_bitmap & (entries.state != NOT_PRESENT)].tolist():
                table = await self.load_bat(index)
                entry = table.entries[index & _INDEX_MASK]
                if entry & STATE_MASK == FULLY_PRESENT:
                    self.space.free(entry & OFFSET_MASK, BITMAP_BLOCK_SIZE >> 20)
                table.store(index & _INDEX_MASK, NOT_PRESENT)
        await self._commit.settle()
        self._forget_bitmaps()

    async def _complete(self, index: int) -> None:
        """The block of BAT entry ``index``, here in part, is here as a whole."""
        start = index - index // ((1 << self._ratio_bits) + 1) << self._block_bits
        end = min(start + self.cluster_size, self.size)
        host_offset = (await self.load_bat(index)).entries[index & _INDEX_MASK] & OFFSET_MASK
        async for offset, (kind, length, _) in loaded_runs(self, start, end):
            if kind == UNALLOCATED:
                await self.storage.zero(host_offset + offset - start, length)
        (await self.load_bat(index)).store(index & _INDEX_MASK, host_offset | FULLY_PRESENT)
        if self.bat.crowded:
            await self._commit.commit()

    async def _ensure_bitmap(self, block: int) -> None:
        """A sector bitmap block for the chunk of ``block``, all bits 0: nothing it says is looked at yet."""
        chunk = block >> self._ratio_bits
        index = self.structure.parameters.bitmap_index(chunk)
        table = await self.load_bat(index)
        if table.entries[index & _INDEX_MASK] & STATE_MASK == FULLY_PRESENT:
            return
        table.pins += 1
        try:
            host_offset, zeroed = self.space.take_whole(BITMAP_BLOCK_SIZE >> 20)
            if not zeroed:
                await self.storage.zero(host_offset, BITMAP_BLOCK_SIZE)
            self.host_limit = max(self.host_limit, host_offset + BITMAP_BLOCK_SIZE)
            table.store(index & _INDEX_MASK, host_offset | FULLY_PRESENT)
        finally:
            table.pins -= 1

    async def _materialise(self, block: int) -> None:
        """A block that reads as zeroes gets host space that holds zeroes, so that a part of it can be written.

        The caller holds the block exclusively.
        """
        table = await self.load_bat(self._index(block))
        table.pins += 1
        try:
            host_offset, zeroed = self._take(1)
            if not zeroed:
                await self.storage.zero(host_offset, self.cluster_size)
            table.store(self._index(block) & _INDEX_MASK, host_offset | FULLY_PRESENT)
        finally:
            table.pins -= 1
