"""Keeping a disk as it was at one moment: what is about to change is copied first."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Mapping
from typing import ClassVar, Final

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.mapping import ChainMap
from nbdserve.block.node import Node
from nbdserve.block.pieces import write_pieces
from nbdserve.block.watchers import Watcher
from nbdserve.block.window import map_node
from nbdserve.errors import RequestError
from nbdserve.units import KIB, MIB, align_down, align_up

GRANULARITY: Final = 64 * KIB
CHUNK: Final = MIB
"""The most that is copied at a time."""


class CopyBeforeWrite(Watcher):
    """Copies from ``source`` to ``target`` what clients are about to change, of what is marked in ``todo``.

    What is not marked is in ``target``, or was never to be kept. As a watcher of ``source`` it keeps the moment at
    which it began to watch; requests under way at that moment are in it or not, unless it was inside ``drained``.
    """

    goes_before: ClassVar[bool] = True

    def __init__(
        self,
        source: Node,
        target: Node,
        todo: DirtyBitmap,
        *,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        """``on_error``: called when a copy for a client fails, whose change then goes on; else that fails, too."""
        self._source = source
        self._target = target
        self.todo = todo
        self._on_error = on_error
        self._copying: dict[asyncio.Event, tuple[int, int]] = {}
        self._reading: dict[asyncio.Event, tuple[int, int]] = {}
        self.copied = 0
        """Bytes."""
        self.lost: Exception | None = None
        """Why the moment is not known any more."""
        self.failed = "read"
        """What the last copy that failed could not do: ``read`` or ``write``."""

    async def before(self, offset: int, length: int) -> None:
        """Keep the range, for it is about to change."""
        try:
            await self.copy(offset, length)
        except (OSError, RequestError) as error:
            if self._on_error is None:
                raise
            self.lost = self.lost or error
            self._on_error(error)

    async def keep(self, offset: int, length: int) -> None:
        """Copy the range for other reasons. It is inside the gate while it does, for clients may wait for it there."""
        async with self._source.gate, self._source.gate.passing():
            await self.copy(offset, length)

    async def copy(self, offset: int, length: int) -> None:
        """Copy what is marked in the range, and wait for those who copy some of it. OSError, RequestError."""
        unit = self.todo.granularity
        start, end = align_down(offset, unit), min(align_up(offset + length, unit), self.todo.size)
        while True:
            while (area := self.todo.next_dirty_area(start, end, CHUNK)) is not None:
                await self._copy(*area)
            others = [*_overlapping(self._copying, start, end), *_overlapping(self._reading, start, end)]
            if not others:
                return
            for done in others:
                await done.wait()

    @property
    def is_copying(self) -> bool:
        """A copy is under way: what it is for is not marked, and not in ``target`` yet."""
        return bool(self._copying)

    async def settle(self) -> None:
        """Wait until no copy is under way."""
        while self._copying:
            await next(iter(self._copying)).wait()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """The bytes of the moment. OSError, RequestError; EIO where they are lost."""
        async with self._source.gate, self._source.gate.passing():
            position, end = offset, offset + len(buffer)
            while position < end:
                position += await self._read_some(position, buffer[position - offset :])

    async def _read_some(self, offset: int, buffer: memoryview) -> int:
        end = offset + len(buffer)
        if self.lost is not None:
            raise OSError(errno.EIO, f"{self._source.path}: the moment is lost: {self.lost}")
        if self.todo.is_dirty(offset):
            # It has not changed yet. Who is about to change it waits until it is read.
            stop = self.todo.next_clean(offset, end) or end
            done = asyncio.Event()
            self._reading[done] = (offset, stop)
            try:
                await self._source.read_into(offset, buffer[: stop - offset])
            finally:
                del self._reading[done]
                done.set()
            return stop - offset
        stop = self.todo.next_dirty(offset, end) or end
        copying = _overlapping(self._copying, offset, stop)
        if copying:
            await copying[0].wait()
            return 0
        await self._target.read_into(offset, buffer[: stop - offset])
        return stop - offset

    async def runs(self, start: int, end: int) -> AsyncIterator[ChainMap]:
        """The map of the moment, as far as it is known without reading: of the source, or of the copy."""
        while start < end:
            dirty = self.todo.is_dirty(start)
            stop = (self.todo.next_clean if dirty else self.todo.next_dirty)(start, end) or end
            disk = self._source if dirty else self._target
            async with disk.gate:
                parts = [part async for part in map_node(disk, start, stop)]
            if dirty and self.todo.next_clean(start, stop) is not None:
                continue  # a client has changed some of it meanwhile
            for part in parts:
                yield part
            start = stop

    async def _copy(self, offset: int, length: int) -> None:
        self.todo.clear_range(offset, length)
        done = asyncio.Event()
        self._copying[done] = (offset, offset + length)
        operation = "read"
        try:
            data = memoryview(bytearray(length))
            pieces = await self._source.read_pieces(offset, data)
            operation = "write"
            await write_pieces(self._target, offset, data, pieces)
            self.copied += length
        except BaseException:
            self.failed = operation
            self.todo.set(offset, length)
            raise
        finally:
            del self._copying[done]
            done.set()


def _overlapping(ranges: Mapping[asyncio.Event, tuple[int, int]], start: int, end: int) -> list[asyncio.Event]:
    return [done for done, (first, stop) in ranges.items() if first < end and start < stop]
