"""``image check`` of Parallels images, and the repair.

As for QEMU, an image that is marked as in use has one error for that, and what the file has behind the last cluster is
leaked. Clusters of a dirty bitmap are in use too. A hole among the clusters is space that the next writer fills.
"""

from __future__ import annotations

from dataclasses import replace

from nbdserve.formats.base import CheckResult
from nbdserve.formats.flat_check import FlatCheck
from nbdserve.formats.flat_image import copy_unit
from nbdserve.formats.flat_map import FlatMap, Scan
from nbdserve.formats.parallels import layout
from nbdserve.formats.parallels.driver import ParallelsDriver, read_header
from nbdserve.formats.parallels.layout import CLOSED, IN_USE, Header
from nbdserve.units import SECTOR_SIZE, div_ceil


class ParallelsCheck(FlatCheck):
    """The table, the mark of a writer, and the file."""

    image: ParallelsDriver

    async def header(self) -> Header:
        """As it is on disk."""
        return await read_header(self.storage)

    async def scan(self, header: Header) -> Scan:
        """What the table on disk refers to, in clusters from the data offset on."""
        limit = div_ceil(max(0, self.storage.size - header.data_offset), header.cluster_size)
        table = FlatMap(self.storage, layout.BAT_OFFSET, header.bat_entries)
        return await table.scan(self.image.units_of, limit)

    def end(self, header: Header, found: Scan) -> int:
        """Host offset behind the last cluster in use; the file's end where an unknown feature may use any."""
        end = header.data_offset + found.end * header.cluster_size
        if self.image.extension.unknown:
            return max(end, self.storage.size)
        used = [header.extension_offset] if self.image.extension.bitmaps else []
        for bitmap in self.image.extension.bitmaps:
            used += [at for sector in bitmap.l1 if sector > 1 and (at := sector * SECTOR_SIZE) < self.storage.size]
        return max(end, *(offset + header.cluster_size for offset in used)) if used else end

    async def judge(self) -> CheckResult:
        """What is wrong now."""
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
        self.blame(result, found)
        result.leaks = div_ceil(max(0, self.storage.size - end), header.cluster_size)
        if result.leaks:
            result.messages.append(f"Leaked: the file has {self.storage.size - end} bytes behind the last cluster")
        return result

    async def repair(self, *, leaks: bool, errors: bool) -> None:
        """Errors first: what they refer to is not leaked."""
        if errors:
            await self._mend_errors()
        if leaks:
            await self._mend_leaks()

    async def _mend_errors(self) -> None:
        """Unmap what is outside, give a copy to what is shared, and mark the image as closed.

        Each step is stable before the next; the mark is last, so that a crash leaves an image to be repaired.
        """
        header = await self.header()
        found = await self.scan(header)
        for block in found.outside:
            await self.write_entry(block, 0)
        await self.storage.flush()
        size = header.cluster_size
        clusters = div_ceil(max(0, self.storage.size - header.data_offset), size)
        for block in found.duplicates:
            source = await self.entry(block) * header.entry_scale
            target = header.data_offset + clusters * size
            clusters += 1
            await copy_unit(self.storage, source, target, size)
            await self.storage.flush()
            await self.write_entry(block, target // header.entry_scale)
        await self.storage.flush()
        header = await self.header()
        if header.in_use == IN_USE:
            # Whoever did not close it kept no dirty bitmap up to date.
            closed = replace(header, in_use=CLOSED, extension_offset=0)
            await self.storage.write_stable([(0, closed.build())])

    async def _mend_leaks(self) -> None:
        """Cut the file behind the last cluster: QEMU takes what is there for zeroes."""
        header = await self.header()
        await self.storage.truncate(self.end(header, await self.scan(header)))
        await self.storage.flush()
