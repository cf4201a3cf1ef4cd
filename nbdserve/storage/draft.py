"""Changes of a storage that are tried out in memory first, and then made, or not."""

from __future__ import annotations

import errno
from typing import Final

from nbdserve.extents import RunArray
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.units import MIB

MAX_DRAFT_BYTES: Final = 256 * MIB
"""Of changes held in memory: the refcounts of 8 TiB in clusters of 64 KiB."""
_PAGE: Final = 4096


class Draft(Storage):
    """What ``below`` would be after the changes made here, which does not see them before ``apply``.

    ``below`` must not change meanwhile. OSError(EFBIG) when more than ``MAX_DRAFT_BYTES`` are changed.
    """

    def __init__(self, below: Storage) -> None:
        self.path, self.read_only = below.path, below.read_only
        self.size = below.size
        self.grows_zeroed = below.grows_zeroed
        self._below = below
        self._pages: dict[int, bytearray] = {}
        self._changes: list[tuple[int, bytes] | None] = []
        """In the order in which they were made: ``(offset, data)``; None is a flush."""
        self._bytes = 0

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._below.read_into(offset, buffer)
        end = offset + len(buffer)
        for page in range(offset // _PAGE, -(-end // _PAGE)):
            content = self._pages.get(page)
            if content is not None:
                start, stop = max(offset, page * _PAGE), min(end, (page + 1) * _PAGE)
                buffer[start - offset : stop - offset] = content[start - page * _PAGE : stop - page * _PAGE]

    async def write(self, offset: int, data: ReadBuffer) -> None:
        copy = bytes(data)
        self._bytes += len(copy)
        if self._bytes > MAX_DRAFT_BYTES:
            raise OSError(errno.EFBIG, f"{self.path}: the changes are more than {MAX_DRAFT_BYTES} bytes")
        end = offset + len(copy)
        for page in range(offset // _PAGE, -(-end // _PAGE)):
            content = self._pages.get(page)
            if content is None:
                content = self._pages[page] = await self._below.read(page * _PAGE, _PAGE)
            start, stop = max(offset, page * _PAGE), min(end, (page + 1) * _PAGE)
            content[start - page * _PAGE : stop - page * _PAGE] = copy[start - offset : stop - offset]
        self.size = max(self.size, end)
        self._changes.append((offset, copy))

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        """Zeroes in writing."""
        for start in range(offset, offset + length, MIB):
            await self.write(start, bytes(min(MIB, offset + length - start)))

    async def discard(self, offset: int, length: int) -> None:
        """Nothing happens."""

    async def flush(self) -> None:
        """A barrier that ``apply`` keeps."""
        self._changes.append(None)

    async def truncate(self, size: int) -> None:
        """Only to make it longer."""
        if size < self.size:
            raise OSError(errno.ENOTSUP, f"{self.path}: a draft is not cut")
        self.size = size

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        return await self._below.host_map(offset, length, max_runs)

    def allocated_size(self) -> int | None:
        return self._below.allocated_size()

    async def apply(self) -> None:
        """Make the changes, in the order and with the barriers they were made with here."""
        for change in self._changes:
            if change is None:
                await self._below.flush()
            else:
                await self._below.write(*change)
        if self._below.size < self.size:
            await self._below.truncate(self.size)
        await self._below.flush()

    async def close(self) -> None:
        """Forget the changes; ``below`` stays open."""
        self._pages.clear()
        self._changes.clear()
