"""Checking VMDK images: grain directories, grain tables, their redundant copies, and where the grains are."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ImageError
from nbdserve.formats.base import CheckResult
from nbdserve.formats.tables import AnyWords
from nbdserve.formats.vmdk.extents import SECTOR_BITS, SparseExtent
from nbdserve.formats.vmdk.layout import UNCLEAN_AT, ZEROED_ENTRY
from nbdserve.formats.vmdk.source import read_redundant
from nbdserve.units import MIB, SECTOR_SIZE, div_ceil

if TYPE_CHECKING:
    from nbdserve.formats.vmdk.driver import VmdkDriver

_MESSAGES: Final = 100
"""Of one check; more are only counted."""
_BATCH: Final = 4 * MIB
"""Bytes of grain tables looked at in one step."""

Mask: TypeAlias = npt.NDArray[np.bool_]
Indexes: TypeAlias = npt.NDArray[np.intp]


async def check_vmdk(driver: VmdkDriver, *, repair_leaks: bool, repair_errors: bool) -> CheckResult:
    """Check every sparse extent; flat ones have nothing to check.

    ``repair_errors`` makes the redundant copies equal, takes from them what is invalid in the tables that are read, and
    clears ``uncleanShutdown`` where nothing is left. An entry that is invalid in both stays, and is counted.

    Where ``uncleanShutdown`` tells of a crash, copies that differ are what it may leave and no harm to data: they
    count as leaks, which ``repair_leaks`` repairs.
    """
    if (repair_leaks or repair_errors) and driver.storage.read_only:
        raise ImageError(driver.path, "a repair needs the image open for writing")
    result = CheckResult()
    for extent in driver.sparse:
        hosted = extent.header.is_hosted
        check = _ExtentCheck(
            extent, result, repair=repair_errors and hosted, repair_copies=(repair_leaks or repair_errors) and hosted
        )
        await check.run()
    ends = [extent.file.size for extent in driver.sparse]
    result.image_end_offset = max(ends, default=driver.data.size)
    return result


class _ExtentCheck:
    """The check of one extent."""

    def __init__(self, extent: SparseExtent, result: CheckResult, *, repair: bool, repair_copies: bool) -> None:
        self._extent = extent
        self._result = result
        self._crashed = extent.header.unclean or extent.marked
        self._repair = repair
        self._repair_copies = repair or (repair_copies and self._crashed)
        self._grains: list[AnyWords] = []
        """Sectors of all grains, for the search of such as overlap (4 bytes a grain)."""

    async def run(self) -> None:
        extent, result = self._extent, self._result
        before = result.corruptions, result.leaks
        redundant = await read_redundant(extent)
        await self._check_directories(redundant)
        size = extent.header.table_bytes
        most = max(1, _BATCH // size)
        first = 0
        while first < len(extent.directory):
            window = extent.directory[first : first + most]
            await self._check_tables(np.flatnonzero(self._inside(window)) + first, redundant)
            first += most
            await asyncio.sleep(0)
        self._check_overlaps()
        result.total_clusters += div_ceil(extent.size, extent.header.grain_size)
        if self._repair_copies:
            await extent.file.flush()
            if extent.header.unclean and (result.corruptions, result.leaks) == before:
                await extent.file.write_stable([(UNCLEAN_AT, b"\0")])

    def _error(self, message: str, *, count: int = 1, fixed: bool = False, harmless: bool = False) -> None:
        if len(self._result.messages) < _MESSAGES:
            state = "Repaired" if fixed else "Leaked" if harmless else "ERROR"
            self._result.messages.append(f"{state}: {self._extent.path}: {message}")
        if harmless:
            if fixed:
                self._result.leaks_fixed += count
            else:
                self._result.leaks += count
        elif fixed:
            self._result.corruptions_fixed += count
        else:
            self._result.corruptions += count

    # --- grain directories -----------------------------------------------------------------------------------------

    def _inside(self, places: AnyWords) -> Mask:
        """Which of these sectors may be a grain table's."""
        last = self._extent.file.size - self._extent.header.table_bytes
        inside: Mask = (places != 0) & (places <= max(0, last) >> SECTOR_BITS)
        return inside

    async def _check_directories(self, redundant: AnyWords | None) -> None:
        extent = self._extent
        header = extent.header
        wanted = extent.directory != 0
        if redundant is not None:
            wanted = wanted | (redundant != 0)
        await self._check_directory("grain directory", extent.directory, header.directory_offset, wanted)
        if redundant is not None:
            await self._check_directory("redundant grain directory", redundant, header.redundant_offset, wanted)

    async def _check_directory(self, what: str, places: AnyWords, offset: int, wanted: Mask) -> None:
        """Entries that are needed and point into the file, at tables that do not overlap."""
        extent = self._extent
        bad = (wanted & (places == 0)) | (places != 0) & ~self._inside(places)
        if not extent.header.is_hosted:
            if bad.any():
                self._error(f"{what}: {int(bad.sum())} invalid entries", count=int(bad.sum()))
            return
        step = div_ceil(extent.header.table_bytes, SECTOR_SIZE)
        numbers = np.arange(len(places), dtype=np.int64) * step
        # Every known writer puts the tables one behind the other, and most of them behind the directory, so that the
        # others say where a lost one is.
        bases, counts = np.unique((places.astype(np.int64) - numbers)[~bad & (places != 0)], return_counts=True)
        behind = div_ceil(offset + len(places) * 4, SECTOR_SIZE)
        regular = behind in bases or (len(bases) > 0 and int(counts.max()) * 2 > int(counts.sum()))
        base = behind if behind in bases else int(bases[int(counts.argmax())]) if regular else 0
        expected = base + numbers
        order = np.argsort(places, kind="stable")
        near = np.flatnonzero((np.diff(places[order].astype(np.int64)) < step) & (places[order][1:] != 0))
        overlapping = np.zeros(len(places), bool)
        overlapping[order[near]] = overlapping[order[near + 1]] = True
        bad |= overlapping & (~np.full(len(places), regular) | (places != expected))
        for index in np.flatnonzero(bad).tolist():
            place = int(expected[index])
            mendable = self._repair and regular and 0 < place < 1 << 32 and self._fits(place)
            self._error(f"{what}: entry {index} is {int(places[index]):#x}", fixed=mendable)
            if mendable:
                places[index] = place
                await extent.file.write(offset + index * 4, place.to_bytes(4, "little"))

    def _fits(self, place: int) -> bool:
        return (place << SECTOR_BITS) + self._extent.header.table_bytes <= self._extent.header.overhead

    # --- grain tables ----------------------------------------------------------------------------------------------

    async def _check_tables(self, indexes: Indexes, redundant: AnyWords | None) -> None:
        extent = self._extent
        if not len(indexes):
            return
        words = extent.decode(await self._read(extent.directory[indexes]))
        words = words.reshape(len(indexes), extent.header.table_entries)
        copies = None
        if redundant is not None:
            present = self._inside(redundant[indexes])
            copies = words.copy()
            stored = await self._read(redundant[indexes[present]])
            copies[present] = extent.decode(stored).reshape(-1, extent.header.table_entries)
        valid = self._valid(words)
        if copies is not None:
            assert redundant is not None
            await self._compare(indexes, words, copies, valid, redundant)
            valid = self._valid(words)
        for row, column in np.argwhere(~valid)[:_MESSAGES].tolist():
            entry, table = int(words[row, column]), int(indexes[row])
            self._error(f"grain table {table}: entry {column} is {entry:#x}", count=0)
        self._result.corruptions += int((~valid).sum())
        placed = valid & (words > ZEROED_ENTRY)
        grains = words[placed]
        self._grains.append(grains)
        self._result.allocated_clusters += len(grains)
        if extent.header.compressed:
            self._result.compressed_clusters += len(grains)
        else:
            self._result.fragmented_clusters += int((np.diff(grains.astype(np.int64)) != extent.grain_sectors).sum())

    def _valid(self, words: AnyWords) -> Mask:
        """Entries that mean something: a grain that begins in the file, behind the metadata."""
        extent = self._extent
        first = ZEROED_ENTRY + 1
        if extent.header.is_hosted and not extent.header.compressed:
            first = max(first, extent.header.overhead >> SECTOR_BITS)
        grain = (words >= first) & (words < extent.file.size + SECTOR_SIZE - 1 >> SECTOR_BITS)
        zeroed = words <= (ZEROED_ENTRY if extent.zeroed_grains else 0)
        valid: Mask = grain | zeroed
        return valid

    async def _compare(
        self, indexes: Indexes, words: AnyWords, copies: AnyWords, valid: Mask, redundant: AnyWords
    ) -> None:
        """Tables and their copies hold the same; ``words`` is mended where only the copy is valid."""
        different = words != copies
        rows = np.flatnonzero(different.any(axis=1))
        if not len(rows):
            return
        taken = different & ~valid & self._valid(copies)
        for row in rows.tolist():
            count, index = int(different[row].sum()), int(indexes[row])
            lost = taken[row]
            harmless = self._crashed and not lost.any()
            mending = self._repair_copies if harmless else self._repair
            self._error(
                f"grain table {index} and its redundant copy differ in {count} entries",
                count=count,
                fixed=mending,
                harmless=harmless,
            )
            if not mending:
                continue
            words[row][lost] = copies[row][lost]
            table = words[row].astype("<u4").tobytes()
            if lost.any():
                await self._extent.file.write(int(self._extent.directory[index]) << SECTOR_BITS, table)
            await self._extent.file.write(int(redundant[index]) << SECTOR_BITS, table)

    async def _read(self, places: AnyWords) -> bytearray:
        """The tables at these sectors; neighbours in one read."""
        size = self._extent.header.table_bytes
        stored = bytearray(len(places) * size)
        view = memoryview(stored)
        offsets = places.astype(np.int64) << SECTOR_BITS
        breaks = (np.flatnonzero(np.diff(offsets) != size) + 1).tolist()
        for begin, end in pairwise([0, *breaks, len(places)]):
            if begin < end:
                await self._extent.file.read_into(int(offsets[begin]), view[begin * size : end * size])
        return stored

    def _check_overlaps(self) -> None:
        extent = self._extent
        if not self._grains:
            return
        grains = np.concatenate(self._grains)
        self._grains.clear()
        grains.sort()
        room = 1 if extent.header.compressed else extent.grain_sectors
        near = np.flatnonzero(grains[1:] - grains[:-1] < room)
        for index in near[:_MESSAGES].tolist():
            self._error(f"two grains overlap at sector {int(grains[index + 1]):#x}", count=0)
        self._result.corruptions += len(near)
