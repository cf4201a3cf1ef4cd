"""Block status: the map of a chain, projected to the flags of a metadata context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdserve.block.mapping import ChainMap
from nbdserve.block.node import Node
from nbdserve.block.window import map_node
from nbdserve.extents import UNALLOCATED, ZERO

HOLE: Final = 1
"""Not allocated in any layer, or a hole of the file below."""
READS_ZERO: Final = 2

Status: TypeAlias = npt.NDArray[np.int64]
Projection: TypeAlias = Callable[[ChainMap], Status]


def allocation_flags(part: ChainMap) -> Status:
    """``base:allocation``: HOLE and ZERO together for what reads as zeroes without data, as QEMU and nbdkit say it."""
    return np.where((part.kind == ZERO) | (part.kind == UNALLOCATED), HOLE | READS_ZERO, 0).astype(np.int64)


def depth_values(part: ChainMap) -> Status:
    """``qemu:allocation-depth``: 0 where no layer has anything, 1 for the top layer, 2 for the one below it, ..."""
    return np.where(part.kind == UNALLOCATED, 0, part.depth + 1).astype(np.int64)


async def block_status(
    node: Node, offset: int, length: int, projections: list[Projection], max_extents: int
) -> list[list[tuple[int, int]]]:
    """For each projection the extents ``(length, status)`` from ``offset``, merged where equal.

    All lists cover the same range: it is cut where the first of them is full.
    """
    columns: list[tuple[list[npt.NDArray[np.int64]], list[Status]]] = [([], []) for _ in projections]
    position = offset
    async with node.gate:
        node.check_inside(offset, length)
        async for part in map_node(node, offset, offset + length):
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
    merged = [_merge(np.concatenate(starts), np.concatenate(values)) for starts, values in columns]
    end = min([position, *(int(starts[max_extents]) for starts, _ in merged if len(starts) > max_extents)])
    return [_extents(starts, values, end) for starts, values in merged]


def _merge(starts: npt.NDArray[np.int64], values: Status) -> tuple[npt.NDArray[np.int64], Status]:
    first = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    return starts[first], values[first]


def _extents(starts: npt.NDArray[np.int64], values: Status, end: int) -> list[tuple[int, int]]:
    count = int(np.searchsorted(starts, end))
    lengths = np.diff(np.append(starts[:count], end))
    return list(zip(lengths.tolist(), values[:count].tolist(), strict=True))
