"""Copy-on-read: what layers below the top one decide is put into the top one, unseen by clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nbdserve.block.chain import NEEDS_TABLE, resolve
from nbdserve.block.cow import fill_new, old_bytes, reads_zero
from nbdserve.extents import UNALLOCATED, ZERO
from nbdserve.formats.base import Allocation, RoomNeededError
from nbdserve.units import MIB, align_down, align_up

if TYPE_CHECKING:
    from nbdserve.block.node import Node

_LONGEST: Final = MIB
"""The most that is read and written at a time; and the longest a client's write to the range has to wait."""
_LONGEST_ZERO: Final = 256 * MIB


async def populate(node: Node, offset: int, length: int, below: int) -> int:
    """Let the top layer hold the start of the range as far as a layer between it and number ``below`` decides it.

    The bytes looked at, at least one. Nothing changes for who reads the node, and what clients write at the same time
    stays. OSError, RequestError.
    """
    while True:
        try:
            async with node.gate:
                return await _populate(node, offset, length, below)
        except RoomNeededError:
            await node.make_room()


async def _populate(node: Node, offset: int, length: int, below: int) -> int:
    top = node.top
    while (run := top.lookup(offset, length)) is None:
        await top.load(offset)
    if run[0] != UNALLOCATED:
        return run[1]
    kind, known, index = await _decision(node, offset, run[1])
    if index >= below:
        return known
    start = align_down(offset, top.granularity)
    longest = _LONGEST_ZERO if kind == ZERO else _LONGEST
    stop = min(align_up(offset + min(known, longest), top.granularity), align_up(node.size, top.granularity))
    async with node.locks.exclusive(align_down(start, top.cluster_size), align_up(stop, top.cluster_size)):
        return await _fill(node, start, stop, kind) - (offset - start)


async def _decision(node: Node, offset: int, length: int) -> tuple[int, int, int]:
    """``(kind, length, layer index)`` of what decides the start of the range below the top layer."""
    while True:
        kind, length, index, _ = resolve(node.layers, offset, length)
        if kind != NEEDS_TABLE:
            return kind, length, index
        await node.layers[index].load(offset)


async def _fill(node: Node, start: int, stop: int, kind: int) -> int:
    """Fill ``[start, stop)``, whole units of the top layer held exclusively, where the top layer is still undecided.

    The bytes done from ``start``.
    """
    top = node.top
    end = min(stop, node.size)
    while (run := top.lookup(start, end - start)) is None:
        await top.load(start)
    if run[0] != UNALLOCATED:
        return run[1]
    stop = min(stop, align_up(start + run[1], top.granularity))
    end = min(stop, node.size)
    if kind == ZERO and await reads_zero(node, start, end - start):
        while (done := node.zero_mapping(start, stop - start, unmap=False)) is None:
            await top.load(start)
        if done:
            return min(done, end - start)
    stop = min(stop, start + max(_LONGEST, top.granularity))
    data = await old_bytes(node, start, stop)

    async def fill(allocation: Allocation) -> None:
        await node.data.write(allocation.host_offset, memoryview(data)[: allocation.length])

    allocation = await fill_new(node, start, len(data), fill)
    node.changes += 1
    return min(allocation.length, end - start)
