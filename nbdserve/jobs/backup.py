"""Backup: the disk of one moment, copied to another image while clients go on changing it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar, Final

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.filters.copy_before_write import CHUNK, GRANULARITY, CopyBeforeWrite
from nbdserve.block.node import Node
from nbdserve.block.window import map_node
from nbdserve.errors import JobError, RequestError
from nbdserve.extents import UNALLOCATED, ZERO
from nbdserve.jobs.in_flight import InFlight
from nbdserve.jobs.mirror import NodeJob
from nbdserve.units import GIB, align_down, align_up

_SEGMENT: Final = 4 * GIB
_REQUESTS: Final = 8
_IDLE_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 0.1


class Backup(NodeJob):
    """Copies to ``target`` what ``node`` holds at the moment of ``start``.

    Before a client changes what is not copied yet, it is. If that fails the client goes on, and the job fails. Several
    jobs begin at one moment when they are started inside ``drained`` of all their nodes.
    """

    type: ClassVar[str] = "backup"

    def __init__(
        self,
        id: str,
        node: Node,
        target: Node,
        *,
        sync: str = "full",
        base_index: int = 1,
        work: DirtyBitmap | None = None,
        target_is_zero: bool = False,
        on_source_error: str = "report",
        on_target_error: str = "report",
        owns_target: bool = True,
        finished: Callable[[bool, DirtyBitmap | None], None] | None = None,
        **options: Any,
    ) -> None:
        """``sync``: ``full``; ``top``, what the layers above number ``base_index`` hold; ``none``, only what clients
        are about to change, until the job is cancelled; ``bitmap`` (and ``incremental``), what is dirty in ``work``.

        ``target_is_zero``: it reads as zeroes. ``owns_target``: it is closed at the end. ``finished`` is called at the
        end, with whether all is copied, and what is not. ``options`` are those of ``Job``.
        """
        if target.size != node.size:
            raise JobError("Source and target image have different sizes")
        if sync in ("bitmap", "incremental") and work is None:
            raise JobError(f"must provide a valid bitmap name for '{sync}' sync mode")
        super().__init__(id, node, **options)
        self._target = target
        self._sync = sync
        self._base_index = base_index
        self._marked = work
        self._target_is_zero = target_is_zero
        self._on_error = {"read": on_source_error, "write": on_target_error}
        self._owns_target = owns_target
        self._finished = finished
        self._moment: CopyBeforeWrite | None = None
        self._in_flight = InFlight(_REQUESTS)

    def start(self) -> None:
        """Begin; this is the moment that is kept."""
        unit = max(GRANULARITY, min(self._target.top.cluster_size, CHUNK))
        todo = DirtyBitmap(None, self.node.size, unit)
        if self._marked is None:
            if self.node.size:
                todo.set(0, self.node.size)
        else:
            todo.absorb(self._marked)
        self._moment = CopyBeforeWrite(self.node, self._target, todo, on_error=self.fail)
        self.node.watch(self._moment)
        super().start()

    async def run(self) -> None:
        """Copy in the background what nobody has changed yet."""
        moment = self._moment
        assert moment is not None
        if self._sync in ("full", "top"):
            await self._leave_out(moment.todo)
        self.total_progress = moment.todo.count() + moment.copied
        try:
            while self._sync == "none":
                await self.sleep(_IDLE_SECONDS)
                self.current_progress = moment.copied
            while moment.todo.count() or moment.is_copying:
                await self._sweep(moment)
                await moment.settle()
        finally:
            await self._in_flight.cancel()
        await self._target.flush()

    async def _leave_out(self, todo: DirtyBitmap) -> None:
        """Unmark what need not be copied: zeroes of a target that has them, and what is the base's.

        A client who changes it meanwhile has had it copied before.
        """
        unit = todo.granularity
        for start in range(0, self.node.size, _SEGMENT):
            async with self.node.gate:
                end = min(start + _SEGMENT, self.node.size)
                parts = [part async for part in map_node(self.node, start, end)]
            for part in parts:
                zero = (part.kind == ZERO) | (part.kind == UNALLOCATED)
                skip = zero & self._target_is_zero
                if self._sync == "top":
                    skip = part.depth >= self._base_index
                for at, length in zip(part.start[skip].tolist(), part.length[skip].tolist(), strict=True):
                    first, stop = align_up(at, unit), align_down(at + length, unit)
                    if at + length == self.node.size:
                        stop = at + length
                    if first < stop:
                        todo.clear_range(first, stop - first)

    async def _sweep(self, moment: CopyBeforeWrite) -> None:
        """Copy what is marked, once through the disk."""
        position, todo = 0, moment.todo
        while (area := todo.next_dirty_area(position, todo.size, CHUNK)) is not None:
            offset, length = area
            length = min(length, CHUNK - offset % CHUNK)
            if self.pause_requested:
                await self._in_flight.drain()
            await self.throttle(length)
            await self._in_flight.room()
            self._in_flight.begin(self._copy(moment, offset, length))
            position = offset + length
        await self._in_flight.drain()
        await self.pause_point()

    async def _copy(self, moment: CopyBeforeWrite, offset: int, length: int) -> None:
        try:
            await moment.keep(offset, length)
        except (OSError, RequestError) as error:
            operation = moment.failed
            if not self.failed_io(operation, error, self._on_error[operation]):
                raise
            await asyncio.sleep(_RETRY_SECONDS)
        self.current_progress = moment.copied

    async def commit(self) -> None:
        """All is copied."""
        if self._finished is not None:
            self._finished(True, None)

    async def abort(self) -> None:
        """Some is not: what the moment has marked once the copies under way have ended, well or not."""
        if self._moment is not None:
            self.node.unwatch(self._moment)
            await self._moment.settle()
        if self._finished is not None:
            self._finished(False, None if self._moment is None else self._moment.todo)

    async def clean(self) -> None:
        """Keep nothing any more."""
        if self._moment is not None:
            self.node.unwatch(self._moment)
        await super().clean()
        if self._owns_target:
            await self._target.close()
