"""Guest data under encryption: a storage that decrypts what it reads and encrypts what it writes."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

from nbdserve.extents import DATA, RunArray
from nbdserve.formats.encryption.ciphers import Piece, SectorCipher
from nbdserve.storage.base import ReadBuffer, Storage
from nbdserve.storage.pool import worker_pool
from nbdserve.units import KIB, MIB, SECTOR_SIZE, align_down, align_up

INLINE: Final = 256 * KIB
"""Bytes that are converted on the event loop (330 us); more go to a worker thread. Less would not be worth the way: the
threads hold the interpreter lock in turn."""
_ZERO_WRITE: Final = MIB
_IN_SECTOR: Final = SECTOR_SIZE - 1

_GATHERED: Final = 16 * KIB
"""Longer requests are not gathered: their bytes would be moved once more for little."""

Range: TypeAlias = tuple[int, int]
GatheredWrite: TypeAlias = "tuple[EncryptedStorage, int, tuple[int, ReadBuffer]]"
"""To be encrypted, and written at the place in ``inner`` that is its second element."""


class EncryptedStorage(Storage):
    """The bytes of ``inner`` from ``start`` on, decrypted; there is sector 0.

    A sector can only be read or written whole: a write of a part of one reads it first, and nobody else reads or
    writes a sector while that goes on. What was never written reads as noise, so that nothing is known to be zero.
    """

    grows_zeroed = False

    def __init__(self, inner: Storage, cipher: SectorCipher, *, start: int = 0) -> None:
        """``start``, bytes, is a multiple of the sector size. The inner storage is closed with this one."""
        self.path = inner.path
        self.read_only = inner.read_only
        self.alignment = max(SECTOR_SIZE, inner.alignment)
        self.inner = inner
        self.cipher = cipher
        self.reads: list[Piece] | None = None
        """While set, ``try_read_into`` leaves small reads encrypted, and adds them here."""
        self.writes: list[GatheredWrite] | None = None
        """While set, ``try_write`` adds small writes here instead of doing them; their data has to stay as it is."""
        self._start = start
        self._uses: list[_Use] = []

    @property
    def size(self) -> int:  # type: ignore[override]
        """Bytes, without what precedes ``start``."""
        return max(0, self.inner.size - self._start)

    def _place(self, offset: int) -> tuple[int, int]:
        """Where ``offset`` is: the host offset, and the number of the sector that it is in for the cipher."""
        return self._start + offset, offset // SECTOR_SIZE

    # --- without blocking ----------------------------------------------------------------------------------------

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        length = len(buffer)
        if length > INLINE or not length:
            return False
        if self._uses and self._is_used(offset, length, writes=False):
            return False
        host_offset, sector = self._place(offset)
        skip = offset & _IN_SECTOR
        if skip or length & _IN_SECTOR:
            whole = memoryview(bytearray(align_up(skip + length, SECTOR_SIZE)))
            if not self.inner.try_read_into(host_offset - skip, whole):
                return False
            self.cipher.decrypt(sector, whole)
            buffer[:] = whole[skip : skip + length]
            return True
        if not self.inner.try_read_into(host_offset, buffer):
            return False
        if self.reads is not None and length <= _GATHERED:
            self.reads.append((sector, buffer))
        else:
            self.cipher.decrypt(sector, buffer)
        return True

    def try_write(self, offset: int, data: ReadBuffer) -> bool:
        length = len(data)
        if length > INLINE or not length or (offset | length) & _IN_SECTOR:
            return False
        if self._uses and self._is_used(offset, length, writes=True):
            return False
        host_offset, sector = self._place(offset)
        if self.writes is not None and length <= _GATHERED:
            self.writes.append((self, host_offset, (sector, data)))
            return True
        return self.inner.try_write(host_offset, self.cipher.encrypt(sector, data))

    def _is_used(self, offset: int, length: int, *, writes: bool) -> bool:
        ranges = [self._sectors(offset, length)]
        return any(use.conflicts(ranges, writes) for use in self._uses)

    # --- reading and writing -------------------------------------------------------------------------------------

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        length = len(buffer)
        if not length:
            return
        async with self._use([self._sectors(offset, length)], writes=False):
            skip = offset & _IN_SECTOR
            if skip or length & _IN_SECTOR:
                whole = memoryview(bytearray(align_up(skip + length, SECTOR_SIZE)))
                await self._read_sectors(offset - skip, whole)
                buffer[:] = whole[skip : skip + length]
            else:
                await self._read_sectors(offset, buffer)

    async def _read_sectors(self, offset: int, buffer: memoryview) -> None:
        host_offset, sector = self._place(offset)
        await self.inner.read_into(host_offset, buffer)
        if len(buffer) <= INLINE:
            self.cipher.decrypt(sector, buffer)
        else:
            await worker_pool().run(self.cipher.decrypt, sector, buffer)

    async def write(self, offset: int, data: ReadBuffer) -> None:
        await self.write_all([(offset, data)])

    async def write_all(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        whole = []
        for offset, data in pieces:
            if (offset | len(data)) & _IN_SECTOR:
                # By itself: others of the pieces may be for the same sector.
                await self._write_part(offset, data)
            elif data:
                whole.append((offset, data))
        if whole:
            async with self._use([self._sectors(offset, len(data)) for offset, data in whole], writes=True):
                await self._write_sectors(whole)

    async def _write_part(self, offset: int, data: ReadBuffer) -> None:
        """Write ``data`` with the rest of its first and last sector, as those are now."""
        if not data:
            return
        async with self._use([self._sectors(offset, len(data))], writes=True):
            skip = offset & _IN_SECTOR
            length = skip + len(data)
            offset -= skip
            whole = memoryview(bytearray(align_up(length, SECTOR_SIZE)))
            last = len(whole) - SECTOR_SIZE
            if skip:
                await self._read_sectors(offset, whole[:SECTOR_SIZE])
            if length & _IN_SECTOR and not (skip and last == 0):
                await self._read_sectors(offset + last, whole[last:])
            whole[skip:length] = data
            await self._write_sectors([(offset, whole)])

    async def _write_sectors(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> None:
        if sum(len(data) for _, data in pieces) <= INLINE:
            encrypted = self._encrypt(pieces)
        else:
            encrypted = await worker_pool().run(self._encrypt, pieces)
        rest = [(offset, data) for offset, data in encrypted if not self.inner.try_write(offset, data)]
        if rest:
            await self.inner.write_all(rest)

    def _sectors(self, offset: int, length: int) -> Range:
        """The host range of the sectors that the range touches."""
        host_offset, _ = self._place(offset)
        return align_down(host_offset, SECTOR_SIZE), align_up(host_offset + length, SECTOR_SIZE)

    def _encrypt(self, pieces: Sequence[tuple[int, ReadBuffer]]) -> list[tuple[int, ReadBuffer]]:
        places = [self._place(offset) for offset, _ in pieces]
        numbered = [(sector, data) for (_, sector), (_, data) in zip(places, pieces, strict=True)]
        encrypted = self.cipher.encrypt_each(numbered)
        return [(host_offset, data) for (host_offset, _), data in zip(places, encrypted, strict=True)]

    @asynccontextmanager
    async def _use(self, ranges: Sequence[Range], *, writes: bool) -> AsyncIterator[None]:
        """Wait for everybody who came before and works on the same sectors, if they or we write."""
        use = _Use(ranges, writes)
        earlier = [other.done for other in self._uses if other.conflicts(ranges, writes)]
        self._uses.append(use)
        try:
            if earlier:
                await asyncio.wait(earlier)
            yield
        finally:
            self._uses.remove(use)
            use.done.set_result(None)

    # --- everything else -----------------------------------------------------------------------------------------

    async def zero(self, offset: int, length: int, *, unmap: bool = True, fast: bool = False) -> None:
        """Zeroes are written like everything else: a hole would read as noise."""
        if fast:
            raise OSError(errno.ENOTSUP, f"{self.path}: encrypted, so zeroes are written")
        zeroes = memoryview(bytes(min(length, _ZERO_WRITE)))
        end = offset + length
        while offset < end:
            part = zeroes[: end - offset]
            await self.write(offset, part)
            offset += len(part)

    async def discard(self, offset: int, length: int) -> None:
        """Nothing happens: which parts of the disk are in use would show from outside."""

    async def flush(self) -> None:
        await self.inner.flush()

    async def truncate(self, size: int) -> None:
        """Set the size; unlike elsewhere new space reads as noise."""
        await self.inner.truncate(self._start + size)

    def begin_writeback(self) -> None:
        self.inner.begin_writeback()

    async def extend(self, size: int) -> None:
        """Make it longer; unlike elsewhere new space reads as noise."""
        await self.inner.extend(self._start + size)

    async def host_map(self, offset: int, length: int, max_runs: int = 1 << 16) -> RunArray:
        """All DATA: a hole is not what reads as zeroes."""
        return RunArray.of(offset, length, DATA, offset)

    def allocated_size(self) -> int | None:
        return self.inner.allocated_size()

    async def close(self) -> None:
        await self.inner.close()


class _Use:
    """Somebody reads or writes sectors, or waits to."""

    def __init__(self, ranges: Sequence[Range], writes: bool) -> None:
        self._ranges = ranges
        self._writes = writes
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def conflicts(self, ranges: Sequence[Range], writes: bool) -> bool:
        """Whether the uses cannot go on at the same time."""
        return (writes or self._writes) and any(
            start < other_end and other < end for start, end in ranges for other, other_end in self._ranges
        )
