"""Does the metadata of a qcow2 image agree with itself, and with its refcounts?

The counts and their names are qemu-img's: *corruptions* can lose data, *leaks* only space.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import numpy as np

from nbdserve.formats.base import CheckResult
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.check_walk import (
    WINDOW_CLUSTERS,
    BoolArray,
    DiskRefcounts,
    Findings,
    Int64Array,
    Metadata,
    Tables,
    UInt64Array,
    Window,
    read_metadata,
    walk_l2,
)
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.refcounts import Counts
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil

_SHOWN = 100
"""Entries of one batch that get a message of their own."""
_MAX_OUTSIDE: Final = 1 << 16


class Analysis:
    """One pass over an image: what is wrong, and what a repair has to know."""

    def __init__(self, storage: Storage, metadata: Metadata, *, window_clusters: int = WINDOW_CLUSTERS) -> None:
        self.storage = storage
        self.window_clusters = window_clusters
        """Clusters whose counts are in memory at once."""
        self.metadata = metadata
        self.header = metadata.header
        self.findings: Findings = metadata.findings
        self.result: CheckResult = metadata.findings.result
        self.refcounts = DiskRefcounts(storage, metadata.header, metadata.refcount_table)
        self.needs_rebuild = False
        """The refcount structure itself is broken, or has no place for a count: it cannot be mended in place."""
        self.outside: set[int] = set()
        """Clusters past the end of the file that something refers to (the first few thousand)."""
        per_block = self.header.refcount_block_entries
        # One cluster more than the file has: compressed data may reach into it.
        self.total = align_up(metadata.file_clusters + 1, per_block)
        """Clusters that are looked at, whole refcount blocks."""
        self.copied_corruptions = 0
        """Those of the corruptions that are wrong COPIED flags."""
        self._windows: set[int] = set()
        self._bits = self.header.cluster_bits

    @property
    def counts_agree(self) -> bool:
        """Nothing is wrong but, perhaps, COPIED flags."""
        result = self.result
        return not (result.corruptions - self.copied_corruptions or result.leaks or result.check_errors)

    @property
    def wrong_counts(self) -> int:
        """Corruptions other than wrong COPIED flags."""
        return self.result.corruptions - self.copied_corruptions

    async def run(self) -> None:
        """Fill ``result``."""
        self.result.total_clusters = div_ceil(self.header.size, self.header.cluster_size)
        highest = 0
        async for window, refcounts, unknown in self.windows(report=True):
            highest = max(highest, self.judge(window, refcounts, unknown))
        self.result.image_end_offset = (highest + 1) << self._bits

    def judge(self, window: Window, refcounts: Counts, unknown: BoolArray | None) -> int:
        """Count the refcount structure too, and compare; the highest cluster in use, or -1."""
        self.count_structure(window, report=True)
        self._report_overflow(window)
        return self._compare(window, refcounts, unknown)

    async def refcount_windows(self) -> AsyncIterator[tuple[int, Counts, BoolArray | None]]:
        """The refcounts on disk, window by window: the first, and each that has references or refcounts.

        Yields the first cluster, the refcounts, and which of them cannot be read (None: all can).
        """
        per_window = self.window_clusters // self.header.refcount_block_entries
        counted = set((np.flatnonzero(self.refcounts.block_offsets) // per_window).tolist())
        number, last = 0, (self.total - 1) // self.window_clusters
        while number <= last:
            first = number * self.window_clusters
            yield first, *await self.refcounts.read(first, min(self.window_clusters, self.total - first))
            later = [found for found in self._windows | counted if number < found <= last]
            number = min(later, default=last + 1)

    async def windows(self, *, report: bool = False) -> AsyncIterator[tuple[Window, Counts, BoolArray | None]]:
        """The references counted, but for those of the refcount structure itself, with the refcounts on disk.

        With ``report`` everything that is wrong with entries is found on the way.
        """
        async for first, refcounts, unknown in self.refcount_windows():
            window = Window(first, len(refcounts))
            await self._count(window, refcounts, unknown, compare_copied=report)
            yield window, refcounts, unknown

    async def count_all(self, clusters: int) -> Window:
        """Every reference, those of the refcount structure too; nothing is reported."""
        window = Window(0, clusters)
        await self._count(window, np.empty(0, np.uint8), None, compare_copied=False)
        self.count_structure(window)
        return window

    # --- counting --------------------------------------------------------------------------------------------------

    async def _count(
        self, window: Window, refcounts: Counts, unknown: BoolArray | None, *, compare_copied: bool
    ) -> None:
        report = compare_copied and window.first == 0
        for offset, length in self.metadata.regions:
            self._add_region(window, offset, length, report=report)
        offsets = self.metadata.l2_offsets
        self._add_clusters(window, offsets, self.metadata.l2_weight, report=report)
        if compare_copied:
            entries = self.metadata.l1
            entries = entries[entries & np.uint64(layout.OFFSET_MASK) != 0]
            clusters = (entries & np.uint64(layout.OFFSET_MASK)).astype(np.int64) >> self._bits
            ones = np.ones(len(entries), np.int64)
            await self._compare_copied("L2", window, refcounts, unknown, entries, clusters, ones)
        async for tables in walk_l2(self.storage, self.metadata):
            weight = np.repeat(tables.weight, tables.width)
            if report:
                self._report_entries(tables, weight)
                self._add_statistics(tables)
            if not self.header.has_data_file:
                chosen = tables.allocated
                self._add_clusters(window, tables.host_offset[chosen], weight[chosen], report=report)
                self._add_compressed(window, tables, weight, report=report)
            if compare_copied:
                chosen = tables.allocated & np.repeat(tables.active > 0, tables.width)
                entries, active = tables.entries[chosen], np.repeat(tables.active, tables.width)[chosen]
                clusters = tables.host_offset[chosen] >> self._bits
                if self.header.has_data_file:
                    self._compare_external(entries, active, report=report)
                    continue
                await self._compare_copied("data", window, refcounts, unknown, entries, clusters, active)

    def _add_region(self, window: Window, offset: int, length: int, *, report: bool) -> None:
        if length == 0:
            return
        if offset + length - self.metadata.file_size >= self.header.cluster_size:
            if report:
                self._outside(offset, length, 1)
            return
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        self._windows.update(range(first // self.window_clusters, last // self.window_clusters + 1))
        window.add_range(first, last)

    def _add_clusters(self, window: Window, offsets: Int64Array, weight: Int64Array, *, report: bool) -> None:
        """A cluster's length at each of ``offsets``, which should be, but need not be, aligned."""
        inside = offsets < self.metadata.file_size
        if not inside.all():
            if report:
                self._outside_many(offsets[~inside], weight[~inside])
            offsets, weight = offsets[inside], weight[inside]
        if len(offsets) == 0:
            return
        clusters = offsets >> self._bits
        if report and self.total > self.window_clusters:
            self._windows.update(np.unique(clusters // self.window_clusters).tolist())
        window.add(clusters, weight)
        crossing = offsets & (self.header.cluster_size - 1) != 0
        if crossing.any():
            window.add(clusters[crossing] + 1, weight[crossing])

    def _add_compressed(self, window: Window, tables: Tables, weight: Int64Array, *, report: bool) -> None:
        """Every host cluster a compressed cluster's sectors touch."""
        chosen = tables.compressed
        if tables.bitmaps is not None:
            chosen = chosen & (tables.bitmaps == 0)
        if not chosen.any():
            return
        entries, weight = tables.entries[chosen], weight[chosen]
        offset_bits = np.uint64(62 - (self._bits - 8))
        offsets = (entries & ((np.uint64(1) << offset_bits) - np.uint64(1))).astype(np.int64)
        sectors = ((entries & np.uint64(layout.COMPRESSED_FLAG - 1)) >> offset_bits).astype(np.int64) + 1
        ends = offsets - offsets % SECTOR_SIZE + sectors * SECTOR_SIZE
        inside = ends - self.metadata.file_size < self.header.cluster_size
        if not inside.all():
            if report:
                self._outside_many(offsets[~inside], weight[~inside])
            offsets, ends, weight = offsets[inside], ends[inside], weight[inside]
        clusters, last = offsets >> self._bits, (ends - 1) >> self._bits
        if report and self.total > self.window_clusters:
            self._windows.update(np.unique(last // self.window_clusters).tolist())
        while len(clusters):
            window.add(clusters, weight)
            more = clusters < last
            clusters, last, weight = clusters[more] + 1, last[more], weight[more]

    def count_structure(self, window: Window, *, report: bool = False) -> None:
        """The refcount table and blocks; a block that is not used exactly once cannot be mended in place."""
        table_bytes = self.header.refcount_table_clusters * self.header.cluster_size
        self._add_region(window, self.header.refcount_table_offset, table_bytes, report=report and window.first == 0)
        table, offsets = self.metadata.refcount_table, self.refcounts.block_offsets
        numbers = np.flatnonzero(table)
        used = offsets[numbers]
        reserved = table[numbers] & np.uint64(~layout.REFCOUNT_TABLE_OFFSET_MASK & (1 << 64) - 1) != 0
        misaligned = (used & (self.header.cluster_size - 1) != 0) & ~reserved
        clusters = used >> self._bits
        past = ~reserved & ~misaligned & ((clusters >= self.metadata.file_clusters) | (used < 0))
        if report and window.first == 0:
            for mask, what in (
                (reserved, "has reserved bits set"),
                (misaligned, "is not cluster aligned; refcount table entry corrupted"),
                (past, "is outside image"),
            ):
                for number in numbers[mask].tolist():
                    self.findings.corruption(f"refcount block {number} {what}")
                    self.needs_rebuild = True
        good = ~reserved & ~misaligned & ~past & (used != 0)
        blocks, first, times = np.unique(clusters[good], return_index=True, return_counts=True)
        here = (blocks >= window.first) & (blocks < window.first + len(window.counts))
        before = window.counts[blocks[here] - window.first]
        errors = times[here] - (before == 0)
        if report:
            for at in np.flatnonzero(errors).tolist():
                number = int(numbers[good][first[here][at]])
                self.needs_rebuild = True
                self.findings.corruption(
                    f"refcount block {number} refcount={int(before[at]) + int(times[here][at])}", int(errors[at])
                )
        window.add(blocks, times.astype(np.int64))

    def _report_overflow(self, window: Window) -> None:
        """More references than a refcount can say."""
        before = int(window.counts.sum(dtype=np.int64))
        above = window.saturate(self.header.refcount_order)
        self.result.corruptions += before - int(window.counts.sum(dtype=np.int64))
        for cluster in above[:_SHOWN].tolist():
            self.findings.say(f"ERROR overflow cluster offset={cluster << self._bits:#x}: use wider refcount_bits")

    # --- comparing -------------------------------------------------------------------------------------------------

    def differing(self, window: Window, refcounts: Counts) -> BoolArray:
        """Where references and refcounts differ; what a refcount says of space past the file is not looked at."""
        differs: BoolArray = window.counts != refcounts
        in_file = max(0, self.metadata.file_clusters - window.first)
        differs[in_file:] &= window.counts[in_file:] != 0
        return differs

    def _compare(self, window: Window, refcounts: Counts, unknown: BoolArray | None) -> int:
        """References against refcounts; the highest cluster in use, or -1."""
        counts = window.counts
        differs = self.differing(window, refcounts)
        in_file = max(0, self.metadata.file_clusters - window.first)
        used = counts != 0
        used[:in_file] |= refcounts[:in_file] != 0
        if unknown is not None:
            missing = int(unknown[:in_file].sum())
            self.result.check_errors += missing
            self.findings.say(f"the refcounts of {missing} clusters cannot be read")
            differs &= ~unknown
            used &= ~unknown
        at = np.flatnonzero(differs)
        low = refcounts[at] < counts[at]
        corruptions = int(low.sum())
        self.result.corruptions += corruptions
        self.result.leaks += len(at) - corruptions
        if bool((refcounts[at[low]] == 0).any()):
            self.needs_rebuild = True
        for index in at[:_SHOWN].tolist():
            reference, refcount = int(counts[index]), int(refcounts[index])
            word = "ERROR" if refcount < reference else "Leaked"
            self.findings.say(f"{word} cluster {window.first + index} refcount={refcount} reference={reference}")
        if len(at) > _SHOWN:
            self.findings.say(f"({len(at) - _SHOWN} more clusters with a wrong refcount)")
        return window.first + len(used) - 1 - int(used[::-1].argmax()) if used.any() else -1

    async def copied_mismatch(
        self, first: int, refcounts: Counts, unknown: BoolArray | None, entries: UInt64Array, clusters: Int64Array
    ) -> tuple[Int64Array, UInt64Array]:
        """Which ``entries`` have COPIED where the refcount is not 1, or not where it is; and the refcounts of these.

        Only entries of the window from ``first``; with the first window also those past the end of the file.
        """
        index = clusters - first
        inside = (index >= 0) & (index < len(refcounts))
        if unknown is not None:
            inside[inside] = ~unknown[index[inside]]
        chosen = np.flatnonzero(inside)
        values = refcounts[index[chosen]].astype(np.uint64)
        past = np.flatnonzero(clusters >= self.total) if first == 0 else np.empty(0, np.int64)
        if len(past):
            chosen = np.concatenate((chosen, past))
            values = np.concatenate((values, await self.refcounts.of(clusters[past])))
        wrong = (entries[chosen] & np.uint64(layout.COPIED) != 0) != (values == 1)
        return chosen[wrong], values[wrong]

    async def _compare_copied(
        self,
        what: str,
        window: Window,
        refcounts: Counts,
        unknown: BoolArray | None,
        entries: UInt64Array,
        clusters: Int64Array,
        weight: Int64Array,
    ) -> None:
        wrong, values = await self.copied_mismatch(window.first, refcounts, unknown, entries, clusters)
        self.result.corruptions += int(weight[wrong].sum())
        self.copied_corruptions += int(weight[wrong].sum())
        for at, value in zip(wrong[:_SHOWN].tolist(), values[:_SHOWN].tolist(), strict=True):
            self.findings.say(f"ERROR OFLAG_COPIED {what} cluster: entry={int(entries[at]):x} refcount={value}")

    def _compare_external(self, entries: UInt64Array, weight: Int64Array, *, report: bool) -> None:
        """Clusters of an external data file are used once, by definition."""
        wrong = entries & np.uint64(layout.COPIED) == 0
        if report and wrong.any():
            self.copied_corruptions += int(weight[wrong].sum())
            self.findings.corruption("OFLAG_COPIED clear for clusters of the data file", int(weight[wrong].sum()))

    # --- entries ---------------------------------------------------------------------------------------------------

    def _outside(self, offset: int, length: int, times: int) -> None:
        cluster_size = self.header.cluster_size
        if len(self.outside) < _MAX_OUTSIDE:
            self.outside.update(range(offset // cluster_size, (offset + length) // cluster_size + 1))
        self.findings.corruption(f"reference to {length} bytes at {offset:#x}, past the end of the file", times)

    def _outside_many(self, offsets: Int64Array, weight: Int64Array) -> None:
        cluster_size = self.header.cluster_size
        for offset, times in zip(offsets[:_SHOWN].tolist(), weight[:_SHOWN].tolist(), strict=True):
            self._outside(offset, cluster_size, times)
        self.outside.update((offsets[_SHOWN:_MAX_OUTSIDE] // cluster_size).tolist())
        if more := int(weight[_SHOWN:].sum()):
            self.findings.corruption(f"{more} more references past the end of the file", more)

    def _report_entries(self, tables: Tables, weight: Int64Array) -> None:
        """What is wrong with L2 entries by themselves."""
        header, entries, allocated, compressed = self.header, tables.entries, tables.allocated, tables.compressed
        reserved = np.uint64(layout.L2_RESERVED)
        self._report("reserved bits set", ~compressed & (entries & reserved != 0), tables, weight)
        misaligned = allocated & (tables.host_offset & (header.cluster_size - 1) != 0)
        self._report("cluster is not properly aligned; L2 entry corrupted", misaligned, tables, weight)
        copied = compressed & (entries & np.uint64(layout.COPIED) != 0)
        self._report("copied flag must never be set for compressed clusters", copied, tables, weight)
        if header.has_data_file:
            self._report("compressed cluster with data file", compressed, tables, weight)
        if tables.bitmaps is not None:
            alloc = tables.bitmaps & np.uint64(0xFFFF_FFFF)
            both = allocated & (alloc & (tables.bitmaps >> np.uint64(32)) != 0)
            self._report("allocated cluster with corrupted subcluster bitmap", both, tables, weight)
            loose = ~allocated & ~compressed & (alloc != 0)
            self._report("unallocated cluster with allocated subclusters", loose, tables, weight)
            self._report("compressed cluster with subclusters", compressed & (tables.bitmaps != 0), tables, weight)

    def _report(self, what: str, wrong: BoolArray, tables: Tables, weight: Int64Array) -> None:
        if not wrong.any():
            return
        at = np.flatnonzero(wrong)
        self.result.corruptions += int(weight[at].sum())
        for index in at[:_SHOWN].tolist():
            table, position = divmod(index, tables.width)
            place = f"L2 table {int(tables.offsets[table]):#x}, entry {position}"
            self.findings.say(f"ERROR {place} = {int(tables.entries[index]):#x}: {what}")

    def _add_statistics(self, tables: Tables) -> None:
        """What of the active disk is allocated, and how often a cluster does not follow the one before in its table."""
        shared = tables.compressed
        if tables.bitmaps is not None:
            shared = shared & (tables.bitmaps == 0)
        if self.header.has_data_file:
            shared = np.zeros_like(shared)
        active = np.repeat(tables.active, tables.width)
        compressed = int(active[shared].sum())
        at = np.flatnonzero(tables.allocated)
        offsets, rows = tables.host_offset[at], at // tables.width
        breaks = (rows[1:] == rows[:-1]) & (offsets[1:] != offsets[:-1] + self.header.cluster_size)
        self.result.allocated_clusters += int(active[at].sum()) + compressed
        self.result.compressed_clusters += compressed
        self.result.fragmented_clusters += int(active[at[1:]][breaks].sum()) + compressed


async def read_header(storage: Storage) -> Header:
    """The header as it is on disk now."""
    first_cluster = min(storage.size, 1 << layout.MAX_CLUSTER_BITS)
    return Header.parse(await storage.read(0, first_cluster), storage.path, storage.size)


async def analyse(storage: Storage) -> Analysis:
    """Look at everything, change nothing."""
    metadata = await read_metadata(storage, await read_header(storage))
    analysis = Analysis(storage, metadata)
    await analysis.run()
    return analysis
