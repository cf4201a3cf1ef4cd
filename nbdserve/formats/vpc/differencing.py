"""Differencing VHDs: sectors whose bit is set are here, all others are the parent's.

Bits are set in memory when data has been written, and reach the disk behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar
from uuid import UUID

import numpy as np

from nbdserve.errors import ConfigError, ImageError, UnsupportedImageError
from nbdserve.extents import DATA, UNALLOCATED, Run, RunStream
from nbdserve.formats.base import Allocation, BackingReference, FormatDriver, ImageInfo
from nbdserve.formats.ordered_commit import Batch, OrderedCommit, Piece
from nbdserve.formats.vpc import image, layout
from nbdserve.formats.vpc.bitmaps import BitmapCache, SectorBitmap
from nbdserve.formats.vpc.driver import VpcDriver
from nbdserve.formats.vpc.image import BAD
from nbdserve.formats.vpc.layout import Footer
from nbdserve.formats.vpc.resize import resize_blocks
from nbdserve.formats.vpc.runs import iter_sector_runs
from nbdserve.formats.walk import loaded_runs
from nbdserve.units import SECTOR_SIZE, div_ceil


class DifferencingDriver(VpcDriver):
    """One open differencing image. Blocks are reserved as in a dynamic one; within them the unit is the sector."""

    goes_on_as: ClassVar[tuple[int, ...]] = (layout.DYNAMIC, layout.DIFFERENCING)

    async def _open(self, options: Mapping[str, Any], *, read_only: bool) -> None:
        await super()._open(options, read_only=read_only)
        if not self._bitmap_size:
            raise UnsupportedImageError(
                self.path,
                "blocks of less than 4096 bytes have no sector bitmap",
                field="block size",
                value=self.header.block_size,
            )
        self.cluster_size = SECTOR_SIZE
        self.zeroes_fast = False
        self.bitmaps = BitmapCache(self._bitmap_size, sectors=self.header.block_size // SECTOR_SIZE)
        self._recent = self.bitmaps.recent
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._parent_size: int | None = None
        self._commit = OrderedCommit(self.storage, self._collect)
        if self.footer.disk_type != layout.DIFFERENCING:  # until just now
            return
        name = await image.read_parent_name(self.storage, self.header)
        if name is not None:
            self.backing = BackingReference(name, self.name)
        elif not options.get("has_backing"):
            raise ImageError(
                self.path,
                "the header names no parent that can be looked for here",
                field="parent name",
                value=self.header.parent_name,
                hint="give the backing file",
            )

    def accept_backing(self, backing: FormatDriver) -> None:
        """A VHD must be the one the image was made on. What is no VHD was named by the user, and has no identity."""
        self._parent_size = backing.size
        if isinstance(backing, VpcDriver) and backing.footer.uuid != self.header.parent_uuid:
            raise ImageError(
                self.path,
                f"its parent is another image: {backing.path} is {UUID(bytes=backing.footer.uuid)}",
                field="parent unique id",
                value=str(UUID(bytes=self.header.parent_uuid)),
            )

    def info(self) -> ImageInfo:
        return ImageInfo(self.name, self.size, self.header.block_size, backing=self.backing)

    # --- the mapping -----------------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Run | None:
        """DATA where the bit of a sector is set."""
        index = offset >> self._bits
        bitmap = self._recent.get(index)
        if bitmap is None:
            entry = self._entries[index]
            if entry >= BAD:
                return self._without_block(index, offset, length)
            bitmap = self.bitmaps.find(index)
            if bitmap is None:
                return None
        inside = offset & self._mask
        if bitmap.full:
            rest = self._mask + 1 - inside
            return DATA, length if length < rest else rest, bitmap.host_offset + self._bitmap_size + inside
        first = inside >> 9
        count = (min(inside + length, self._mask + 1) + 511 >> 9) - first
        here, run = bitmap.run(first, count)
        length = min(length, (first + run << 9) - inside)
        if here:
            return DATA, length, bitmap.host_offset + self._bitmap_size + inside
        return UNALLOCATED, length, -1

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """Sectors that are here are overwritten in place."""
        return self.lookup(offset, length)

    async def load(self, offset: int) -> None:
        """Bring the sector bitmap of the block into memory."""
        index = offset >> self._bits
        if self._entries[index] >= BAD or self.bitmaps.find(index) is not None:
            return
        task = self._loading.get(index)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load_bitmap(index))
            self._loading[index] = task
            task.add_done_callback(lambda _: self._loading.pop(index, None))
        await asyncio.shield(task)

    async def _load_bitmap(self, index: int) -> None:
        host_offset = self._entries[index] << 9
        bits = await self.storage.read(host_offset, self._bitmap_size)
        if self.bitmaps.find(index) is None:
            self.bitmaps.add(index, host_offset, bits)

    def iter_runs(self, start: int, end: int) -> RunStream:
        """The mapping of ``[start, end)``, a million sectors at a time. RequestError(EIO) for a bad entry."""
        return iter_sector_runs(self, start, end)

    # --- changing it -----------------------------------------------------------------------------------------------

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """The place of the sectors in their block, up to the first one that is here already."""
        index = offset >> self._bits
        bitmap = self.bitmaps.find(index)
        if bitmap is None or self.bitmaps.crowded:
            return None
        inside = offset & self._mask
        first = inside >> 9
        count = min(div_ceil(length, SECTOR_SIZE), (self._mask + 1 >> 9) - first)
        _, count = bitmap.run(first, count)
        bitmap.pins += 1
        host_offset = bitmap.host_offset + self._bitmap_size + inside
        return Allocation(offset, count << 9, host_offset, zeroed=False, token=(bitmap, first, count))

    async def prepare(self, offset: int, length: int) -> None:
        """Reserve the blocks of the range, and bring the bitmap of the first into memory."""
        await super().prepare(offset, length)
        await self.load(offset)
        if self.bitmaps.crowded:
            await self._commit.commit()

    async def _begin_blocks(self, places: dict[int, int]) -> None:
        """New blocks are there at once: with no bit set they change nothing."""
        for index, place in places.items():
            self._reservations.publish(index)
            self.bitmaps.add(index, place, bytearray(self._bitmap_size))

    def publish(self, allocation: Allocation) -> None:
        """Set the bits of the sectors."""
        bitmap: SectorBitmap
        bitmap, first, count = allocation.token
        bitmap.set(first, count)
        bitmap.unpin()

    def abandon(self, allocation: Allocation) -> None:
        """What was written does not show: the bits stay as they are."""
        allocation.token[0].unpin()

    async def flush(self) -> None:
        """Guest data, and behind it the bits that show it."""
        await self._commit.commit()

    def _collect(self, batch: Batch) -> None:
        stage = batch.stage(self._barrier_bits)
        for bitmap in self.bitmaps.changed:
            sectors = frozenset(bitmap.dirty)
            bitmap.dirty.clear()
            bitmap.pins += 1
            batch.finally_(bitmap.unpin)
            stage.add(bitmap.pieces(sectors), partial(bitmap.restore, sectors))
        self.bitmaps.changed.clear()

    async def _barrier_bits(self, pieces: list[Piece]) -> None:
        """Bits are set once the data of their sectors is stable, and are stable themselves at the end.

        Crash before the barrier: each bit is set or not; set, its sector has its data; not set, the parent's content
        shows, which is what was there before.
        """
        await self.storage.write_stable(pieces)

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """As of a dynamic image; without a parent, sectors that are not here hold zeroes, which is what shows then."""
        if reference is None:
            await self.flush()
            await self._zero_what_is_not_here()
        await super().set_backing(reference, backing)
        self._parent_size = None if backing is None else backing.size

    async def _zero_what_is_not_here(self) -> None:
        """For those who look at no bits. Stable on return; no bit is set, so that the parent shows still."""
        for index in np.flatnonzero(self.table.words < BAD).tolist():
            start = index << self._bits
            end = min(start + self.header.block_size, self.size)
            async for offset, (kind, length, _) in loaded_runs(self, start, end):
                if kind == UNALLOCATED:
                    place = (self._entries[index] << 9) + self._bitmap_size + offset - start
                    await self.storage.zero(place, length)
        await self.storage.flush()

    async def _fill_bitmaps(self) -> None:
        """All sectors of the blocks are here."""
        for index in np.flatnonzero(self.table.words < BAD).tolist():
            await self.storage.write(self._entries[index] << 9, b"\xff" * self._bitmap_size)
        await self.storage.flush()

    async def _resize(self, larger: Footer) -> None:
        if self.footer.disk_type != layout.DIFFERENCING:
            await super()._resize(larger)
            return
        if self._parent_size is None:
            raise ConfigError(f"{self.path}: a differencing VHD is made larger with its parent open")
        await resize_blocks(self, self._space, larger, self._parent_size)

    async def _settle(self) -> None:
        await self._commit.settle()
        await super()._settle()
