"""The qcow2 driver (docs/interop/qcow2.rst): what standard L2 entries mean, and changing them.

Images with extended L2 entries are opened as the subclass in ``subclusters``.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Self, cast

import numpy as np

from nbdserve.errors import RequestError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO, Run, RunStream
from nbdserve.formats.base import Allocation, SnapshotInfo
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.image import Qcow2Image
from nbdserve.formats.qcow2.layout import (
    COMPRESSED_FLAG,
    COPIED,
    CRYPT_AES,
    OFFSET_MASK,
    ZERO_FLAG,
    compressed_range,
)
from nbdserve.formats.qcow2.resize import drop_mapping, preallocate_qcow2, resize_qcow2
from nbdserve.formats.qcow2.runs import iter_runs
from nbdserve.formats.qcow2.snapshots import describe
from nbdserve.formats.tables import L2Table, Words, run_from
from nbdserve.storage.base import ReadBuffer
from nbdserve.units import align_up, div_ceil


class Qcow2Driver(Qcow2Image):
    """One open qcow2 image."""

    @classmethod
    def _class_for(cls, header: Header) -> type[Self]:
        if header.crypt_method == CRYPT_AES:
            from nbdserve.formats.qcow2.aes import AesDriver, AesSubclusterDriver  # noqa: PLC0415  (subclasses)

            return cast("type[Self]", AesSubclusterDriver if header.extended_l2 else AesDriver)
        if header.extended_l2:
            from nbdserve.formats.qcow2.subclusters import SubclusterDriver  # noqa: PLC0415  (a subclass of this class)

            return cast("type[Self]", SubclusterDriver)
        return cls

    # --- reading the mapping ---------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run | None:
        """What this layer has at ``offset``; EIO where the entry is invalid."""
        table = self._recent.get(offset >> self._l1_shift)
        if table is None:
            table = self.cache.find(offset >> self._l1_shift)
            if table is None:
                return self._without_table(offset, length)
        entries = table.entries
        index = (offset >> self._bits) & self._l2_mask
        entry = entries[index]
        host_offset = entry & OFFSET_MASK
        inside = offset & self._cluster_mask
        run = self.cluster_size - inside
        if not host_offset or entry & self.not_plain:
            if not entry and run >= length and not self.external:
                return UNALLOCATED, length, -1
            return self._lookup_special(entries, index, offset, length)
        if run < length:
            # Clusters that follow each other in the file have entries that differ by the cluster size.
            unit = self.cluster_size
            length = run_from(entries, index, self._l2_entries, run, length, unit, unit)
            end = host_offset + inside + length
            if end > self.host_limit and (last := end - 1 & ~self._cluster_mask) >= self.host_limit:
                raise self._bad_entry(offset, entry + last - host_offset)
        elif host_offset >= self.host_limit:
            raise self._bad_entry(offset, entry)
        return DATA, length, host_offset + inside

    def _without_table(self, offset: int, length: int) -> Run | None:
        """The answer when the L2 table is not in memory: there is none, or it must be loaded."""
        if self.l1.entries[offset >> self._l1_shift]:
            return None
        rest = (1 << self._l1_shift) - (offset & (1 << self._l1_shift) - 1)
        return UNALLOCATED, min(length, rest), -1

    def _lookup_special(self, entries: memoryview[int], index: int, offset: int, length: int) -> Run:
        """``lookup`` of everything but an ordinary data cluster."""
        entry = entries[index]
        inside = offset & self._cluster_mask
        if entry & COMPRESSED_FLAG:
            if self.external:
                raise self._bad_entry(offset, entry)
            return COMPRESSED, min(length, self.cluster_size - inside), compressed_range(entry, self._bits)[0]
        kind, host_offset = self._decode(offset, entry)
        unit, step = self.cluster_size, self.cluster_size if host_offset >= 0 else 0
        length = run_from(entries, index, self._l2_entries, unit - inside, length, unit, step)
        return kind, length, host_offset if host_offset < 0 else host_offset + inside

    def _decode(self, offset: int, entry: int) -> tuple[int, int]:
        """Kind and host offset of a valid entry that is not compressed; EIO for an invalid one."""
        host_offset = entry & OFFSET_MASK
        placed = host_offset != 0 or (self.external and bool(entry & COPIED))
        if entry & self.not_plain:
            if entry & self.not_plain != ZERO_FLAG or self.header.version < 3:
                raise self._bad_entry(offset, entry)
            return ZERO, host_offset if placed else -1
        if not placed:
            if entry:
                raise self._bad_entry(offset, entry)
            return UNALLOCATED, -1
        if host_offset >= self.host_limit:
            raise self._bad_entry(offset, entry)
        return DATA, host_offset

    def _bad_entry(self, offset: int, entry: int) -> RequestError:
        return RequestError(errno.EIO, f"{self.path}: invalid L2 entry {entry:#x} for guest offset {offset:#x}")

    def iter_runs(self, start: int, end: int) -> RunStream:
        """The mapping of ``[start, end)``, about 2 MiB of L2 tables at a time. RequestError(EIO) for a bad entry."""
        return iter_runs(self, start, end)

    async def read_compressed(self, offset: int) -> tuple[int, bytes]:
        """The compressed cluster that contains ``offset``."""
        while (table := self.cache.find(offset >> self._l1_shift)) is None:
            await self.load(offset)
        entry = self._compressed_entry(table, (offset >> self._bits) & self._l2_mask)
        return offset & ~self._cluster_mask, await self._compressed.read(entry)

    def _compressed_entry(self, table: L2Table, index: int) -> int:
        return table.entries[index]

    def _store_compressed(self, table: L2Table, index: int, entry: int) -> None:
        """Let the entry stand for compressed data; what it stood for is released."""
        if table.entries[index]:
            self._release(table.entries[index])
        table.entries[index] = entry
        table.touch(index, index + 1)

    # --- changing the mapping --------------------------------------------------------------------------------------

    def take_bytes(self, length: int) -> int | None:
        """Host offset for compressed data of ``length`` bytes; None: ``prepare`` must be awaited first."""
        host_offset = None if self.is_crowded() else self.allocator.take_bytes(length)
        self._starved = host_offset is None
        if host_offset is not None:
            self.host_limit = max(self.host_limit, align_up(host_offset + length, self.cluster_size))
        return host_offset

    def release_bytes(self, entry: int) -> None:
        """Give back what ``take_bytes`` gave for ``entry``."""
        self._release(entry)

    def publish_compressed(self, offset: int, entry: int) -> bool:
        """Let the cluster at ``offset`` be what ``entry`` says; False: ``prepare`` must be awaited first."""
        table = self._writable_table(offset)
        if table is None:
            return False
        self._compressed.forget(entry)
        self._store_compressed(table, (offset >> self._bits) & self._l2_mask, entry)
        return True

    async def write_compressed(self, offset: int, data: ReadBuffer) -> None:
        """Compress on the worker threads, and pack the results one behind the other."""
        from nbdserve.formats.qcow2.compressing import write_compressed  # noqa: PLC0415  (works on drivers)

        await write_compressed(self, offset, memoryview(data))

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """Data is overwritten in place where COPIED says that nothing else refers to the cluster."""
        table = self._recent.get(offset >> self._l1_shift)
        if table is None:
            table = self.cache.find(offset >> self._l1_shift)
            if table is None:
                return self._without_table(offset, length)
        entries = table.entries
        index = (offset >> self._bits) & self._l2_mask
        entry = entries[index]
        inside = offset & self._cluster_mask
        run = self.cluster_size - inside
        if entry & self._form != COPIED:
            if self._broken:
                raise RequestError(errno.EIO, self._broken)
            if entry & self.not_plain and not entry & COMPRESSED_FLAG:
                self._decode(offset, entry)
            end = self._l2_entries
            index += 1
            while run < length and index < end and entries[index] & self._form != COPIED:
                run += self.cluster_size
                index += 1
            return UNALLOCATED, min(run, length), -1
        host_offset = entry & OFFSET_MASK
        cluster = host_offset >> self._bits
        if cluster in self._protected:
            self._corruption(f"guest offset {offset:#x} is mapped to metadata at {host_offset:#x}")
        if host_offset >= self.host_limit:
            raise self._bad_entry(offset, entry)
        if run < length:
            step, end = self.cluster_size, self._l2_entries
            index, entry, cluster = index + 1, entry + step, cluster + 1
            while (
                run < length
                and index < end
                and entries[index] == entry
                and cluster not in self._protected
                and cluster << self._bits < self.host_limit
            ):
                run += step
                index, entry, cluster = index + 1, entry + step, cluster + 1
            length = min(run, length)
        return DATA, length, host_offset + inside

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """New clusters, or those a ZERO entry has reserved; consecutive in the file, inside one L2 table."""
        table = self._writable_table(offset)
        if table is None:
            return None
        first = (offset >> self._bits) & self._l2_mask
        most = (length + self._cluster_mask) >> self._bits
        if most > self._l2_entries - first:
            most = self._l2_entries - first
        entry = table.entries[first]
        reused = entry != 0 and self._reserved(entry)
        if self.external:
            host_offset, count, zeroed = offset, most, offset >= self._data_virgin and self.data.grows_zeroed
            self._data_virgin = max(self._data_virgin, offset + (count << self._bits))
        elif reused:
            host_offset, count, zeroed = entry & OFFSET_MASK, 1, False
            while count < most and table.entries[first + count] == entry + (count << self._bits):
                count += 1
            if not self._protected.isdisjoint(range(host_offset >> self._bits, (host_offset >> self._bits) + count)):
                self._corruption(f"guest offset {offset:#x} reserves metadata at {host_offset:#x}")
        else:
            wanted = 1
            while wanted < most and self._needs_space(table.entries[first + wanted]):
                wanted += 1
            virgin = self.allocator.virgin
            taken = self._take(wanted)
            if taken is None:
                return None
            cluster, count = taken
            host_offset, zeroed = cluster << self._bits, cluster >= virgin and self.data.grows_zeroed
        table.pins += 1
        if length > count << self._bits:
            length = count << self._bits
        return Allocation(offset, length, host_offset, zeroed, (table, first, count, reused))

    def _reserved(self, entry: int) -> bool:
        """The entry keeps a host cluster of its own that holds no data."""
        return entry & self._form == COPIED | ZERO_FLAG and entry & OFFSET_MASK != 0

    def _needs_space(self, entry: int) -> bool:
        return not self._reserved(entry) and entry & self._form != COPIED

    def publish(self, allocation: Allocation) -> None:
        """Point the entries at the new clusters."""
        table, first, count, reused = allocation.token
        entries = table.entries
        entry = allocation.host_offset | COPIED
        if count == 1:  # what a small write allocates
            if entries[first] and not reused:
                self._release(entries[first])
            table.store(first, entry)
        else:
            for index in range(first, first + count):
                if not reused and entries[index]:
                    self._release(entries[index])
                entries[index] = entry
                entry += self.cluster_size
            table.touch(first, first + count)
        table.pins -= 1

    def abandon(self, allocation: Allocation) -> None:
        """The clusters are counted down with the next commit."""
        table, _, count, reused = allocation.token
        table.pins -= 1
        if not reused and not self.external:
            self.allocator.quarantine.append((allocation.host_offset >> self._bits, count))

    def _release(self, entry: int) -> None:
        """The host clusters of an entry have one reference less."""
        if self.external:
            return
        if entry & COMPRESSED_FLAG:
            host_offset, length = compressed_range(entry, self._bits)
            first, last = host_offset >> self._bits, (host_offset + length - 1) >> self._bits
            self.allocator.quarantine.append((first, last - first + 1))
        elif host_offset := entry & OFFSET_MASK:
            self.allocator.quarantine.append((host_offset >> self._bits, 1))

    def _release_entries(self, words: Words) -> None:
        """The host clusters of all these entries have one reference less."""
        if self.external:
            return
        compressed = words & np.uint64(COMPRESSED_FLAG) != 0
        for entry in words[compressed].tolist():
            self._release(entry)
        offsets = words[~compressed] & np.uint64(OFFSET_MASK)
        self.allocator.free(offsets[offsets != 0].astype(np.int64) >> self._bits)

    def drop_table(self, l1_index: int) -> None:
        """Unmap everything under an L1 entry, whose table is in memory."""
        table = self.cache.find(l1_index)
        assert table is not None
        self._release_entries(cast("Words", table.words))
        self.allocator.retire_metadata((table.host_offset >> self._bits, 1))
        self.l1.store(l1_index, 0)
        self.cache.drop(table)

    def cut_table(self, offset: int) -> bool:
        """Unmap what an L2 table has from ``offset``, a multiple of ``granularity``, on. False: ``prepare`` first."""
        table = self.cache.find(offset >> self._l1_shift)
        if table is None:
            return not self.l1.entries[offset >> self._l1_shift]
        first = (offset >> self._bits) & self._l2_mask
        if table.words[first:].any():
            table = self._writable_table(offset)
            if table is None:
                return False
            self._release_entries(cast("Words", table.words[first:]))
            table.words[first:] = 0
            table.touch(first, self._l2_entries)
        return True

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Set ZERO flags; version 2 has none, so that only ``unmap`` without a backing file works there."""
        if self.header.data_file_raw:
            return 0
        if self.header.version < 3 and (self.has_backing or not unmap):
            return 0
        l1_rest = (1 << self._l1_shift) - (offset & (1 << self._l1_shift) - 1)
        length = min(length, l1_rest)
        if not self.has_backing and not self.l1.entries[offset >> self._l1_shift]:
            return length
        table = self._writable_table(offset)
        if table is None:
            return None
        first = (offset >> self._bits) & self._l2_mask
        self._zero_entries(table, first, first + div_ceil(length, self.cluster_size), unmap=unmap)
        return length

    def _zero_entries(self, table: L2Table, first: int, end: int, *, unmap: bool) -> None:
        old = table.words[first:end].copy()
        placed = old & np.uint64(OFFSET_MASK) != 0
        if self.external:
            placed |= old & np.uint64(COPIED) != 0
        compressed = old & np.uint64(COMPRESSED_FLAG) != 0
        bad = ~compressed & (old & np.uint64(self.not_plain & ~ZERO_FLAG) != 0)
        if bad.any():
            index = first + int(bad.argmax())
            raise self._bad_entry((table.l1_index << self._l1_shift) + (index << self._bits), table.entries[index])
        new = np.full(len(old), ZERO_FLAG if self.header.version >= 3 else 0, np.uint64)
        if not self.has_backing:
            new[old == 0] = 0
        if not unmap:
            kept = placed & ~compressed
            new[kept] = old[kept] | np.uint64(ZERO_FLAG)
        changed = np.flatnonzero(new != old)
        if not len(changed):
            return
        table.words[first:end] = new
        table.touch(first + int(changed[0]), first + int(changed[-1]) + 1)
        self._release_entries(old[compressed | placed & (new & np.uint64(OFFSET_MASK) == 0)])

    async def resize(self, size: int) -> None:
        """Change the size; a crash at any point leaves the old one or the new.

        Where the old end is inside a unit that only a longer layer below has, the engine zeroes the rest of it.
        """
        await resize_qcow2(self, size)

    async def make_empty(self) -> None:
        """Unmap every table, and give its clusters back. After a crash some are unmapped and others are not."""
        self.check_writable()
        await drop_mapping(self, 0)
        await self.flush()

    async def preallocate(self, start: int, end: int, mode: str) -> None:
        """Data clusters of zeroes; encrypted zeroes are written in any mode."""
        await preallocate_qcow2(self, start, end, mode)

    def discard(self, offset: int, length: int) -> int | None:
        """As ``zero``: what was discarded reads as zeroes."""
        return self.zero(offset, length, unmap=True)

    async def amend(self, options: Mapping[str, str]) -> None:
        """Change version, refcount width, backing file and the like, where the driver was opened read-only, too."""
        from nbdserve.formats.qcow2.amend import amend_qcow2, parse_amendment  # noqa: PLC0415  (rarely needed)

        amendment = parse_amendment(options)
        async with self.replaced_tables():
            await amend_qcow2(self.storage, amendment)

    # --- internal snapshots ----------------------------------------------------------------------------------------

    async def create_snapshot(self, name: str, *, icount: int | None = None) -> SnapshotInfo:
        """The disk as it is now becomes a snapshot; the file is changed where the driver was opened read-only, too."""
        from nbdserve.formats.qcow2 import snapshot_changes  # noqa: PLC0415  (rarely needed)

        async with self.replaced_tables():
            snapshot = await snapshot_changes.create_snapshot(self.storage, name, icount=icount)
        return describe(snapshot, self.header)

    async def apply_snapshot(self, wanted: str) -> None:
        """A snapshot becomes the disk; what that has now is lost."""
        from nbdserve.formats.qcow2 import snapshot_changes  # noqa: PLC0415  (rarely needed)

        async with self.replaced_tables():
            await snapshot_changes.apply_snapshot(self.storage, wanted)

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """What no other snapshot and not the disk uses becomes free."""
        from nbdserve.formats.qcow2 import snapshot_changes  # noqa: PLC0415  (rarely needed)

        async with self.replaced_tables():
            await snapshot_changes.delete_snapshot(self.storage, snapshot_id)
