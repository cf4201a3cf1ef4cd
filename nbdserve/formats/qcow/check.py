"""Checking a qcow image: every entry is followed once, and no two may name the same bytes of the file.

The format counts nothing, and space that no entry names is no harm to anyone, so there are no leaks.

References are compared by sorting them, those to one *window* of the file at a time, so that memory is bounded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ImageError
from nbdserve.formats.base import CheckResult
from nbdserve.formats.qcow.layout import Header
from nbdserve.formats.two_level.entries import FLAG
from nbdserve.storage.base import Storage
from nbdserve.units import align_up, div_ceil

WINDOW_REFERENCES: Final = 1 << 20
"""References looked at together: 40 MiB of columns."""
MAX_MESSAGES: Final = 1000
MAX_REPAIRS: Final = 1 << 16
"""References of one kind that one repair mends."""

Offsets: TypeAlias = npt.NDArray[np.int64]
Entries: TypeAlias = npt.NDArray[np.uint64]


@dataclass(slots=True)
class Analysis:
    """What one walk has found."""

    header: Header
    result: CheckResult = field(default_factory=CheckResult)
    tables: Offsets = field(default_factory=lambda: np.empty(0, np.int64))
    """Host offsets of the L2 tables inside the file, ascending."""
    overlapping: int = 0
    """L2 tables that begin inside another. This cannot be repaired."""
    bad: list[int] = field(default_factory=list)
    """Host offsets of invalid entries of L1 and L2 tables."""
    shared: list[tuple[int, int]] = field(default_factory=list)
    """``(host offset of the entry, entry)`` of clusters on bytes that something else uses already."""

    def corruption(self, message: str, count: int) -> None:
        """``count`` corruptions of one kind."""
        self.result.corruptions += count
        if len(self.result.messages) < MAX_MESSAGES:
            self.result.messages.append(f"ERROR {message}")

    def add_shared(self, positions: Offsets, entries: Entries) -> None:
        """These are to get a place of their own."""
        room = MAX_REPAIRS - len(self.shared)
        self.shared += zip(positions[:room].tolist(), entries[:room].tolist(), strict=True)


async def analyse(storage: Storage, header: Header) -> Analysis:
    """Walk the image. OSError."""
    found = Analysis(header)
    found.result.total_clusters = div_ceil(header.disk_size, header.cluster_size)
    await _find_tables(storage, found)
    windows = div_ceil(len(found.tables) << header.l2_bits, WINDOW_REFERENCES)
    step = div_ceil(storage.size, max(1, windows))
    carried = 0
    for number in range(windows):
        low, high = number * step, min((number + 1) * step, storage.size)
        positions, entries = await _references(storage, found, low, high, first=number == 0)
        carried = _compare(found, positions, entries, carried)
    metadata = [end for start, end in header.geometry.reserved if end > start]
    metadata += (found.tables[-1:] + header.geometry.table_bytes).tolist()
    found.result.image_end_offset = max(carried, *metadata)
    return found


async def _find_tables(storage: Storage, found: Analysis) -> None:
    header = found.header
    stored = await storage.read(header.l1_table_offset, header.l1_entries * 8)
    entries = np.frombuffer(stored, ">u8").astype(np.uint64)
    used = np.flatnonzero(entries)
    offsets = entries[used]
    length = header.geometry.table_bytes
    valid = (offsets < np.uint64(FLAG)) & (offsets <= max(0, storage.size - length))
    for start, end in header.geometry.reserved:
        valid &= (offsets >= end) | (offsets + np.uint64(length) <= start)
    bad = used[~valid]
    if len(bad):
        what = f"first entry {int(bad[0])}: {int(entries[bad[0]]):#x}"
        found.corruption(f"{len(bad)} L1 entries name no L2 table of the file, {what}", len(bad))
        found.bad += (header.l1_table_offset + bad[:MAX_REPAIRS] * 8).tolist()
    found.tables = np.sort(offsets[valid].astype(np.int64))
    found.overlapping = int((np.diff(found.tables) < length).sum())
    if found.overlapping:
        found.corruption(f"{found.overlapping} L2 tables overlap another", found.overlapping)
        found.tables = np.unique(found.tables)


async def _walk(storage: Storage, header: Header, tables: Offsets) -> AsyncIterator[tuple[Offsets, Entries]]:
    """``(host offsets of the entries, entries)`` of what is in use, some tables at a time."""
    length = header.geometry.table_bytes
    for table in tables.tolist():
        entries = np.frombuffer(await storage.read(table, length), ">u8").astype(np.uint64)
        used = np.flatnonzero(entries)
        if len(used):
            yield table + used * 8, entries[used]


def _ranges(header: Header, entries: Entries) -> tuple[Entries, Entries]:
    """Start and length of what the entries name."""
    packed = entries >= np.uint64(FLAG)
    bits = 63 - header.cluster_bits
    start = np.where(packed, entries & np.uint64((1 << bits) - 1), entries)
    length = np.where(packed, entries >> np.uint64(bits) & np.uint64(header.cluster_size - 1), header.cluster_size)
    return start.astype(np.uint64), length.astype(np.uint64)


async def _references(
    storage: Storage, found: Analysis, low: int, high: int, *, first: bool
) -> tuple[Offsets, Entries]:
    """The valid references that begin in ``[low, high)``; the ``first`` time, everything is counted."""
    header, result = found.header, found.result
    columns: list[tuple[Offsets, Entries]] = []
    room = 4 * WINDOW_REFERENCES
    async for positions, entries in _walk(storage, header, found.tables):
        start, length = _ranges(header, entries)
        packed = entries >= np.uint64(FLAG)
        # A last cluster may be cut off where the file ends: what is missing reads as zeroes.
        valid = np.where(packed, (start + length <= storage.size) & (length > 0), start < storage.size)
        if first:
            plain = start[~packed]
            result.allocated_clusters += len(entries)
            result.compressed_clusters += int(packed.sum())
            result.fragmented_clusters += int((np.diff(plain) != header.cluster_size).sum())
            if not valid.all():
                bad = positions[~valid]
                what = f"first the one at {int(bad[0]):#x}: {int(entries[~valid][0]):#x}"
                found.corruption(f"{len(bad)} L2 entries name what is not inside the file, {what}", len(bad))
                found.bad += bad.tolist()[: MAX_REPAIRS - len(found.bad)]
        chosen = valid & (start >= low) & (start < high)
        on_metadata = chosen & _on_metadata(found, start, length)
        if on_metadata.any():
            count, where = int(on_metadata.sum()), int(start[on_metadata][0])
            found.corruption(f"{count} clusters are on metadata, first {where:#x}", count)
            found.add_shared(positions[on_metadata], entries[on_metadata])
            chosen &= ~on_metadata
        count = int(chosen.sum())
        if room > 0:
            columns.append((positions[chosen], entries[chosen]))
        elif count:
            found.corruption(f"{count} more clusters are on bytes in use", count)
        room -= count
    if not columns:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    return np.concatenate([p for p, _ in columns]), np.concatenate([e for _, e in columns])


def _on_metadata(found: Analysis, start: Entries, length: Entries) -> npt.NDArray[np.bool_]:
    """Which ranges overlap header, L1 table, or an L2 table."""
    overlap = np.zeros(len(start), np.bool_)
    for low, high in found.header.geometry.reserved:
        overlap |= (start < high) & (start + length > low)
    tables = found.tables.astype(np.uint64)
    if len(tables):
        before = np.searchsorted(tables, start, "right")
        overlap |= (before > 0) & (tables[before - 1] + np.uint64(found.header.geometry.table_bytes) > start)
        overlap |= (before < len(tables)) & (tables[np.minimum(before, len(tables) - 1)] < start + length)
    return overlap


def _compare(found: Analysis, positions: Offsets, entries: Entries, carried: int) -> int:
    """Find references to bytes that an earlier one names.

    ``carried``, and returned for the next window: where the last of those before ends.
    """
    start, length = _ranges(found.header, entries)
    order = np.argsort(start, kind="stable")
    start, end = start[order], (start + length)[order]
    ends = np.maximum.accumulate(np.concatenate((np.array([carried], np.uint64), end)))
    shared = start < ends[:-1]
    if shared.any():
        count = int(shared.sum())
        found.corruption(f"{count} clusters are on bytes in use, first {int(start[shared][0]):#x}", count)
        found.add_shared(positions[order][shared], entries[order][shared])
    return int(ends[-1])


async def check_qcow(
    storage: Storage, header: Header, *, repair_leaks: bool = False, repair_errors: bool = False
) -> CheckResult:
    """Check the image, and repair it on request; the figures are those of a last look after the repair.

    The image must be idle; after a repair it has to be opened anew. ImageError when a repair is asked for on a
    read-only file; OSError.
    """
    before = await analyse(storage, header)
    if not (repair_leaks or repair_errors):
        return before.result
    if storage.read_only:
        raise ImageError(storage.path, "open read-only, so it cannot be repaired")
    if not (repair_errors and before.result.corruptions):
        return before.result
    await _repair(storage, before)
    result = (await analyse(storage, header)).result
    result.corruptions_fixed = max(0, before.result.corruptions - result.corruptions)
    result.messages = before.result.messages + result.messages
    return result


async def _repair(storage: Storage, found: Analysis) -> None:
    """Clear entries that name nothing, and give the second owner of bytes a copy of its own.

    What an invalid entry stood for is lost: it reads as the backing file, or zeroes. L2 tables that overlap are left.
    The copies are stable before an entry names one. Crash in between: each entry is as it was, or names an equal copy.
    """
    header = found.header
    await storage.write_all([(at, bytes(8)) for at in found.bad])
    await storage.flush()
    if found.overlapping or not found.shared:
        return
    end = align_up(storage.size, header.cluster_size)
    pieces = []
    for position, entry in found.shared:
        start, length = (int(part[0]) for part in _ranges(header, np.array([entry], np.uint64)))
        await storage.write(end, await storage.read(start, length))
        pieces.append((position, (entry - start + end).to_bytes(8, "big")))
        end += header.cluster_size
    await storage.truncate(end)
    await storage.flush()
    await storage.write_stable(pieces)
