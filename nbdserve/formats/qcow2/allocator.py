"""Host clusters: finding free ones, and giving back what is no longer referred to.

A cluster that lost a reference goes into quarantine: on disk something may still point at it. Once a commit has made
that something disappear, ``release`` lowers the count in memory, and the cluster may be used again.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.formats.qcow2.layout import MAX_HOST_OFFSET
from nbdserve.formats.qcow2.refcounts import Refcounts
from nbdserve.storage.base import Storage
from nbdserve.units import div_ceil

ClusterRange: TypeAlias = tuple[int, int]
"""``(first cluster, count)``."""

Clusters: TypeAlias = npt.NDArray[np.int64]
"""Cluster numbers."""

_WINDOW: Final = 8192
"""Clusters looked at in one step (3 us), and the most one extent has."""


class Allocator:
    """Hands out clusters with refcount 0, lowest first, so that a file grows only when nothing inside it is free."""

    def __init__(
        self,
        storage: Storage,
        refcounts: Refcounts,
        cluster_bits: int,
        metadata: set[int],
        corrupt: Callable[[str], NoReturn],
    ) -> None:
        self.quarantine: list[ClusterRange] = []
        self.metadata = metadata
        """Clusters that hold the image's own tables; kept current here."""
        self.virgin = div_ceil(storage.size, 1 << cluster_bits)
        """The lowest cluster from which on nothing was ever written."""
        self._storage = storage
        self._refcounts = refcounts
        self._cluster_bits = cluster_bits
        self._corrupt = corrupt
        self.punch = False
        """What becomes free is given back to the file system."""
        self._cursor = 0  # nothing below it is free, except in the extent
        self._free = self._free_end = 0  # an extent of free clusters, inside one refcount block
        self._missing = 0  # the block that must be loaded to find more
        self._tail = 0  # where the last cluster that compressed data was put in has room left; 0: nowhere

    def take(self, wanted: int) -> ClusterRange | None:
        """Up to ``wanted`` consecutive free clusters, counted once from now on. None: ``ready`` must be awaited first.

        OSError(ENOSPC) when the format cannot address more.
        """
        if not self._has_extent():
            return None
        first = self._free
        count = wanted if first + wanted <= self._free_end else self._free_end - first
        end = self._free = first + count
        if first in self.metadata if count == 1 else self._holds_metadata(first, count):
            self._corrupt(f"clusters {first}..{end - 1} hold metadata, but their refcount is 0")
        self._refcounts.set_range(first, count, 1)
        if end > self.virgin:
            self.virgin = end
        return first, count

    def take_bytes(self, length: int) -> int | None:
        """Host offset of ``length`` bytes, less than a cluster, that may share their clusters with others such.

        Each cluster they lie in is counted once more. None and OSError as for ``take``.
        """
        cluster_size = 1 << self._cluster_bits
        if not self._has_extent():
            return None
        room = -self._tail % cluster_size
        shared = self._tail >> self._cluster_bits
        if room and self._shareable(shared) and (length <= room or self._free == shared + 1):
            host_offset = self._tail
            self._count_once_more(shared)
        else:
            room, host_offset = 0, self._free << self._cluster_bits
        if length > room and self.take(1) is None:
            return None
        self._tail = host_offset + length
        return host_offset

    def _shareable(self, cluster: int) -> bool:
        index, position = divmod(cluster, self._refcounts.entries)
        block = self._refcounts.block(index)
        return block is not None and 0 < block.counts[position] < self._refcounts.highest

    def _count_once_more(self, cluster: int) -> None:
        index, position = divmod(cluster, self._refcounts.entries)
        block = self._refcounts.block(index)
        assert block is not None
        self._refcounts.set_range(cluster, 1, int(block.counts[position]) + 1)

    def free(self, clusters: Clusters) -> None:
        """Each of these lost a reference."""
        self.quarantine += runs_of(clusters)

    def _holds_metadata(self, first: int, count: int) -> bool:
        if count < len(self.metadata):
            return not self.metadata.isdisjoint(range(first, first + count))
        return any(first <= cluster < first + count for cluster in self.metadata)

    def retire_metadata(self, clusters: ClusterRange) -> None:
        """A table of the image has moved away from here."""
        self.metadata.difference_update(range(clusters[0], sum(clusters)))
        self.quarantine.append(clusters)

    async def take_run(self, wanted: int) -> int:
        """``wanted`` consecutive clusters behind everything the file has, counted once from now on; the first of them.

        For tables of more than one cluster. OSError(ENOSPC) when the format cannot address them.
        """
        self._forget_extent()
        refcounts, entries = self._refcounts, self._refcounts.entries
        while True:
            first, end = self.virgin, self.virgin + wanted
            if end << self._cluster_bits > MAX_HOST_OFFSET:
                raise OSError(errno.ENOSPC, f"{self._storage.path}: the image cannot address more than 2^56 bytes")
            blocks = range(first // entries, (end - 1) // entries + 1)
            missing = next((index for index in blocks if not refcounts.block_offset(index)), None)
            if missing is not None:
                await self._add_block_before(missing, first)
            elif (used := await self._last_used(first, end)) is not None:
                self.virgin = used + 1
            else:
                break
        if self._holds_metadata(first, wanted):
            self._corrupt(f"clusters {first}..{end - 1} hold metadata, but their refcount is 0")
        for low, high in self._by_block(first, end):
            await refcounts.load(low // entries)
            refcounts.set_range(low, high - low, 1)
        self.virgin = end
        return first

    async def _last_used(self, first: int, end: int) -> int | None:
        """The last cluster of a range that is in use; None where all are free."""
        for low, high in reversed(self._by_block(first, end)):
            index, at = divmod(low, self._refcounts.entries)
            if self._refcounts.block_offset(index):
                counts = (await self._refcounts.load(index)).counts[at : at + high - low]
                if counts.any():
                    return high - 1 - int((counts[::-1] != 0).argmax())
        return None

    async def end(self) -> int:
        """The first cluster behind all that are in use."""
        last = await self._last_used(0, len(self._refcounts.table.words) * self._refcounts.entries)
        return 0 if last is None else last + 1

    def _by_block(self, first: int, end: int) -> list[ClusterRange]:
        """``[first, end)`` cut where one refcount block ends and the next begins, as ``(first, end)``."""
        entries = self._refcounts.entries
        cuts = [first, *range((first // entries + 1) * entries, end, entries), end]
        return list(itertools.pairwise(cuts))

    async def _add_block_before(self, index: int, cluster: int) -> None:
        """Make block ``index`` at ``cluster``, which some block before it counts, or one that counts ``cluster``."""
        refcounts = self._refcounts
        home, at = divmod(cluster, refcounts.entries)
        if index >= len(refcounts.table.words):
            self._add_block(index)
        elif not refcounts.block_offset(home):
            self._place_block(home, cluster)
        elif (await refcounts.load(home)).counts[at]:
            self.virgin = cluster + 1
        else:
            self._place_block(index, cluster)

    async def ready(self) -> None:
        """Find free clusters, so that ``take`` succeeds."""
        while not self._has_extent():
            await self._refcounts.load(self._missing)

    def _has_extent(self) -> bool:
        """Whether there are free clusters at hand, and the block that counts them."""
        if self._free == self._free_end:
            return self._find()
        self._missing = self._free // self._refcounts.entries
        return self._refcounts.block(self._missing) is not None

    def _find(self) -> bool:
        """Set the extent to the next free clusters; False if a refcount block needed for it is not in memory."""
        refcounts, entries = self._refcounts, self._refcounts.entries
        while True:
            index, position = divmod(self._cursor, entries)
            if self._cursor + entries << self._cluster_bits > MAX_HOST_OFFSET:
                raise OSError(errno.ENOSPC, f"{self._storage.path}: the image cannot address more than 2^56 bytes")
            if not refcounts.block_offset(index):
                self._add_block(index)
                continue
            block = refcounts.block(index)
            if block is None:
                self._missing = index
                return False
            free = block.counts[position : position + _WINDOW] == 0
            start = int(free.argmax())
            if not free[start]:
                self._cursor += len(free)
                continue
            used = ~free[start:]
            length = int(used.argmax()) or len(used)
            self._free = self._cursor + start
            self._free_end = self._cursor = self._free + length
            return True

    def _add_block(self, index: int) -> None:
        """Start counting a range in which everything is free, with a block in its first clusters that counts itself."""
        if index < len(self._refcounts.table.words):
            self._place_block(index, self._cursor)
            return
        old = self._refcounts.table.host_offset >> self._cluster_bits, self._refcounts.table_clusters
        first, count = self._refcounts.grow_table(index)
        self.retire_metadata(old)
        self._add_metadata(first, count)

    def _place_block(self, index: int, cluster: int) -> None:
        self._refcounts.add_block(index, cluster)
        self._refcounts.set_range(cluster, 1, 1)
        self._add_metadata(cluster, 1)

    def _add_metadata(self, first: int, count: int) -> None:
        if self._holds_metadata(first, count):
            self._corrupt(f"clusters {first}..{first + count - 1} hold metadata, but no refcount block counts them")
        self.metadata.update(range(first, first + count))
        self.virgin = max(self.virgin, first + count)

    async def release(self, ranges: Sequence[ClusterRange]) -> None:
        """Take one reference from every cluster of ``ranges``; nothing on disk points there any more.

        What becomes free is punched out of the file first and counted free afterwards: nobody may have it in between.
        """
        for first, count in _merged(ranges):
            if self._holds_metadata(first, count):
                self._corrupt(f"clusters {first}..{first + count - 1} hold metadata, but data was mapped to them")
            position, end = first, first + count
            while position < end:
                index, at = divmod(position, self._refcounts.entries)
                part = min(end - position, self._refcounts.entries - at)
                if self._refcounts.block_offset(index):
                    await self._release_part(index, at, part)
                position += part

    async def _release_part(self, index: int, at: int, count: int) -> None:
        block = await self._refcounts.load(index)
        block.pins += 1
        try:
            counts = block.counts[at : at + count]
            base = index * self._refcounts.entries + at
            lowered = counts != 0  # a count of 0 that was referred to is an error of the image, left to ``check``
            freed = np.flatnonzero(counts == 1) + base
            if self._tail >> self._cluster_bits in freed:
                self._tail = 0  # now: what is put there while it is punched out would be lost
            if self.punch:
                for start, length in runs_of(freed):
                    await self._storage.discard(start << self._cluster_bits, length << self._cluster_bits)
            counts -= lowered.astype(counts.dtype)
            self._refcounts.touch(base, count)
        finally:
            block.pins -= 1
        if len(freed):
            self._cursor = min(self._cursor, int(freed[0]))
            self._forget_extent()

    def _forget_extent(self) -> None:
        if self._free < self._free_end:
            self._cursor = min(self._cursor, self._free)
        self._free = self._free_end = 0


def _merged(ranges: Iterable[ClusterRange]) -> list[ClusterRange]:
    """Ranges in ascending order, neighbours joined; a cluster named twice stays in two ranges."""
    result: list[ClusterRange] = []
    for first, count in sorted(ranges):
        if result and sum(result[-1]) == first:
            result[-1] = (result[-1][0], result[-1][1] + count)
        else:
            result.append((first, count))
    return result


def runs_of(clusters: Clusters) -> list[ClusterRange]:
    """The runs of consecutive numbers in ``clusters``, as they stand."""
    if not len(clusters):
        return []
    breaks = np.flatnonzero(np.diff(clusters) != 1) + 1
    starts = clusters[np.concatenate(([0], breaks))]
    lengths = np.diff(np.concatenate(([0], breaks, [len(clusters)])))
    return list(zip(starts.tolist(), lengths.tolist(), strict=True))
