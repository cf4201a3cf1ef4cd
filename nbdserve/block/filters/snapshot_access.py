"""The disk as it was when copy-before-write began, as a disk of its own, read-only."""

from __future__ import annotations

import errno

from nbdserve.block.filters.copy_before_write import CopyBeforeWrite
from nbdserve.block.node import Node
from nbdserve.block.window import host_runs
from nbdserve.buffers import fill_zeroes
from nbdserve.errors import RequestError
from nbdserve.extents import RunArray
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.base import ReadBuffer, Storage


class MomentStorage(Storage):
    """The bytes that ``moment`` keeps."""

    read_only = True

    def __init__(self, moment: CopyBeforeWrite, path: str) -> None:
        self.path = path
        self.size = moment.todo.size
        self._moment = moment

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        inside = max(0, min(len(buffer), self.size - offset))
        try:
            await self._moment.read_into(offset, buffer[:inside])
        except RequestError as error:
            raise OSError(error.errno, str(error)) from error
        fill_zeroes(buffer[inside:])

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        inside = max(offset, min(offset + length, self.size))
        return await host_runs(self._moment.runs(offset, inside), inside, offset + length, max_runs)

    def allocated_size(self) -> int:
        return 0

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self._refuse()

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        self._refuse()

    async def discard(self, offset: int, length: int) -> None:
        self._refuse()

    async def truncate(self, size: int) -> None:
        self._refuse()

    def _refuse(self) -> None:
        raise OSError(errno.EROFS, f"{self.path} is read-only")

    async def flush(self) -> None:
        """Nothing is written here."""

    async def close(self) -> None:
        """The disk and the copy are not this one's."""


def snapshot_access(moment: CopyBeforeWrite, path: str) -> Node:
    """The disk of ``moment``, called ``path`` in messages; to be closed before the moment ends."""
    storage = MomentStorage(moment, path)
    return Node([RawDriver(storage, 0, storage.size, read_only=True)])
