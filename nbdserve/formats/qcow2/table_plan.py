"""Where the new tables of an image go, and what the refcounts are then (see ``rewrite``). Nothing here does I/O."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ConfigError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.check_analysis import Analysis
from nbdserve.formats.qcow2.check_walk import BoolArray, Int64Array, UInt64Array
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.refcounts import encode_counts
from nbdserve.formats.qcow2.snapshots import Snapshot
from nbdserve.formats.tables import Piece, encode_words
from nbdserve.units import align_up, div_ceil

Numbers = npt.NDArray[np.int32]
"""A refcount, or a change of one, for each host cluster."""


@dataclass(frozen=True, slots=True)
class State:
    """What an image is, as far as its tables say it."""

    header: Header
    """Of a new state: size, version, feature bits and refcount width count; the places of tables are made anew."""
    l1: UInt64Array
    """The active L1 table. Of a new state COPIED is set anew."""
    snapshots: Sequence[Snapshot]
    """Their L1 tables stay where they are, but for what is said at ``replace_tables``."""


@dataclass(slots=True)
class MovedTables:
    """L2 tables that change, in the order of their old host offsets; columns."""

    offsets: Int64Array
    times: Int64Array
    """L1 entries that are to name the new one."""
    everywhere: BoolArray
    """In the L1 tables of snapshots too."""
    zeroes: Int64Array
    """New data clusters of zeroes that it gets."""


class TablePlan:
    """Where everything new goes, and what the refcounts are then."""

    def __init__(
        self,
        path: str,
        old: Header,
        new: State,
        analysis: Analysis,
        final: Numbers,
        free: npt.NDArray[np.bool_],
    ) -> None:
        self._path, self._old, self._new = path, old, new
        self._bits, self._cluster = old.cluster_bits, old.cluster_size
        self._same_width = old.refcount_order == new.header.refcount_order
        self._per_block = new.header.refcount_block_entries
        self._old_table = analysis.metadata.refcount_table
        self._old_blocks = (self._old_table & np.uint64(layout.REFCOUNT_TABLE_OFFSET_MASK)).astype(np.int64)
        self._snapshots = list(new.snapshots)
        self._snapshot_table = b"".join(snapshot.build() for snapshot in new.snapshots)
        self._snapshot_l1: list[UInt64Array] = []
        self.final = final
        self._free = free
        self.moved_to: dict[int, int] = {}
        """Of L2 tables that the active L1 table names in another place: old host offset, new host offset."""
        self._moved_everywhere: dict[int, int] = {}
        self._blocks: dict[int, int] = {}
        """New refcount blocks by index: the clusters they go to."""

    def place_tables(self, moved: MovedTables, snapshot_l1: Sequence[UInt64Array]) -> None:
        """Places for L2 tables, zeroed data clusters, L1 tables and the snapshot table.

        ``snapshot_l1`` are the L1 tables of the snapshots, where they have to name other L2 tables; else nothing.
        """
        l1_clusters = [self._in_clusters(len(words) * 8) for words in (self._new.l1, *snapshot_l1)]
        table_clusters = self._in_clusters(len(self._snapshot_table))
        self._make_room(len(moved.offsets) + int(moved.zeroes.sum()) + sum(l1_clusters) + table_clusters)
        places = self._take(len(moved.offsets))
        self.final[places] = moved.times
        self.final[moved.offsets >> self._bits] -= moved.times.astype(np.int32)
        for offset, place, everywhere in zip(
            moved.offsets.tolist(), (places << self._bits).tolist(), moved.everywhere.tolist(), strict=True
        ):
            self.moved_to[offset] = place
            if everywhere:
                self._moved_everywhere[offset] = place
        self.zeroes = self._take(int(moved.zeroes.sum()))
        self.final[self.zeroes] = np.repeat(moved.times, moved.zeroes)
        self._l1_at = self._take_run(l1_clusters[0])
        for number, (words, clusters) in enumerate(zip(snapshot_l1, l1_clusters[1:], strict=True)):
            old = self._snapshots[number].l1_offset >> self._bits
            self.final[old : old + clusters] -= 1
            self._snapshots[number] = replace(self._snapshots[number], l1_offset=self._take_run(clusters))
            self._snapshot_l1.append(words)
        self._snapshot_table = b"".join(snapshot.build() for snapshot in self._snapshots)
        self._snapshots_at = self._take_run(table_clusters)

    def place_refcounts(self, counts: Numbers) -> None:
        """Places for refcount blocks that change, or all of another width, and for their table.

        They count themselves, so this is a fixpoint.
        """
        table_first = self._old.refcount_table_offset >> self._bits
        self.final[table_first : table_first + self._old.refcount_table_clusters] -= 1
        if not self._same_width:
            self.final[self._old_blocks[self._old_blocks != 0] >> self._bits] -= 1
        self._table_clusters, self._table_at = 0, 0
        while True:
            changed = self.final != 0
            if self._same_width:
                changed = self.final != np.pad(counts, (0, len(self.final) - len(counts)))
            blocks = np.flatnonzero(changed.reshape(-1, self._per_block).any(axis=1)).tolist()
            missing = [index for index in blocks if index not in self._blocks]
            entries = max([len(self._old_table) if self._same_width else 1, *(index + 1 for index in blocks)])
            if not missing and entries * 8 <= self._table_clusters << self._bits:
                return
            for index, cluster in zip(missing, self._take(len(missing)).tolist(), strict=True):
                self._blocks[index] = cluster
                if self._same_width and index < len(self._old_blocks) and self._old_blocks[index]:
                    self.final[self._old_blocks[index] >> self._bits] -= 1
            if entries * 8 > self._table_clusters << self._bits:
                first = self._table_at >> self._bits
                self.final[first : first + self._table_clusters] = 0
                self._table_clusters = self._in_clusters(entries * 8)
                self._table_at = self._take_run(self._table_clusters)

    def check_counts(self) -> None:
        """ConfigError when a refcount would be more than its width can say."""
        order = self._new.header.refcount_order
        most = (1 << min(31, 1 << order)) - 1
        if order < 5 and int(self.final.max()) > most:
            at = int(self.final.argmax())
            raise ConfigError(
                f"{self._path}: the cluster at {at << self._bits:#x} would have a refcount of {int(self.final[at])}, "
                f"{1 << order} bits count up to {most}: use more refcount_bits"
            )
        if self._table_clusters << self._bits > max(layout.MAX_REFCOUNT_TABLE_BYTES, self._cluster):
            raise ConfigError(f"{self._path}: with {1 << order} refcount_bits the refcount table would exceed 8 MiB")
        assert int(self.final.min()) >= 0

    def pieces(self) -> list[Piece]:
        """The L1 table, the snapshot table, and the refcounts, in whole clusters."""
        order = self._new.header.refcount_order
        kind = np.dtype(f"u{max(1, (1 << order) // 8)}")
        pieces: list[Piece] = []
        tables = [(self._l1_at, encode_words(self._l1(self._new.l1, self.moved_to)))]
        for snapshot, words in zip(self._snapshots, self._snapshot_l1, strict=False):
            tables.append((snapshot.l1_offset, encode_words(self._l1(words, self._moved_everywhere))))
        for offset, data in (*tables, (self._snapshots_at, self._snapshot_table)):
            if data:
                pieces.append((offset, data.ljust(align_up(len(data), self._cluster), b"\0")))
        table = np.zeros((self._table_clusters << self._bits) // 8, np.uint64)
        if self._same_width:
            table[: len(self._old_table)] = self._old_table
        for index, cluster in self._blocks.items():
            counts = self.final[index * self._per_block : (index + 1) * self._per_block].astype(kind)
            pieces.append((cluster << self._bits, encode_counts(counts, order)))
            table[index] = cluster << self._bits
        return [*pieces, (self._table_at, encode_words(table))]

    def _l1(self, words: UInt64Array, moved_to: Mapping[int, int]) -> UInt64Array:
        offsets = [moved_to.get(offset, offset) for offset in (words & np.uint64(layout.OFFSET_MASK)).tolist()]
        words = np.array(offsets, np.uint64)
        alone = self.final[(words >> np.uint64(self._bits)).astype(np.int64)] == 1
        words[(words != 0) & alone] |= np.uint64(layout.COPIED)
        return words

    def patch(self, sector: bytearray) -> None:
        """Change the header's first sector to what the new tables are."""
        header = self._new.header
        struct.pack_into(">Q", sector, layout.SIZE_AT, header.size)
        struct.pack_into(">IQ", sector, layout.L1_FIELDS_AT, len(self._new.l1), self._l1_at)
        struct.pack_into(
            ">QIIQ",
            sector,
            layout.REFCOUNT_TABLE_FIELDS_AT,
            self._table_at,
            self._table_clusters,
            len(self._snapshots),
            self._snapshots_at,
        )
        if header.version >= 3:
            struct.pack_into(">Q", sector, layout.AUTOCLEAR_AT, header.autoclear)
            struct.pack_into(">I", sector, layout.REFCOUNT_ORDER_AT, header.refcount_order)

    # --- free clusters ---------------------------------------------------------------------------------------------

    def _in_clusters(self, length: int) -> int:
        return div_ceil(length, self._cluster)

    def _make_room(self, clusters: int) -> None:
        """Look at so many clusters past the end of the file too, and at those that refcounts for all of them take."""
        total = len(self.final) + clusters
        blocks = 2 * div_ceil(total, self._per_block) + len(self._old_table) + 64
        total = align_up(total + 2 * (blocks + self._in_clusters(blocks * 8)), self._per_block)
        room = total - len(self.final)
        self.final = np.pad(self.final, (0, room))
        self._free = np.pad(self._free, (0, room), constant_values=True)

    def _take(self, count: int) -> Int64Array:
        """Free clusters, counted once from now on."""
        places = np.flatnonzero(self._free)[:count]
        assert len(places) == count
        self._free[places] = False
        self.final[places] = 1
        return places

    def _take_run(self, count: int) -> int:
        """The offset of the first of consecutive ones; 0 for none."""
        if not count:
            return 0
        places = np.flatnonzero(self._free)
        starts = np.flatnonzero(places[count - 1 :] - places[: len(places) - count + 1] == count - 1)
        first = int(places[starts[0]])
        self._free[first : first + count] = False
        self.final[first : first + count] = 1
        return first << self._bits
