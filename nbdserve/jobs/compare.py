"""Comparing the content of two disks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import ClassVar, Final

import numpy as np

from nbdserve.block.cow import is_zero
from nbdserve.block.node import Node
from nbdserve.block.pieces import zero_pieces
from nbdserve.block.window import map_node
from nbdserve.extents import COMPRESSED, UNALLOCATED, ZERO, Int64Array
from nbdserve.jobs.copy import CHUNK
from nbdserve.jobs.job import Job
from nbdserve.jobs.stretches import Stretch, What, stretches
from nbdserve.units import SECTOR_SIZE

_IN_FLIGHT: Final = 3
"""Chunks compared at a time, each of two reads."""
_LAST: Final = 16
"""Added to the status of the run that ends with the disk."""


def first_difference(one: bytearray, other: bytearray) -> int | None:
    """The offset of the first sector that differs; both have one length."""
    if one == other:
        return None
    differ = np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)
    return int(differ.argmax()) // SECTOR_SIZE * SECTOR_SIZE


def first_data(data: bytearray) -> int | None:
    """The offset of the first sector that is not zero."""
    view = memoryview(data)
    if is_zero(view):
        return None
    return int((np.frombuffer(data, np.uint8) != 0).argmax()) // SECTOR_SIZE * SECTOR_SIZE


class CompareJob(Job):
    """Looks for the first difference; what the shorter disk lacks counts as zeroes."""

    type: ClassVar[str] = "compare"

    def __init__(self, id: str, one: Node, other: Node) -> None:
        super().__init__(id)
        self._nodes = one, other
        self.total_progress = max(one.size, other.size)
        self.mismatch: int | None = None
        """Offset of the first sector that differs."""

    async def run(self) -> None:
        """Compare."""
        running: deque[tuple[int, asyncio.Task[int | None]]] = deque()
        try:
            async for offset, length, data in self._chunks():
                await self.throttle(length)
                if len(running) == _IN_FLIGHT and await self._found(*running.popleft()):
                    return
                task = asyncio.get_running_loop().create_task(self._compare(offset, length, data))
                running.append((offset, task))
            while running:
                if await self._found(*running.popleft()):
                    return
            self.current_progress = self.total_progress
        finally:
            for _, task in running:
                task.cancel()
            if running:
                await asyncio.wait([task for _, task in running])

    async def _found(self, offset: int, task: asyncio.Task[int | None]) -> bool:
        self.current_progress = offset
        found = await task
        if found is not None:
            self.mismatch = offset + found
        return found is not None

    async def _chunks(self) -> AsyncIterator[tuple[int, int, list[Node]]]:
        """Offset, length and the disks that have data there; where none has, nothing needs to be compared."""
        one, other = (_padded(node, self.total_progress) for node in self._nodes)
        left, right = await anext(one, None), await anext(other, None)
        while left is not None and right is not None:
            start = max(left.offset, right.offset)
            end = min(left.offset + left.length, right.offset + right.length)
            data = [node for node, part in zip(self._nodes, (left, right), strict=True) if part.what == What.DATA]
            while start < end and data:
                length = min(end - start, CHUNK - start % CHUNK)
                yield start, length, data
                start += length
            if left.offset + left.length == end:
                left = await anext(one, None)
            if right.offset + right.length == end:
                right = await anext(other, None)

    async def _compare(self, offset: int, length: int, data: list[Node]) -> int | None:
        buffers = await asyncio.gather(*(_read(node, offset, length) for node in data))
        return first_difference(*buffers) if len(buffers) == 2 else first_data(buffers[0])


async def _padded(node: Node, end: int) -> AsyncIterator[Stretch]:
    """The disk as stretches, with zeroes behind it up to ``end``."""
    if node.size:
        async for stretch in stretches(node, 0, node.size):
            yield stretch
    if node.size < end:
        yield Stretch(node.size, end - node.size, What.ZERO)


async def _read(node: Node, offset: int, length: int) -> bytearray:
    buffer = bytearray(length)
    with memoryview(buffer) as view:
        zero_pieces(view, await node.read_pieces(offset, view))
    return buffer


async def first_status_mismatch(one: Node, other: Node) -> int | None:
    """The offset from which on one disk has allocated what the other has not, or in another way.

    It lies inside the shorter of the two.
    """
    end = min(one.size, other.size)
    columns = [await _statuses(node, end) for node in (one, other)]
    starts = np.union1d(columns[0][0], columns[1][0])
    values = [status[np.searchsorted(start, starts, "right") - 1] for start, status in columns]
    differ = values[0] != values[1]
    return int(starts[differ.argmax()]) if differ.any() else None


async def _statuses(node: Node, end: int) -> tuple[Int64Array, Int64Array]:
    """Starts of runs, and for each a number for its kind; the place of data does not count.

    That a run is the last one of its disk counts, as it does for qemu-img.
    """
    starts, statuses = [], []
    if end:
        async for part in map_node(node, 0, end):
            placed = (part.host_offset >= 0) & (part.kind != COMPRESSED) & (part.kind != UNALLOCATED)
            kind = part.kind.astype(np.int64)
            statuses.append(kind * 2 + np.where(kind == ZERO, placed & (node.format != "raw"), 0))
            starts.append(part.start)
    if not starts:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    start, status = np.concatenate(starts), np.concatenate(statuses)
    if node.size == end:
        others = np.flatnonzero(status != status[-1])
        status[others[-1] + 1 if len(others) else 0 :] += _LAST
    return start, status
