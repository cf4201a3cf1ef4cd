"""Repairing a qcow2 image, in an order in which a crash at any point leaves the image no worse than it was.

1. L2 entries that name an impossible place for data they do not have become plain zeroes.
2. Refcounts that are too low are raised, on stable storage before anything else; then those too high are lowered.
   Where the refcount structure itself is broken, a new one is written into free space behind the image, made stable,
   and put in force by one sector: the header's.
3. COPIED follows the refcounts.
4. An image without an error left is no longer marked dirty or corrupt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdserve.errors import CorruptImageError
from nbdserve.formats.base import CheckResult
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.check_analysis import Analysis, analyse, read_header
from nbdserve.formats.qcow2.check_walk import Int64Array, Tables, Window, walk_l2
from nbdserve.formats.qcow2.refcounts import Counts, encode_counts
from nbdserve.formats.tables import Piece, encode_words
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, div_ceil

MAX_ROUNDS: Final = 3
"""A repair can bring to light what another one mends (a new refcount structure makes the file longer)."""


async def repair(storage: Storage, *, errors: bool) -> CheckResult:
    """Mend leaks, and with ``errors`` corruptions; the result of a last check with what was fixed on the way."""
    leaks_fixed = corruptions_fixed = 0
    messages: list[str] = []
    analysis = await analyse(storage)
    for _ in range(MAX_ROUNDS):
        before = analysis.result
        messages += before.messages
        if not (before.corruptions or before.leaks):
            break
        if errors and (dropped := await _drop_misplaced_zeroes(analysis)):
            corruptions_fixed += dropped
            analysis = await analyse(storage)
        rebuild = analysis.needs_rebuild
        if not rebuild:
            raised, lowered = await _mend_refcounts(analysis, errors=errors)
            corruptions_fixed += raised
            leaks_fixed += lowered
        elif errors:
            await _rebuild(analysis)
        wrong = analysis
        analysis = await analyse(storage)
        if rebuild:
            corruptions_fixed += max(0, wrong.wrong_counts - analysis.wrong_counts)
            leaks_fixed += max(0, wrong.result.leaks - analysis.result.leaks)
        if errors or analysis.counts_agree:
            copied_fixed = await _mend_copied(analysis)
            corruptions_fixed += copied_fixed
            analysis = await analyse(storage) if copied_fixed else analysis
        if (analysis.result.corruptions, analysis.result.leaks) == (before.corruptions, before.leaks):
            break
    result = analysis.result
    if not result.corruptions and not result.check_errors:
        await _clear_marks(storage)
    result.leaks_fixed, result.corruptions_fixed = leaks_fixed, corruptions_fixed
    result.messages = list(dict.fromkeys([*messages, *result.messages]))
    return result


async def _write_tables(
    analysis: Analysis, tables: Tables, entries: npt.NDArray[np.uint64], changed: Int64Array
) -> None:
    """Write the L2 tables that ``changed`` entries are in, with ``entries`` in place of theirs."""
    words = entries
    if tables.bitmaps is not None:
        words = np.column_stack((entries, tables.bitmaps)).reshape(-1)
    rows = words.reshape(len(tables.offsets), -1)
    pieces: list[Piece] = [
        (int(tables.offsets[row]), encode_words(rows[row])) for row in np.unique(changed // tables.width)
    ]
    await analysis.storage.write_all(pieces)


async def _drop_misplaced_zeroes(analysis: Analysis) -> int:
    """Entries that reserve an impossible place, but have no data there, keep their zeroes and lose the place."""
    header, fixed = analysis.header, 0
    async for tables in walk_l2(analysis.storage, analysis.metadata):
        wrong = tables.allocated & (tables.host_offset & (header.cluster_size - 1) != 0)
        if tables.bitmaps is None:
            wrong &= tables.entries & np.uint64(layout.ZERO_FLAG) != 0
        else:
            wrong &= tables.bitmaps & np.uint64(0xFFFF_FFFF) == 0
        changed = np.flatnonzero(wrong)
        if len(changed):
            zero = np.uint64(layout.ZERO_FLAG if tables.bitmaps is None else 0)
            await _write_tables(analysis, tables, np.where(wrong, zero, tables.entries), changed)
            fixed += len(changed)
    if fixed:
        await analysis.storage.flush()
    return fixed


async def _mend_refcounts(analysis: Analysis, *, errors: bool) -> tuple[int, int]:
    """Raise what is too low (with ``errors``), then lower what is too high; how many clusters of each."""
    raised = lowered = 0
    async for window, refcounts, _ in analysis.windows():
        analysis.count_structure(window)
        window.saturate(analysis.header.refcount_order)
        differs = analysis.differing(window, refcounts)
        low = differs & (refcounts < window.counts)
        if errors and low.any():
            refcounts[low] = window.counts[low]
            await _write_refcounts(analysis, window, refcounts, low)
            # A count that is too low is what loses data: it is right on disk before anything is given up.
            await analysis.storage.flush()
            raised += int(low.sum())
        high = differs & (refcounts > window.counts)
        if high.any():
            refcounts[high] = window.counts[high]
            await _write_refcounts(analysis, window, refcounts, high)
            await analysis.storage.flush()
            lowered += int(high.sum())
    return raised, lowered


async def _write_refcounts(
    analysis: Analysis, window: Window, refcounts: Counts, changed: npt.NDArray[np.bool_]
) -> None:
    """Write the blocks with ``changed`` clusters in place."""
    per_block = analysis.header.refcount_block_entries
    blocks = np.unique(np.flatnonzero(changed) // per_block)
    for number in blocks.tolist():
        offset = int(analysis.refcounts.block_offsets[window.first // per_block + number])
        counts = refcounts[number * per_block : (number + 1) * per_block]
        await analysis.storage.write(offset, encode_counts(counts, analysis.header.refcount_order))


async def _rebuild(analysis: Analysis) -> None:
    """Write a new refcount structure behind the image, and put it in force with the header's sector."""
    header, storage = analysis.header, analysis.storage
    per_block, order = header.refcount_block_entries, header.refcount_order
    used = np.empty(0, np.int64)
    async for window, _, _ in analysis.windows():
        filled = window.counts.reshape(-1, per_block).any(axis=1)
        used = np.union1d(used, np.flatnonzero(filled) + window.first // per_block)
    place = _plan_structure(analysis, used)
    if place.table_clusters * header.cluster_size > max(layout.MAX_REFCOUNT_TABLE_BYTES, header.cluster_size):
        raise CorruptImageError(storage.path, "a refcount table for the references found would exceed 8 MiB")

    async def write(blocks: Int64Array, window: Window) -> None:
        window.saturate(order)
        window.add_range(place.first, place.end - 1)
        for number in blocks.tolist():
            at = number * per_block - window.first
            index = int(np.searchsorted(place.blocks, number))
            data = encode_counts(window.counts[at : at + per_block], order)
            await storage.write((place.first + index) * header.cluster_size, data)

    left = place.blocks
    async for window, _, _ in analysis.windows():
        inside = (left * per_block >= window.first) & (left * per_block < window.first + len(window.counts))
        await write(left[inside], window)
        left = left[~inside]
    for number in left.tolist():
        await write(np.array([number]), Window(number * per_block, per_block))
    table = np.zeros(place.table_clusters * header.cluster_size // 8, np.uint64)
    numbers = np.arange(len(place.blocks), dtype=np.uint64)
    table[place.blocks] = (np.uint64(place.first) + numbers) << np.uint64(header.cluster_bits)
    table_offset = (place.first + len(place.blocks)) << header.cluster_bits
    await storage.write(table_offset, encode_words(table))
    # The old structure stays in force until all of the new one is stable; one sector then decides.
    await storage.flush()
    await _patch_header(
        storage, layout.REFCOUNT_TABLE_FIELDS_AT, struct.pack(">QI", table_offset, place.table_clusters)
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """A new refcount structure: ``blocks`` in clusters from ``first``, then the table."""

    first: int
    blocks: Int64Array
    table_clusters: int

    @property
    def end(self) -> int:
        return self.first + len(self.blocks) + self.table_clusters


def _plan_structure(analysis: Analysis, used: Int64Array) -> _Place:
    """Behind the file, and clear of what entries refer to past its end; it counts itself, so this is a fixpoint."""
    header = analysis.header
    place = _Place(analysis.metadata.file_clusters, used, 1)
    while True:
        first = place.first
        for cluster in sorted(analysis.outside):
            if first <= cluster < first + place.end - place.first:
                first = cluster + 1
        last = first + len(place.blocks) + place.table_clusters - 1
        own = np.arange(first // header.refcount_block_entries, last // header.refcount_block_entries + 1)
        blocks = np.union1d(used, own)
        needed = _Place(first, blocks, div_ceil((int(blocks[-1]) + 1) * 8, header.cluster_size))
        if (needed.first, needed.end) == (place.first, place.end):
            return needed
        place = needed


async def _mend_copied(analysis: Analysis) -> int:
    """Set COPIED where the refcount is 1, clear it elsewhere, in the tables of the active disk; how many entries."""
    storage, header, fixed = analysis.storage, analysis.header, 0
    l1 = analysis.metadata.l1
    copied, mask = np.uint64(layout.COPIED), np.uint64(layout.OFFSET_MASK)
    async for first, refcounts, unknown in analysis.refcount_windows():
        used = np.flatnonzero(l1 & mask)
        clusters = (l1[used] & mask).astype(np.int64) >> header.cluster_bits
        wrong, _ = await analysis.copied_mismatch(first, refcounts, unknown, l1[used], clusters)
        if len(wrong):
            l1[used[wrong]] ^= copied
            await storage.write(header.l1_offset, encode_words(l1))
            fixed += len(wrong)
        async for tables in walk_l2(storage, analysis.metadata, active_only=True):
            at = np.flatnonzero(tables.allocated)
            entries = tables.entries[at]
            if header.has_data_file:
                wrong = np.flatnonzero(entries & copied == 0)
            else:
                clusters = tables.host_offset[at] >> header.cluster_bits
                wrong, _ = await analysis.copied_mismatch(first, refcounts, unknown, entries, clusters)
            if len(wrong):
                changed = tables.entries.copy()
                changed[at[wrong]] ^= copied
                await _write_tables(analysis, tables, changed, at[wrong])
                fixed += len(wrong)
    if fixed:
        await storage.flush()
    return fixed


async def _clear_marks(storage: Storage) -> None:
    """The image is consistent: it is neither dirty nor corrupt."""
    header = await read_header(storage)
    marks = layout.INCOMPATIBLE_DIRTY | layout.INCOMPATIBLE_CORRUPT
    if header.version >= 3 and header.incompatible & marks:
        await _patch_header(storage, layout.INCOMPATIBLE_AT, struct.pack(">Q", header.incompatible & ~marks))


async def _patch_header(storage: Storage, at: int, data: bytes) -> None:
    """Change header fields in one write of the first sector, which is not torn, and make it stable."""
    sector = await storage.read(0, SECTOR_SIZE)
    sector[at : at + len(data)] = data
    await storage.write(0, sector)
    await storage.flush()
