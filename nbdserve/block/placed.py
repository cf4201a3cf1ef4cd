"""Where ranges of a disk are in files, for work that reads them on a worker thread by itself.

So a copy and a comparison look at what they have read while it is still in the processor's cache, and need one trip.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from nbdserve.block.chain import NEEDS_TABLE, resolve
from nbdserve.buffers import fill_zeroes
from nbdserve.extents import COMPRESSED, DATA
from nbdserve.storage.base import BlockingRead

if TYPE_CHECKING:
    from nbdserve.block.node import Node

Place: TypeAlias = tuple[BlockingRead, int, int]
"""How to read it, from which offset of the host, and how many bytes."""


@asynccontextmanager
async def placed(node: Node, ranges: Sequence[tuple[int, int]]) -> AsyncIterator[list[list[Place]] | None]:
    """The places of every ``(offset, length)``, ascending and inside the disk, of which nobody changes any meanwhile.

    None where that does not do, for compressed data for example, or at the moment: ``Node.read_all`` reads it.
    """
    if not ranges:
        yield []
        return
    async with node.gate:
        start, end = ranges[0][0], sum(ranges[-1])
        node.check_inside(start, end - start)
        lock = node.locks.shared(start, end)
        if not node.locks.try_acquire(lock):
            yield None
            return
        try:
            yield await _places(node, ranges)
        finally:
            node.locks.release(lock)


async def _places(node: Node, ranges: Sequence[tuple[int, int]]) -> list[list[Place]] | None:
    found: list[list[Place]] = []
    for offset, total in ranges:
        places: list[Place] = []
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
        found.append(places)
    return found


def _read_zeroes(offset: int, buffer: memoryview) -> None:
    fill_zeroes(buffer)


def read_places(places: Sequence[Place], buffer: memoryview) -> None:
    """Fill the start of ``buffer``, on a worker thread. OSError."""
    position = 0
    for read, host_offset, length in places:
        read(host_offset, buffer[position : position + length])
        position += length
