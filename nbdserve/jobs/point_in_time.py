"""Keeping a disk as it was at one moment: what is about to change is copied first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ClassVar, Final

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.node import Node
from nbdserve.block.watchers import Watcher
from nbdserve.errors import RequestError
from nbdserve.units import KIB, MIB, align_down, align_up

GRANULARITY: Final = 64 * KIB
CHUNK: Final = MIB
"""The most that is copied at a time."""


class PointInTime(Watcher):
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
        self._busy: dict[asyncio.Event, tuple[int, int]] = {}
        self.copied = 0
        """Bytes."""
        self.failed = "read"
        """What the last copy that failed could not do: ``read`` or ``write``."""

    async def before(self, offset: int, length: int) -> None:
        """Keep the range, for it is about to change."""
        try:
            await self.copy(offset, length)
        except (OSError, RequestError) as error:
            if self._on_error is None:
                raise
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
            others = [done for done, (first, stop) in self._busy.items() if first < end and start < stop]
            if not others:
                return
            for done in others:
                await done.wait()

    async def _copy(self, offset: int, length: int) -> None:
        self.todo.clear_range(offset, length)
        done = asyncio.Event()
        self._busy[done] = (offset, offset + length)
        operation = "read"
        try:
            data = memoryview(bytearray(length))
            pieces = await self._source.read_pieces(offset, data)
            operation = "write"
            position = 0
            for is_zero, part in pieces:
                if is_zero:
                    await self._target.zero(offset + position, part)
                else:
                    await self._target.write(offset + position, data[position : position + part])
                position += part
            self.copied += length
        except BaseException:
            self.failed = operation
            self.todo.set(offset, length)
            raise
        finally:
            del self._busy[done]
            done.set()
