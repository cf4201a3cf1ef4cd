"""``image check`` of Parallels images, and the repair.

As for QEMU, an image that is marked as in use has one error for that, and what the file has behind the last cluster is
leaked. Clusters of a dirty bitmap are in use too. A hole among the clusters is space that the next writer fills.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdserve.formats.base import CheckResult
from nbdserve.formats.flat_map import FlatMap, Scan
from nbdserve.formats.parallels import layout
from nbdserve.formats.parallels.layout import CLOSED, IN_USE, Header
from nbdserve.units import MIB, SECTOR_SIZE, div_ceil

if TYPE_CHECKING:
    from nbdserve.formats.parallels.driver import ParallelsDriver

_LISTED: Final = 20
"""Messages of one kind."""
_COPY: Final = MIB


async def check_parallels(driver: ParallelsDriver, *, repair_leaks: bool, repair_errors: bool) -> CheckResult:
    """The result; with a repair that of a second look, and what was mended."""
    check = _Check(driver)
    result = await check.judge()
    if repair_errors and result.corruptions:
        await check.mend_errors()
    if repair_leaks and result.leaks:
        await check.mend_leaks()
    if not ((repair_errors and result.corruptions) or (repair_leaks and result.leaks)):
        return result
    after = await check.judge()
    after.corruptions_fixed = result.corruptions - after.corruptions
    after.leaks_fixed = max(0, result.leaks - after.leaks)
    after.messages = [*result.messages, *after.messages]
    return after


class _Check:
    def __init__(self, driver: ParallelsDriver) -> None:
        self.driver = driver
        self.storage = driver.storage

    async def header(self) -> Header:
        """As it is on disk."""
        data = await self.storage.read(0, layout.HEADER_LENGTH)
        return Header.parse(data, self.storage.path, self.storage.size)

    async def scan(self, header: Header) -> Scan:
        """What the table on disk refers to, in clusters from the data offset on."""
        limit = div_ceil(max(0, self.storage.size - header.data_offset), header.cluster_size)
        table = FlatMap(self.storage, layout.BAT_OFFSET, header.bat_entries)
        return await table.scan(self.driver.units_of, limit)

    def end(self, header: Header, found: Scan) -> int:
        """Host offset behind the last cluster in use; the file's end where an unknown feature may use any."""
        end = header.data_offset + found.end * header.cluster_size
        if self.driver.extension.unknown:
            return max(end, self.storage.size)
        used = [header.extension_offset] if self.driver.extension.bitmaps else []
        for bitmap in self.driver.extension.bitmaps:
            used += [sector * SECTOR_SIZE for sector in bitmap.l1 if sector > 1]
        return max(end, *(offset + header.cluster_size for offset in used)) if used else end

    async def judge(self) -> CheckResult:
        header = await self.header()
        found = await self.scan(header)
        end = self.end(header, found)
        result = CheckResult(
            image_end_offset=end,
            total_clusters=header.bat_entries,
            allocated_clusters=found.allocated,
            fragmented_clusters=found.fragmented,
        )
        if header.in_use == IN_USE:
            result.corruptions += 1
            result.messages.append("ERROR: the image was not closed")
        for blocks, problem in (
            (found.outside, "is outside the file, or not aligned"),
            (found.duplicates, "shares its place with another cluster"),
        ):
            result.corruptions += len(blocks)
            result.messages += [
                f"ERROR: the cluster at guest offset {block * header.cluster_size:#x} {problem}"
                for block in blocks[:_LISTED]
            ]
        result.leaks = div_ceil(max(0, self.storage.size - end), header.cluster_size)
        if result.leaks:
            result.messages.append(f"Leaked: the file has {self.storage.size - end} bytes behind the last cluster")
        return result

    async def mend_errors(self) -> None:
        """Unmap what is outside, give a copy to what is shared, and mark the image as closed.

        Each step is stable before the next; the mark is last, so that a crash leaves an image to be repaired.
        """
        header = await self.header()
        found = await self.scan(header)
        for block in found.outside:
            await self._write_entry(block, 0)
        await self.storage.flush()
        size = header.cluster_size
        clusters = div_ceil(max(0, self.storage.size - header.data_offset), size)
        for block in found.duplicates:
            source = await self._entry(block) * header.entry_scale
            target = header.data_offset + clusters * size
            clusters += 1
            for at in range(0, size, _COPY):
                data = await self.storage.read(source + at, min(_COPY, size - at))
                await self.storage.write(target + at, data)
            await self.storage.flush()
            await self._write_entry(block, target // header.entry_scale)
        await self.storage.flush()
        header = await self.header()
        if header.in_use == IN_USE:
            # Whoever did not close it kept no dirty bitmap up to date.
            closed = replace(header, in_use=CLOSED, extension_offset=0)
            await self.storage.write_stable([(0, closed.build())])

    async def mend_leaks(self) -> None:
        """Cut the file behind the last cluster: QEMU takes what is there for zeroes."""
        header = await self.header()
        await self.storage.truncate(self.end(header, await self.scan(header)))
        await self.storage.flush()

    async def _entry(self, block: int) -> int:
        return int.from_bytes(await self.storage.read(layout.BAT_OFFSET + block * 4, 4), "little")

    async def _write_entry(self, block: int, word: int) -> None:
        await self.storage.write(layout.BAT_OFFSET + block * 4, struct.pack("<I", word))
