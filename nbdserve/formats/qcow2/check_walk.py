"""What refers to which host cluster: a walk over all metadata of a qcow2 image, in numpy columns.

The walk counts references in a *window* of the host clusters, so that memory is bounded whatever the size of the file;
an image of up to WINDOW_CLUSTERS clusters (2 TiB at 64 KiB) is walked once. Every L2 table is read once per window,
however many snapshots share it: its references count as often as L1 tables name it.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.errors import CorruptImageError
from nbdserve.formats.base import CheckResult
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.bitmap_directory import MAX_BITMAP_BYTES, read_bitmap_directory
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.refcounts import Counts, decode_counts
from nbdserve.formats.qcow2.snapshots import Snapshot, read_snapshots
from nbdserve.formats.tables import decode_words
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil

WINDOW_CLUSTERS: Final = 1 << 25
"""Host clusters whose reference counts are in memory at once: 128 MiB of counts."""
BATCH_BYTES: Final = 4 << 20
"""Tables read at a time."""
MAX_MESSAGES: Final = 1000
"""Messages kept of one check; the counters count all."""

UInt64Array: TypeAlias = npt.NDArray[np.uint64]
Int64Array: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

BITMAP_ENTRY_RESERVED: Final = 0xFF00_0000_0000_01FE


class Findings:
    """A CheckResult being filled."""

    def __init__(self) -> None:
        self.result = CheckResult()

    def say(self, message: str) -> None:
        """Keep a message, unless there are too many."""
        if len(self.result.messages) < MAX_MESSAGES:
            self.result.messages.append(message)
        elif len(self.result.messages) == MAX_MESSAGES:
            self.result.messages.append(f"(only the first {MAX_MESSAGES} messages are shown)")

    def corruption(self, message: str, count: int = 1) -> None:
        """``count`` corruptions of one kind."""
        self.result.corruptions += count
        self.say(f"ERROR {message}")


@dataclass(slots=True)
class Metadata:
    """The small tables of an image, read once."""

    header: Header
    l1: UInt64Array
    l2_offsets: Int64Array
    """Every L2 table named by any L1 table once, ascending."""
    l2_weight: Int64Array
    """How often each is named."""
    l2_active: Int64Array
    """How often the active L1 table names it."""
    refcount_table: UInt64Array
    regions: list[tuple[int, int]]
    """``(host_offset, length)`` of everything but L2 tables, data and the refcount structure."""
    file_size: int
    """Bytes, in whole sectors."""
    without_zeroes: bool = False
    """Entries that read as zeroes (standard ones) are taken for empty."""
    findings: Findings = field(default_factory=Findings)

    @property
    def file_clusters(self) -> int:
        """Clusters of the file, a last one that is not complete included."""
        return div_ceil(self.file_size, self.header.cluster_size)


async def read_words(storage: Storage, offset: int, count: int) -> UInt64Array:
    """``count`` big-endian u64 from ``offset``."""
    return decode_words(await storage.read(offset, count * 8))


async def read_metadata(storage: Storage, header: Header) -> Metadata:
    """Read the small tables, and report what is wrong with their entries. CorruptImageError, OSError."""
    l1 = await read_words(storage, header.l1_offset, header.l1_entries)
    snapshots, snapshot_bytes = await read_snapshots(storage, header)
    return await gather_metadata(storage, header, l1, snapshots, snapshot_bytes)


async def gather_metadata(
    storage: Storage, header: Header, l1: UInt64Array, snapshots: Sequence[Snapshot], snapshot_bytes: int
) -> Metadata:
    """The metadata of an image with this active L1 table, and these snapshots in a table of ``snapshot_bytes``."""
    findings = Findings()
    cluster_size = header.cluster_size
    regions = [
        (0, cluster_size),
        (header.l1_offset, header.l1_entries * 8),
        (header.snapshots_offset, snapshot_bytes),
    ]
    if header.luks_area is not None:
        regions.append(header.luks_area)
    offsets, weights = _named(l1, findings, cluster_size)
    active = (offsets, weights)
    for snapshot in snapshots:
        regions.append((snapshot.l1_offset, snapshot.l1_entries * 8))
        table = await read_words(storage, snapshot.l1_offset, snapshot.l1_entries)
        named, counts = _named(table, findings, cluster_size)
        both = np.concatenate((offsets, named))
        offsets, inverse = np.unique(both, return_inverse=True)
        weights = np.bincount(inverse, np.concatenate((weights, counts)), len(offsets)).astype(np.int64)
    l2_active = np.zeros(len(offsets), np.int64)
    l2_active[np.searchsorted(offsets, active[0])] = active[1]
    metadata = Metadata(
        header=header,
        l1=l1,
        l2_offsets=offsets,
        l2_weight=weights,
        l2_active=l2_active,
        refcount_table=await read_words(storage, header.refcount_table_offset, header.refcount_table_entries),
        regions=regions,
        file_size=align_up(storage.size, SECTOR_SIZE),
        findings=findings,
    )
    await _add_bitmaps(storage, metadata)
    return metadata


def _named(l1: UInt64Array, findings: Findings, cluster_size: int) -> tuple[Int64Array, Int64Array]:
    """The L2 tables an L1 table names, and how often."""
    offsets = (l1 & np.uint64(layout.OFFSET_MASK)).astype(np.int64)
    for entry in l1[l1 & np.uint64(layout.L1_RESERVED) != 0]:
        findings.corruption(f"found L1 entry with reserved bits set: {int(entry):x}")
    for offset in offsets[offsets % cluster_size != 0]:
        findings.corruption(f"l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
    return np.unique(offsets[offsets != 0], return_counts=True)


async def _add_bitmaps(storage: Storage, metadata: Metadata) -> None:
    """The bitmap directory, the bitmaps' tables and their clusters."""
    header, findings = metadata.header, metadata.findings
    try:
        bitmaps = await read_bitmap_directory(storage, header)
    except CorruptImageError as error:
        findings.corruption(str(error))
        return
    if bitmaps and header.bitmaps is not None:
        metadata.regions.append((header.bitmaps.directory_offset, header.bitmaps.directory_size))
    for bitmap in bitmaps:
        offset, length = bitmap.table_offset, bitmap.table_entries * 8
        too_long = bitmap.table_entries << header.cluster_bits > MAX_BITMAP_BYTES
        if too_long or offset % header.cluster_size or offset + length > metadata.file_size:
            findings.corruption(
                f"table of bitmap {bitmap.name!r} at {offset:#x}, {length} bytes: outside the file, or too long"
            )
            continue
        metadata.regions.append((offset, length))
        table = await read_words(storage, offset, bitmap.table_entries)
        reserved = table & np.uint64(BITMAP_ENTRY_RESERVED) != 0
        for entry in table[reserved]:
            findings.corruption(f"bitmap table entry with reserved bits set: {int(entry):x}")
        clusters = table[~reserved] & np.uint64(layout.OFFSET_MASK)
        metadata.regions.extend((int(offset), header.cluster_size) for offset in clusters[clusters != 0])


@dataclass(slots=True)
class Tables:
    """Some L2 tables, decoded; all columns are flat, ``width`` entries per table."""

    offsets: Int64Array
    weight: Int64Array
    active: Int64Array
    width: int
    entries: UInt64Array
    bitmaps: UInt64Array | None
    """The subcluster bitmaps of extended entries."""
    compressed: BoolArray
    """Compressed clusters that may be there."""
    allocated: BoolArray
    """Clusters with a host cluster of their own, be their content data or zeroes."""
    host_offset: Int64Array
    """Of ``allocated`` entries, bytes."""
    zeroes: BoolArray | None = None
    """Entries that were taken for empty, ``without_zeroes``."""

    def empty_zeroes(self) -> None:
        """Take standard entries with the ZERO flag for empty."""
        self.zeroes = ~self.compressed & (self.entries & np.uint64(layout.ZERO_FLAG) != 0)
        self.entries[self.zeroes] = 0
        self.allocated &= ~self.zeroes


async def walk_l2(storage: Storage, metadata: Metadata, *, active_only: bool = False) -> AsyncIterator[Tables]:
    """Every L2 table inside the file, in batches of BATCH_BYTES."""
    header = metadata.header
    inside = (metadata.l2_offsets % header.cluster_size == 0) & (metadata.l2_offsets < metadata.file_size)
    if active_only:
        inside &= metadata.l2_active > 0
    chosen = np.flatnonzero(inside)
    per_batch = max(1, BATCH_BYTES // header.cluster_size)
    for first in range(0, len(chosen), per_batch):
        part = chosen[first : first + per_batch]
        offsets = metadata.l2_offsets[part]
        data = await read_clusters(storage, offsets, header.cluster_size)
        tables = decode_l2(header, data, offsets, metadata.l2_weight[part], metadata.l2_active[part])
        if metadata.without_zeroes:
            tables.empty_zeroes()
        yield tables


async def read_clusters(storage: Storage, offsets: Int64Array, cluster_size: int) -> bytearray:
    """The clusters at ``offsets`` (ascending), one behind the other; neighbours are read together."""
    buffer = bytearray(len(offsets) * cluster_size)
    view = memoryview(buffer)
    breaks = np.flatnonzero(np.diff(offsets) != cluster_size) + 1
    bounds = [0, *breaks.tolist(), len(offsets)]
    for low, high in itertools.pairwise(bounds):
        await storage.read_into(int(offsets[low]), view[low * cluster_size : high * cluster_size])
    return buffer


def decode_l2(header: Header, data: bytearray, offsets: Int64Array, weight: Int64Array, active: Int64Array) -> Tables:
    """The tables in ``data``."""
    words = decode_words(data)
    bitmaps: UInt64Array | None = None
    if header.extended_l2:
        words, bitmaps = words[0::2].copy(), words[1::2].copy()
    compressed = words & np.uint64(layout.COMPRESSED_FLAG) != 0
    host_offset = (words & np.uint64(layout.OFFSET_MASK)).astype(np.int64)
    placed = host_offset != 0
    if header.has_data_file:
        # Cluster 0 of an external file is data; COPIED tells its entry from an empty one.
        placed |= words & np.uint64(layout.COPIED | layout.ZERO_FLAG) == np.uint64(layout.COPIED)
    return Tables(
        offsets=offsets,
        weight=weight,
        active=active,
        width=header.l2_entries,
        entries=words,
        bitmaps=bitmaps,
        compressed=compressed,
        allocated=placed & ~compressed,
        host_offset=host_offset,
    )


class Window:
    """Reference counts of the host clusters ``[first, first + len(counts))``."""

    def __init__(self, first: int, clusters: int) -> None:
        self.first = first
        self.counts = np.zeros(clusters, np.uint32)

    def add(self, clusters: Int64Array, weight: Int64Array | None = None) -> None:
        """One reference, or ``weight``, to each of ``clusters``; those outside the window do not count here."""
        if weight is not None and bool((weight == 1).all()):
            weight = None
        index = clusters - self.first
        if self.first or (len(index) and int(index.max()) >= len(self.counts)):
            inside = (index >= 0) & (index < len(self.counts))
            index = index[inside]
            weight = None if weight is None else weight[inside]
        if len(index) == 0:
            return
        low = int(index.min())
        span = int(index.max()) - low + 1
        if span <= 8 * len(index) + 4096:
            found = np.bincount(index - low, weight, span)
            self.counts[low : low + span] += found.astype(np.uint32)
        else:
            np.add.at(self.counts, index, np.uint32(1) if weight is None else weight.astype(np.uint32))

    def add_range(self, first: int, last: int) -> None:
        """One reference to every cluster from ``first`` to ``last``."""
        low, high = max(first - self.first, 0), min(last + 1 - self.first, len(self.counts))
        if low < high:
            self.counts[low:high] += np.uint32(1)

    def saturate(self, order: int) -> Int64Array:
        """Cap the counts at what a refcount can say; the clusters that were above."""
        limit = (1 << (1 << order)) - 1
        if order >= 5:
            return np.empty(0, np.int64)
        above = np.flatnonzero(self.counts > limit)
        self.counts[above] = limit
        return above + self.first


class DiskRefcounts:
    """The refcounts as they are on disk."""

    def __init__(self, storage: Storage, header: Header, refcount_table: UInt64Array) -> None:
        self._storage = storage
        self._header = header
        self.block_offsets = (refcount_table & np.uint64(layout.REFCOUNT_TABLE_OFFSET_MASK)).view(np.int64)
        self._unusable = (self.block_offsets % self._header.cluster_size != 0) | (self.block_offsets < 0)

    async def read(self, first: int, count: int) -> tuple[Counts, BoolArray | None]:
        """The refcounts of ``count`` clusters from ``first``, a multiple of a block's; and which cannot be known."""
        per_block = self._header.refcount_block_entries
        refcounts = np.zeros(count, f"u{max(1, self._header.refcount_bits // 8)}")
        unknown: BoolArray | None = None
        low = first // per_block
        offsets = self.block_offsets[low : low + div_ceil(count, per_block)]
        bad = self._unusable[low : low + len(offsets)]
        for number in np.flatnonzero(bad):
            if unknown is None:
                unknown = np.zeros(count, np.bool_)
            unknown[number * per_block : (number + 1) * per_block] = True
        usable = np.flatnonzero(~bad & (offsets != 0) & (offsets < self._storage.size))
        usable = usable[np.argsort(offsets[usable], kind="stable")]
        per_batch = max(1, BATCH_BYTES // self._header.cluster_size)
        for start in range(0, len(usable), per_batch):
            part = usable[start : start + per_batch]
            data = await read_clusters(self._storage, offsets[part], self._header.cluster_size)
            values = decode_counts(data, self._header.refcount_order).reshape(len(part), per_block)
            for row, number in enumerate(part.tolist()):
                at = number * per_block
                refcounts[at : at + per_block] = values[row, : count - at]
        return refcounts, unknown

    async def of(self, clusters: Int64Array) -> npt.NDArray[np.uint64]:
        """The refcounts of single clusters anywhere; 0 where there is no block."""
        per_block = self._header.refcount_block_entries
        values = np.zeros(len(clusters), np.uint64)
        blocks = clusters // per_block
        for block in np.unique(blocks[blocks < len(self.block_offsets)]).tolist():
            here = blocks == block
            found, _ = await self.read(block * per_block, per_block)
            values[here] = found[clusters[here] - block * per_block]
        return values
