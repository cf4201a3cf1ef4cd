"""``image check`` of VDI images, and the repair.

What QEMU's allocator takes for granted is an error: a map entry at or behind the count of allocated blocks would be
overwritten by its next block. A count that is too high, or a block nothing refers to, only wastes space: a leak.
"""

from __future__ import annotations

import numpy as np

from nbdserve.formats.base import CheckResult
from nbdserve.formats.flat_check import FlatCheck
from nbdserve.formats.flat_image import copy_unit
from nbdserve.formats.flat_map import FlatMap, Scan
from nbdserve.formats.vdi import layout, room
from nbdserve.formats.vdi.driver import VdiDriver, read_header
from nbdserve.formats.vdi.layout import FREE, ZEROED


class VdiCheck(FlatCheck):
    """The map, the count of allocated blocks, and the file."""

    image: VdiDriver

    async def scan(self) -> tuple[Scan, int]:
        """What the map refers to, and the count of allocated blocks in the header."""
        header = self.image.header
        limit = -(-max(0, self.storage.size - header.data_offset) // header.block_size)
        found = await self._map().scan(self.image.units_of, limit)
        return found, int.from_bytes(await self.storage.read(layout.BLOCKS_ALLOCATED_AT, 4), "little")

    def _map(self) -> FlatMap:
        """As it is on disk."""
        return FlatMap(self.storage, self.image.header.map_offset, self.image.header.disk_blocks)

    async def judge(self) -> CheckResult:
        """What is wrong now."""
        found, count = await self.scan()
        header = self.image.header
        result = CheckResult(
            image_end_offset=header.data_offset + found.end * header.block_size,
            total_clusters=header.disk_blocks,
            allocated_clusters=found.allocated,
            fragmented_clusters=found.fragmented,
        )
        self.blame(result, found)
        if count < found.end:
            result.corruptions += 1
            result.messages.append(
                f"ERROR: blocks_allocated = {count}, but the block {found.end - 1} is in use: "
                "the next one that QEMU allocates would be put over data"
            )
        result.leaks = max(count, found.end) - len(found.used)
        if result.leaks:
            result.messages.append(f"Leaked blocks: {result.leaks} of {max(count, found.end)} have no map entry")
        return result

    def can_mend(self, result: CheckResult, *, leaks: bool, errors: bool) -> bool:
        """Leaks among errors are left alone, unless these are mended too."""
        return errors or (leaks and not result.corruptions)

    async def repair(self, *, leaks: bool, errors: bool) -> None:
        """Make the map refer to each place once, and the data area dense."""
        header = self.image.header
        if header.map_among_data:
            await room.finish(self.storage, *await read_header(self.storage))
            header, _ = await read_header(self.storage)
            self.image.adopt_header(header)
        found, count = await self.scan()
        end = max(found.end, 0)
        if count < end:
            await self._write_count(end)
        for block in found.outside:
            await self.write_entry(block, ZEROED if header.differencing else FREE)
        await self.storage.flush()
        for block in found.duplicates:
            await self._copy(await self.entry(block), end)
            end += 1
            await self._write_count(end)
            await self.write_entry(block, end - 1)
            await self.storage.flush()
        found, _ = await self.scan()
        holes = (at for first, length in found.holes() for at in range(first, first + length))
        moves: list[tuple[int, int]] = []
        async for first, words in self._map().words(0, header.disk_blocks):
            for index in np.flatnonzero((words >= found.allocated) & (words < ZEROED)).tolist():
                target = next(holes)
                await self._copy(int(words[index]), target)
                moves.append((first + index, target))
        await self.storage.flush()
        for block, target in moves:
            await self.write_entry(block, target)
        await self.storage.flush()
        await self._write_count(found.allocated)
        await self.storage.truncate(header.data_offset + found.allocated * header.block_size)
        await self.storage.flush()

    async def _write_count(self, count: int) -> None:
        """The header's sector, whole, and stable. It has no placeholders then."""
        _, sector = await read_header(self.storage)
        fields = {layout.BLOCKS_ALLOCATED_AT: count, layout.BLOCKS_AT: self.image.header.disk_blocks}
        await self.storage.write_stable([(0, layout.patched(sector, fields))])

    async def _copy(self, source: int, target: int) -> None:
        """The content of one block of the data area to another, stable."""
        base, size = self.image.header.data_offset, self.image.header.block_size
        await copy_unit(self.storage, base + source * size, base + target * size, size)
        await self.storage.flush()
