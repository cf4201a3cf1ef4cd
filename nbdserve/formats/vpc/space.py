"""Where new blocks go: behind the last one, in front of a footer that is always the last thing in the file.

Stock tools put their next block behind the last one the table shows, and rely on that space to read as zeroes. So
nothing but zeroes is ever there: the file grows first, by a footer at its new end, and what lies between is handed out
only to blocks whose table entries are made stable before anything is written to them.
"""

from __future__ import annotations

import errno
from typing import Final

from nbdserve.formats.vpc.image import BAD
from nbdserve.formats.vpc.layout import FOOTER_SIZE
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, SECTOR_SIZE

_LARGEST_STEP: Final = 64 * MIB
"""Bytes by which the file grows at a time, at most; the step doubles from one block on."""


class BlockSpace:
    """Hands out places for blocks. One caller at a time."""

    def __init__(self, storage: Storage, footer: bytes, end: int, *, block_size: int, bitmap_size: int) -> None:
        """``footer`` is what stands at the end of the file; ``end`` the host offset behind all that is in use."""
        self.end = end
        """Host offset behind the last block handed out."""
        self._storage = storage
        self._footer = footer
        self._block_size = block_size
        self._bitmap_size = bitmap_size
        self._room = -1
        """Host offset of the footer; everything from ``end`` to it reads as zeroes. -1: the file has to be tidied."""
        self._step = 1

    @property
    def is_open(self) -> bool:
        """The file may have grown beyond what is in use."""
        return self._room >= 0

    async def take(self, count: int) -> list[int]:
        """Host offsets of ``count`` new blocks: of their sector bitmaps, behind which the data is. All of it zeroes.

        OSError(ENOSPC) when table entries cannot say where.
        """
        if self._room < 0:
            await self.tidy()
        places, end = self._places(self.end, count)
        if places[-1] // SECTOR_SIZE >= BAD:
            raise OSError(errno.ENOSPC, f"{self._storage.path}: a VHD cannot be larger than 2 TiB")
        if end > self._room:
            most = max(1, _LARGEST_STEP // (self._bitmap_size + self._block_size))
            self._step = min(2 * self._step, most)
            await self._grow(max(end, self._places(self.end, self._step)[1]))
        self.end = end
        return places

    async def clear(self, place: int) -> None:
        """Let the data of the block at ``place`` be zeroes again."""
        await self._storage.zero(place + self._bitmap_size, self._block_size)

    def _places(self, end: int, count: int) -> tuple[list[int], int]:
        """Blocks one behind the other, where stock tools would put them, too.

        They are not aligned: the footer of a file that has grown for more blocks than came to be is then where the
        bitmap of a block of theirs will be, which they overwrite, and not in the middle of its data.
        """
        stride = self._bitmap_size + self._block_size
        return [end + number * stride for number in range(count)], end + count * stride

    async def _grow(self, room: int) -> None:
        """Move the footer to ``room``, with zeroes up to there.

        On a block device, which shows old bytes where a file has none, they are written; the end of the image is then
        not the end of the device, as with stock tools.
        """
        old = self._room
        if not self._storage.grows_zeroed:
            if room + FOOTER_SIZE > self._storage.size:
                raise OSError(errno.ENOSPC, f"{self._storage.path}: the device is full")
            await self._storage.zero(old + FOOTER_SIZE, room - old - FOOTER_SIZE, unmap=False)
            await self._storage.flush()
        await self._barrier_new_footer(room)
        await self._barrier_old_footer(old)
        self._room = room

    async def _barrier_new_footer(self, room: int) -> None:
        """The footer at the new end is stable before the old one is touched.

        Crash before the barrier: the file ends with the old footer or with the new one, for it grows by nothing but
        this write. Behind the old one are zeroes, which belong to no block.
        """
        await self._storage.write_stable([(room, self._footer)])

    async def _barrier_old_footer(self, old: int) -> None:
        """Where the old footer was there are zeroes before a table entry shows the block that begins there.

        Crash before the barrier: two footers, and the last one counts. Without it, the block's bitmap could be the old
        footer's bytes, and show sectors of a differencing image that hold nothing.
        """
        await self._storage.write_stable([(old, bytes(FOOTER_SIZE))])

    async def tidy(self) -> None:
        """Let the file end with the footer right behind ``end``: whatever else is there is cut off.

        Crash on the way: before the cut the file ends with the footer it had, afterwards with the new one, which was
        stable before.
        """
        storage = self._storage
        footer_is_last = storage.size == self.end + FOOTER_SIZE
        if not footer_is_last or bytes(await storage.read(self.end, FOOTER_SIZE)) != self._footer:
            await storage.write_stable([(self.end, self._footer)])
            if storage.size > self.end + FOOTER_SIZE and storage.grows_zeroed:
                await storage.truncate(self.end + FOOTER_SIZE)
                await storage.flush()
        self._room = self.end
