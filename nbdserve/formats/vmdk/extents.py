"""The parts of a VMDK disk: each answers for a range of the guest, counted from its own beginning.

A flat extent is a range of a file, a zero extent nothing. A sparse extent maps grains through two levels: the grain
directory, in memory, and grain tables, of which the cache has some. In memory the tables of every form of extent are
native words that hold sector numbers of the file, 0 for an unallocated grain and 1 for one that reads as zeroes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any, Final, NoReturn, cast

import numpy as np

from nbdserve.errors import CorruptImageError, RequestError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO, Run
from nbdserve.formats.append_space import AppendSpace
from nbdserve.formats.base import Allocation
from nbdserve.formats.tables import AnyWords, L2Cache, L2Table, Piece, decode_table
from nbdserve.formats.vmdk import layout
from nbdserve.formats.vmdk.layout import UNALLOCATED_ENTRY, ZEROED_ENTRY, SparseHeader
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil

SECTOR_BITS: Final = 9
"""log2 of the unit in which tables count."""


class Extent:
    """``[start, start + size)`` of the guest. Offsets given to its methods count from ``start``."""

    kind: str
    """The type as the descriptor has it; empty for the file that is a whole image."""
    start: int
    size: int
    path: str
    """Of its file, as the user and the descriptor name it; empty without one."""

    def lookup(self, offset: int, length: int) -> Run | None:
        """As ``FormatDriver.lookup``; the caller keeps the range inside ``size``."""
        raise NotImplementedError

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """As ``FormatDriver.lookup_writable``."""
        raise NotImplementedError


class FlatExtent(Extent):
    """A range of a file. Where the file is shorter, it reads as zeroes."""

    def __init__(self, kind: str, start: int, size: int, file: Storage, path: str, host_offset: int) -> None:
        self.kind, self.start, self.size, self.file, self.path = kind, start, size, file, path
        self.host_offset = host_offset
        """Of its beginning, in the image's host space."""

    def lookup(self, offset: int, length: int) -> Run:
        return DATA, length, self.host_offset + offset

    def lookup_writable(self, offset: int, length: int) -> Run:
        return DATA, length, self.host_offset + offset


class ZeroExtent(Extent):
    """Reads as zeroes, takes nothing."""

    def __init__(self, start: int, size: int) -> None:
        self.kind, self.start, self.size, self.path = "ZERO", start, size, ""

    def lookup(self, offset: int, length: int) -> Run:
        return ZERO, length, -1

    def lookup_writable(self, offset: int, length: int) -> Run:
        raise RequestError(errno.EPERM, "an extent of type ZERO cannot be written")


class GrainTable(L2Table):
    """A grain table, and its redundant copy, which is written along with it. Entries count sectors."""

    __slots__ = ("base", "limit", "redundant_offset")

    def __init__(
        self, extent: SparseExtent, index: int, host_offset: int, words: AnyWords, redundant_offset: int
    ) -> None:
        super().__init__(extent.first_key + index, host_offset, words, extent.cache.changed, "<u4")
        self.base = extent.host_base
        """Of the extent's file in the image's host space."""
        self.redundant_offset = redundant_offset
        """In that space; 0: there is no copy."""
        self.limit = extent.end >> SECTOR_BITS
        """Sectors: every grain begins before it."""

    def mark_dirty(self, sectors: Iterable[int]) -> None:
        """These sectors differ from the disk after all."""
        self.dirty.update(sectors)
        self._changed.add(self)

    def pieces(self, sectors: Iterable[int]) -> list[Piece]:
        """These sectors of both copies as they are now."""
        pieces = super().pieces(sectors)
        if self.redundant_offset:
            shift = self.redundant_offset - self.host_offset
            pieces += [(host_offset + shift, data) for host_offset, data in pieces]
        return pieces


class SparseExtent(Extent):
    """Grains of one file."""

    def __init__(
        self,
        kind: str,
        start: int,
        file: Storage,
        path: str,
        header: SparseHeader,
        directory: AnyWords,
        cache: L2Cache,
        first_key: int,
        host_base: int,
    ) -> None:
        self.kind, self.start, self.size, self.file, self.path = kind, start, header.capacity, file, path
        self.header = header
        self.directory = directory
        """Native words: the sector of the file where each grain table begins; 0: there is none."""
        self.redundant: AnyWords | None = None
        """The same for the copies; only while the extent is open for writing."""
        self.cache = cache
        self.first_key = first_key
        """The key of grain table 0 in the cache that all extents share."""
        self.host_base = host_base
        self.space: AppendSpace | None = None
        """Host space for new grains; only while the extent is open for writing."""
        self.needs_mark = header.is_hosted and not header.unclean
        """The header does not say yet that the extent is being changed."""
        self.marked = False
        """It says so because of this open."""
        self.has_backing = False
        # What lookup needs is one attribute away.
        self.grain_bits = header.grain_size.bit_length() - 1
        self.table_shift = header.coverage.bit_length() - 1
        self._recent = cast("dict[int, GrainTable]", cache.recent)
        self._grain = header.grain_size
        self._grain_mask = header.grain_size - 1
        self.grain_sectors = header.grain_size >> SECTOR_BITS
        self._table_mask = header.table_entries - 1
        self._entries = header.table_entries
        self._special = layout.MAX_EXTENT_BYTES if header.compressed else ZEROED_ENTRY
        """Entries up to this are no ordinary grains."""
        self._first_data = max(header.overhead >> SECTOR_BITS, ZEROED_ENTRY + 1)
        """Sectors: no grain begins before it, of an extent that is written."""

    @property
    def zeroed_grains(self) -> bool:
        """A table entry of 1, as tables are in memory, is a grain that reads as zeroes."""
        return self.header.zeroed_grains or self.header.kind == layout.SESPARSE

    @property
    def end(self) -> int:
        """Host offset in the file before which every grain begins."""
        return self.file.size if self.space is None else max(self.file.size, self.space.end)

    # --- reading the mapping ---------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run | None:
        """What the extent has at ``offset``; EIO where the entry is invalid."""
        table = self._recent.get(self.first_key + (offset >> self.table_shift))
        if table is None:
            table = self.find_table(offset >> self.table_shift)
            if table is None:
                return self._without_table(offset, length)
        entries = table.entries
        index = (offset >> self.grain_bits) & self._table_mask
        entry = entries[index]
        if entry <= self._special:
            return self._lookup_special(table, index, offset, length)
        inside = offset & self._grain_mask
        run = self._grain - inside
        last = entry
        if run < length:
            # Grains that follow each other in the file have entries that differ by the sectors of a grain.
            step, end = self.grain_sectors, self._entries
            index += 1
            last += step
            while run < length and index < end and entries[index] == last:
                run += self._grain
                index += 1
                last += step
            last -= step
            length = min(length, run)
        if last >= table.limit:
            raise self._bad_entry(offset, last)
        return DATA, length, table.base + (entry << SECTOR_BITS) + inside

    def _without_table(self, offset: int, length: int) -> Run | None:
        """The answer when the grain table is not in memory: there is none, or it must be loaded."""
        if self.directory[offset >> self.table_shift]:
            return None
        rest = (1 << self.table_shift) - (offset & (1 << self.table_shift) - 1)
        return UNALLOCATED, min(length, rest), -1

    def _lookup_special(self, table: GrainTable, index: int, offset: int, length: int) -> Run:
        """``lookup`` of everything but an ordinary grain."""
        entries = table.entries
        entry = entries[index]
        run = self._grain - (offset & self._grain_mask)
        if entry > ZEROED_ENTRY:
            if entry >= table.limit:
                raise self._bad_entry(offset, entry)
            return COMPRESSED, min(length, run), table.base + (entry << SECTOR_BITS)
        if entry == ZEROED_ENTRY and not self.zeroed_grains:
            raise self._bad_entry(offset, entry)
        index += 1
        while run < length and index < self._entries and entries[index] == entry:
            run += self._grain
            index += 1
        return ZERO if entry == ZEROED_ENTRY else UNALLOCATED, min(length, run), -1

    def _bad_entry(self, offset: int, entry: int) -> RequestError:
        return RequestError(
            errno.EIO, f"{self.path}: invalid grain table entry {entry:#x} for offset {offset:#x} of the extent"
        )

    def table_place(self, index: int) -> int:
        """Where grain table ``index`` is in the file, bytes. RequestError(EIO) when it is outside."""
        place, length = int(self.directory[index]) << SECTOR_BITS, self.header.table_bytes
        if place + length > self.file.size:
            raise RequestError(
                errno.EIO, f"{self.path}: grain table {index} at {place:#x} is outside the file of {self.file.size}"
            )
        return place

    def find_table(self, index: int) -> GrainTable | None:
        """Grain table ``index`` if it is in memory; it then counts as recently used."""
        return cast("GrainTable | None", self.cache.find(self.first_key + index))

    def has_table(self, offset: int) -> bool:
        """Whether the table for ``offset`` is in memory, or there is none to load."""
        index = offset >> self.table_shift
        return not self.directory[index] or self.find_table(index) is not None

    async def load_table(self, index: int) -> None:
        """Bring grain table ``index`` into the cache. OSError, or RequestError(EIO)."""
        place = self.table_place(index)
        words = self.decode(await self.file.read(place, self.header.table_bytes))
        if self.find_table(index) is None:
            redundant = 0 if self.redundant is None else self.host_base + (int(self.redundant[index]) << SECTOR_BITS)
            self.cache.add(GrainTable(self, index, self.host_base + place, words, redundant))

    def decode(self, stored: bytes | bytearray | memoryview) -> AnyWords:
        """Grain tables as stored, in the form that is kept in memory. RequestError(EIO) for an invalid entry."""
        if self.header.kind != layout.SESPARSE:
            return decode_table(stored, "<u4")
        return self._decode_sesparse(decode_table(stored, "<u8"))

    def _decode_sesparse(self, words: Any) -> AnyWords:
        """Bits 60-63 say what the grain is, 48-59 are the low and 0-47 the high bits of its number."""
        kind = words >> np.uint64(60)
        number = (words >> np.uint64(48) & np.uint64(0xFFF)) | (words & np.uint64((1 << 48) - 1)) << np.uint64(12)
        sector = number * np.uint64(self.grain_sectors) + np.uint64(self.header.grains_offset >> SECTOR_BITS)
        bad = (kind > 3) | (kind == 0) & (words != 0) | (kind == 3) & (number >= np.uint64(1 << 40))
        if bad.any():
            word = int(words[int(bad.argmax())])
            raise RequestError(errno.EIO, f"{self.path}: invalid grain table entry {word:#x}")
        decoded: AnyWords = np.where(kind == 3, sector, np.where(kind == 0, UNALLOCATED_ENTRY, ZEROED_ENTRY))
        return decoded.astype(np.uint64)

    # --- changing it -----------------------------------------------------------------------------------------------

    def open_writable(self, redundant: AnyWords | None, *, punch: bool) -> None:
        """Get ready for changes. CorruptImageError unless tables and grains are clearly apart."""
        header = self.header
        copies = [("gdOffset", header.directory_offset, self.directory)]
        if redundant is not None:
            copies.append(("rgdOffset", header.redundant_offset, redundant))
        for field, place, _ in copies:
            if place + header.directory_entries * 4 > header.overhead:
                self._refuse(field, place >> SECTOR_BITS, "the grain directory is not in front of the grains")
        length = div_ceil(header.table_bytes, SECTOR_SIZE)
        tables = np.concatenate([places[places != 0] for _, _, places in copies])
        tables.sort()
        if len(tables) and int(tables[-1]) + length > header.overhead >> SECTOR_BITS:
            self._refuse("grain table offset", int(tables[-1]), "a grain table is not in front of the grains")
        overlapping = tables[1:] - tables[:-1] < length
        if overlapping.any():
            self._refuse("grain table offset", int(tables[int(overlapping.argmax())]), "two grain tables overlap")
        if redundant is not None and ((redundant == 0) != (self.directory == 0)).any():
            self._refuse(
                "rgdOffset", header.redundant_offset >> SECTOR_BITS, "the redundant grain directory has other tables"
            )
        self.redundant = redundant
        unit = SECTOR_SIZE if header.compressed else header.grain_size
        end = align_up(max(self.file.size, header.overhead), unit)
        self.space = AppendSpace(self.file, unit, end, limit=layout.MAX_EXTENT_BYTES, punch=punch)

    def _refuse(self, field: str, value: int, problem: str) -> NoReturn:
        hint = "it can be read; `image check -r all` may repair it"
        raise CorruptImageError(self.path, problem, field=field, value=value, hint=hint)

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """Grains are overwritten in place."""
        table = self._recent.get(self.first_key + (offset >> self.table_shift))
        if table is None:
            table = self.find_table(offset >> self.table_shift)
            if table is None:
                if self._without_table(offset, length) is None:
                    return None
                raise self._no_table(offset)
        entries = table.entries
        index = (offset >> self.grain_bits) & self._table_mask
        entry = entries[index]
        inside = offset & self._grain_mask
        run = self._grain - inside
        if entry <= ZEROED_ENTRY:
            if entry and not self.zeroed_grains:
                raise self._bad_entry(offset, entry)
            index += 1
            while run < length and index < self._entries and entries[index] <= ZEROED_ENTRY:
                run += self._grain
                index += 1
            return UNALLOCATED, min(length, run), -1
        last = entry
        if run < length:
            step, end = self.grain_sectors, self._entries
            index += 1
            last += step
            while run < length and index < end and entries[index] == last:
                run += self._grain
                index += 1
                last += step
            last -= step
            length = min(length, run)
        if entry < self._first_data or last >= table.limit:
            raise self._bad_entry(offset, entry)
        return DATA, length, table.base + (entry << SECTOR_BITS) + inside

    def _no_table(self, offset: int) -> RequestError:
        return RequestError(errno.EIO, f"{self.path}: no grain table for offset {offset:#x} of the extent")

    def _table_for_change(self, offset: int) -> GrainTable | None:
        table = self.find_table(offset >> self.table_shift)
        if table is None and not self.directory[offset >> self.table_shift]:
            raise self._no_table(offset)
        return table

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """New grains, consecutive in the file, of one table. The allocation's offset counts from ``start``, too."""
        table = self._table_for_change(offset)
        if table is None:
            return None
        assert self.space is not None
        first = (offset >> self.grain_bits) & self._table_mask
        most = min(self._entries - first, div_ceil(length, self._grain))
        wanted = 1
        while wanted < most and table.entries[first + wanted] <= ZEROED_ENTRY:
            wanted += 1
        host_offset, count, zeroed = self.space.take(wanted)
        table.pins += 1
        length = min(length, count << self.grain_bits)
        token = (self, table, first, count)
        return Allocation(self.start + offset, length, table.base + host_offset, zeroed, token)

    def publish(self, allocation: Allocation) -> None:
        """Point the entries at the new grains."""
        _, table, first, count = allocation.token
        entries = table.entries
        entry = (allocation.host_offset - table.base) >> SECTOR_BITS
        for index in range(first, first + count):
            if entries[index] > ZEROED_ENTRY:
                self._release(entries[index])
            entries[index] = entry
            entry += self.grain_sectors
        table.limit = max(table.limit, entry)
        table.touch(first, first + count)
        table.pins -= 1

    def abandon(self, allocation: Allocation) -> None:
        """The grains may be used again after the next commit."""
        _, table, _, count = allocation.token
        table.pins -= 1
        assert self.space is not None
        self.space.free(allocation.host_offset - table.base, count)

    def _release(self, entry: int) -> None:
        """Nothing points at the grain any more. One not aligned, in the metadata or past the end is not used again."""
        assert self.space is not None
        place = entry << SECTOR_BITS
        if self._first_data <= entry and place + self._grain <= self.space.end and not place & self._grain_mask:
            self.space.free(place)

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Entries that read as zeroes; bytes done, 0 where the format or ``unmap`` leaves nothing but writing."""
        zeroed_grains = self.zeroed_grains
        if self.has_backing and not zeroed_grains:
            return 0
        rest = (1 << self.table_shift) - (offset & (1 << self.table_shift) - 1)
        length = min(length, rest)
        if not self.has_backing and not self.directory[offset >> self.table_shift]:
            return length
        table = self._table_for_change(offset)
        if table is None:
            return None
        first = (offset >> self.grain_bits) & self._table_mask
        end = first + div_ceil(length, self._grain)
        old = table.words[first:end].copy()
        grains = old > ZEROED_ENTRY
        if not unmap and grains.any():
            end = first + int(grains.argmax())
            old, grains = old[: end - first], grains[: end - first]
            length = end - first << self.grain_bits
            if not length:
                return 0
        new = np.where(grains | self.has_backing, ZEROED_ENTRY, old) if zeroed_grains else np.zeros_like(old)
        changed = np.flatnonzero(new != old)
        if len(changed):
            table.words[first:end] = new
            table.touch(first + int(changed[0]), first + int(changed[-1]) + 1)
            for entry in old[grains].tolist():
                self._release(entry)
        return length
