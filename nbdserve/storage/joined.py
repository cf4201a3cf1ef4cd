"""Several files as one host space: for an image whose data is in more than one of them.

File number n has the addresses from ``n << PART_BITS`` on. A range never reaches from one file into the next: no caller
asks for one, because each file holds mapped ranges of its own.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Sequence
from typing import Any, Final

from nbdserve.extents import RunArray
from nbdserve.storage.base import ReadBuffer, Storage

PART_BITS: Final = 48
"""log2 of the addresses of one file: 256 TiB, and 2^14 files in what a signed 64-bit column holds."""
MAX_PARTS: Final = 1 << 14
INSIDE_PART: Final = (1 << PART_BITS) - 1
"""What of an address is the offset in its file."""


class JoinedStorage(Storage):
    """Owns its parts. Its size is that of its address space up to the end of the last file."""

    def __init__(self, parts: Sequence[Storage], path: str) -> None:
        assert 0 < len(parts) <= MAX_PARTS
        self.parts = tuple(parts)
        self.path = path
        self.read_only = any(part.read_only for part in parts)
        self.alignment = max(part.alignment for part in parts)
        self.grows_zeroed = all(part.grows_zeroed for part in parts)

    @property
    def size(self) -> int:  # type: ignore[override]
        return (len(self.parts) - 1 << PART_BITS) + self.parts[-1].size

    def _part(self, offset: int) -> Storage:
        """OSError(EIO) for an address in no file."""
        if not 0 <= offset >> PART_BITS < len(self.parts):
            raise OSError(errno.EIO, f"{self.path}: host offset {offset:#x} is in none of its {len(self.parts)} files")
        return self.parts[offset >> PART_BITS]

    # Each call looks its part's method up anew: a file replaces an attempt that its file system refuses.

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return self.parts[offset >> PART_BITS].try_read_into(offset & INSIDE_PART, buffer)

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        return self.parts[offset >> PART_BITS].try_write(offset & INSIDE_PART, data)

    def can_send(self, offset: int, length: int) -> bool:
        return self.parts[offset >> PART_BITS].can_send(offset & INSIDE_PART, length)

    def send(self, socket_fd: int, offset: int, length: int) -> int:
        return self.parts[offset >> PART_BITS].send(socket_fd, offset & INSIDE_PART, length)

    def begin_writeback(self) -> None:
        for part in self.parts:
            part.begin_writeback()

    def hold(self) -> None:
        for part in self.parts:
            part.hold()

    def let_go(self) -> None:
        for part in self.parts:
            part.let_go()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._part(offset).read_into(offset & INSIDE_PART, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        await self._part(offset).write(offset & INSIDE_PART, data)

    async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        """One trip for each file; an error is raised when nothing is under way any more."""
        await _all(part.write_all(own) for part, own in self._by_part(pieces))

    async def write_stable(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        """Each file that is written is flushed, and no other: a caller with changes elsewhere flushes them itself."""
        await _all(part.write_stable(own) for part, own in self._by_part(pieces))

    def _by_part(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> list[tuple[Storage, list[tuple[int, ReadBuffer]]]]:
        own: dict[int, list[tuple[int, ReadBuffer]]] = {}
        for offset, data in pieces:
            own.setdefault(offset >> PART_BITS, []).append((offset & INSIDE_PART, data))
        return [(self._part(index << PART_BITS), part) for index, part in own.items()]

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        await self._part(offset).zero(offset & INSIDE_PART, length, unmap=unmap, fast=fast)

    async def discard(self, offset: int, length: int) -> None:
        await self._part(offset).discard(offset & INSIDE_PART, length)

    async def flush(self) -> None:
        """Every file; a file in which nothing has changed does nothing."""
        await _all(part.flush() for part in self.parts)

    async def truncate(self, size: int) -> None:
        """OSError(ENOTSUP): it is a part that grows or is cut."""
        raise OSError(errno.ENOTSUP, f"{self.path}: several files have no size of their own")

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        base = offset & ~INSIDE_PART
        runs = await self._part(offset).host_map(offset & INSIDE_PART, length, max_runs)
        placed = runs.host_offset >= 0
        host_offset = runs.host_offset.copy()
        host_offset[placed] += base
        return RunArray(runs.start + base, runs.length, runs.kind, host_offset)

    def allocated_size(self) -> int | None:
        sizes = [part.allocated_size() for part in self.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    async def close(self) -> None:
        """Close every file. The first error is raised after all of them are closed."""
        await _all(part.close() for part in self.parts)


async def _all(calls: Any) -> None:
    """Await all of them, then raise the first error there was."""
    awaitables: list[Awaitable[None]] = list(calls)
    if len(awaitables) == 1:
        await awaitables[0]
        return
    for outcome in await asyncio.gather(*awaitables, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
