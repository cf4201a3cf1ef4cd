"""Rebase: another backing file under an image whose disk stays what it is."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from nbdserve.block.lower import LowerNode
from nbdserve.block.node import Node
from nbdserve.block.window import map_node
from nbdserve.errors import JobError
from nbdserve.extents import UNALLOCATED
from nbdserve.formats.base import BackingReference
from nbdserve.jobs.in_flight import InFlight
from nbdserve.jobs.mirror import NodeJob
from nbdserve.units import GIB, MIB, SECTOR_SIZE, align_down, align_up

_SEGMENT: Final = GIB
_CHUNK: Final = MIB
_REQUESTS: Final = 4


class Rebase(NodeJob):
    """Copies into the top layer of ``node`` what its layers below and ``base`` do not have alike, then names ``base``.

    Nobody else changes the disk meanwhile. Ended before, the image has its old backing file and reads as it did.
    """

    type: ClassVar[str] = "rebase"

    def __init__(
        self, id: str, node: Node, base: Node | None, reference: BackingReference | None, **options: int
    ) -> None:
        """``base`` is the new backing chain, open, and ``reference`` what the header is to say of it; None: nothing."""
        if not node.top.can("set_backing"):
            name = "" if reference is None else reference.name
            raise JobError(f"Could not change the backing file to '{name}': Operation not supported")
        super().__init__(id, node, **options)
        self._base = base
        self._reference = reference
        self._old = LowerNode(node, 1) if len(node.layers) > 1 else None
        self._in_flight = InFlight(_REQUESTS)

    async def run(self) -> None:
        """Compare and copy."""
        size = self.total_progress = self.node.size
        try:
            for start in range(0, size, _SEGMENT):
                end = min(start + _SEGMENT, size)
                parts = [part async for part in map_node(self.node, start, end)]
                for part in parts:
                    below = (part.depth > 0) | (part.kind == UNALLOCATED)
                    for at, length, wanted in zip(
                        part.start.tolist(), part.length.tolist(), below.tolist(), strict=True
                    ):
                        if wanted:
                            await self._range(at, at + length)
                        else:
                            self.current_progress += length
            await self._in_flight.drain()
        finally:
            await self._in_flight.cancel()
        await self.node.flush()

    async def _range(self, start: int, end: int) -> None:
        while start < end:
            stop = min(end, start - start % _CHUNK + _CHUNK)
            await self.throttle(stop - start)
            await self._in_flight.room()
            self._in_flight.begin(self._compare(start, stop))
            start = stop

    async def _compare(self, start: int, end: int) -> None:
        """Write to the top layer what the range reads as where the new chain differs."""
        length = end - start
        (was_zero, was), (is_zero, new) = await _content(self._old, start, end), await _content(self._base, start, end)
        if not (was_zero and is_zero):
            padded = align_up(length, SECTOR_SIZE)
            sectors = [
                np.frombuffer(bytes(data).ljust(padded, b"\0"), np.uint64).reshape(-1, SECTOR_SIZE // 8)
                for data in (was, new)
            ]
            differs = np.concatenate(([False], (sectors[0] != sectors[1]).any(axis=1), [False]))
            edges = np.flatnonzero(differs[1:] != differs[:-1]) * SECTOR_SIZE
            for at, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                stop = min(stop, length)  # noqa: PLW2901
                if was_zero or not any(was[at:stop]):
                    await self._zero(start + at, start + stop)
                else:
                    await self.node.write(start + at, memoryview(was)[at:stop])
        self.current_progress += length

    async def _zero(self, start: int, end: int) -> None:
        """Zeroes of the top layer's own, also where the old chain reads as zeroes without."""
        node, top = self.node, self.node.top
        first = align_up(start, top.granularity)
        last = end if end == node.size else align_down(end, top.granularity)
        while first < last and start <= first:
            done = node.zero_mapping(first, last - first, unmap=False)
            if done is None:
                await top.load(first)
                continue
            if not done:
                break
            await node.write(start, bytes(first - start))
            start = first = first + done
        await node.write(start, bytes(max(0, end - start)))

    async def prepare(self) -> None:
        """Name the new backing file."""
        await self.node.top.set_backing(self._reference, None if self._base is None else self._base.top)


async def _content(node: Node | None, start: int, end: int) -> tuple[bool, bytearray]:
    """Whether the mapping tells that the range is zeroes, and its bytes; past the end of ``node`` are zeroes."""
    data = bytearray(end - start)
    inside = 0 if node is None else min(end, node.size) - start
    if node is None or inside <= 0:
        return True, data
    view = memoryview(data)[:inside]
    pieces = await node.read_pieces(start, view)
    position = 0
    for is_zero, length in pieces:
        if is_zero:
            data[position : position + length] = bytes(length)
        position += length
    return all(is_zero for is_zero, _ in pieces), data
