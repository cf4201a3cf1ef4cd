"""``image check`` of VDI images, and the repair.

What QEMU's allocator takes for granted is an error: a map entry at or behind the count of allocated blocks would be
overwritten by its next block. A count that is too high, or a block nothing refers to, only wastes space: a leak.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdserve.formats.base import CheckResult
from nbdserve.formats.flat_map import FlatMap, Scan
from nbdserve.formats.vdi import layout
from nbdserve.formats.vdi.layout import FREE, ZEROED
from nbdserve.units import MIB, SECTOR_SIZE

if TYPE_CHECKING:
    from nbdserve.formats.vdi.driver import VdiDriver

_LISTED: Final = 20
"""Messages of one kind."""
_COPY: Final = MIB


async def check_vdi(driver: VdiDriver, *, repair_leaks: bool, repair_errors: bool) -> CheckResult:
    """The result; with a repair that of a second look, and what was mended."""
    result = await _Check(driver).judge()
    mends_errors, mends_leaks = repair_errors and result.corruptions, repair_leaks and result.leaks
    if not mends_errors and not (mends_leaks and not result.corruptions):
        return result
    await _Repair(driver).run()
    after = await _Check(driver).judge()
    after.corruptions_fixed = result.corruptions - after.corruptions
    after.leaks_fixed = result.leaks - after.leaks
    after.messages = [*result.messages, *after.messages]
    return after


class _Check:
    def __init__(self, driver: VdiDriver) -> None:
        self.driver = driver
        self.header = driver.header
        self.map = FlatMap(driver.storage, self.header.map_offset, self.header.blocks)
        """As it is on disk."""

    async def scan(self) -> tuple[Scan, int]:
        """What the map refers to, and the count of allocated blocks in the header."""
        storage, header = self.driver.storage, self.header
        limit = -(-max(0, storage.size - header.data_offset) // header.block_size)
        found = await self.map.scan(self.driver.units_of, limit)
        at = layout.BLOCKS_ALLOCATED_AT
        return found, int.from_bytes(await storage.read(at, 4), "little")

    async def judge(self) -> CheckResult:
        found, count = await self.scan()
        header = self.header
        result = CheckResult(
            image_end_offset=header.data_offset + found.end * header.block_size,
            total_clusters=-(-header.size // header.block_size),
            allocated_clusters=found.allocated,
            fragmented_clusters=found.fragmented,
        )
        for blocks, problem in (
            (found.outside, "is outside the file"),
            (found.duplicates, "shares its place with another block"),
        ):
            result.corruptions += len(blocks)
            result.messages += [
                f"ERROR: the block at guest offset {block * header.block_size:#x} {problem}"
                for block in blocks[:_LISTED]
            ]
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


class _Repair(_Check):
    """Makes the map refer to each place once, and the data area dense."""

    async def run(self) -> None:
        """Each step is stable before the next; a crash leaves what another repair mends."""
        storage, header = self.driver.storage, self.header
        found, count = await self.scan()
        end = max(found.end, 0)
        if count < end:
            await self._write_count(end)
        for block in found.outside:
            await self._write_entry(block, ZEROED if header.differencing else FREE)
        await storage.flush()
        for block in found.duplicates:
            await self._copy(await self._entry(block), end)
            end += 1
            await self._write_count(end)
            await self._write_entry(block, end - 1)
            await storage.flush()
        found, _ = await self.scan()
        holes = (at for first, length in found.holes() for at in range(first, first + length))
        moves: list[tuple[int, int]] = []
        async for first, words in self.map.words(0, header.blocks):
            for index in np.flatnonzero((words >= found.allocated) & (words < ZEROED)).tolist():
                target = next(holes)
                await self._copy(int(words[index]), target)
                moves.append((first + index, target))
        await storage.flush()
        for block, target in moves:
            await self._write_entry(block, target)
        await storage.flush()
        await self._write_count(found.allocated)
        await storage.truncate(header.data_offset + found.allocated * header.block_size)
        await storage.flush()

    async def _entry(self, block: int) -> int:
        return int.from_bytes(await self.driver.storage.read(self.header.map_offset + block * 4, 4), "little")

    async def _write_entry(self, block: int, word: int) -> None:
        await self.driver.storage.write(self.header.map_offset + block * 4, struct.pack("<I", word))

    async def _write_count(self, count: int) -> None:
        """The header's sector, whole, and stable."""
        sector = await self.driver.storage.read(0, SECTOR_SIZE)
        struct.pack_into("<I", sector, layout.BLOCKS_ALLOCATED_AT, count)
        await self.driver.storage.write_stable([(0, sector)])

    async def _copy(self, source: int, target: int) -> None:
        """The content of one block of the data area to another, stable."""
        storage, header = self.driver.storage, self.header
        base, size = header.data_offset, header.block_size
        for at in range(0, size, _COPY):
            data = await storage.read(base + source * size + at, min(_COPY, size))
            await storage.write(base + target * size + at, data)
        await storage.flush()
