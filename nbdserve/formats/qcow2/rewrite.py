"""Replacing the tables of an image in one step: what snapshots are made of, and a change of the refcounts' width.

An L2 entry's COPIED flag and the refcount it stands for are in different places, so no order of changing them in place
keeps them in agreement. Instead everything that changes - L2 tables, the L1 table, the snapshot table, refcount blocks
and their table - is written to clusters that are free, made stable, and put in force by one write of one sector: the
header's. Crash before it: the old image, with something in free clusters. After it: the new one. Neither has leaks.

Refcounts are changed by as much as the references change, so that what was leaked stays leaked.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ConfigError, CorruptImageError, UnsupportedImageError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.check_analysis import Analysis, read_header
from nbdserve.formats.qcow2.check_walk import (
    Int64Array,
    Metadata,
    Tables,
    UInt64Array,
    gather_metadata,
    read_words,
    walk_l2,
)
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.refcounts import encode_counts
from nbdserve.formats.qcow2.snapshots import Snapshot, read_snapshots
from nbdserve.formats.tables import Piece, encode_words
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil

MAX_CLUSTERS: Final = 1 << 28
"""Host clusters of an image whose tables can be replaced: 16 TiB of file at 64 KiB. 15 bytes of memory each."""

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
    """Their L1 tables stay where they are."""


async def read_state(storage: Storage) -> State:
    """The image as it is on disk. ImageError."""
    header = await read_header(storage)
    if storage.read_only:
        raise ConfigError(f"{storage.path}: the file is open read-only")
    if header.incompatible & layout.INCOMPATIBLE_CORRUPT:
        raise _unsound(storage.path, "the image is marked corrupt")
    snapshots, _ = await read_snapshots(storage, header)
    return State(header, await read_words(storage, header.l1_offset, header.l1_entries), snapshots)


def _unsound(path: str, problem: str) -> CorruptImageError:
    return CorruptImageError(path, problem, hint="image check -r all")


async def replace_tables(storage: Storage, old: State, new: State) -> None:
    """Turn the image, which is idle and in state ``old``, into ``new``. Stable on return.

    CorruptImageError when its tables are not in order; ConfigError when there are more references than a refcount can
    count. Nothing is changed then.
    """
    analysis, references, counts = await _sound(storage, old)
    bare = replace(new.header, l1_entries=0, l1_offset=0, snapshot_count=0, snapshots_offset=0)
    target = await gather_metadata(storage, bare, new.l1, new.snapshots, 0)
    target.refcount_table = analysis.metadata.refcount_table
    wanted = (await Analysis(storage, target).count_all(len(references))).counts
    free = (counts == 0) & (references == 0) & (wanted == 0)
    np.subtract(wanted, references, out=wanted)  # modulo 2^32, which is a signed difference
    final = counts + wanted.view(np.int32)
    moved = await _wrong_tables(storage, target, final)
    plan = _Plan(storage.path, old.header, new, analysis, final, free)
    plan.place_tables(moved)
    plan.place_refcounts(counts)
    plan.check_counts()
    await _write_l2(storage, target, plan)
    await storage.write_all(plan.pieces())
    await storage.flush()
    sector = await storage.read(0, SECTOR_SIZE)
    plan.patch(sector)
    await storage.write(0, sector)
    await storage.flush()
    freed = np.flatnonzero((plan.final[: len(counts)] == 0) & (counts != 0))
    for part in np.split(freed, np.flatnonzero(np.diff(freed) != 1) + 1) if len(freed) else []:
        bits = new.header.cluster_bits
        await storage.discard(int(part[0]) << bits, len(part) << bits)


async def _sound(storage: Storage, old: State) -> tuple[Analysis, npt.NDArray[np.uint32], Numbers]:
    """The image, found in order; the references to each cluster, and their counts."""
    metadata = await gather_metadata(
        storage, old.header, old.l1, old.snapshots, (await read_snapshots(storage, old.header))[1]
    )
    analysis = Analysis(storage, metadata, window_clusters=MAX_CLUSTERS)
    if analysis.total > MAX_CLUSTERS:
        raise UnsupportedImageError(
            storage.path,
            f"its tables can be replaced up to {MAX_CLUSTERS} clusters",
            field="clusters of the file",
            value=analysis.total,
        )
    async for window, refcounts, unknown in analysis.windows(report=True):
        analysis.judge(window, refcounts, unknown)
        result = analysis.result
        if result.corruptions or result.check_errors:
            raise _unsound(storage.path, f"its metadata has {result.corruptions + result.check_errors} errors")
        if int(refcounts.max()) >= 1 << 31:
            raise _unsound(storage.path, f"a refcount is {int(refcounts.max())}")
        return analysis, window.counts, refcounts.astype(np.int32)
    raise AssertionError("there is always a first window")


def _set_copied(header: Header, tables: Tables, final: Numbers) -> UInt64Array:
    """The entries with COPIED where the refcount will be 1, and nowhere else."""
    entries = tables.entries & np.uint64(~layout.COPIED & (1 << 64) - 1)
    at = np.flatnonzero(tables.allocated)
    if not header.has_data_file:
        at = at[final[tables.host_offset[at] >> header.cluster_bits] == 1]
    entries[at] |= np.uint64(layout.COPIED)
    return entries


@dataclass(slots=True)
class _Moved:
    """L2 tables of the active disk with a wrong COPIED flag, and how often its L1 table names them."""

    offsets: Int64Array
    times: Int64Array


async def _wrong_tables(storage: Storage, target: Metadata, final: Numbers) -> _Moved:
    offsets, times = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    async for tables in walk_l2(storage, target, active_only=True):
        wrong = (_set_copied(target.header, tables, final) != tables.entries).reshape(-1, tables.width).any(axis=1)
        offsets.append(tables.offsets[wrong])
        times.append(tables.active[wrong])
    return _Moved(np.concatenate(offsets), np.concatenate(times))


async def _write_l2(storage: Storage, target: Metadata, plan: _Plan) -> None:
    """The tables that move, in their new places."""
    async for tables in walk_l2(storage, target, active_only=True):
        found = np.isin(tables.offsets, plan.moved.offsets)
        if not found.any():
            continue
        words = _set_copied(target.header, tables, plan.final)
        if tables.bitmaps is not None:
            words = np.column_stack((words, tables.bitmaps)).reshape(-1)
        rows = words.reshape(len(tables.offsets), -1)
        await storage.write_all(
            [(plan.new_place(int(tables.offsets[row])), encode_words(rows[row])) for row in np.flatnonzero(found)]
        )


class _Plan:
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
        self._snapshot_table = b"".join(snapshot.build() for snapshot in new.snapshots)
        self.final = final
        self._free = free
        self._moved_to: dict[int, int] = {}
        self._blocks: dict[int, int] = {}
        """New refcount blocks by index: the clusters they go to."""

    def place_tables(self, moved: _Moved) -> None:
        """Places for L2 tables, the L1 table and the snapshot table."""
        self.moved = moved
        l1, snapshots = self._in_clusters(len(self._new.l1) * 8), self._in_clusters(len(self._snapshot_table))
        self._make_room(len(moved.offsets) + l1 + snapshots)
        places = self._take(len(moved.offsets))
        self.final[places] = moved.times
        self.final[moved.offsets >> self._bits] -= moved.times.astype(np.int32)
        self._moved_to = dict(zip(moved.offsets.tolist(), (places << self._bits).tolist(), strict=True))
        self._l1_at, self._snapshots_at = self._take_run(l1), self._take_run(snapshots)

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

    def new_place(self, offset: int) -> int:
        """Where the L2 table at ``offset`` goes."""
        return self._moved_to[offset]

    def pieces(self) -> list[Piece]:
        """The L1 table, the snapshot table, and the refcounts, in whole clusters."""
        order = self._new.header.refcount_order
        kind = np.dtype(f"u{max(1, (1 << order) // 8)}")
        pieces: list[Piece] = []
        for data, offset in ((encode_words(self._new_l1()), self._l1_at), (self._snapshot_table, self._snapshots_at)):
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

    def _new_l1(self) -> UInt64Array:
        offsets = [
            self._moved_to.get(offset, offset) for offset in (self._new.l1 & np.uint64(layout.OFFSET_MASK)).tolist()
        ]
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
            len(self._new.snapshots),
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
