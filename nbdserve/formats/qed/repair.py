"""Repairing a QED image: entries that name nothing, clusters with two owners, and clusters with none.

Each step is stable before the next one begins, and leaves an image in which every guest byte reads as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from nbdserve.formats.qed.check import Analysis, walk_entries
from nbdserve.storage.base import Storage
from nbdserve.units import MIB

_COPY: Final = MIB
_MOVES: Final = 1 << 16
"""Clusters moved by one repair."""


async def repair_entries(storage: Storage, found: Analysis) -> None:
    """Clear entries that name no cluster, and give the second owner of a cluster a copy of its own.

    What an invalid entry stood for is lost: it reads as the backing file, or zeroes. L2 tables that overlap are left.
    """
    await storage.write_all([(at, bytes(8)) for at in found.bad_l1 + found.bad_l2])
    await storage.flush()
    if found.overlapping:
        return
    size = found.header.cluster_size
    copies = []
    end = found.end
    for position, host_offset in found.shared:
        await _copy(storage, host_offset, end, size)
        copies.append((position, end))
        end += size
    await _point(storage, copies)


async def close_gaps(storage: Storage, found: Analysis, most_moved: int | None = None) -> None:
    """Cut off what is behind the last cluster in use, and move the last data clusters into the gaps before it.

    An L2 table is not moved: where one is at the end of the file, gaps before it may stay. ``most_moved``: no gap is
    closed when that means to copy more bytes.
    """
    size = found.header.cluster_size
    end = found.used_end
    inner = found.inner_holes
    gaps = sum(count for _, count in inner)
    if gaps and (most_moved is None or gaps * size <= most_moved):
        moves: list[tuple[int, int]] = []
        places = (first + number for first, count in inner for number in range(count))
        for (position, host_offset), place in zip(
            await _last_clusters(storage, found, end - gaps * size), places, strict=False
        ):
            if place * size >= host_offset:
                break
            await _copy(storage, host_offset, place * size, size)
            moves.append((position, place * size))
        await _point(storage, moves)
        end = await _used_end(storage, found)
    if end < storage.size:
        # Nothing on disk refers to what is cut off here.
        await storage.truncate(end)
        await storage.flush()


async def _last_clusters(storage: Storage, found: Analysis, threshold: int) -> list[tuple[int, int]]:
    """``(host offset of the entry, host offset of the cluster)`` of data clusters from ``threshold`` on, last first."""
    result: list[tuple[int, int]] = []
    async for positions, offsets in walk_entries(storage, found):
        late = offsets >= threshold
        if late.any() and len(result) < _MOVES:
            result += zip(positions[late].tolist(), offsets[late].tolist(), strict=True)
    result.sort(key=lambda pair: -pair[1])
    return result[:_MOVES]


async def _used_end(storage: Storage, found: Analysis) -> int:
    """The end of the last table or cluster, as the entries are now."""
    header = found.header
    end = header.l1_table_offset + header.table_bytes
    if len(found.tables):
        end = max(end, int(found.tables[-1]) + header.table_bytes)
    async for _, offsets in walk_entries(storage, found):
        end = max(end, int(offsets.max()) + header.cluster_size)
    return end


async def _copy(storage: Storage, source: int, target: int, length: int) -> None:
    for part in range(0, length, _COPY):
        await storage.write(target + part, await storage.read(source + part, min(_COPY, length - part)))


async def _point(storage: Storage, changes: Iterable[tuple[int, int]]) -> None:
    """Let entries name the copies.

    The copies are stable first: an entry never names a cluster without its content. Crash before the last flush: each
    entry names the old cluster or the copy, which hold the same.
    """
    pieces = [(position, np.array([target], "<u8").tobytes()) for position, target in changes]
    if pieces:
        await storage.flush()
        await storage.write_stable(pieces)
