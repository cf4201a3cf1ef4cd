"""Refcounts: the refcount table, and refcount blocks of every width (qcow2.rst, "Host cluster management").

Blocks are cached as numpy arrays of one count per item. The table is kept whole (at most 8 MiB).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.errors import RequestError
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.layout import MAX_REFCOUNT_TABLE_BYTES
from nbdserve.formats.tables import Piece, Table, decode_words, sector_runs
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.units import MIB, SECTOR_SIZE, div_ceil

Counts: TypeAlias = npt.NDArray[Any]
"""One refcount per item, of the narrowest unsigned type that holds it."""

CACHE_BYTES: Final = 16 * MIB
MIN_CACHED_BLOCKS: Final = 4


def decode_counts(data: ReadBuffer, order: int) -> Counts:
    """The refcounts in ``data``, each ``1 << order`` bits wide; narrow ones begin at a byte's least significant bit."""
    if order >= 3:
        width = 1 << order - 3
        return np.frombuffer(data, f">u{width}").astype(f"u{width}")
    packed = np.frombuffer(data, np.uint8)
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    counts: Counts = (packed[:, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(-1)
    return counts


def encode_counts(counts: Counts, order: int) -> bytes:
    """The stored form of ``counts``."""
    if order >= 3:
        return bytes(counts.astype(f">u{1 << order - 3}").tobytes())
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed = np.bitwise_or.reduce(counts.reshape(-1, 8 // bits) << shifts, axis=1)
    return bytes(packed.astype(np.uint8).tobytes())


class RefcountBlock:
    """The counts of ``len(counts)`` clusters. ``fresh``: nothing of the block is on disk yet."""

    __slots__ = ("counts", "dirty", "fresh", "host_offset", "pins")

    def __init__(self, host_offset: int, counts: Counts, *, fresh: bool) -> None:
        self.host_offset = host_offset
        self.counts = counts
        self.fresh = fresh
        self.dirty: set[int] = set()
        self.pins = 0

    def unpin(self) -> None:
        """Let go of it."""
        self.pins -= 1


class Refcounts:
    """The refcounts of an image: reading needs ``load``, everything else works on what is in memory."""

    def __init__(self, storage: Storage, header: Header, table: Table) -> None:
        self.table = table
        self.table_clusters = header.refcount_table_clusters
        self.table_moved = False
        """The table has outgrown its place on disk; the header still names the old one."""
        self.changed: set[int] = set()
        """Indexes of blocks that differ from the disk."""
        self.entries = header.refcount_block_entries
        """Clusters per block."""
        self.highest = (1 << header.refcount_bits) - 1
        """The largest count."""
        self._order = header.refcount_order
        self._storage = storage
        self._cluster_size = header.cluster_size
        self._blocks: dict[int, RefcountBlock] = {}
        in_memory = self.entries * max(1, header.refcount_bits // 8)
        self._limit = max(MIN_CACHED_BLOCKS, CACHE_BYTES // (in_memory + 512))
        self._entries_per_sector = SECTOR_SIZE * 8 // header.refcount_bits

    @classmethod
    async def open(cls, storage: Storage, header: Header) -> Refcounts:
        """Read the refcount table."""
        length = header.refcount_table_clusters * header.cluster_size
        words = decode_words(await storage.read(header.refcount_table_offset, length))
        return cls(storage, header, Table(header.refcount_table_offset, words))

    def block_offset(self, index: int) -> int:
        """Host offset of block ``index``; 0 where there is none, so that all its counts are 0."""
        return self.table.entries[index] if index < len(self.table.words) else 0

    def block(self, index: int) -> RefcountBlock | None:
        """The block, if it is in memory."""
        return self._blocks.get(index)

    async def load(self, index: int) -> RefcountBlock:
        """The block, which must exist. RequestError(EIO) when it cannot be where the table says."""
        block = self._blocks.get(index)
        if block is None:
            offset = self.block_offset(index)
            if not offset or offset % self._cluster_size or offset >= self._storage.size:
                path = self._storage.path
                raise RequestError(errno.EIO, f"{path}: refcount table entry {index} is invalid: {offset:#x}")
            data = await self._storage.read(offset, self._cluster_size)
            block = self._blocks.get(index)  # it may have come by another way meanwhile
            if block is None:
                block = RefcountBlock(offset, decode_counts(data, self._order), fresh=False)
                self._keep(index, block)
        return block

    def _keep(self, index: int, block: RefcountBlock) -> None:
        if len(self._blocks) >= self._limit:
            unused = (i for i, b in self._blocks.items() if not b.pins and i not in self.changed)
            if (oldest := next(unused, None)) is not None:
                del self._blocks[oldest]
        self._blocks[index] = block

    async def count(self, cluster: int) -> int:
        """The refcount of one host cluster."""
        index, position = divmod(cluster, self.entries)
        if not self.block_offset(index):
            return 0
        return int((await self.load(index)).counts[position])

    def set_range(self, first: int, count: int, value: int) -> None:
        """Set the counts of clusters of one block that is in memory."""
        index, position = divmod(first, self.entries)
        block = self._blocks[index]
        if count == 1:  # what a small write takes; a slice costs 0.3 us more
            block.counts[position] = value
            block.dirty.add(position // self._entries_per_sector)
            self.changed.add(index)
        else:
            block.counts[position : position + count] = value
            self.touch(first, count)

    def touch(self, first: int, count: int) -> None:
        """The counts of clusters of one block were changed."""
        index, position = divmod(first, self.entries)
        self.changed.add(index)
        per = self._entries_per_sector
        self._blocks[index].dirty.update(range(position // per, (position + count - 1) // per + 1))

    def mark(self, index: int, sectors: Iterable[int], fresh: bool) -> None:
        """These sectors of a block that is in memory, or with ``fresh`` all of it, differ from the disk after all."""
        block = self._blocks[index]
        block.dirty.update(sectors)
        block.fresh = block.fresh or fresh
        self.changed.add(index)

    def mark_moved(self) -> None:
        """The header still names the table's old place."""
        self.table_moved = True

    def add_block(self, index: int, cluster: int) -> None:
        """Make a block of zeroes at the host cluster ``cluster``, which is not counted by this."""
        kind = np.dtype(f"u{1 << max(0, self._order - 3)}")
        self._keep(index, RefcountBlock(cluster * self._cluster_size, np.zeros(self.entries, kind), fresh=True))
        self.changed.add(index)
        self.table.store(index, cluster * self._cluster_size)

    def grow_table(self, index: int) -> tuple[int, int]:
        """Move the table to where block ``index``, which it has no room for, begins to count.

        New blocks are put first, then the table, all of it counted by those blocks. Returns ``(first, count)`` of the
        clusters used. OSError(ENOSPC) where the table would exceed 8 MiB.
        """
        per_cluster = self._cluster_size // 8
        most = MAX_REFCOUNT_TABLE_BYTES // self._cluster_size
        clusters = min(most, max(div_ceil(index + 2, per_cluster), self.table_clusters * 3 // 2 + 1))
        blocks = div_ceil(clusters, self.entries - 1)
        if index + blocks > clusters * per_cluster:
            raise OSError(errno.ENOSPC, f"{self._storage.path}: the refcount table is full (8 MiB)")
        words = np.zeros(clusters * per_cluster, np.uint64)
        words[: len(self.table.words)] = self.table.words
        first = index * self.entries
        self.table = Table((first + blocks) * self._cluster_size, words)
        self.table_clusters = clusters
        self.table_moved = True
        for number in range(blocks):
            self.add_block(index + number, first + number)
        left, start = blocks + clusters, first
        while left:
            part = min(left, self.entries - start % self.entries)
            self.set_range(start, part, 1)
            left, start = left - part, start + part
        return first, blocks + clusters

    def pieces(self, index: int, sectors: Iterable[int]) -> list[Piece]:
        """The stored form of these sectors of a block as they are now."""
        block, per = self._blocks[index], self._entries_per_sector
        return [
            (block.host_offset + first * SECTOR_SIZE, encode_counts(block.counts[first * per : end * per], self._order))
            for first, end in sector_runs(sectors)
        ]

    def whole(self, index: int) -> Piece:
        """The stored form of a block as it is now."""
        block = self._blocks[index]
        return block.host_offset, encode_counts(block.counts, self._order)
