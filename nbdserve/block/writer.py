"""Batched writes: what needs no waiting to be planned is written together, one trip to a worker thread for many.

A trip costs as much as 10 writes of 4 KiB, and a file system takes buffered writes to one file one after the other. So
one trip of a node is under way at a time, and what arrives meanwhile gathers for the next: the busier the disk, the
larger the batches. Locks, allocation and the content for copy-on-write are settled on the event loop, before the trip;
the mapping shows the new clusters after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdserve.block.pieces import zero_pieces
from nbdserve.block.requests import RangeLock
from nbdserve.errors import RequestError
from nbdserve.extents import DATA
from nbdserve.formats.base import Allocation
from nbdserve.storage.base import ReadBuffer
from nbdserve.units import KIB, align_down, align_up

if TYPE_CHECKING:
    from nbdserve.block.node import Node

Done: TypeAlias = Callable[[Exception | None], None]
"""Called once, when the write is complete (in the cache: FLUSH makes it stable) or has failed."""

_LONGEST_COPY: Final = 256 * KIB
"""The longest copy-on-write done here; the copy of a larger cluster would hold up the event loop (20 us for this)."""


class _Write:
    """One write, or several to one new cluster."""

    __slots__ = ("allocation", "copy", "done", "lock", "pieces")

    def __init__(self, lock: RangeLock, allocation: Allocation | None, copy: bytearray | None) -> None:
        self.lock = lock
        self.allocation = allocation
        self.copy = copy
        """The whole content of the allocation, where it is made of more than what is written."""
        self.pieces: list[tuple[int, ReadBuffer]] = []
        self.done: list[Done] = []

    def add(self, offset: int, data: memoryview) -> bool:
        """Another write into the cluster this one allocates, before the trip; False if it overlaps what is there."""
        allocation = self.allocation
        assert allocation is not None
        start = offset - allocation.offset
        if start < 0 or start + len(data) > allocation.length:
            return False
        if self.copy is not None:
            self.copy[start : start + len(data)] = data
            return True
        host_offset = allocation.host_offset + start
        if any(at < host_offset + len(data) and host_offset < at + len(other) for at, other in self.pieces):
            return False
        self.pieces.append((host_offset, data))
        return True


class BatchWriter:
    """Gathers the writes of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._top = node.top
        self._queue: list[_Write] = []
        self._allocating: dict[int, _Write] = {}
        """Queued writes that allocate exactly one cluster, by its guest offset."""
        self._runner: asyncio.Task[None] | None = None

    def try_write(self, offset: int, data: memoryview, done: Done) -> bool:
        """Take over the write if it can be planned without waiting; ``data`` must stay as it is until ``done``."""
        try:
            run = self._top.lookup_writable(offset, len(data))
        except RequestError:
            return False  # a corrupt mapping: the caller's other way reports it
        if run is None or run[1] < len(data):
            return False
        if run[0] != DATA:
            return self._try_allocate(offset, data, done)
        locks = self._node.locks
        lock = locks.shared(offset, offset + len(data))
        if not locks.try_acquire(lock):
            return False
        write = _Write(lock, None, None)
        write.pieces.append((run[2], data))
        self._enqueue(write, done)
        return True

    def _try_allocate(self, offset: int, data: memoryview, done: Done) -> bool:
        cluster_size, locks = self._top.cluster_size, self._node.locks
        start, end = align_down(offset, cluster_size), align_up(offset + len(data), cluster_size)
        lock = locks.exclusive(start, end)
        if not locks.try_acquire(lock):
            write = self._allocating.get(start)
            if write is None or not write.add(offset, data):
                return False
            write.done.append(done)
            return True
        try:
            planned = self._plan(lock, offset, data)
        except (OSError, RequestError):
            planned = None  # no space, or a corrupt mapping: the caller's other way reports it
        if planned is None:
            locks.release(lock)
            return False
        if end - start == cluster_size:
            self._allocating[start] = planned
        self._enqueue(planned, done)
        return True

    def _plan(self, lock: RangeLock, offset: int, data: memoryview) -> _Write | None:
        top, end = self._top, offset + len(data)
        start = align_down(offset, top.granularity)
        stop = align_up(end, top.granularity)
        head = self._old_content(start, offset)
        tail = self._old_content(end, stop)
        if head is None or tail is None:
            return None
        allocation = top.allocate(start, stop - start)
        if allocation is None:
            return None
        if allocation.length < stop - start or (not allocation.zeroed and stop - start - len(data) > _LONGEST_COPY):
            top.abandon(allocation)
            return None
        if (head or tail) or (not allocation.zeroed and stop - start > len(data)):
            copy = bytearray(stop - start)
            copy[: len(head)] = head
            copy[offset - start : end - start] = data
            copy[end - start : end - start + len(tail)] = tail
            write = _Write(lock, allocation, copy)
            write.pieces.append((allocation.host_offset, copy))
        else:
            write = _Write(lock, allocation, None)
            write.pieces.append((allocation.host_offset + offset - start, data))
        return write

    def _old_content(self, start: int, end: int) -> bytes | bytearray | None:
        """What the guest range reads as; empty for zeroes only; None if that cannot be told without waiting."""
        end = min(end, self._node.size)
        if start >= end:
            return b""
        if end - start > _LONGEST_COPY:
            return None
        content = bytearray(end - start)
        view = memoryview(content)
        pieces = self._node.try_read_pieces(start, view)
        if pieces is None:
            return None
        if len(pieces) == 1 and pieces[0][0]:
            return b""
        zero_pieces(view, pieces)
        return content

    def _enqueue(self, write: _Write, done: Done) -> None:
        write.done.append(done)
        self._queue.append(write)
        if self._runner is None:
            self._runner = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue, []
                self._allocating.clear()
                try:
                    await self._node.data.write_all([piece for write in batch for piece in write.pieces])
                except Exception:
                    await self._write_singly(batch)
                else:
                    for write in batch:
                        self._settle(write, None)
        finally:
            self._runner = None

    async def _write_singly(self, batch: list[_Write]) -> None:
        """Which write of the batch failed is not known: do each again, by itself."""
        for write in batch:
            try:
                await self._node.data.write_all(write.pieces)
            except Exception as error:
                self._settle(write, error)
            else:
                self._settle(write, None)

    def _settle(self, write: _Write, error: Exception | None) -> None:
        try:
            if write.allocation is not None:
                (self._top.publish if error is None else self._top.abandon)(write.allocation)
        except Exception as failure:
            error = failure
        self._node.locks.release(write.lock)
        for done in write.done:
            done(error)
