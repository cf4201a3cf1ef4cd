"""An open image of two levels of tables, apart from what its entries mean: tables, new space, stability, closing.

There are no reference counts: a cluster is in use because an entry says so, and new ones are taken at the end of the
file. A cluster that is mapped stays where it is for as long as the image is open, so that nothing ever has to be taken
back on disk, and a crash leaves at most clusters that nothing refers to.

L2 tables may be large (1 GiB in QED), so they are read, kept and written in *slices*.

**The end of the file** is moved up (sparse) before clusters behind it are handed out, so that the file always contains
every cluster an entry points at as a whole, and that all writes are below the size the file is being given. ``close``
cuts off what was not used.
"""

from __future__ import annotations

import asyncio
import errno
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Final, cast

import numpy as np

from nbdserve.errors import CorruptImageError, ImageError, RequestError
from nbdserve.formats.append_space import AppendSpace
from nbdserve.formats.base import BackingReference, FormatDriver
from nbdserve.formats.ordered_commit import Batch, OrderedCommit, Piece
from nbdserve.formats.tables import L2Cache, L2Table, StoredForm, Table, Words, decode_in_place, decode_table
from nbdserve.formats.two_level.entries import BAD_ENTRY, Flags
from nbdserve.formats.two_level.geometry import TwoLevelGeometry
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, SECTOR_SIZE, align_up

GROWTH_MIN: Final = MIB
GROWTH_MAX: Final = 64 * MIB
"""How much the end of the file moves up at a time; an eighth of the file in between."""


class TwoLevelImage(FormatDriver):
    """The parts of an open image that do not depend on what is asked of the mapping."""

    backing_formats: ClassVar[tuple[str, ...] | None] = None
    declares_backing_format = False
    stored: ClassVar[StoredForm]
    """The form of the words on disk."""

    def __init__(
        self,
        storage: Storage,
        geometry: TwoLevelGeometry,
        l1: Table,
        backing: BackingReference | None,
        options: Mapping[str, Any],
    ) -> None:
        """``l1`` has the entries the disk needs, unchecked. The driver is read-only until ``_open_writable``."""
        self.storage = self.data = storage
        self.path = storage.path
        self.read_only = True
        self.geometry = geometry
        self.size = geometry.size
        self.cluster_size = self.granularity = geometry.cluster_size
        self.keeps_places = True  # a mapped cluster is never freed
        self.l1 = l1
        self.backing = backing
        self.has_backing = backing is not None or bool(options.get("has_backing", False))
        """Something below may show where this layer does not decide."""
        self.cache = L2Cache(geometry.slice_bytes, stored=self.stored)
        self._recent = self.cache.recent
        self._bits = geometry.cluster_bits
        self._cluster_mask = geometry.cluster_size - 1
        self._l1_shift = geometry.l1_shift
        self._slice_shift = geometry.slice_shift
        self._slice_entries = geometry.slice_entries
        self._slice_mask = geometry.slice_entries - 1
        self._suspect: set[int] = set()
        """Slices with a BAD_ENTRY: nothing in them is changed, so that what is on disk stays as it is."""
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._tables_at = self._table_offsets()
        # Only of a writable image:
        self._starved = False
        """A synchronous method has to wait for space, or for a commit."""
        self._wanted = 0
        """Bytes of new host space it would have taken."""
        self._fresh: set[int] = set()
        """L1 indices of tables that nothing on disk refers to yet."""
        self._unready: int | None = None
        """Host offset taken for an L2 table that has to be zeroed first."""
        self._spare: int | None = None
        """Host offset of a zeroed place for an L2 table."""
        self._prepared = False
        """The header says that the image is in use, where the format has a word for that."""
        self._unclosed = False
        """The last writer has not closed the image."""
        self._stopped = ""
        """Why nothing may be changed any more."""
        self._held = False
        """Writing in place has to wait for ``_before_first_change``, or is not allowed any more."""

    @classmethod
    async def _read_l1(cls, storage: Storage, host_offset: int, count: int) -> Table:
        """The first ``count`` entries of the L1 table."""
        stored = await storage.read(host_offset, count * 8)
        return Table(host_offset, decode_in_place(stored, cls.stored), cls.stored)

    @classmethod
    def created_size(cls, size: int, options: Mapping[str, str]) -> int:
        """Whole sectors."""
        return align_up(size, SECTOR_SIZE)

    async def _open_writable(self, end: int | None = None) -> None:
        """``end``: where new clusters begin, if it is not the end of the file."""
        if self.storage.read_only:
            raise ImageError(self.path, "the file is open read-only")
        starts = self._tables_at
        if (np.diff(starts) < self.geometry.table_bytes).any():
            at = int(starts[int(np.argmax(np.diff(starts) < self.geometry.table_bytes))])
            raise CorruptImageError(
                self.path,
                "the L2 table overlaps another",
                field="L1 entry",
                value=at,
                hint="it can be read; image check says what else is wrong",
            )
        self.read_only = False
        end = self.geometry.end_of(self.storage.size) if end is None else end
        self._space = AppendSpace(self.storage, self.cluster_size, end)
        self._grown = self.storage.size
        """Bytes of the file that allocations may use."""
        self._commit = OrderedCommit(self.storage, self._collect)
        self._room_lock = asyncio.Lock()

    # --- what the formats differ in ----------------------------------------------------------------------------------

    @abstractmethod
    def _valid(self, words: Words) -> Words:
        """The words of a slice with every invalid entry replaced by BAD_ENTRY."""

    async def _before_first_change(self) -> None:
        """Mark the image as in use, stable on return."""

    async def _after_last_change(self) -> None:
        """Mark it as closed, stable on return."""

    # --- L2 tables ---------------------------------------------------------------------------------------------------

    def _table_offsets(self) -> Words:
        """The host offsets of the L2 tables that lie inside the file, ascending."""
        entries = cast("Words", self.l1.words)
        found = entries[self._usable(entries)]
        found.sort()
        return found

    def _usable(self, entries: Words) -> Flags:
        """Which L1 entries point at a table: inside the file, and on none of the image's other metadata."""
        return self._is_free_of_header(entries, self.geometry.table_bytes) & (
            entries <= max(0, self.geometry.host_limit(self.storage.size) - self.geometry.table_bytes)
        )

    def _is_place(self, offsets: Words) -> Flags:
        """Which of these may be host offsets of data clusters: inside the file, and on no metadata."""
        geometry = self.geometry
        length = geometry.cluster_size
        places = self._is_free_of_header(offsets, length) & (offsets < geometry.host_limit(self.storage.size))
        starts = self._tables_at
        if len(starts):
            before = np.searchsorted(starts, offsets, "right")
            places &= (before == 0) | (starts[before - 1] + np.uint64(geometry.table_bytes) <= offsets)
            places &= (before == len(starts)) | (
                starts[np.minimum(before, len(starts) - 1)] >= offsets + np.uint64(length)
            )
        return places

    def _is_free_of_header(self, offsets: Words, length: int) -> Flags:
        """Which are aligned as the format wants it, with no range of ``length`` bytes that is reserved."""
        free: Flags = offsets & np.uint64(self.geometry.alignment - 1) == 0
        for start, end in self.geometry.reserved:
            free &= (offsets >= end) | (offsets + np.uint64(length) <= start)
        return free

    def slice_offset(self, number: int) -> int:
        """Host offset of a slice; 0 when its L2 table does not exist. RequestError(EIO) for an invalid L1 entry."""
        index = number >> self.geometry.slices_per_table_bits
        entry = self.l1.entries[index]
        if not entry:
            return 0
        if index not in self._fresh and not self._usable(cast("Words", self.l1.words[index : index + 1]))[0]:
            raise RequestError(errno.EIO, f"{self.path}: invalid L1 entry {entry:#x} at index {index}")
        part = number & (1 << self.geometry.slices_per_table_bits) - 1
        return entry + part * self.geometry.slice_bytes

    def decode_slices(self, stored: bytearray | memoryview) -> Words:
        """The words of slices as on disk, invalid ones replaced."""
        return self._valid(cast("Words", decode_table(stored, self.stored)))

    async def load(self, offset: int) -> None:
        """Bring the slice of ``offset`` into memory; if it is there already, make room, for that was missing."""
        number = offset >> self._slice_shift
        if self.l1.entries[offset >> self._l1_shift] and self.cache.find(number) is None:
            task = self._loading.get(number)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._load_slice(number))
                self._loading[number] = task
                task.add_done_callback(lambda _: self._loading.pop(number, None))
            await asyncio.shield(task)
        elif self._starved:
            await self._make_room()

    async def _load_slice(self, number: int) -> None:
        host_offset = self.slice_offset(number)
        words = self.decode_slices(await self.storage.read(host_offset, self.geometry.slice_bytes))
        if self.cache.find(number) is None:
            if (words == BAD_ENTRY).any():
                self._suspect.add(number)
            self.cache.create(number, host_offset, words)

    # --- new host space ----------------------------------------------------------------------------------------------

    def _writable_slice(self, offset: int) -> L2Table | None:
        """The slice of ``offset``, made if there is none; None if ``load`` must be awaited first."""
        if self._stopped:
            raise RequestError(errno.EIO, self._stopped)
        if not self._prepared or self.cache.crowded:
            self._starved = True
            return None
        number = offset >> self._slice_shift
        table = self.cache.find(number)
        if table is not None:
            if number in self._suspect:
                raise RequestError(errno.EIO, self._corrupt_table(offset))
            return table
        l1_index = offset >> self._l1_shift
        if self.l1.entries[l1_index]:
            return None
        host_offset = self._take_table()
        if host_offset is None:
            return None
        self.l1.store(l1_index, host_offset)
        self._fresh.add(l1_index)
        return self.cache.create(number, self.slice_offset(number), np.zeros(self.geometry.slice_entries, np.uint64))

    def _corrupt_table(self, offset: int) -> str:
        return f"{self.path}: the L2 table for guest offset {offset:#x} is corrupt"

    def _has_room(self, length: int) -> bool:
        if self._space.end + length <= self._grown:
            return True
        self._starved, self._wanted = True, length
        return False

    def _take_table(self) -> int | None:
        """A zeroed place for an L2 table; None if there is none right now."""
        if self._spare is not None:
            host_offset, self._spare = self._spare, None
            return host_offset
        if self._unready is not None or not self._has_room(self.geometry.table_clusters * self.cluster_size):
            self._starved = True
            return None
        host_offset, zeroed = self._space.take_whole(self.geometry.table_clusters)
        if not zeroed:
            self._unready, self._starved = host_offset, True
            return None
        return host_offset

    async def prepare(self, offset: int, length: int) -> None:
        """The slice in memory, clusters at hand, and not too many changes waiting."""
        self._wanted = max(self._wanted, length)
        await self._make_room()
        await self.load(offset)

    async def _make_room(self) -> None:
        async with self._room_lock:
            wanted, self._wanted = self._wanted, 0
            if not self._prepared:
                await self._before_first_change()
                self._prepared, self._held = True, bool(self._stopped)
            if self.cache.crowded:
                await self._commit.commit()
            needed = align_up(wanted, self.cluster_size) + self.geometry.table_clusters * self.cluster_size
            if self._space.end + needed > self._grown:
                await self._grow(self._space.end + needed)
            if self._unready is not None:
                await self.storage.zero(self._unready, self.geometry.table_bytes)
                self._spare, self._unready = self._unready, None
            self._starved = False

    async def _grow(self, end: int) -> None:
        """Move the end of the file up to ``end`` or more.

        Every write under way ends below the old one, so that none can be cut off by this.
        """
        if not self.storage.grows_zeroed:
            raise OSError(errno.ENOSPC, f"{self.path}: {self.name} images on a block device cannot grow")
        step = min(max(end // 8, GROWTH_MIN), GROWTH_MAX)
        await self.storage.truncate(align_up(end + step, self.cluster_size))
        self._grown = self.storage.size

    # --- stability ---------------------------------------------------------------------------------------------------

    async def _settle_for_check(self, *, repair: bool) -> None:
        """Write everything back; with ``repair`` nothing is written after it through the tables in memory."""
        if not self.read_only:
            await self._commit.settle()
            if repair:
                self._stop_writing(f"{self.path}: repaired since it was opened, open it anew")

    async def flush(self) -> None:
        """Everything published so far is stable on return."""
        if not self.read_only:
            await self._commit.commit()

    def _collect(self, batch: Batch) -> None:
        """Copy what differs from the disk: what belongs to new L2 tables goes first, with the data."""
        batch.free(self._space)
        mapping = batch.stage(self._barrier_mapping)
        fresh = frozenset(self._fresh)
        for table in self.cache.changed:
            table.pins += 1
            batch.finally_(table.unpin)
            is_new = table.l1_index >> self.geometry.slices_per_table_bits in fresh
            stage = batch.hidden if is_new else mapping
            stage.undo.append(partial(self.cache.changed.add, table))
            stage.add_dirty(table)
        self.cache.changed.clear()
        if fresh:
            batch.hidden.undo.append(partial(self._fresh.update, fresh))
            self._fresh.clear()
        mapping.add_dirty(self.l1)

    async def _barrier_mapping(self, pieces: list[Piece]) -> None:
        """Entries of L1 and L2 tables appear, one 512-byte sector at a time, in any order; then all of them are stable.

        Crash before the barrier: each entry is old or new. A new L2 entry points at a cluster whose data, and the size
        of the file that contains it, are stable; a new L1 entry at a table that was complete before. No cluster is ever
        given to another block, so that an old entry is as good as it was.
        """
        await self.storage.write_stable(pieces)

    async def close(self) -> None:
        """Write everything back, cut off what was not used, and close the storage whether that succeeded or not."""
        try:
            if not self.read_only:
                await self._commit.settle()
                if self._prepared or self._unclosed:
                    await self._cut()
                    await self._after_last_change()
        finally:
            await self.storage.close()

    async def _cut(self) -> None:
        """Give back the end of the file that no entry refers to.

        Crash while the file shrinks: all that is lost is space that no entry on disk has ever shown.
        """
        for host_offset in (self._spare, self._unready):
            if host_offset is not None:
                self._space.free(host_offset, self.geometry.table_clusters)
        await self._space.release(self._space.collect())
        if self._space.end < self.storage.size and self.storage.grows_zeroed:
            await self.storage.truncate(self._space.end)
            await self.storage.flush()

    def _stop_writing(self, reason: str) -> None:
        self._stopped, self._held = reason, True
