"""Checking a QED image: every entry is followed once, and what nothing refers to is a leak.

The walk counts references in a *window* of the file's clusters, so that memory is bounded whatever the size of the
file; tables that lie in a hole of the file are empty and not read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ImageError
from nbdserve.extents import ZERO, RunArray
from nbdserve.formats.base import CheckResult
from nbdserve.formats.qed import layout
from nbdserve.formats.qed.layout import Header
from nbdserve.formats.two_level.entries import ZERO_ENTRY
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, div_ceil

WINDOW_CLUSTERS: Final = 1 << 24
"""Host clusters whose use is known at once: 16 MiB."""
BATCH_BYTES: Final = 2 * MIB
"""Table entries decoded at a time."""
MAX_MESSAGES: Final = 1000
MAX_REPAIRS: Final = 1 << 16
"""References of one kind, or gaps, that one repair mends."""

Offsets: TypeAlias = npt.NDArray[np.int64]
"""Host offsets."""


@dataclass(slots=True)
class Analysis:
    """What one walk has found."""

    header: Header
    end: int
    """Where the clusters of the file end, bytes."""
    result: CheckResult = field(default_factory=CheckResult)
    tables: Offsets = field(default_factory=lambda: np.empty(0, np.int64))
    """The L2 tables inside the file, ascending."""
    blank: RunArray = field(default_factory=RunArray.empty)
    """What the file system knows to be holes of the file: tables there are empty, and not read."""
    overlapping: int = 0
    """L2 tables that begin inside another. This cannot be repaired."""
    bad_l1: list[int] = field(default_factory=list)
    """Host offsets of invalid L1 entries."""
    bad_l2: list[int] = field(default_factory=list)
    """Host offsets of invalid L2 entries."""
    shared: list[tuple[int, int]] = field(default_factory=list)
    """``(host offset of the entry, host offset it names)`` of data clusters that something else uses already."""
    used_end: int = 0
    """The end of the last cluster in use, bytes."""
    holes: list[tuple[int, int]] = field(default_factory=list)
    """Runs of clusters not in use, as ``(first cluster, count)``, the lowest MAX_REPAIRS."""

    @property
    def inner_holes(self) -> list[tuple[int, int]]:
        """Those before ``used_end``."""
        return [(first, count) for first, count in self.holes if first * self.header.cluster_size < self.used_end]

    def is_blank(self, offset: int, length: int) -> bool:
        """Whether the range of the file is known to be zeroes."""
        run = int(np.searchsorted(self.blank.start, offset, "right")) - 1
        end = offset + length
        return run >= 0 and self.blank.kind[run] == ZERO and end <= self.blank.start[run] + self.blank.length[run]

    def say(self, message: str) -> None:
        """Keep a message, unless there are too many."""
        messages = self.result.messages
        if len(messages) < MAX_MESSAGES:
            messages.append(message)
        elif len(messages) == MAX_MESSAGES:
            messages.append(f"(only the first {MAX_MESSAGES} messages are shown)")

    def corruption(self, message: str, count: int = 1) -> None:
        """``count`` corruptions of one kind."""
        self.result.corruptions += count
        self.say(f"ERROR {message}")


class Window:
    """Which of the clusters ``[first, first + count)`` are in use."""

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.used = np.zeros(count, np.bool_)

    def take_range(self, first: int, count: int) -> bool:
        """Mark a range; whether some of it was in use already."""
        low, high = max(first - self.first, 0), min(first + count - self.first, len(self.used))
        if low >= high:
            return False
        part = self.used[low:high]
        taken = bool(part.any())
        part[:] = True
        return taken

    def take(self, clusters: Offsets) -> npt.NDArray[np.bool_]:
        """Mark single clusters; which of them were in use already, be it by an earlier one of these."""
        index = clusters - self.first
        inside = (index >= 0) & (index < len(self.used))
        taken = np.zeros(len(clusters), np.bool_)
        index = index[inside]
        again = self.used[index]
        self.used[index] = True
        _, first_of = np.unique(index, return_index=True)
        if len(first_of) < len(index):
            repeated = np.ones(len(index), np.bool_)
            repeated[first_of] = False
            again |= repeated
        taken[inside] = again
        return taken


async def analyse(storage: Storage, header: Header, open_end: int | None = None) -> Analysis:
    """Walk the image. ``open_end``: where new clusters begin in an image that is open for writing. OSError."""
    end = header.geometry.host_limit(storage.size) if open_end is None else open_end
    found = Analysis(header, end)
    result = found.result
    result.total_clusters = div_ceil(header.image_size, header.cluster_size)
    found.blank = await storage.host_map(0, storage.size)
    await _find_tables(storage, found)
    clusters = end // header.cluster_size
    first = 0
    while first < clusters:
        window = Window(first, min(WINDOW_CLUSTERS, clusters - first))
        _take_metadata(found, window)
        async for positions, offsets in walk_entries(storage, found):
            _look_at(found, window, positions, offsets)
        _count_unused(found, window)
        first += WINDOW_CLUSTERS
    result.image_end_offset = found.used_end
    if result.leaks:
        found.say(f"Leaked {result.leaks} clusters")
    return found


async def _find_tables(storage: Storage, found: Analysis) -> None:
    """Read the L1 table, all of it: entries past the end of the disk use clusters too."""
    header = found.header
    tables: list[Offsets] = []
    count_valid = 0
    for first in range(0, header.table_entries, BATCH_BYTES // 8):
        count = min(BATCH_BYTES // 8, header.table_entries - first)
        at = header.l1_table_offset + first * 8
        if found.is_blank(at, count * 8):
            continue
        entries = np.frombuffer(await storage.read(at, count * 8), "<u8").astype(np.uint64)
        used = np.flatnonzero(entries)
        if not len(used):
            continue
        offsets = entries[used]
        valid = _inside(found, offsets, header.table_bytes)
        valid &= (offsets + np.uint64(header.table_bytes) <= header.l1_table_offset) | (
            offsets >= header.l1_table_offset + header.table_bytes
        )
        bad = used[~valid]
        if len(bad):
            what = f"entry {first + int(bad[0])}: {int(entries[bad[0]]):#x}"
            found.corruption(f"{len(bad)} L1 entries name no L2 table of the file, first {what}", len(bad))
            found.bad_l1 += (at + bad * 8).tolist()[: MAX_REPAIRS - len(found.bad_l1)]
        count_valid += int(valid.sum())
        tables.append(np.unique(offsets[valid].astype(np.int64)))  # of a damaged table there may be millions, all alike
    if tables:
        found.tables = np.unique(np.concatenate(tables))
    found.overlapping = count_valid - len(found.tables) + int((np.diff(found.tables) < header.table_bytes).sum())
    if found.overlapping:
        found.corruption(f"{found.overlapping} L2 tables overlap another", found.overlapping)


def _inside(found: Analysis, offsets: npt.NDArray[np.uint64], length: int) -> npt.NDArray[np.bool_]:
    """Which are places of ``length`` bytes between the header and the end of the file."""
    header = found.header
    inside: npt.NDArray[np.bool_] = (
        (offsets & np.uint64(header.cluster_size - 1) == 0)
        & (offsets >= header.header_size * header.cluster_size)
        & (offsets <= max(found.end - length, 0))
    )
    return inside


def _take_metadata(found: Analysis, window: Window) -> None:
    header = found.header
    window.take_range(0, header.header_size)
    window.take_range(header.l1_table_offset // header.cluster_size, header.table_size)
    for offset in found.tables.tolist():
        window.take_range(offset // header.cluster_size, header.table_size)


async def walk_entries(storage: Storage, found: Analysis) -> AsyncIterator[tuple[Offsets, npt.NDArray[np.uint64]]]:
    """``(host offsets of the entries, what they name)`` of every entry of an L2 table that names a cluster.

    No batch has entries of two tables.
    """
    table_bytes = found.header.table_bytes
    for table in found.tables.tolist():
        for part in range(0, table_bytes, BATCH_BYTES):
            length = min(BATCH_BYTES, table_bytes - part)
            if found.is_blank(table + part, length):
                continue
            entries = np.frombuffer(await storage.read(table + part, length), "<u8").astype(np.uint64)
            used = np.flatnonzero(entries > ZERO_ENTRY)
            if len(used):
                yield table + part + used * 8, entries[used]


def _look_at(found: Analysis, window: Window, positions: Offsets, offsets: npt.NDArray[np.uint64]) -> None:
    header, result = found.header, found.result
    valid = _inside(found, offsets, header.cluster_size)
    if window.first == 0:
        result.allocated_clusters += len(offsets)
        result.fragmented_clusters += int((np.diff(offsets) != header.cluster_size).sum())
        bad = positions[~valid]
        if len(bad):
            first = f"the one at {int(bad[0]):#x}: {int(offsets[~valid][0]):#x}"
            found.corruption(f"{len(bad)} L2 entries name no cluster of the file, first {first}", len(bad))
            found.bad_l2 += bad[: MAX_REPAIRS - len(found.bad_l2)].tolist()
    positions, places = positions[valid], offsets[valid].astype(np.int64)
    again = window.take(places // header.cluster_size)
    if again.any():
        count = int(again.sum())
        found.corruption(f"{count} clusters are used more than once, first {int(places[again][0]):#x}", count)
        room = MAX_REPAIRS - len(found.shared)
        found.shared += zip(positions[again].tolist()[:room], places[again].tolist()[:room], strict=True)


def _count_unused(found: Analysis, window: Window) -> None:
    size = found.header.cluster_size
    used = np.flatnonzero(window.used)
    found.result.leaks += len(window.used) - len(used)
    if len(used):
        found.used_end = (window.first + int(used[-1]) + 1) * size
    edges = np.flatnonzero(np.diff(np.concatenate(([True], window.used, [True])).astype(np.int8)))
    room = MAX_REPAIRS - len(found.holes)
    starts, ends = edges[0::2][:room] + window.first, edges[1::2][:room] + window.first
    found.holes += zip(starts.tolist(), (ends - starts).tolist(), strict=True)


async def check_qed(
    storage: Storage,
    header: Header,
    sector: bytes,
    *,
    repair_leaks: bool = False,
    repair_errors: bool = False,
    open_end: int | None = None,
    most_moved: int | None = None,
    all_or_nothing: bool = False,
) -> CheckResult:
    """Check the image, and repair it on request; the figures are those of a last look after the repair.

    ``sector`` is the first of the file. The image must be idle; after a repair it has to be opened anew. ``most_moved``
    limits the bytes that closing gaps may copy; with ``all_or_nothing`` an image with errors that cannot be repaired is
    left as it is. ImageError when a repair is asked for on a read-only file; OSError.
    """
    before = await analyse(storage, header, open_end)
    if not (repair_leaks or repair_errors):
        return before.result
    if storage.read_only:
        raise ImageError(storage.path, "open read-only, so it cannot be repaired")
    most = max(len(before.bad_l1), len(before.bad_l2), len(before.shared))
    if all_or_nothing and (before.overlapping or most == MAX_REPAIRS):
        return before.result
    from nbdserve.formats.qed.repair import close_gaps, repair_entries  # noqa: PLC0415  (repairing begins with a check)

    after = before
    if repair_errors and before.result.corruptions:
        await repair_entries(storage, before)
        after = await analyse(storage, header)
    corruptions, leaks = after.result.corruptions, max(before.result.leaks, after.result.leaks)
    if repair_leaks and after.result.leaks and not corruptions:
        await close_gaps(storage, after, most_moved)
        after = await analyse(storage, header)
    result = after.result
    result.corruptions_fixed = max(0, before.result.corruptions - result.corruptions)
    result.leaks_fixed = max(0, leaks - result.leaks)
    result.messages = before.result.messages + result.messages
    if header.features & layout.FEATURE_NEED_CHECK and not result.corruptions:
        features = header.features & ~layout.FEATURE_NEED_CHECK
        at = layout.FEATURES_AT
        # All that was repaired is stable: each step of a repair ends with a flush.
        await storage.write_stable([(0, sector[:at] + features.to_bytes(8, "little") + sector[at + 8 :])])
    return result
