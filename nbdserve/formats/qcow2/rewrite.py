"""Replacing the tables of an image in one step: what snapshots are made of, and a change of the refcounts' width.

An L2 entry's COPIED flag and the refcount it stands for are in different places, so no order of changing them in place
keeps them in agreement. Instead everything that changes - L2 tables, the L1 table, the snapshot table, refcount blocks
and their table - is written to clusters that are free, made stable, and put in force by one write of one sector: the
header's. Crash before it: the old image, with something in free clusters. After it: the new one. Neither has leaks.

Refcounts are changed by as much as the references change, so that what was leaked stays leaked.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ConfigError, CorruptImageError, UnsupportedImageError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.allocator import runs_of
from nbdserve.formats.qcow2.check_analysis import Analysis, read_header
from nbdserve.formats.qcow2.check_walk import (
    BoolArray,
    Int64Array,
    Metadata,
    Tables,
    UInt64Array,
    gather_metadata,
    read_words,
    walk_l2,
)
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.snapshots import read_snapshots
from nbdserve.formats.qcow2.table_plan import MovedTables, Numbers, State, TablePlan
from nbdserve.formats.tables import Piece, encode_words
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE

MAX_CLUSTERS: Final = 1 << 28
"""Host clusters of an image whose tables can be replaced: 16 TiB of file at 64 KiB. 15 bytes of memory each."""


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


async def replace_tables(
    storage: Storage, old: State, new: State, *, without_zeroes: bool = False, zeroes_as_data: bool = False
) -> None:
    """Turn the image, which is idle and in state ``old``, into ``new``. Stable on return.

    ``without_zeroes`` empties the (standard) entries that read as zeroes, in snapshots too, whose L1 tables then move;
    with ``zeroes_as_data`` they get data clusters of zeroes instead.
    CorruptImageError when its tables are not in order; ConfigError when there are more references than a refcount can
    count. Nothing is changed then.
    """
    analysis, references, counts = await _sound(storage, old)
    bare = replace(new.header, l1_entries=0, l1_offset=0, snapshot_count=0, snapshots_offset=0)
    target = await gather_metadata(storage, bare, new.l1, new.snapshots, 0)
    target.refcount_table = analysis.metadata.refcount_table
    target.without_zeroes = without_zeroes
    wanted = (await Analysis(storage, target).count_all(len(references))).counts
    free = (counts == 0) & (references == 0) & (wanted == 0)
    np.subtract(wanted, references, out=wanted)  # modulo 2^32, which is a signed difference
    final = counts + wanted.view(np.int32)
    moved = await _changed_tables(storage, target, final, zeroes_as_data=zeroes_as_data)
    snapshot_l1: list[UInt64Array] = []
    if moved.everywhere.any():
        snapshot_l1 = [await read_words(storage, each.l1_offset, each.l1_entries) for each in new.snapshots]
    plan = TablePlan(storage.path, old.header, new, analysis, final, free)
    plan.place_tables(moved, snapshot_l1)
    plan.place_refcounts(counts)
    plan.check_counts()
    bits = old.header.cluster_bits
    for first, count in runs_of(plan.zeroes):
        await storage.zero(first << bits, count << bits)
    await _write_l2(storage, target, plan, zeroes_as_data=zeroes_as_data)
    await _barrier_tables(storage, plan.pieces())
    sector = await storage.read(0, SECTOR_SIZE)
    plan.patch(sector)
    await _barrier_header(storage, sector)
    with suppress(OSError):  # the new tables are in force, whatever becomes of free space
        for first, count in runs_of(np.flatnonzero((plan.final[: len(counts)] == 0) & (counts != 0))):
            await storage.discard(first << bits, count << bits)


async def _barrier_tables(storage: Storage, pieces: list[Piece]) -> None:
    """Everything new, the L2 tables and zeroes written before included, is stable before the header names it.

    Crash before the barrier: it is in clusters that the tables in force count as free. Without it the header could
    name tables that were never written.
    """
    await storage.write_stable(pieces)


async def _barrier_header(storage: Storage, sector: bytearray) -> None:
    """One sector puts the new tables in force. What only the old ones used is given back to the file system after it.

    Crash before the barrier: the old image or the new one. Without it, clusters that the image on disk still uses could
    be discarded, or written to by whoever goes on with the new tables.
    """
    await storage.write_stable([(0, sector)])


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


async def _changed_tables(storage: Storage, target: Metadata, final: Numbers, *, zeroes_as_data: bool) -> MovedTables:
    """The tables of the active disk with a wrong COPIED flag, and all that lose entries that read as zeroes."""
    columns: list[tuple[Int64Array, Int64Array, BoolArray, Int64Array]] = []
    async for tables in walk_l2(storage, target, active_only=not target.without_zeroes):
        wrong = (_set_copied(target.header, tables, final) != tables.entries).reshape(-1, tables.width).any(axis=1)
        wrong &= tables.active > 0
        lost = np.zeros(len(wrong), np.int64)
        if tables.zeroes is not None:
            lost = tables.zeroes.reshape(-1, tables.width).sum(axis=1)
        chosen = wrong | (lost > 0)
        times = np.where(lost > 0, tables.weight, tables.active)
        filled = lost if zeroes_as_data else np.zeros_like(lost)
        columns.append((tables.offsets[chosen], times[chosen], lost[chosen] > 0, filled[chosen]))
    none = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.int64))
    return MovedTables(*(np.concatenate(column) for column in zip(none, *columns, strict=True)))


async def _write_l2(storage: Storage, target: Metadata, plan: TablePlan, *, zeroes_as_data: bool) -> None:
    """The tables that move, in their new places."""
    used = 0
    async for tables in walk_l2(storage, target, active_only=not target.without_zeroes):
        found = np.array([offset in plan.moved_to for offset in tables.offsets.tolist()], np.bool_)
        words = _set_copied(target.header, tables, plan.final)
        if zeroes_as_data and tables.zeroes is not None:
            at = np.flatnonzero(tables.zeroes)
            places = plan.zeroes[used : used + len(at)]
            copied = np.where(plan.final[places] == 1, np.uint64(layout.COPIED), np.uint64(0))
            words[at] = (places.astype(np.uint64) << np.uint64(target.header.cluster_bits)) | copied
            used += len(at)
        if tables.bitmaps is not None:
            words = np.column_stack((words, tables.bitmaps)).reshape(-1)
        rows = words.reshape(len(tables.offsets), -1)
        await storage.write_all(
            [(plan.moved_to[int(tables.offsets[row])], encode_words(rows[row])) for row in np.flatnonzero(found)]
        )
