"""The ordered commit: how changes in memory reach the disk so that every crash is survived.

At each point the disk shows either the old or the new mapping of a cluster, every cluster it refers to is counted at
least as often as it is referred to, and COPIED is set only where the count is 1. What a crash may leave is a leak.

One commit serves every ``flush`` that waits when it begins; a flush that arrives later waits for the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from nbdserve.formats.group_run import FollowUp, GroupRun
from nbdserve.formats.qcow2.allocator import Allocator, ClusterRange
from nbdserve.formats.qcow2.layout import REFCOUNT_TABLE_FIELDS_AT
from nbdserve.formats.qcow2.refcounts import Refcounts
from nbdserve.formats.tables import L2Cache, Piece, Table, encode_words
from nbdserve.storage.base import Storage

_log: Final = logging.getLogger(__name__)


class HeaderSector:
    """Sector 0, which is patched in place and written alone: a disk does not tear 512 bytes."""

    def __init__(self, storage: Storage, sector: bytes | bytearray) -> None:
        self._storage = storage
        self._sector = bytearray(sector)
        self._lock = asyncio.Lock()

    def read_u64(self, at: int) -> int:
        """The field of 8 bytes at ``at``."""
        return int.from_bytes(self._sector[at : at + 8], "big")

    def read(self, at: int, length: int) -> bytes:
        """The bytes at ``at``."""
        return bytes(self._sector[at : at + length])

    async def patch(self, at: int, value: bytes) -> None:
        """Replace the bytes at ``at``, durably."""
        await self.patch_all([(at, value)])

    async def patch_all(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        """Replace the bytes of each ``(at, value)``, together and durably."""
        async with self._lock:  # two patches in flight could reach the disk in the wrong order
            for at, value in pieces:
                self._sector[at : at + len(value)] = value
            await self._storage.write_stable([(0, bytes(self._sector))])


@dataclass(slots=True)
class _Batch:
    """What one commit writes: a copy of everything that differed from the disk at one moment."""

    new_blocks: list[Piece] = field(default_factory=list)
    moved_table: tuple[Piece, int] | None = None
    """The refcount table in its new place, and its clusters."""
    refcounts: list[Piece] = field(default_factory=list)
    """Sectors of the refcount table and of refcount blocks, and whole new L2 tables, which nothing shows yet."""
    mapping: list[Piece] = field(default_factory=list)
    """Sectors of the L1 table and of L2 tables."""
    freed: list[ClusterRange] = field(default_factory=list)
    undo_refcounts: list[Callable[[], None]] = field(default_factory=list)
    undo_mapping: list[Callable[[], None]] = field(default_factory=list)
    """These mark what was to be written as different from the disk again."""
    unpin: list[Callable[[], None]] = field(default_factory=list)


class Committer:
    """Writes back the tables of one image."""

    def __init__(
        self,
        storage: Storage,
        data: Storage,
        header: HeaderSector,
        l1: Table,
        cache: L2Cache,
        refcounts: Refcounts,
        allocator: Allocator,
    ) -> None:
        self._storage = storage
        self._data = data
        self._header = header
        self.l1 = l1
        self._cache = cache
        self._refcounts = refcounts
        self._allocator = allocator
        self._runs = GroupRun(self._run)

    @property
    def is_clean(self) -> bool:
        """Everything is on disk and nothing is in quarantine."""
        refcounts = self._refcounts
        return not (
            self._cache.changed
            or self.l1.dirty
            or refcounts.changed
            or refcounts.table.dirty
            or refcounts.table_moved
            or self._allocator.quarantine
        )

    async def commit(self) -> None:
        """Everything published before this call, and the data behind it, is stable on return."""
        await self._runs.join()

    async def settle(self) -> None:
        """Commit until nothing is left: the counts of what one commit freed are written by the next."""
        await self.commit()
        while True:
            await self._runs.idle()
            if self.is_clean:
                return
            await self.commit()

    async def _run(self) -> FollowUp:
        return partial(self._follow_up, await self._commit_once())

    async def _follow_up(self, freed: list[ClusterRange]) -> None:
        try:
            await self._release_quarantine(freed)
        except Exception as error:
            _log.warning("%s: freed clusters stay in use until 'image check -r leaks': %s", self._storage.path, error)

    async def _commit_once(self) -> list[ClusterRange]:
        batch = self._collect()
        try:
            await self._barrier_new_refcount_blocks(batch)
            await self._barrier_refcount_table(batch)
            await self._barrier_refcounts_and_data(batch)
            batch.undo_refcounts.clear()  # stable: after a failure below, only the mapping is to be written again
            await self._barrier_mapping(batch)
        except BaseException:
            for undo in batch.undo_refcounts + batch.undo_mapping:
                undo()
            self._allocator.quarantine += batch.freed
            raise
        finally:
            for unpin in batch.unpin:
                unpin()
        return batch.freed

    async def _barrier_new_refcount_blocks(self, batch: _Batch) -> None:
        """New refcount blocks are stable before the refcount table points at them.

        Crash before the barrier: nothing on disk refers to them. Without it the table could point at a block that was
        never written, whose garbage would count clusters in use as free.
        """
        if batch.new_blocks:
            await self._storage.write_stable(batch.new_blocks)

    async def _barrier_refcount_table(self, batch: _Batch) -> None:
        """A refcount table that moved is stable in its new place before the header names that.

        Crash before the header is written: the old table is still where the header says, and lacks only blocks that
        count nothing but clusters no mapping shows yet. Its clusters are in quarantine until this commit is complete.
        """
        if batch.moved_table is not None:
            table, clusters = batch.moved_table
            await self._storage.write_stable([table])
            await self._header.patch(
                REFCOUNT_TABLE_FIELDS_AT, table[0].to_bytes(8, "big") + clusters.to_bytes(4, "big")
            )

    async def _barrier_refcounts_and_data(self, batch: _Batch) -> None:
        """Guest data, the counts of new clusters, and new L2 tables are stable before anything shows them.

        Crash before the barrier: counts may be higher than what refers to the clusters, which is a leak. Counts that
        are lowered here are those of clusters whose last mapping an earlier commit has removed for good.
        """
        if self._data is not self._storage:
            await self._data.flush()
        if batch.refcounts:
            await self._storage.write_stable(batch.refcounts)
        elif self._data is self._storage:
            await self._storage.flush()

    async def _barrier_mapping(self, batch: _Batch) -> None:
        """L1 and L2 entries appear, one 512-byte sector at a time, in any order; at the end all of them are stable.

        Crash before the barrier: each entry is old or new. The old one still refers to clusters nobody has reused, for
        they are in quarantine; the new one to counted clusters with their data. An L1 entry that is new refers to an L2
        table that was complete before it.
        """
        if batch.mapping:
            await self._storage.write_stable(batch.mapping)

    async def _release_quarantine(self, freed: list[ClusterRange]) -> None:
        """Clusters that lost their mapping before this commit become free: no mapping on disk has them any more.

        Crash from here on: their counts on disk are still the old ones, which is a leak, until the next commit.
        """
        await self._allocator.release(freed)

    def _collect(self) -> _Batch:
        """Copy what differs from the disk, now, and count it as written."""
        batch = _Batch()
        batch.freed, self._allocator.quarantine[:] = list(self._allocator.quarantine), []
        self._collect_refcounts(batch)
        for table in self._cache.changed:
            table.pins += 1
            batch.unpin.append(table.unpin)
            if table.fresh:
                batch.refcounts.append((table.host_offset, encode_words(table.words)))
                batch.undo_refcounts.append(partial(table.relocate, table.host_offset))
                table.fresh = False
                table.dirty.clear()
            else:
                batch.undo_mapping.append(partial(self._cache.changed.add, table))
                self._collect_sectors(table, batch.mapping, batch.undo_mapping)
        self._cache.changed.clear()
        self._collect_sectors(self.l1, batch.mapping, batch.undo_mapping)
        return batch

    def _collect_refcounts(self, batch: _Batch) -> None:
        refcounts = self._refcounts
        for index in sorted(refcounts.changed):
            block = refcounts.block(index)
            assert block is not None
            block.pins += 1
            batch.unpin.append(block.unpin)
            batch.undo_refcounts.append(partial(refcounts.mark, index, frozenset(block.dirty), block.fresh))
            if block.fresh:
                batch.new_blocks.append(refcounts.whole(index))
            else:
                batch.refcounts += refcounts.pieces(index, block.dirty)
            block.dirty.clear()
            block.fresh = False
        refcounts.changed.clear()
        if refcounts.table_moved:
            table = refcounts.table
            batch.moved_table = (table.host_offset, encode_words(table.words)), refcounts.table_clusters
            batch.undo_refcounts.append(refcounts.mark_moved)
            table.dirty.clear()
            refcounts.table_moved = False
        else:
            self._collect_sectors(refcounts.table, batch.refcounts, batch.undo_refcounts)

    @staticmethod
    def _collect_sectors(table: Table, pieces: list[Piece], undo: list[Callable[[], None]]) -> None:
        if table.dirty:
            pieces += table.pieces(table.dirty)
            undo.append(partial(table.dirty.update, frozenset(table.dirty)))
            table.dirty.clear()
