"""Where ranges of a disk are in files, for work that reads them on a worker thread by itself.

So a copy and a comparison look at what they have read while it is still in the processor's cache, and need one trip.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from nbdserve.block.chain import NEEDS_TABLE, resolve
from nbdserve.buffers import fill_zeroes
from nbdserve.extents import COMPRESSED, DATA
from nbdserve.storage.base import BlockingRead

if TYPE_CHECKING:
    from nbdserve.block.node import Node

_Place: TypeAlias = tuple[BlockingRead, int, int]
"""How to read it, from which offset of the host, and how many bytes."""


class PlacedReader:
    """Reads what is at many places as if it were one behind the other."""

    def __init__(self, places: Iterable[_Place]) -> None:
        self._places = iter(places)
        self._at: _Place = _read_zeroes, 0, 0

    def fill(self, buffer: memoryview) -> None:
        """Read on, as much as ``buffer`` takes, on a worker thread. OSError."""
        read, host_offset, left = self._at
        position, total = 0, len(buffer)
        while position < total:
            if not left:
                read, host_offset, left = next(self._places)
            length = min(left, total - position)
            read(host_offset, buffer[position : position + length])
            position += length
            host_offset += length
            left -= length
        self._at = read, host_offset, left


@asynccontextmanager
async def placed(node: Node, ranges: Sequence[tuple[int, int]]) -> AsyncIterator[PlacedReader | None]:
    """Reads every ``(offset, length)``, ascending and inside the disk, none of which anybody changes meanwhile.

    None where that does not do, for compressed data for example, or at the moment: ``Node.read_all`` reads it.
    """
    if not ranges:
        yield PlacedReader(())
        return
    async with node.gate:
        start, end = ranges[0][0], sum(ranges[-1])
        node.check_inside(start, end - start)
        lock = node.locks.shared(start, end)
        if not node.locks.try_acquire(lock):
            yield None
            return
        try:
            places = await _places(node, ranges)
            yield None if places is None else PlacedReader(places)
        finally:
            node.locks.release(lock)


async def _places(node: Node, ranges: Sequence[tuple[int, int]]) -> list[_Place] | None:
    places: list[_Place] = []
    for offset, total in ranges:
        position = 0
        while position < total:
            kind, length, index, host_offset = resolve(node.layers, offset + position, total - position)
            read: BlockingRead | None = _read_zeroes
            if kind == NEEDS_TABLE:
                await node.layers[index].load(offset + position)
                continue
            if kind == DATA:
                read = node.layers[index].data.blocking_read
            if read is None or kind == COMPRESSED:
                return None
            places.append((read, host_offset, length))
            position += length
    return places


def _read_zeroes(offset: int, buffer: memoryview) -> None:
    fill_zeroes(buffer)
