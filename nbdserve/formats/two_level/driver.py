"""What QED and qcow (version 1) share: what the entries of two levels of tables mean, and changing them."""

from __future__ import annotations

import errno
from typing import cast

import numpy as np

from nbdserve.errors import RequestError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO, Run, RunStream
from nbdserve.formats.base import Allocation
from nbdserve.formats.tables import L2Table, Words, run_from
from nbdserve.formats.two_level.entries import BAD_ENTRY, FLAG, are_data, count_before
from nbdserve.formats.two_level.image import TwoLevelImage
from nbdserve.formats.two_level.runs import iter_runs
from nbdserve.units import div_ceil


class TwoLevelDriver(TwoLevelImage):
    """One open image. Subclasses know the header, and what an entry that is no host offset means."""

    # --- reading the mapping -----------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run | None:
        """What this layer has at ``offset``; EIO where the entry is invalid."""
        table = self._recent.get(offset >> self._slice_shift)
        if table is None:
            table = self.cache.find(offset >> self._slice_shift)
            if table is None:
                return self._without_table(offset, length)
        entries = table.entries
        index = (offset >> self._bits) & self._slice_mask
        entry = entries[index]
        inside = offset & self._cluster_mask
        run = self.cluster_size - inside
        if not BAD_ENTRY < entry < FLAG:
            if not entry and run >= length:
                return UNALLOCATED, length, -1
            return self._lookup_special(entries, index, offset, length)
        if run < length:
            # Clusters that follow each other in the file have entries that differ by the cluster size.
            unit = self.cluster_size
            length = run_from(entries, index, self._slice_entries, run, length, unit, unit)
        return DATA, length, entry + inside

    def _without_table(self, offset: int, length: int) -> Run | None:
        """The answer when the slice is not in memory: there is none, or it must be loaded."""
        if self.l1.entries[offset >> self._l1_shift]:
            return None
        rest = (1 << self._l1_shift) - (offset & (1 << self._l1_shift) - 1)
        return UNALLOCATED, min(length, rest), -1

    def _lookup_special(self, entries: memoryview[int], index: int, offset: int, length: int) -> Run:
        """``lookup`` of everything but a data cluster."""
        entry = entries[index]
        if entry == BAD_ENTRY:
            raise self._bad_entry(offset)
        run = self.cluster_size - (offset & self._cluster_mask)
        if entry >= FLAG:
            return COMPRESSED, min(run, length), self.geometry.compressed_range(entry)[0]
        length = run_from(entries, index, self._slice_entries, run, length, self.cluster_size, 0)
        return ZERO if entry else UNALLOCATED, length, -1

    def _bad_entry(self, offset: int) -> RequestError:
        return RequestError(errno.EIO, f"{self.path}: the L2 entry for guest offset {offset:#x} is invalid")

    def iter_runs(self, start: int, end: int) -> RunStream:
        """The mapping of ``[start, end)``, about 2 MiB of L2 tables at a time. RequestError(EIO) for a bad entry."""
        return iter_runs(self, start, end)

    # --- changing the mapping ----------------------------------------------------------------------------------------

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """Data is overwritten in place; everything else is allocated."""
        table = self._recent.get(offset >> self._slice_shift)
        if table is None:
            table = self.cache.find(offset >> self._slice_shift)
            if table is None:
                return self._without_table(offset, length)
        entries = table.entries
        index = (offset >> self._bits) & self._slice_mask
        entry = entries[index]
        inside = offset & self._cluster_mask
        run = self.cluster_size - inside
        if self._held:
            if self._stopped:
                raise RequestError(errno.EIO, self._stopped)
            self._starved = True
            return None
        end, unit = self._slice_entries, self.cluster_size
        if not BAD_ENTRY < entry < FLAG:
            if entry == BAD_ENTRY:
                raise self._bad_entry(offset)
            index += 1
            while run < length and index < end and not BAD_ENTRY <= entries[index] < FLAG:
                run += unit
                index += 1
            return UNALLOCATED, min(run, length), -1
        if run < length:
            length = run_from(entries, index, end, run, length, unit, unit)
        return DATA, length, entry + inside

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """New clusters, consecutive in the file, inside one slice."""
        table = self._writable_slice(offset)
        if table is None:
            return None
        entries = table.entries
        first = (offset >> self._bits) & self._slice_mask
        most = min(self._slice_entries - first, div_ceil(length, self.cluster_size))
        count = 1
        while count < most and not BAD_ENTRY <= entries[first + count] < FLAG:
            count += 1
        if not self._has_room(count * self.cluster_size):
            return None
        host_offset, count, zeroed = self._space.take(count)
        table.pins += 1
        return Allocation(offset, min(length, count << self._bits), host_offset, zeroed, (table, first, count))

    def publish(self, allocation: Allocation) -> None:
        """Point the entries at the new clusters."""
        table, first, count = allocation.token
        entries, entry = table.entries, allocation.host_offset
        for index in range(first, first + count):
            entries[index] = entry
            entry += self.cluster_size
        table.touch(first, first + count)
        table.pins -= 1

    def abandon(self, allocation: Allocation) -> None:
        """Nothing refers to the clusters: the next commit makes them free."""
        table, _, count = allocation.token
        table.pins -= 1
        self._space.free(allocation.host_offset, count)

    def _words_at(self, table: L2Table, offset: int, length: int) -> tuple[int, Words]:
        """The entries of ``table`` for a range of whole clusters, as far as it has them, and the index of the first."""
        first = (offset >> self._bits) & self._slice_mask
        end = min(first + div_ceil(length, self.cluster_size), self._slice_entries)
        return first, cast("Words", table.words[first:end])

    def _zero_alone(self, offset: int, length: int) -> int | None:
        """``zero`` of an image with nothing below: only data clusters do not read as zeroes, or can be made to.

        They are left to be zeroed where they are.
        """
        l1_index = offset >> self._l1_shift
        if not self.l1.entries[l1_index]:
            return min(length, (l1_index + 1 << self._l1_shift) - offset)
        if self._stopped or offset >> self._slice_shift in self._suspect:
            raise RequestError(errno.EIO, self._stopped or self._corrupt_table(offset))
        table = self.cache.find(offset >> self._slice_shift)
        if table is None:
            return None
        first, words = self._words_at(table, offset, length)
        count = count_before(are_data(words))
        packed = np.flatnonzero(words[:count] >= np.uint64(FLAG))
        if len(packed):
            if self._writable_slice(offset) is None:
                return None
            words[packed] = 0
            table.touch(first + int(packed[0]), first + int(packed[-1]) + 1)
        return min(length, count << self._bits)
