"""The whole mapping as runs, vectorised: L2 tables are read in batches, past the cache, and decoded with numpy."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from nbdserve.errors import RequestError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO, Int64Array, RunArray, RunStream
from nbdserve.formats.qcow2.layout import COMPRESSED_FLAG, COPIED, CRYPT_NONE, OFFSET_MASK, SUBCLUSTERS, ZERO_FLAG
from nbdserve.formats.tables import Words, decode_words, read_tables
from nbdserve.units import MIB

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.driver import Qcow2Driver

BATCH_BYTES: Final = 2 * MIB
"""L2 tables decoded in one turn of the event loop (5 ms)."""

Columns = tuple[npt.NDArray[np.uint8], Int64Array]
"""Kind and host offset of consecutive units of equal length."""


async def iter_runs(driver: Qcow2Driver, start: int, end: int) -> RunStream:
    """See ``FormatDriver.iter_runs``. ``[start, end)`` is inside the disk."""
    coverage = driver.header.l2_coverage
    most = max(1, BATCH_BYTES // driver.cluster_size)
    while start < end:
        first = start // coverage
        stop = -(-end // coverage)
        used = driver.l1.words[first : min(stop, first + (1 << 16))] != 0
        if not used[0]:
            empty = int(used.argmax()) or len(used)
            until = min(end, (first + empty) * coverage)
            yield RunArray.of(start, until - start, UNALLOCATED)
        else:
            unused = ~used[:most]
            count = int(unused.argmax()) or len(unused)
            tables = range(first, first + count)
            words = await read_tables(
                driver.storage, driver.cache, tables, driver.cluster_size, driver.l2_offset, decode_words
            )
            until = min(end, (first + count) * coverage)
            yield _runs(driver, words, first * coverage, start, until)
        start = until
        await asyncio.sleep(0)


def _runs(driver: Qcow2Driver, words: Words, base: int, start: int, end: int) -> RunArray:
    """The runs of ``[start, end)``; ``words`` begins at the guest offset ``base``."""
    unit = driver.cluster_size
    width = 2 if driver.header.extended_l2 else 1
    first, last = (start - base) // unit, (end - 1 - base) // unit + 1
    words = words[first * width : last * width]
    base += first * unit
    if driver.header.extended_l2:
        kind, host_offset = _decode_extended(driver, words)
        unit //= SUBCLUSTERS
    else:
        kind, host_offset = _decode_standard(driver, words)
    if driver.header.crypt_method != CRYPT_NONE:
        host_offset[kind != COMPRESSED] = -1  # the bytes there are not the guest's
    starts = base + np.arange(len(kind), dtype=np.int64) * unit
    lengths = np.full(len(kind), unit, np.int64)
    runs = RunArray(starts, lengths, kind, host_offset)
    if driver.header.extended_l2:
        runs = _join_compressed(runs)
    runs = runs.coalesced()
    if starts[0] < start:
        runs = _from(runs, start)
    surplus = int(runs.start[-1] + runs.length[-1]) - end
    if surplus > 0:
        keep = runs.start < end
        runs = RunArray(runs.start[keep], runs.length[keep].copy(), runs.kind[keep], runs.host_offset[keep])
        runs.length[-1] = end - runs.start[-1]
    return runs


def _from(runs: RunArray, start: int) -> RunArray:
    """The part of ``runs`` from ``start`` on."""
    keep = runs.start + runs.length > start
    cut = RunArray(runs.start[keep].copy(), runs.length[keep].copy(), runs.kind[keep], runs.host_offset[keep].copy())
    skipped = start - int(cut.start[0])
    cut.start[0] += skipped
    cut.length[0] -= skipped
    if cut.host_offset[0] >= 0 and cut.kind[0] != COMPRESSED:
        cut.host_offset[0] += skipped
    return cut


def _decode_standard(driver: Qcow2Driver, words: Words) -> Columns:
    host_offset = (words & np.uint64(OFFSET_MASK)).astype(np.int64)
    placed = host_offset != 0
    if driver.external:
        placed |= words & np.uint64(COPIED) != 0
    kind = np.where(placed, np.uint8(DATA), np.uint8(UNALLOCATED))
    host_offset[~placed] = -1
    special = words & np.uint64(driver.not_plain) != 0
    if special.any():
        zero = words & np.uint64(driver.not_plain) == ZERO_FLAG
        if driver.header.version < 3:
            zero[:] = False
        compressed = words & np.uint64(COMPRESSED_FLAG) != 0
        kind[zero] = ZERO
        _mark_compressed(driver, words, compressed, kind, host_offset)
        _refuse_bad(driver, words, special & ~zero & ~compressed)
    _refuse_bad(driver, words, (kind == DATA) & (host_offset >= driver.host_limit))
    _refuse_bad(driver, words, (words == COPIED) & ~placed)
    return kind, host_offset


def _mark_compressed(
    driver: Qcow2Driver, words: Words, compressed: npt.NDArray[np.bool_], kind: npt.NDArray[np.uint8], host: Int64Array
) -> None:
    if driver.external:
        _refuse_bad(driver, words, compressed)
    offset_bits = 62 - (driver.header.cluster_bits - 8)
    kind[compressed] = COMPRESSED
    host[compressed] = (words[compressed] & np.uint64((1 << offset_bits) - 1)).astype(np.int64)


def _decode_extended(driver: Qcow2Driver, words: Words) -> Columns:
    entries, bitmaps = words[0::2], words[1::2]
    host = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
    placed = host != 0
    if driver.external:
        placed |= entries & np.uint64(COPIED) != 0
    compressed = entries & np.uint64(COMPRESSED_FLAG) != 0
    _refuse_bad(driver, entries, ~compressed & (entries & np.uint64(driver.not_plain) != 0))
    numbers = np.arange(SUBCLUSTERS, dtype=np.uint64)
    allocated = (bitmaps[:, None] >> numbers & np.uint64(1)).astype(bool)
    zero = (bitmaps[:, None] >> (numbers + np.uint64(SUBCLUSTERS)) & np.uint64(1)).astype(bool)
    _refuse_bad(driver, entries, ~compressed & (allocated & zero | allocated & ~placed[:, None]).any(axis=1))
    _refuse_bad(driver, entries, ~compressed & allocated.any(axis=1) & (host >= driver.host_limit))
    kind = np.full(allocated.shape, UNALLOCATED, np.uint8)
    kind[zero] = ZERO
    kind[allocated] = DATA
    offsets = host[:, None] + numbers.astype(np.int64) * (driver.cluster_size // SUBCLUSTERS)
    offsets[~placed] = -1
    flat_kind: npt.NDArray[np.uint8] = kind.reshape(-1)
    flat_offsets: Int64Array = offsets.reshape(-1)
    if compressed.any():
        words = np.repeat(entries, SUBCLUSTERS)
        _mark_compressed(driver, words, np.repeat(compressed, SUBCLUSTERS), flat_kind, flat_offsets)
    return flat_kind, flat_offsets


def _join_compressed(runs: RunArray) -> RunArray:
    """One run per compressed cluster, where each of its subclusters has one."""
    compressed = runs.kind == COMPRESSED
    if not compressed.any():
        return runs
    keep = ~compressed
    keep[0::SUBCLUSTERS] = True
    length = runs.length.copy()
    length[0::SUBCLUSTERS][compressed[0::SUBCLUSTERS]] *= SUBCLUSTERS
    return RunArray(runs.start[keep], length[keep], runs.kind[keep], runs.host_offset[keep])


def _refuse_bad(driver: Qcow2Driver, words: Words, bad: npt.NDArray[np.bool_]) -> None:
    if bad.any():
        word = int(words[int(bad.argmax())])
        raise RequestError(errno.EIO, f"{driver.path}: invalid L2 entry {word:#x}")
