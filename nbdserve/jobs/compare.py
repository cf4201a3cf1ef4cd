"""Comparing the content of two disks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import ClassVar, Final, NamedTuple

import numpy as np

from nbdserve.block.cow import is_zero
from nbdserve.block.node import Node
from nbdserve.block.placed import PlacedReader, placed
from nbdserve.block.window import map_node
from nbdserve.errors import naming
from nbdserve.extents import COMPRESSED, UNALLOCATED, ZERO, Int64Array
from nbdserve.jobs.job import Job
from nbdserve.jobs.stretches import Stretch, What, stretches
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.pool import worker_pool
from nbdserve.units import KIB, MIB, SECTOR_SIZE

_CHUNK: Final = 16 * MIB
"""The most that is compared with one trip to the worker threads."""
_READ: Final = 2 * MIB
"""The most that is read of each disk at a time where both are read before they are compared."""
_MOST_PIECES: Final = 128
_IN_FLIGHT: Final = 3
"""Chunks compared at a time."""
_STEP: Final = 256 * KIB
"""Compared at a time: as much as stays in the processor's cache when both disks are read."""
_LAST: Final = 16
"""Added to the status of the run that ends with the disk."""


class _Piece(NamedTuple):
    """A range of guest bytes, and the numbers of the disks that have data there."""

    offset: int
    length: int
    data: tuple[int, ...]


def first_difference(one: ReadBuffer, other: ReadBuffer) -> int | None:
    """The offset of the first sector that differs; both have one length."""
    for start in range(0, len(one), _STEP):
        length = min(_STEP, len(one) - start)
        words = np.uint64 if length % 8 == 0 else np.uint8
        step = np.dtype(words).itemsize
        differ = np.frombuffer(one, words, length // step, start) != np.frombuffer(other, words, length // step, start)
        if differ.any():
            return (start + int(differ.argmax()) * step) // SECTOR_SIZE * SECTOR_SIZE
    return None


def first_data(data: ReadBuffer) -> int | None:
    """The offset of the first sector that is not zero."""
    if is_zero(memoryview(data)):
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
        self._spare: list[tuple[bytearray, ...]] = []

    async def run(self) -> None:
        """Compare."""
        running: deque[tuple[int, asyncio.Task[int | None]]] = deque()
        try:
            async for batch in self._batches():
                await self.throttle(sum(piece.length for piece in batch))
                if len(running) == _IN_FLIGHT and await self._found(*running.popleft()):
                    return
                task = asyncio.get_running_loop().create_task(self._compare(batch))
                running.append((batch[0].offset, task))
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
        self.mismatch = await task
        return self.mismatch is not None

    async def _batches(self) -> AsyncIterator[list[_Piece]]:
        """What has to be read, as much of it as fills a buffer at a time."""
        batch: list[_Piece] = []
        room = _CHUNK
        async for piece in self._pieces():
            if piece.length > room or len(batch) == _MOST_PIECES:
                yield batch
                batch, room = [], _CHUNK
            batch.append(piece)
            room -= piece.length
        if batch:
            yield batch

    async def _pieces(self) -> AsyncIterator[_Piece]:
        """Where at least one disk has data; where none has, nothing needs to be compared."""
        one, other = (_padded(node, self.total_progress) for node in self._nodes)
        left, right = await anext(one, None), await anext(other, None)
        while left is not None and right is not None:
            start = max(left.offset, right.offset)
            end = min(left.offset + left.length, right.offset + right.length)
            data = tuple(number for number, part in enumerate((left, right)) if part.what == What.DATA)
            while start < end and data:
                length = min(end - start, _CHUNK - start % _CHUNK)
                yield _Piece(start, length, data)
                start += length
            if left.offset + left.length == end:
                left = await anext(one, None)
            if right.offset + right.length == end:
                right = await anext(other, None)

    async def _compare(self, batch: list[_Piece]) -> int | None:
        """The offset of the first sector that differs."""
        buffers = self._spare.pop() if self._spare else tuple(bytearray(_STEP) for _ in self._nodes)
        try:
            one, other = (
                placed(node, [(piece.offset, piece.length) for piece in batch if number in piece.data])
                for number, node in enumerate(self._nodes)
            )
            async with one as here, other as there:
                if here is not None and there is not None:
                    return await worker_pool().run(self._first_mismatch, batch, (here, there), buffers)
            for part in _parts(batch):
                if (found := await self._compare_read(part)) is not None:
                    return found
            return None
        finally:
            self._spare.append(buffers)

    def _first_mismatch(
        self, batch: list[_Piece], readers: tuple[PlacedReader, ...], buffers: tuple[bytearray, ...]
    ) -> int | None:
        """Read and compare step by step, on a worker thread."""
        one, other = buffers
        whole = [memoryview(buffer) for buffer in buffers]
        for offset, total, data in batch:
            for start in range(0, total, _STEP):
                length = min(_STEP, total - start)
                for number in data:
                    with naming(self._nodes[number].path):
                        readers[number].fill(whole[number][:length])
                if len(data) == 2 and length == _STEP and one == other:
                    continue  # one memcmp, a third of the time of what finds the place
                found = _mismatch([whole[number][:length] for number in data])
                if found is not None:
                    return offset + start + found
        return None

    async def _compare_read(self, batch: list[_Piece]) -> int | None:
        """``_compare`` of what cannot be read on a worker thread alone."""
        buffers = [memoryview(bytearray(_READ)) for _ in self._nodes]
        views: list[list[memoryview]] = []
        wanted: tuple[list[tuple[int, memoryview]], ...] = tuple([] for _ in self._nodes)
        position = 0
        for offset, length, data in batch:
            views.append([buffers[number][position : position + length] for number in data])
            for number, view in zip(data, views[-1], strict=True):
                wanted[number].append((offset, view))
            position += length
        reads = [node.read_all(ranges) for node, ranges in zip(self._nodes, wanted, strict=True)]
        for outcome in await asyncio.gather(*reads, return_exceptions=True):
            if outcome is not None:
                raise outcome
        for piece, read in zip(batch, views, strict=True):
            found = _mismatch(read)
            if found is not None:
                return piece.offset + found
        return None


def _parts(batch: list[_Piece]) -> Iterator[list[_Piece]]:
    """The batch in parts that fit into a buffer."""
    part: list[_Piece] = []
    room = _READ
    for offset, total, data in batch:
        start = 0
        while start < total:
            length = min(room, total - start)
            part.append(_Piece(offset + start, length, data))
            start += length
            room -= length
            if not room:
                yield part
                part, room = [], _READ
    if part:
        yield part


def _mismatch(read: Sequence[memoryview]) -> int | None:
    """Of what was read of both disks, or of the one that has data there."""
    return first_difference(*read) if len(read) == 2 else first_data(read[0])


async def _padded(node: Node, end: int) -> AsyncIterator[Stretch]:
    """The disk as stretches, with zeroes behind it up to ``end``."""
    if node.size:
        async for stretch in stretches(node, 0, node.size):
            yield stretch
    if node.size < end:
        yield Stretch(node.size, end - node.size, What.ZERO)


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
