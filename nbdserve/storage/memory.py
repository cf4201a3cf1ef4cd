"""Storage in memory: sparse, for overlays that are thrown away and for tests."""

from __future__ import annotations

import errno
from typing import Final

import numpy as np

from nbdserve.extents import DATA, ZERO, RunArray
from nbdserve.storage.base import ReadBuffer, Storage

PAGE_SIZE: Final = 64 * 1024

_ZERO_PAGE: Final = memoryview(bytes(PAGE_SIZE))


class MemoryStorage(Storage):
    """A dict of 64 KiB pages; a page that is not there reads as zeroes. Every attempt succeeds without blocking."""

    def __init__(self, content: ReadBuffer = b"", *, size: int | None = None, path: str = "memory") -> None:
        """``content`` at offset 0; ``size`` in bytes if it is not that of the content."""
        self.path = path
        self.read_only = False
        self.size = len(content) if size is None else size
        self._pages: dict[int, memoryview] = {}
        self._closed = False
        if content:
            self._store(0, content)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if self._closed:
            return False
        done, length = 0, len(buffer)
        while done < length:
            index, skip = divmod(offset + done, PAGE_SIZE)
            count = min(PAGE_SIZE - skip, length - done)
            page = self._pages.get(index, _ZERO_PAGE)
            buffer[done : done + count] = page[skip : skip + count]
            done += count
        return True

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        if self._closed or self.read_only:
            return False
        if data:
            self._store(offset, data)
            self.size = max(self.size, offset + len(data))
        return True

    def _store(self, offset: int, data: ReadBuffer) -> None:
        done, length = 0, len(data)
        source = memoryview(data)
        while done < length:
            index, skip = divmod(offset + done, PAGE_SIZE)
            count = min(PAGE_SIZE - skip, length - done)
            page = self._pages.get(index)
            if page is None:
                page = self._pages[index] = memoryview(bytearray(PAGE_SIZE))
            page[skip : skip + count] = source[done : done + count]
            done += count

    def _clear(self, offset: int, end: int) -> None:
        """Drop the whole pages of the range, those that are there, and clear its parts of pages."""
        first, last = -(-offset // PAGE_SIZE), end // PAGE_SIZE
        if last - first > len(self._pages):
            for index in [index for index in self._pages if first <= index < last]:
                del self._pages[index]
        else:
            for index in range(first, last):
                self._pages.pop(index, None)
        head_end, tail_start = min(end, first * PAGE_SIZE), max(offset, last * PAGE_SIZE)
        edges = [(offset, end)] if head_end > tail_start else [(offset, head_end), (tail_start, end)]
        for start, stop in edges:
            page = self._pages.get(start // PAGE_SIZE)
            if page is not None and stop > start:
                skip = start % PAGE_SIZE
                page[skip : skip + stop - start] = _ZERO_PAGE[: stop - start]

    def _check(self, *, writing: bool = False) -> None:
        if self._closed:
            raise OSError(errno.EBADF, f"{self.path} is closed")
        if writing and self.read_only:
            raise OSError(errno.EROFS, f"{self.path} is open read-only")

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self._check()
        self.try_read_into(offset, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        self._check(writing=True)
        self.try_write(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        """Nothing is reserved in memory: without ``unmap`` pages are dropped all the same."""
        self._check(writing=True)
        if length:
            self._clear(offset, offset + length)
            self.size = max(self.size, offset + length)

    async def discard(self, offset: int, length: int) -> None:
        self._check(writing=True)
        self._clear(offset, max(offset, min(offset + length, self.size)))

    async def flush(self) -> None:
        """Nothing to do: memory is as stable as it gets."""
        self._check()

    async def truncate(self, size: int) -> None:
        self._check(writing=True)
        if size < self.size:
            self._clear(size, -(-self.size // PAGE_SIZE) * PAGE_SIZE)
        self.size = size

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        self._check()
        end = offset + length
        pages = np.fromiter(self._pages, np.int64, len(self._pages))
        pages = np.sort(pages[(pages >= offset // PAGE_SIZE) & (pages * PAGE_SIZE < end)])
        if not len(pages):
            return RunArray.of(offset, length, ZERO)
        gap = np.flatnonzero(np.diff(pages) != 1) + 1
        first, last = pages[np.concatenate(([0], gap))], pages[np.concatenate((gap - 1, [-1]))]
        data = np.stack((first * PAGE_SIZE, (last + 1) * PAGE_SIZE), axis=1).ravel()
        limits = np.concatenate(([offset], np.clip(data, offset, max(offset, min(end, self.size))), [end]))
        lengths = np.diff(limits)
        kind = np.where(np.arange(len(lengths)) % 2 == 0, ZERO, DATA).astype(np.uint8)
        kept = np.flatnonzero(lengths)[:max_runs]
        start, kind = limits[kept], kind[kept]
        return RunArray(start, lengths[kept], kind, np.where(kind == DATA, start, -1)).coalesced()

    def allocated_size(self) -> int:
        return len(self._pages) * PAGE_SIZE

    async def close(self) -> None:
        """Forget everything."""
        self._closed = True
        self._pages.clear()
