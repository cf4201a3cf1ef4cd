"""Extended L2 entries: 32 subclusters per cluster, each allocated, zero or neither (docs/interop/qcow2.rst).

An entry is two words: host offset and flags as in a standard entry, and a bitmap with 32 "allocated" bits below 32
"reads as zeroes" bits. A cluster has one host cluster at most, in which subclusters become allocated one by one.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, Final, cast

from nbdserve.errors import RequestError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO, Run
from nbdserve.formats.base import Allocation
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.layout import COMPRESSED_FLAG, COPIED, OFFSET_MASK, SUBCLUSTERS, compressed_range
from nbdserve.formats.tables import L2Table, Table, Words
from nbdserve.storage.base import Storage
from nbdserve.units import div_ceil

ALL_ALLOCATED: Final = (1 << SUBCLUSTERS) - 1
ALL_ZERO: Final = ALL_ALLOCATED << SUBCLUSTERS


class SubclusterDriver(Qcow2Driver):
    """A qcow2 image with extended L2 entries."""

    def __init__(self, storage: Storage, data: Storage, header: Header, l1: Table, options: Mapping[str, Any]) -> None:
        super().__init__(storage, data, header, l1, options)
        self.granularity = header.cluster_size // SUBCLUSTERS
        self._sub_bits = self.granularity.bit_length() - 1
        self.not_plain |= 1  # there is no ZERO flag

    # --- reading the mapping ---------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run | None:
        """What this layer has at ``offset``; EIO where the entry is invalid."""
        table = self._recent.get(offset >> self._l1_shift) or self.cache.find(offset >> self._l1_shift)
        if table is None:
            return self._without_table(offset, length)
        entries = table.entries
        at = ((offset >> self._bits) & self._l2_mask) << 1
        entry = entries[at]
        if entry & COMPRESSED_FLAG and not self.external:
            run = self.cluster_size - (offset & self._cluster_mask)
            return COMPRESSED, min(length, run), compressed_range(entry, self._bits)[0]
        subcluster = (offset >> self._sub_bits) & SUBCLUSTERS - 1
        kind, count, host_offset = self._subclusters(offset, entry, entries[at + 1], subcluster)
        inside = offset & self.granularity - 1
        run = (count << self._sub_bits) - inside
        if host_offset >= 0:
            host_offset += inside
        position = offset + run
        while run < length and not position & self._cluster_mask and (position >> self._bits) & self._l2_mask:
            at += 2
            entry = entries[at]
            if entry & COMPRESSED_FLAG:
                break
            more, count, follows = self._subclusters(position, entry, entries[at + 1], 0)
            if more != kind or follows != (host_offset + run if host_offset >= 0 else -1):
                break
            run += count << self._sub_bits
            position = offset + run
        return kind, min(run, length), host_offset

    def _subclusters(self, offset: int, entry: int, bitmap: int, subcluster: int) -> tuple[int, int, int]:
        """Kind and number of equal subclusters from ``subcluster`` on, and the host offset of the first, or -1."""
        if entry & self.not_plain or bitmap & bitmap >> SUBCLUSTERS:
            raise self._bad_entry(offset, entry)
        host_offset = entry & OFFSET_MASK
        placed = host_offset != 0 or (self.external and bool(entry & COPIED))
        host_offset = host_offset + (subcluster << self._sub_bits) if placed else -1
        allocated, zero = (bitmap & ALL_ALLOCATED) >> subcluster, bitmap >> SUBCLUSTERS + subcluster
        if allocated & 1:
            if not placed or entry & OFFSET_MASK >= self.host_limit:
                raise self._bad_entry(offset, entry)
            kind, differ = DATA, ~allocated
        elif zero & 1:
            kind, differ = ZERO, ~zero
        else:
            kind, differ, host_offset = UNALLOCATED, allocated | zero, -1
        differ |= 1 << SUBCLUSTERS - subcluster
        return kind, (differ & -differ).bit_length() - 1, host_offset

    def _compressed_entry(self, table: L2Table, index: int) -> int:
        return table.entries[index << 1]

    def _store_compressed(self, table: L2Table, index: int, entry: int) -> None:
        old = table.entries[index << 1]
        if old:
            self._release(old)
        self._store(table, index << 1, entry, 0)

    # --- changing the mapping --------------------------------------------------------------------------------------

    def _owns_cluster(self, entry: int) -> bool:
        """The entry has a host cluster that nothing else refers to."""
        return not entry & COMPRESSED_FLAG and bool(entry & COPIED) and (self.external or entry & OFFSET_MASK != 0)

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """Allocated subclusters are overwritten in place where COPIED says that nothing else refers to the cluster."""
        if self._broken:
            raise RequestError(errno.EIO, self._broken)
        table = self._recent.get(offset >> self._l1_shift) or self.cache.find(offset >> self._l1_shift)
        if table is None:
            return self._without_table(offset, length)
        at = ((offset >> self._bits) & self._l2_mask) << 1
        entry, bitmap = table.entries[at], table.entries[at + 1]
        subcluster = (offset >> self._sub_bits) & SUBCLUSTERS - 1
        if self._owns_cluster(entry):
            kind, count, host_offset = self._subclusters(offset, entry, bitmap, subcluster)
            cluster = (entry & OFFSET_MASK) >> self._bits
            if cluster in self._protected:
                self._corruption(f"guest offset {offset:#x} is mapped to metadata at {cluster << self._bits:#x}")
            inside = offset & self.granularity - 1
            run = min(length, (count << self._sub_bits) - inside)
            return (DATA, run, host_offset + inside) if kind == DATA else (UNALLOCATED, run, -1)
        if not entry & COMPRESSED_FLAG:
            self._subclusters(offset, entry, bitmap, subcluster)
        run = self.cluster_size - (offset & self._cluster_mask)
        at, end = at + 2, len(table.words)
        while run < length and at < end and not self._owns_cluster(table.entries[at]):
            run += self.cluster_size
            at += 2
        return UNALLOCATED, min(run, length), -1

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """Subclusters of the host cluster there is, or whole new clusters, or a new one of which a part is used."""
        table = self._writable_table(offset)
        if table is None:
            return None
        index = (offset >> self._bits) & self._l2_mask
        first = (offset >> self._sub_bits) & SUBCLUSTERS - 1
        entry, bitmap = table.entries[index << 1], table.entries[index << 1 | 1]
        inside = offset & self._cluster_mask
        whole = inside == 0 and length >= self.cluster_size
        covered = min(length, self.cluster_size - inside)
        zeroed = False
        if owned := self._owns_cluster(entry):
            count, host_offset = 1, (entry & OFFSET_MASK) + inside
            if (entry & OFFSET_MASK) >> self._bits in self._protected:
                self._corruption(f"guest offset {offset:#x} is mapped to metadata at {entry & OFFSET_MASK:#x}")
        elif not whole and (entry & COMPRESSED_FLAG or bitmap & ALL_ALLOCATED):
            return None  # ``prepare`` gives the cluster a host cluster of its own
        elif self.external:
            count, host_offset, zeroed = 1, offset, offset - inside >= self._data_virgin and self.data.grows_zeroed
            self._data_virgin = max(self._data_virgin, offset - inside + self.cluster_size)
        else:
            wanted = 1
            most = min(length >> self._bits, self._l2_entries - index) if whole else 1
            while wanted < most and not self._owns_cluster(table.entries[index + wanted << 1]):
                wanted += 1
            virgin = self.allocator.virgin
            taken = self._take(wanted)
            if taken is None:
                return None
            cluster, count = taken
            host_offset, zeroed = (cluster << self._bits) + inside, cluster >= virgin and self.data.grows_zeroed
            if whole:
                covered = count << self._bits
        table.pins += 1
        last = first + div_ceil(covered, self.granularity) if not whole or owned else SUBCLUSTERS
        mask = (1 << last) - (1 << first)
        return Allocation(offset, covered, host_offset, zeroed, (table, index, count, mask, owned))

    async def prepare(self, offset: int, length: int) -> None:
        """As for standard entries; and a compressed or shared cluster that is written in part gets its own space."""
        await super().prepare(offset, length)
        if offset & self._cluster_mask == 0 and length >= self.cluster_size:
            return
        table = self._writable_table(offset)
        if table is None:
            return  # asked for again
        at = ((offset >> self._bits) & self._l2_mask) << 1
        entry, bitmap = table.entries[at], table.entries[at + 1]
        if not self._owns_cluster(entry) and (entry & COMPRESSED_FLAG or bitmap & ALL_ALLOCATED):
            table.pins += 1
            try:
                await self._unshare(table, at, offset)
            finally:
                table.pins -= 1

    async def _unshare(self, table: L2Table, at: int, offset: int) -> None:
        """Copy a cluster that is compressed, or that a snapshot shares, to a host cluster of its own."""
        entry, bitmap = table.entries[at], table.entries[at + 1]
        start = offset & ~self._cluster_mask
        if entry & COMPRESSED_FLAG:
            bitmap, content = ALL_ALLOCATED, bytearray(await self._compressed.read(entry))
        else:
            self._subclusters(offset, entry, bitmap, 0)
            content = await self.data.read(self.data_place(entry & OFFSET_MASK, start), self.cluster_size)
        while (taken := self._take(1)) is None:
            await self.allocator.ready()
        host_offset = taken[0] << self._bits
        place, size = self.data_place(host_offset, start), self.granularity
        try:
            await self.data.write_all(
                [
                    (place + number * size, memoryview(content)[number * size : (number + 1) * size])
                    for number in range(SUBCLUSTERS)
                    if bitmap >> number & 1
                ]
            )
        except BaseException:
            self.allocator.quarantine.append(taken)
            raise
        self._release(entry)
        self._store(table, at, host_offset | COPIED, bitmap)

    def _store(self, table: L2Table, at: int, entry: int, bitmap: int) -> None:
        table.entries[at], table.entries[at + 1] = entry, bitmap
        table.touch(at, at + 2)

    def publish(self, allocation: Allocation) -> None:
        """Point the entries at the host clusters, and mark the subclusters as allocated."""
        table, index, count, mask, owned = allocation.token
        entry = allocation.host_offset - (allocation.offset & self._cluster_mask) | COPIED
        for at in range(index << 1, index + count << 1, 2):
            old, bitmap = table.entries[at], table.entries[at + 1]
            if not owned and old:
                self._release(old)
            if old & COMPRESSED_FLAG or mask == ALL_ALLOCATED:
                bitmap = 0
            self._store(table, at, entry, bitmap & ~(mask << SUBCLUSTERS) | mask)
            entry += self.cluster_size
        table.pins -= 1

    def abandon(self, allocation: Allocation) -> None:
        """New clusters are counted down with the next commit."""
        table, _, count, _, owned = allocation.token
        table.pins -= 1
        if not owned and not self.external:
            self.allocator.quarantine.append((allocation.host_offset >> self._bits, count))

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Set the subclusters' zero bits. A compressed cluster has none, so that it can only be zeroed whole."""
        if self.header.data_file_raw:
            return 0
        length = min(length, (1 << self._l1_shift) - (offset & (1 << self._l1_shift) - 1))
        if not self.has_backing and not self.l1.entries[offset >> self._l1_shift]:
            return length
        table = self._writable_table(offset)
        if table is None:
            return None
        position, end = offset, offset + length
        while position < end:
            stop = min(end, (position | self._cluster_mask) + 1)
            if not self._zero_cluster(table, position, stop, unmap=unmap):
                break
            position = stop
        return position - offset

    def _zero_cluster(self, table: L2Table, start: int, end: int, *, unmap: bool) -> bool:
        """Zero ``[start, end)`` of one cluster; False if that cannot be done."""
        at = ((start >> self._bits) & self._l2_mask) << 1
        entry, bitmap = table.entries[at], table.entries[at + 1]
        first = (start & self._cluster_mask) >> self._sub_bits
        mask = (1 << first + div_ceil(end - start, self.granularity)) - (1 << first)
        if end == self.size:
            mask |= ALL_ALLOCATED & ~((1 << first) - 1)
        if entry & COMPRESSED_FLAG:
            if mask != ALL_ALLOCATED:
                return False
            allocated, zero, kept = 0, mask, 0
        else:
            self._subclusters(start, entry, bitmap, first)
            decided = ALL_ALLOCATED if self.has_backing else bitmap | bitmap >> SUBCLUSTERS
            allocated = bitmap & ALL_ALLOCATED & ~mask
            zero = bitmap >> SUBCLUSTERS | mask & decided
            kept = entry
            if unmap and not allocated:
                kept = 0
        if (kept, zero << SUBCLUSTERS | allocated) != (entry, bitmap):
            if entry and not kept:
                self._release(entry)
            self._store(table, at, kept, zero << SUBCLUSTERS | allocated)
        return True

    def _release_entries(self, words: Words) -> None:
        super()._release_entries(words[0::2])

    def cut_table(self, offset: int) -> bool:
        """As for standard entries; of a cluster that ``offset`` is inside of, the subclusters from there on go."""
        table = self.cache.find(offset >> self._l1_shift)
        if table is None:
            return not self.l1.entries[offset >> self._l1_shift]
        at = ((offset >> self._bits) & self._l2_mask) << 1
        if not table.words[at:].any():
            return True
        table = self._writable_table(offset)
        if table is None:
            return False
        subcluster = (offset >> self._sub_bits) & SUBCLUSTERS - 1
        if subcluster:
            entry, bitmap = table.entries[at], table.entries[at + 1]
            kept = (1 << subcluster) - 1
            if not entry & COMPRESSED_FLAG:  # such a cluster is copied, with zeroes at its end
                self._store(table, at, entry, bitmap & (kept | kept << SUBCLUSTERS))
            at += 2
        self._release_entries(cast("Words", table.words[at:]))
        table.words[at:] = 0
        table.touch(at, len(table.words))
        return True
