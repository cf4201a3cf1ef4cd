"""Moments of disks that commands keep: the node ``copy-before-write``."""

from __future__ import annotations

import asyncio
import errno

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.filters.copy_before_write import GRANULARITY, CopyBeforeWrite
from nbdserve.block.node import Node


class Moment(CopyBeforeWrite):
    """Keeps the whole disk as it is when this is made; make it inside ``drained`` of ``source``, and ``close`` it.

    ``target`` has the size of ``source``, and nobody else writes it. When a copy fails, or takes more than ``timeout``
    seconds (0: any), the client's change fails, or, with ``breaks``, goes on, and the moment is lost.
    """

    def __init__(self, source: Node, target: Node, *, breaks: bool = False, timeout: float = 0) -> None:
        unit = max(GRANULARITY, target.top.cluster_size)
        todo = DirtyBitmap(None, source.size, unit)
        if source.size:
            todo.set(0, source.size)
        super().__init__(source, target, todo, on_error=_go_on if breaks else None)
        self._timeout = timeout or None
        self._disk = source
        self.since = source.bitmaps.add(None, unit)
        """What has changed since."""
        source.watch(self)

    async def copy(self, offset: int, length: int) -> None:
        try:
            await asyncio.wait_for(super().copy(offset, length), self._timeout)
        except TimeoutError:
            problem = f"{self._disk.path}: what is to change could not be copied in {self._timeout:g} seconds"
            raise OSError(errno.ETIMEDOUT, problem) from None

    async def before(self, offset: int, length: int) -> None:
        if self.lost is None:
            await super().before(offset, length)

    def resized(self, old_size: int, size: int) -> None:
        self.lost = self.lost or OSError(errno.EIO, "the size of the disk has changed")

    def close(self) -> None:
        """Keep nothing any more."""
        self._disk.unwatch(self)
        self._disk.bitmaps.discard(self.since)


def _go_on(error: Exception) -> None:
    """The moment notes that it is lost; who reads it is told."""
