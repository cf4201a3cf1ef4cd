"""Copying a disk while clients change it: what a bitmap says is copied, and what has changed meanwhile once more."""

from __future__ import annotations

import asyncio
from typing import Final, Literal

import numpy as np

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.node import Node
from nbdserve.block.pieces import write_pieces
from nbdserve.block.watchers import Watcher
from nbdserve.block.window import map_node
from nbdserve.errors import RequestError
from nbdserve.extents import UNALLOCATED, ZERO
from nbdserve.jobs.job import Job
from nbdserve.units import GIB, KIB, MIB

GRANULARITY: Final = 64 * KIB
CHUNK: Final = MIB
"""The longest read and write."""
REQUESTS: Final = 8
"""In flight at a time."""
_SEGMENT: Final = 4 * GIB
"""How much of a map is made in one turn; layers may be exchanged between two."""
_RETRY_SECONDS: Final = 0.1

OnError = Literal["report", "ignore", "stop", "enospc", "auto"]
"""QEMU's BlockdevOnError. What is ignored is tried again later."""


class LiveCopy(Watcher):
    """Copies from ``source`` to ``target`` for ``job``. ``work`` says what; as a watcher of the source it adds to it.

    A granule is marked clean before it is read, and marked after it has changed, so no change is lost.
    """

    def __init__(
        self,
        job: Job,
        source: Node,
        target: Node,
        size: int,
        *,
        on_source_error: str = "report",
        on_target_error: str = "report",
        granularity: int = GRANULARITY,
    ) -> None:
        self._job = job
        self._source = source
        self._target = target
        self._on_error = {"read": on_source_error, "write": on_target_error}
        self.work = DirtyBitmap(None, size, granularity)
        self._running: dict[asyncio.Task[None], tuple[int, int]] = {}
        self._failure: BaseException | None = None
        self._done = 0
        self._finishing = False
        self.troubled = False
        """In the last sweep something could not be copied, and is to be tried again."""

    def changed(self, offset: int, length: int) -> None:
        """A client has written: it is to be copied (again)."""
        length = min(length, self.work.size - offset)
        if length > 0:
            self.work.set(offset, length)

    async def mark(self, *, above: int | None = None, zeroes: bool = True) -> None:
        """Mark what the source holds as work.

        ``above``: only what its layers with a number below it decide. Without ``zeroes`` nothing that reads as zeroes:
        the target does, too.
        """
        for start in range(0, self.work.size, _SEGMENT):
            end = min(start + _SEGMENT, self.work.size)
            async with self._source.gate:
                parts = [part async for part in map_node(self._source, start, end)]
            for part in parts:
                wanted = np.ones(len(part), np.bool_) if above is None else part.depth < above
                if not zeroes:
                    wanted &= (part.kind != ZERO) & (part.kind != UNALLOCATED)
                for at, length in zip(part.start[wanted].tolist(), part.length[wanted].tolist(), strict=True):
                    self.work.set(at, length)
        self._tell_progress()

    @property
    def remaining(self) -> int:
        """Bytes to be copied."""
        return self.work.count() + sum(length for _, length in self._running.values())

    def _tell_progress(self) -> None:
        self._job.current_progress = self._done
        self._job.total_progress = self._done + self.remaining

    def finish(self) -> None:
        """The job's work is done but for the last changes.

        Neither its speed nor a pause hold them back, and an error is reported.
        """
        self._finishing = True
        self._on_error = dict.fromkeys(self._on_error, "report")

    async def sweep(self) -> None:
        """Copy what is marked, once through the disk; what changes behind the sweep stays marked.

        Nothing is in flight on return. The error that a policy reports is raised; what was not copied is marked again.
        """
        position = 0
        self.troubled = False
        try:
            while self._failure is None:
                if self._job.pause_requested and not self._finishing:
                    await self._drain()
                area = self._next(position)
                if area is None:
                    if not self._running or self._next(position, busy=True) is None:
                        break
                    await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                    continue
                if not self._finishing:
                    await self._job.throttle(area[1])
                position = sum(area)
                if len(self._running) >= REQUESTS:
                    await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                self._begin(*area)
            await self._drain()
        except BaseException:
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running)
            raise
        self._tell_progress()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _next(self, position: int, *, busy: bool = False) -> tuple[int, int] | None:
        """The next piece of work from ``position`` on; with ``busy`` also what a request in flight works on."""
        while (area := self.work.next_dirty_area(position, self.work.size, CHUNK)) is not None:
            start, length = area
            length = min(length, CHUNK - start % CHUNK)
            if busy:
                return start, length
            other = next((end for at, end in self._spans() if at < start + length and start < end), None)
            if other is None:
                return start, length
            position = other
        return None

    def _spans(self) -> list[tuple[int, int]]:
        return [(at, at + length) for at, length in self._running.values()]

    def _begin(self, offset: int, length: int) -> None:
        # Whole granules are marked clean; their last one may reach past the end of the piece only at the disk's end.
        self.work.clear_range(offset, length)
        task = asyncio.get_running_loop().create_task(self._copy(offset, length))
        self._running[task] = (offset, length)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        offset, length = self._running.pop(task)
        if task.cancelled() or task.exception() is not None:
            self.work.set(offset, length)
            if not task.cancelled() and self._failure is None:
                self._failure = task.exception()
        else:
            self._done += length
        self._tell_progress()

    async def _drain(self) -> None:
        while self._running:
            await asyncio.wait(self._running)

    async def _copy(self, offset: int, length: int) -> None:
        data = memoryview(bytearray(length))
        operation = "read"
        try:
            pieces = await self._source.read_pieces(offset, data)
            operation = "write"
            await write_pieces(self._target, offset, data, pieces)
        except (OSError, RequestError) as error:
            if not self._job.failed_io(operation, error, self._on_error[operation]):
                raise
            self.work.set(offset, length)
            self._done -= length
            self.troubled = True
            await asyncio.sleep(_RETRY_SECONDS)
