"""What is to be copied: the map of a disk as data to read, zeroes to make, and what stays as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from nbdserve.block.mapping import ChainMap
from nbdserve.block.node import Node
from nbdserve.block.window import map_node
from nbdserve.extents import UNALLOCATED, ZERO, Int64Array


class What(IntEnum):
    """What to do about a stretch of the disk."""

    DATA = 0
    """Read it, and write it."""
    ZERO = 1
    """It reads as zeroes."""
    SKIP = 2
    """It is decided by the base, and stays to be."""


class Stretch(NamedTuple):
    """A range of guest bytes."""

    offset: int
    length: int
    what: What


async def stretches(node: Node, start: int, end: int, *, above: int | None = None) -> AsyncIterator[Stretch]:
    """The content of ``[start, end)``, inside the disk of ``node``, in stretches that continue each other.

    With ``above`` only what the layers with a number below it decide: what they leave to the layers from ``above`` on
    is SKIP. Where one of them ends before the one above it does, what follows is zeroes, and theirs.
    """
    pending: Stretch | None = None
    async for part in map_node(node, start, end):
        what = _decided(node, part, above)
        first = np.flatnonzero(np.concatenate(([True], what[1:] != what[:-1])))
        starts = part.start[first]
        lengths = np.diff(np.append(starts, part.start[-1] + part.length[-1]))
        for offset, length, value in zip(starts.tolist(), lengths.tolist(), what[first].tolist(), strict=True):
            if pending is not None and pending.what == value:
                pending = Stretch(pending.offset, pending.length + length, pending.what)
                continue
            if pending is not None:
                yield pending
            pending = Stretch(offset, length, What(value))
    if pending is not None:
        yield pending


def _decided(node: Node, part: ChainMap, above: int | None) -> Int64Array:
    zero = (part.kind == ZERO) | (part.kind == UNALLOCATED)
    what = np.where(zero, What.ZERO, What.DATA).astype(np.int64)
    if above is not None and above < len(node.layers):
        what[part.depth >= above] = What.SKIP
    return what


async def in_units(source: AsyncIterator[Stretch], unit: int, end: int) -> AsyncIterator[Stretch]:
    """The same in whole units, at multiples of ``unit``; a unit that is not all of one sort is DATA.

    The end of the disk, at ``end``, ends a unit.
    """
    low: int | None = None  # nothing before it was asked for
    data_from: int | None = None
    position = 0
    async for offset, length, what in source:
        low = offset if low is None else low
        position = offset + length
        floor = max(low, offset - offset % unit)
        first = offset + -offset % unit
        last = position if position == end else position - position % unit
        if what == What.DATA or first >= last:
            data_from = floor if data_from is None else data_from
            continue
        if first > offset and data_from is None:
            data_from = floor
        if data_from is not None:
            yield Stretch(data_from, first - data_from, What.DATA)
            data_from = None
        yield Stretch(first, last - first, what)
        if last < position:
            data_from = last
    if data_from is not None:
        yield Stretch(data_from, position - data_from, What.DATA)


async def skipping_zeroes(source: AsyncIterator[Stretch]) -> AsyncIterator[Stretch]:
    """The same, for a target that reads as zeroes where nothing is written."""
    async for offset, length, what in source:
        yield Stretch(offset, length, What.SKIP if what == What.ZERO else what)
