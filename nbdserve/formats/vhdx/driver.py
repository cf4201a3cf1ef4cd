"""The VHDX driver: what the block allocation table of a dynamic or fixed image says, and changing it.

Differencing images, whose blocks can be here in part, are opened as the subclass in ``differencing``.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Self, cast
from uuid import uuid4

from nbdserve.errors import ConfigError, RequestError
from nbdserve.extents import DATA, UNALLOCATED, ZERO, Run, RunArray, RunStream
from nbdserve.formats.base import Allocation, BackingReference, FormatDriver
from nbdserve.formats.tables import L2Table, Piece
from nbdserve.formats.vhdx.image import TABLE_ENTRY_BITS, VhdxImage
from nbdserve.formats.vhdx.layout import (
    FULLY_PRESENT,
    NOT_PRESENT,
    OFFSET_MASK,
    PARTIALLY_PRESENT,
    STATE_MASK,
    UNMAPPED,
    Parameters,
    Region,
)
from nbdserve.formats.vhdx.layout import ZERO as ZERO_STATE
from nbdserve.formats.vhdx.parent import locator_on, with_parent
from nbdserve.formats.vhdx.resize import change_pages, grown, place_table, write_rest_of_last_block
from nbdserve.formats.vhdx.runs import iter_runs
from nbdserve.formats.vhdx.structure import Structure
from nbdserve.units import MIB, align_up, div_ceil

_INDEX_MASK = (1 << TABLE_ENTRY_BITS) - 1


class VhdxDriver(VhdxImage):
    """One open VHDX image."""

    @classmethod
    def _class_for(cls, structure: Structure) -> type[Self]:
        if structure.parameters.has_parent:
            from nbdserve.formats.vhdx.differencing import DifferencingDriver  # noqa: PLC0415  (a subclass of this)

            return cast("type[Self]", DifferencingDriver)
        return cls

    # --- reading the mapping ---------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run | None:
        """What this layer has at ``offset``; EIO where the entry is invalid."""
        block = offset >> self._block_bits
        index = block + (block >> self._ratio_bits)
        table = self._recent.get(index >> TABLE_ENTRY_BITS)
        if table is None:
            table = self.bat.find(index >> TABLE_ENTRY_BITS)
            if table is None:
                return None
        entry = table.entries[index & _INDEX_MASK]
        if entry & STATE_MASK != FULLY_PRESENT:
            return self._lookup_other(table, block, offset, length)
        inside = offset & self._block_mask
        host_offset = (entry & OFFSET_MASK) + inside
        rest = self._block_mask + 1 - inside
        if length > rest:  # noqa: PLR1730 - a call costs more than the rest of this method
            length = rest
        if host_offset + length > self.host_limit or host_offset < MIB:
            length = self._inside_file(block, entry, host_offset, length)
        return DATA, length, host_offset

    def _lookup_other(self, table: L2Table, block: int, offset: int, length: int) -> Run | None:
        """``lookup`` where the block is not here as a whole."""
        kind, count = self._absent(table, block, length)
        return kind, min(length, (count << self._block_bits) - (offset & self._block_mask)), -1

    def _absent(self, table: L2Table, block: int, length: int) -> tuple[int, int]:
        """Kind of a block that is not here, and how many blocks from it on are of that kind, as far as one look goes.

        EIO for an entry that cannot be.
        """
        entry = table.entries[self._index(block) & _INDEX_MASK]
        state = entry & STATE_MASK
        if state > UNMAPPED:
            raise self._bad_entry(block, entry)
        kind = UNALLOCATED if state == NOT_PRESENT else ZERO
        most = min(self._together(block), div_ceil(length, self.cluster_size) + 1)
        first = self._index(block) & _INDEX_MASK
        count = 1
        while count < most and table.entries[first + count] & STATE_MASK == state:
            count += 1
        return kind, count

    def _index(self, block: int) -> int:
        return block + (block >> self._ratio_bits)

    def _together(self, block: int) -> int:
        """Blocks from this one on that are in the same chunk and the same part of the table."""
        in_chunk = (1 << self._ratio_bits) - (block & (1 << self._ratio_bits) - 1)
        return min(in_chunk, _INDEX_MASK + 1 - (self._index(block) & _INDEX_MASK))

    def _inside_file(self, block: int, entry: int, host_offset: int, length: int) -> int:
        """The part of the run that the file has: the last block of some writers is cut at the end of the disk."""
        length = min(length, self.host_limit - host_offset)
        if length <= 0 or host_offset < MIB:
            raise self._bad_entry(block, entry)
        return length

    def _bad_entry(self, block: int, entry: int) -> RequestError:
        return RequestError(
            errno.EIO, f"{self.path}: invalid BAT entry {entry:#x} for guest offset {block << self._block_bits:#x}"
        )

    def iter_runs(self, start: int, end: int) -> RunStream:
        """The mapping of ``[start, end)``, a part of the table at a time. RequestError(EIO) for a bad entry."""
        return iter_runs(self, start, end)

    async def split_partial(self, runs: RunArray) -> RunStream:
        """``runs``, where blocks that are here in part are divided; here there are none."""
        yield runs.coalesced()

    async def load(self, offset: int) -> None:
        """The part of the table that ``offset`` needs; before the first change, what has to be done first."""
        await self._make_ready()
        await self.load_bat(self._index(offset >> self._block_bits))

    # --- changing it -----------------------------------------------------------------------------------------------

    def _find(self, offset: int) -> tuple[L2Table, int, int] | None:
        """``(table, index in it, entry)`` of the block at ``offset``, if the table is in memory."""
        index = self._index(offset >> self._block_bits)
        table = self.bat.find(index >> TABLE_ENTRY_BITS)
        if table is None:
            return None
        index &= _INDEX_MASK
        return table, index, table.entries[index]

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """Blocks that are here are overwritten in place: opening has seen that they lie nowhere else's."""
        if not self._begun and not self._may_change():
            return None
        if self._broken:
            raise RequestError(errno.EIO, self._broken)
        run = self.lookup(offset, length)
        if run is None or run[0] == DATA:
            return run
        return UNALLOCATED, run[1], -1

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """New blocks, consecutive in the file and in one part of the table."""
        found = self._find(offset) if self._may_change() else None
        if found is None:
            return None
        table, first, _ = found
        most = min(self._together(offset >> self._block_bits), div_ceil(length, self.cluster_size))
        count = 1
        while count < most and table.entries[first + count] & STATE_MASK <= UNMAPPED:
            count += 1
        host_offset, zeroed = self._take(count)
        table.pins += 1
        return Allocation(
            offset, min(length, count << self._block_bits), host_offset, zeroed, (table, first, count, host_offset)
        )

    def _take(self, blocks: int) -> tuple[int, bool]:
        """Host space for that many consecutive blocks."""
        host_offset, zeroed = self.space.take_whole(blocks << self._block_bits >> 20)
        self.host_limit = max(self.host_limit, host_offset + (blocks << self._block_bits))
        return host_offset, zeroed

    def publish(self, allocation: Allocation) -> None:
        """Point the entries at the new blocks."""
        table, first, count, host_offset = allocation.token
        for number in range(count):
            table.store(first + number, host_offset + (number << self._block_bits) | FULLY_PRESENT)
        table.pins -= 1

    def abandon(self, allocation: Allocation) -> None:
        """The blocks are free again after the next commit."""
        table, _, count, host_offset = allocation.token
        table.pins -= 1
        self.space.free(host_offset, count << self._block_bits >> 20)

    async def prepare(self, offset: int, length: int) -> None:
        """As ``load``."""
        await self.load(offset)

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Whole blocks become ZERO; those of a fixed image, or that are to keep their space, are zeroed in place."""
        if self.structure.parameters.leave_allocated:
            return 0
        found = self._find(offset) if self._may_change() else None
        if found is None:
            return None
        table, first, entry = found
        block = offset >> self._block_bits
        if offset & self._block_mask or (length < self.cluster_size and offset + length < self.size):
            return 0
        stop = offset + length
        blocks = div_ceil(stop, self.cluster_size) if stop == self.size else stop >> self._block_bits
        most = min(self._together(block), blocks - block)
        count = 0
        while count < most:
            entry = table.entries[first + count]
            state = entry & STATE_MASK
            if state > UNMAPPED:
                if state not in (FULLY_PRESENT, PARTIALLY_PRESENT):
                    raise self._bad_entry(block + count, entry)
                if not unmap:
                    break
                self.space.free(entry & OFFSET_MASK, self.cluster_size >> 20)
            if state != ZERO_STATE:
                table.store(first + count, ZERO_STATE)
            count += 1
        return min(length, count << self._block_bits)

    def discard(self, offset: int, length: int) -> int | None:
        """As ``zero``, of the whole blocks of the range: what was discarded reads as zeroes."""
        if inside := offset & self._block_mask:
            return min(length, self.cluster_size - inside)
        if length < self.cluster_size and offset + length < self.size:
            return length
        return self.zero(offset, length, unmap=True)

    async def resize(self, size: int) -> None:
        """Grow the disk; what is new reads as zeroes, also where the layer below goes on.

        Crash at any point: the disk has its old size or the new one. What is written before the log entry that says so
        is past the end of the disk, or in space that nothing refers to.
        """
        wanted = grown(self.structure.parameters, size)
        old = self.structure.parameters
        if self._broken:
            raise RequestError(errno.EIO, self._broken)
        if wanted == old:
            await self.flush()
            return
        await self._begin()
        await self._cover_blocks()
        if old.size & self._block_mask:
            end = min(wanted.size, old.blocks * old.block_size)
            await write_rest_of_last_block(self, end)
        await self._commit.settle()
        bat = self.structure.bat
        needed = align_up(wanted.bat_entries * 8, MIB)
        if needed > bat.length:
            bat = replace(bat, offset=await self._take_zeroed(needed), length=needed)
        blocks_at = 0
        if old.leave_allocated and wanted.blocks > old.blocks:
            blocks_at = await self._take_zeroed((wanted.blocks - old.blocks) * old.block_size)
        await place_table(self.storage, self.structure, wanted, bat, blocks_at)
        await self._cover_blocks()
        await self.storage.flush()
        self._log.stable_size = self._log.end = self.storage.size
        await self._change(await change_pages(self.storage, self.structure, wanted, bat))
        self._adopt(wanted, bat)
        await self.flush()

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """Name another parent, by its file and the identity of its data, or none. A crash leaves the old or the new.

        Without a parent no block is here in part: zeroes take the place of what was the parent's, and do so after a
        crash on the way, too. An image that had no parent is to be opened anew when it has got one.
        """
        if self._broken:
            raise RequestError(errno.EIO, self._broken)
        old, locator = self.structure, None
        try:
            if reference is not None:
                if not isinstance(backing, VhdxImage):
                    raise ConfigError("the parent of a VHDX image is one, too, and has to be opened")
                locator = locator_on(backing.structure, reference.name, old)
            structure, pages = await with_parent(self.storage, old, locator)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        await self._commit.settle()
        if locator is None and old.locator is None:
            return
        if not self._begun:
            await self._headers.update(file_write_guid=uuid4())
        await self._prepare_parent(structure.parameters)
        await self._change(pages)
        self.structure = replace(structure, header=self._headers.header)
        self.has_backing = locator is not None
        self.backing = None if reference is None else BackingReference(reference.name, self.name)
        if not isinstance(self, self._class_for(self.structure)):
            await self._finish()
            self._stop_writing(f"{self.path}: it has a parent now, open it anew")

    async def _prepare_parent(self, wanted: Parameters) -> None:
        """What has to be so when the metadata say ``wanted``; the image says the same as before. Stable on return.

        The table of an image with a parent goes on where that of another ends: with blocks past the end of the disk.
        """
        counts = self.structure.parameters.bat_entries, wanted.bat_entries
        start, end = (self.structure.bat.offset + count * 8 for count in counts)
        if start < end:
            await self.storage.zero(start, end - start)
            await self.storage.flush()

    async def _change(self, pages: list[Piece]) -> None:
        """All of the pages, in one entry of the log. Stable on return."""
        try:
            await self._log.barrier_log(pages)
        except BaseException as error:
            # Some of the pages may be in their places: the log has to stay, for the next one who opens it.
            self._stop_writing(f"{self.path}: its metadata could not be changed, open it anew: {error}")
            raise

    async def _cover_blocks(self) -> None:
        """The file is as long as the last block is, which some writers cut where the disk ends."""
        await self.storage.extend(self.space.end)
        self.host_limit = max(self.host_limit, self.space.end)

    async def _take_zeroed(self, length: int) -> int:
        """Host space of ``length`` bytes, whole MiB, that reads as zeroes."""
        host_offset, zeroed = self.space.take_whole(length >> 20)
        if not zeroed:
            await self.storage.zero(host_offset, length)
        self.host_limit = max(self.host_limit, host_offset + length)
        return host_offset

    def _adopt(self, parameters: Parameters, bat: Region) -> None:
        """The image in memory is as large, with its table there."""
        old = self.structure.bat
        if bat != old:
            self.space.free(old.offset, old.length >> 20)
        regions = tuple(bat if region.guid == bat.guid else region for region in self.structure.regions)
        self.structure = replace(self.structure, parameters=parameters, regions=regions)
        self.size = parameters.size
        self._forget_tables()
