"""Many ranges of a disk at once, for copies: one trip to the worker threads reads or writes all of them.

A trip costs what the copy of a few hundred kilobytes costs, and a disk is in pieces: so what is wanted of all of them
is settled on the event loop, and then moved together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

from nbdserve.block import cow
from nbdserve.block.chain import NEEDS_TABLE, resolve
from nbdserve.block.requests import RangeLock
from nbdserve.buffers import fill_zeroes
from nbdserve.extents import COMPRESSED, DATA
from nbdserve.formats.base import Allocation, RoomNeededError
from nbdserve.storage.base import BlockingWrite, ReadBuffer, Storage
from nbdserve.units import align_down, align_up

if TYPE_CHECKING:
    from nbdserve.block.node import Node

Ranges: TypeAlias = Sequence[tuple[int, memoryview]]
"""Guest offsets, and the buffers for what is there; inside the disk, not overlapping."""


async def read_all(node: Node, ranges: Ranges) -> None:
    """Fill every buffer; nobody changes the mapping of a range while it is read."""
    while ranges:
        async with node.gate:
            for offset, buffer in ranges:
                node.check_inside(offset, len(buffer))
            done = await _read_free(node, ranges)
        if done < len(ranges):  # somebody else works there, and may wait for a range that was held here
            await node.read_into(*ranges[done])
        ranges = ranges[done + 1 :]


async def _read_free(node: Node, ranges: Ranges) -> int:
    """Read the ranges up to the first that is held exclusively by others; how many these are."""
    wanted: dict[Storage, list[tuple[int, memoryview]]] = {}
    done = 0
    with ExitStack() as locks:
        for offset, buffer in ranges:
            lock = node.locks.shared(offset, offset + len(buffer))
            if not node.locks.try_acquire(lock):
                break
            locks.callback(node.locks.release, lock)
            await _plan_read(node, offset, buffer, wanted)
            done += 1
        for storage, pieces in wanted.items():
            await storage.read_all(pieces)
    return done


async def _plan_read(
    node: Node, offset: int, buffer: memoryview, wanted: dict[Storage, list[tuple[int, memoryview]]]
) -> None:
    """Note what is to be read from where; zeroes and compressed data are put into ``buffer`` at once."""
    position, total = 0, len(buffer)
    while position < total:
        at = offset + position
        kind, length, index, host_offset = resolve(node.layers, at, total - position)
        layer = node.layers[index]
        if kind == NEEDS_TABLE:
            await layer.load(at)
            continue
        if kind == COMPRESSED:
            start, unit = await layer.read_compressed(at)
            length = min(length, len(unit) - (at - start))
            buffer[position : position + length] = memoryview(unit)[at - start : at - start + length]
        elif kind == DATA:
            wanted.setdefault(layer.data, []).append((host_offset, buffer[position : position + length]))
        else:
            fill_zeroes(buffer[position : position + length])
        position += length


async def write_all(node: Node, ranges: Ranges) -> None:
    """Write every range, in new clusters where there are none to overwrite.

    When this fails any of them may be written.
    """
    while ranges:
        async with node.gate:
            for offset, data in ranges:
                node.check_inside(offset, len(data))
            try:
                done = await _write_free(node, ranges) if node.writes_at_once else 0
            except RoomNeededError:
                done = 0
            finally:
                node.changes += 1
        if done < len(ranges):  # somebody else works there or is told of it, or the image needs room: wait for that
            await node.write(*ranges[done])
        ranges = ranges[done + 1 :]


async def _write_free(node: Node, ranges: Ranges) -> int:
    """Write the ranges up to the first whose clusters are held; how many these are."""
    plan = WritePlan(node)
    done = 0
    for offset, data in ranges:
        if not await plan.add(offset, data):
            break
        done += 1
    await plan.write()
    return done


class WritePlan:
    """What is to be written to the host, and shown then. The ranges are held exclusively until that is done."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.ready: list[tuple[int, ReadBuffer]] = []
        """Host offsets, and what goes there."""
        self.unread: list[tuple[int, range]] = []
        """Host offsets, and the ranges of the guest whose content, not read so far, goes there; in their order."""
        self._allocations: list[Allocation] = []
        self._locks: list[RangeLock] = []

    async def add(self, offset: int, data: cow.Content) -> bool:
        """Plan the write of a range; False if its clusters are held, by others or for this plan.

        ``data`` that is not read so far is the range itself, of whole sectors. An error undoes the whole plan.
        """
        node = self._node
        unit = node.top.cluster_size
        lock = node.locks.exclusive(align_down(offset, unit), align_up(offset + len(data), unit))
        if not node.locks.try_acquire(lock):
            return False
        self._locks.append(lock)
        try:
            position, total = 0, len(data)
            while position < total:
                at = offset + position
                run = node.top.lookup_writable(at, total - position)
                if run is None:
                    await node.top.load(at)
                    continue
                kind, length, host_offset = run
                if kind == DATA:
                    self._put(host_offset, data[position : position + length])
                else:
                    length = await self._allocate(at, data[position : position + length])
                position += length
        except BaseException:
            self.give_up()
            raise
        return True

    def _put(self, host_offset: int, data: ReadBuffer | range) -> None:
        if isinstance(data, range):
            self.unread.append((host_offset, data))
        else:
            self.ready.append((host_offset, data))

    async def _allocate(self, offset: int, data: cow.Content) -> int:
        """New space for the start of ``data``; the bytes it is for."""
        top, length = self._node.top, len(data)
        start = align_down(offset, top.granularity)
        size = align_up(offset + length, top.granularity) - start
        while (allocation := top.allocate(start, size)) is None:
            await top.prepare(start, size)
        self._allocations.append(allocation)
        stop = min(offset + length, start + allocation.length)
        for host_offset, piece in await cow.content(self._node, allocation, offset, data[: stop - offset]):
            self._put(host_offset, piece)
        return stop - offset

    async def write(self) -> None:
        """Write, show what is new, and let go of the ranges."""
        try:
            if self.ready:
                await self._node.data.write_all(self.ready)
        except BaseException:
            self.give_up()
            raise
        self._end(self._node.publish)

    async def carry_out(self, work: Callable[[BlockingWrite], bool]) -> bool:
        """``write``, by what ``work`` does on a worker thread; if that is False, ``give_up``."""
        try:
            written = await self._node.data.work(work)
        except BaseException:
            self.give_up()
            raise
        self._end(self._node.publish if written else self._node.top.abandon)
        return written

    def give_up(self) -> None:
        """Let go of the ranges, and of the space for them."""
        self._end(self._node.top.abandon)

    def _end(self, settle: Callable[[Allocation], None]) -> None:
        try:
            for allocation in self._allocations:
                settle(allocation)
        finally:
            for lock in self._locks:
                self._node.locks.release(lock)
            self.ready, self.unread, self._allocations, self._locks = [], [], [], []
