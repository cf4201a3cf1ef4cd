"""Replaying the log: into memory, for an image that is opened to be read, and for good.

Either way the image is parsed with the changes laid over the file, so that an image that turns out to be damaged is
refused before anything is written.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from nbdserve.errors import UnsupportedImageError
from nbdserve.extents import DATA, RunArray
from nbdserve.formats.vhdx.layout import Header
from nbdserve.formats.vhdx.log import PAGE, Change, LogReader
from nbdserve.storage.base import ReadBuffer, Storage

_MAX_ZERO_RANGES = 4096


class ReplayedStorage(Storage):
    """A file as it will be when its log has been replayed. Read-only; the file is not modified."""

    def __init__(self, inner: Storage, changes: Sequence[Change], size: int) -> None:
        """``size``: what the newest entry says the file has to have at least."""
        self.inner = inner
        self.path = inner.path
        self.read_only = True
        self.size = max(inner.size, size)
        self.alignment = inner.alignment
        self.grows_zeroed = inner.grows_zeroed
        self.pages: dict[int, bytes] = {}
        """By page number."""
        self.zeroes: list[tuple[int, int]] = []
        """``[start, end)``; a page that is also in ``pages`` was written later."""
        for change in changes:
            self._add(change)

    def _add(self, change: Change) -> None:
        first, end = change.offset // PAGE, (change.offset + change.length) // PAGE
        if change.data is not None:
            self.pages[first] = change.data
            return
        if end - first > len(self.pages):
            for page in [page for page in self.pages if first <= page < end]:
                del self.pages[page]
        else:
            for page in range(first, end):
                self.pages.pop(page, None)
        self.zeroes.append((change.offset, min(change.offset + change.length, self.size)))
        if len(self.zeroes) > _MAX_ZERO_RANGES:
            raise UnsupportedImageError(
                self.path, f"at most {_MAX_ZERO_RANGES}", field="zero descriptors", value=len(self.zeroes)
            )

    def touches(self, offset: int, end: int) -> bool:
        """Whether a change is in the range."""
        return any(offset // PAGE <= page < -(-end // PAGE) for page in self.pages) or any(
            start < end and offset < stop for start, stop in self.zeroes
        )

    def _patch(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        for start, stop in self.zeroes:
            low, high = max(start, offset), min(stop, end)
            if low < high:
                buffer[low - offset : high - offset] = bytes(high - low)
        if not self.pages:
            return
        for page in range(offset // PAGE, -(-end // PAGE)):
            data = self.pages.get(page)
            if data is not None:
                low, high = max(page * PAGE, offset), min(page * PAGE + PAGE, end)
                buffer[low - offset : high - offset] = data[low - page * PAGE : high - page * PAGE]

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if not self.inner.try_read_into(offset, buffer):
            return False
        self._patch(offset, buffer)
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.inner.read_into(offset, buffer)
        self._patch(offset, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        raise self._read_only()

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        raise self._read_only()

    async def discard(self, offset: int, length: int) -> None:
        raise self._read_only()

    async def truncate(self, size: int) -> None:
        raise self._read_only()

    async def flush(self) -> None:
        """Nothing was written."""

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        """As the file has it, as far as no change is in the way."""
        runs = await self.inner.host_map(offset, length, max_runs)
        end = int(runs.start[-1] + runs.length[-1])
        return RunArray.of(offset, end - offset, DATA, offset) if self.touches(offset, end) else runs

    def allocated_size(self) -> int | None:
        return self.inner.allocated_size()

    async def close(self) -> None:
        await self.inner.close()

    def _read_only(self) -> OSError:
        return OSError(errno.EROFS, f"{self.path}: its log was replayed in memory only")


async def replayed(storage: Storage, header: Header) -> ReplayedStorage | None:
    """``storage`` with its log replayed in memory; None when there is nothing to replay. ImageError."""
    log = LogReader(storage, header)
    sequence = await log.active_sequence()
    if not sequence:
        return None
    return ReplayedStorage(storage, await log.changes(sequence), sequence[-1].last_file_offset)


async def write_replayed(overlay: ReplayedStorage) -> None:
    """Write the changes to the file; they are stable on return. The log is still the same.

    Crash at any point: the log is replayed again, and says the same.
    """
    file = overlay.inner
    if file.size < overlay.size:
        await file.truncate(overlay.size)
    for start, end in overlay.zeroes:
        if start < end:
            await file.zero(start, end - start)
    await file.write_stable([(page * PAGE, data) for page, data in sorted(overlay.pages.items())])
