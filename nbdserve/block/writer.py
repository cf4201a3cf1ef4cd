"""Batched writes: what needs no waiting to be planned is written together, one trip to a worker thread for many.

A trip costs 25 us where the write of 4 KiB itself takes 2 to 7, and a file system takes buffered writes to one file
one after the other. So one trip of a node is under way at a time, and what arrives meanwhile gathers for the next:
the busier the disk, the larger the batches. Locks, allocation and the content for copy-on-write are settled on the
event loop, before the trip; the mapping shows the new clusters after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from nbdserve.block.chain import resolve
from nbdserve.block.pieces import zero_pieces
from nbdserve.block.places import Places
from nbdserve.block.requests import RangeLock
from nbdserve.buffers import fill_zeroes
from nbdserve.errors import RequestError
from nbdserve.extents import DATA, ZERO
from nbdserve.formats.base import Allocation
from nbdserve.storage.base import ReadBuffer
from nbdserve.units import KIB, is_power_of_two

if TYPE_CHECKING:
    from nbdserve.block.node import Node

WRITE_WAIT: Final = 0
"""Nothing was done: use ``Node.write``."""
WRITE_DONE: Final = 1
"""The write is complete (in the cache: FLUSH makes it stable)."""
WRITE_TAKEN: Final = 2
"""The write is under way; ``done`` will be called."""

Done: TypeAlias = Callable[[Exception | None], None]
"""Called once, when a write that was taken is complete or has failed."""

_LONGEST_COPY: Final = 256 * KIB
"""The longest copy-on-write done here; the copy of a larger cluster would hold up the event loop (10 us for this, from
the cache)."""
_MOST_SPARE: Final = 16
"""Buffers of one cluster that are kept: fio's queue depth."""


class _Write:
    """One write, or several to one new cluster."""

    __slots__ = ("allocation", "copy", "done", "lock", "pieces")

    def __init__(self, host_offset: int, data: ReadBuffer, allocation: Allocation | None, copied: bool) -> None:
        self.pieces: list[tuple[int, ReadBuffer]] = [(host_offset, data)]
        self.allocation = allocation
        self.copy = data if copied and isinstance(data, bytearray) else None
        """The whole content of the allocation, where it is made of more than what is written."""
        self.lock: RangeLock
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
        self.pieces.append((host_offset, bytes(data)))
        return True


class BatchWriter:
    """Gathers the writes of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._top = node.top
        self._data = node.top.data
        self._locks = node.locks
        self._queue: list[_Write] = []
        self._allocating: dict[int, _Write] = {}
        """Queued writes that allocate exactly one cluster, by its guest offset."""
        if not is_power_of_two(self._top.cluster_size):  # which is rounded to with masks here
            self._try_allocate = lambda offset, data, done: WRITE_WAIT  # type: ignore[method-assign]
        self._spare: list[bytearray] = []
        self._trip: asyncio.Event | None = None
        """Set when the trip that is under way has ended."""
        self._runner: asyncio.Task[None] | None = None
        self._remember = node.places.learn_writable if Places.worthwhile(node.layers) else None

    def try_write(self, offset: int, data: memoryview, done: Done) -> int:
        """Write if that can be planned without waiting: WRITE_DONE, WRITE_TAKEN or WRITE_WAIT.

        A write that is taken keeps a copy of ``data`` unless that is a buffer of its own.
        """
        length = len(data)
        try:
            run = self._top.lookup_writable(offset, length)
            if run is None or run[1] < length:
                return WRITE_WAIT
            if run[0] == DATA:
                if self._data.try_write(run[2], data):
                    if self._remember is not None:
                        self._remember(offset)
                    return WRITE_DONE
                lock = self._locks.shared(offset, offset + length)
                if self._locks.blocked(lock.start, lock.end, exclusive=False):
                    return WRITE_WAIT
                self._enqueue(_Write(run[2], data, None, False), lock, data, done)
                return WRITE_TAKEN
            return self._try_allocate(offset, data, done)
        except (OSError, RequestError):
            return WRITE_WAIT  # no space, or a corrupt mapping: the caller's other way reports it

    def _try_allocate(self, offset: int, data: memoryview, done: Done) -> int:
        mask = self._top.cluster_size - 1
        start, end = offset & ~mask, (offset + len(data) + mask) & ~mask
        if self._locks.blocked(start, end, exclusive=True):
            joined = self._allocating.get(start)
            if joined is None or not joined.add(offset, data):
                return WRITE_WAIT
            joined.done.append(done)
            return WRITE_TAKEN
        plan = self._plan(offset, data)
        if plan is None:
            return WRITE_WAIT
        allocation, host_offset, content = plan
        if not self._queue and self._data.try_write(host_offset, content):
            self._node.publish(allocation)
            if content is not data:
                self._spare_again(cast(bytearray, content))
            return WRITE_DONE
        write = _Write(host_offset, content, allocation, content is not data)
        if end - start == mask + 1:
            self._allocating[start] = write
        self._enqueue(write, self._locks.exclusive(start, end), data, done)
        return WRITE_TAKEN

    def _plan(self, offset: int, data: memoryview) -> tuple[Allocation, int, ReadBuffer] | None:
        """Space for a write, and what is to be written where: ``data``, or around it what the clusters read as."""
        top, length = self._top, len(data)
        mask = top.granularity - 1
        start = offset & ~mask
        size = (offset + length + mask & ~mask) - start
        at = offset - start
        copy: bytearray | None = None
        if size > length:
            known, copy = self._old_content(start, size)
            if not known:
                return None
        allocation = top.allocate(start, size)
        if allocation is None:
            self._spare_again(copy)
            return None
        if allocation.length < size or (copy is None and not allocation.zeroed and size - length > _LONGEST_COPY):
            top.abandon(allocation)
            self._spare_again(copy)
            return None
        if copy is None and (allocation.zeroed or size == length):
            return allocation, allocation.host_offset + at, data
        copy = copy or bytearray(size)
        copy[at : at + length] = data
        return allocation, allocation.host_offset, copy

    def _old_content(self, start: int, size: int) -> tuple[bool, bytearray | None]:
        """Whether it can be told at once what the guest range reads as, and that; None: as zeroes."""
        node = self._node
        inside = min(size, node.size - start)
        kind, found, index, host_offset = resolve(node.layers, start, inside)
        if kind == ZERO and found >= inside:
            return True, None
        if size > _LONGEST_COPY:
            return False, None
        copy = self._spare.pop() if self._spare and size == self._top.granularity else bytearray(size)
        view = memoryview(copy)[:inside]
        if kind == DATA and found >= inside:
            pieces = [(False, inside)] if node.layers[index].data.try_read_into(host_offset, view) else None
        else:
            pieces = node.try_read_pieces(start, view)
        if pieces is None:
            self._spare_again(copy)
            return False, None
        zero_pieces(view, pieces)
        fill_zeroes(memoryview(copy)[inside:])
        return True, copy

    def _spare_again(self, copy: bytearray | None) -> None:
        """A buffer for the content of a cluster is free. A fresh one of 64 KiB costs 3 to 50 us, for page faults."""
        if copy is not None and len(copy) == self._top.granularity and len(self._spare) < _MOST_SPARE:
            self._spare.append(copy)

    def _enqueue(self, write: _Write, lock: RangeLock, data: memoryview, done: Done) -> None:
        if write.copy is None and not isinstance(data.obj, bytes):
            write.pieces = [(write.pieces[0][0], bytes(data))]
        self._locks.try_acquire(lock)
        write.lock = lock
        write.done.append(done)
        self._queue.append(write)
        if self._runner is None:
            self._runner = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue, []
                self._allocating.clear()
                self._trip = asyncio.Event()
                try:
                    await self._data.write_all([piece for write in batch for piece in write.pieces])
                except Exception:
                    await self._write_singly(batch)
                else:
                    for write in batch:
                        self._settle(write, None)
                finally:
                    self._trip.set()
        finally:
            self._runner = self._trip = None

    async def catch_up(self) -> None:
        """What was taken before this call is complete on return; what comes after it may not be."""
        if self._runner is None:
            return
        for _ in range(2 if self._trip is not None and self._queue else 1):
            if self._trip is None:
                await asyncio.sleep(0)  # the runner's first turn
            if self._trip is not None:
                await self._trip.wait()

    async def _write_singly(self, batch: list[_Write]) -> None:
        """Which write of the batch failed is not known: do each again, by itself."""
        for write in batch:
            try:
                await self._data.write_all(write.pieces)
            except Exception as error:
                self._settle(write, error)
            else:
                self._settle(write, None)

    def _settle(self, write: _Write, error: Exception | None) -> None:
        try:
            if write.allocation is not None:
                (self._node.publish if error is None else self._top.abandon)(write.allocation)
        except Exception as failure:
            error = failure
        self._spare_again(write.copy)
        self._node.changes += 1
        self._locks.release(write.lock)
        for done in write.done:
            done(error)
