"""Block status: the map of a chain, projected to the flags of a metadata context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.mapping import ChainMap
from nbdserve.block.node import Node
from nbdserve.block.window import map_node
from nbdserve.extents import UNALLOCATED, ZERO

HOLE: Final = 1
"""Not allocated in any layer, or a hole of the file below."""
READS_ZERO: Final = 2

Status: TypeAlias = npt.NDArray[np.int64]
Projection: TypeAlias = Callable[[ChainMap], Status]
Extents: TypeAlias = tuple[npt.NDArray[np.int64], Status]
"""Where each begins, and its status."""


def allocation_flags(part: ChainMap) -> Status:
    """``base:allocation``: HOLE and ZERO together for what reads as zeroes without data, as QEMU and nbdkit say it."""
    return np.where((part.kind == ZERO) | (part.kind == UNALLOCATED), HOLE | READS_ZERO, 0).astype(np.int64)


def depth_values(part: ChainMap) -> Status:
    """``qemu:allocation-depth``: 0 where no layer has anything, 1 for the top layer, 2 for the one below it, ..."""
    return np.where(part.kind == UNALLOCATED, 0, part.depth + 1).astype(np.int64)


async def block_status(
    node: Node, offset: int, length: int, questions: Sequence[Projection | DirtyBitmap], max_extents: int
) -> list[list[tuple[int, int]]]:
    """For each projection of the map, or bitmap, the extents ``(length, status)`` from ``offset``, merged where equal.

    All lists cover the same range: it is cut where the first of them is full.
    """
    projections = [question for question in questions if not isinstance(question, DirtyBitmap)]
    async with node.gate:
        node.check_inside(offset, length)
        mapped, end = await _project(node, offset, offset + length, projections, max_extents)
        from_map = iter(mapped)
        merged = [
            _dirty(question, offset, end, max_extents + 1) if isinstance(question, DirtyBitmap) else next(from_map)
            for question in questions
        ]
    end = min([end, *(int(starts[max_extents]) for starts, _ in merged if len(starts) > max_extents)])
    return [_extents(starts, values, end) for starts, values in merged]


async def _project(
    node: Node, start: int, end: int, projections: Sequence[Projection], max_extents: int
) -> tuple[list[Extents], int]:
    """The map from ``start`` in each projection, and how far it was looked at."""
    if not projections:
        return [], end
    columns: list[tuple[list[npt.NDArray[np.int64]], list[Status]]] = [([], []) for _ in projections]
    position = start
    async for part in map_node(node, start, end):
        position = int(part.start[-1] + part.length[-1])
        full = False
        for project, (starts, values) in zip(projections, columns, strict=True):
            status = project(part)
            first = np.flatnonzero(np.concatenate(([True], status[1:] != status[:-1])))
            starts.append(part.start[first])
            values.append(status[first])
            full |= sum(map(len, starts)) > max_extents
        if full:
            break
    return [_merge(np.concatenate(starts), np.concatenate(values)) for starts, values in columns], position


def _dirty(bitmap: DirtyBitmap, start: int, end: int, most: int) -> Extents:
    """At most ``most`` extents of the bitmap; what lies behind the disk it is of is clean."""
    inside = min(end, bitmap.size)
    if start >= inside:
        return np.array([start], np.int64), np.zeros(1, np.int64)
    starts, dirty, stop = bitmap.runs(start, inside, most)
    values = dirty.astype(np.int64)
    if stop < end and len(starts) < most:
        starts, values = _merge(np.append(starts, stop), np.append(values, 0))
    return starts, values


def _merge(starts: npt.NDArray[np.int64], values: Status) -> Extents:
    first = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    return starts[first], values[first]


def _extents(starts: npt.NDArray[np.int64], values: Status, end: int) -> list[tuple[int, int]]:
    count = int(np.searchsorted(starts, end))
    lengths = np.diff(np.append(starts[:count], end))
    return list(zip(lengths.tolist(), values[:count].tolist(), strict=True))
