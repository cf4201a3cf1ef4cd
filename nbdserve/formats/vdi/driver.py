"""The VDI driver: dynamic, static and differencing images.

A block once allocated keeps its place: zeroing and discarding work on the file behind it (a hole is punched). So the
data area stays dense, as the allocator of QEMU and VirtualBox takes for granted; the one way to a hole, an allocation
whose write failed, is mended before the image is closed.

A commit that allocates writes the map to its other place (``two_maps``), so that QEMU's tools find a clean image after
a crash at any point. Before the first allocation the room for that is made (``room``). Where it cannot be, because the
image was not clean before, the count of allocated blocks is written before the entries: a crash in between leaves a
count that is too high, which QEMU's check calls an error although every block is where it was, and the next one is put
behind them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ConfigError, ImageError
from nbdserve.extents import DATA, UNALLOCATED, ZERO, RunArray, RunStream
from nbdserve.formats.append_space import AppendSpace
from nbdserve.formats.base import Allocation, CheckResult, CreateOption, FormatDriver, ImageInfo, RoomNeededError
from nbdserve.formats.flat_image import FlatImage, copy_unit
from nbdserve.formats.flat_map import PAGE_WORDS, FlatMap, Scan
from nbdserve.formats.ordered_commit import Batch, Piece
from nbdserve.formats.tables import AnyWords
from nbdserve.formats.vdi import layout, room
from nbdserve.formats.vdi.create import CREATE_OPTIONS, create_vdi, plan_header
from nbdserve.formats.vdi.layout import FREE, ZEROED, Header
from nbdserve.formats.vdi.two_maps import TwoMaps
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil

_MOST_UNMAPPED: Final = 1 << 16
"""Holes that are listed; with more there is no room for as many placeholders anyway."""

_log: Final = logging.getLogger(__name__)


async def read_header(storage: Storage) -> tuple[Header, bytes]:
    """The header of the image on ``storage``, and its sector as stored."""
    sector = bytes(await storage.read(0, SECTOR_SIZE))
    return Header.parse(sector, storage.path, storage.size), sector


class VdiDriver(FlatImage):
    """One open VDI image."""

    name: ClassVar[str] = "vdi"
    unit_called: ClassVar[str] = "block"
    backing_formats: ClassVar[tuple[str, ...] | None] = ("vdi",)
    needs_open_backing = True
    create_options: ClassVar[tuple[CreateOption, ...]] = CREATE_OPTIONS

    def __init__(self, storage: Storage, header: Header, sector: bytes) -> None:
        super().__init__(storage, header.size, header.block_size)
        self.zeroes_fast = self.keeps_places = True
        self._sector = sector
        """As it is on disk."""
        self._allocated = 0
        """Blocks of the data area that the map refers to."""
        self._end = 0
        """The block of the data area behind the last one of these."""
        self._unmapped: set[int] | None = set()
        """The others before that; None: too many to be listed."""
        self._maps: TwoMaps | None = None
        self._lacks_room = False
        """There is to be room for a second map before anything is allocated."""
        self._ready = False
        """The second map was made, or there is no room for one."""
        self._readying = asyncio.Lock()
        self._touched = False
        """The file is not what it was when it was opened."""
        self.adopt_header(header)

    def adopt_header(self, header: Header) -> None:
        """Take the disk, the map and the data area to be where ``header`` says."""
        self.header = header
        self.size = header.size
        self._set_map(
            FlatMap(self.storage, header.map_offset, header.disk_blocks),
            base=header.data_offset,
            scale=header.block_size,
            low=0,
            host_limit=max(self.storage.size, header.data_offset),
        )

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image.

        A differencing image needs ``has_backing``: its header does not name the parent. Two blocks that share their
        place, or one outside the file, keep an image from being opened writable.
        """
        header, sector = await read_header(storage)
        if header.differencing and not options.get("has_backing"):
            raise ImageError(
                storage.path,
                "a differencing image is opened together with its parent, which the header does not name",
                field="parent UUID",
                value=str(header.uuid_parent),
                hint="give the parent as the backing file",
            )
        driver = cls(storage, header, sector)
        if not read_only:
            await driver._open_writable()
        return driver

    async def _open_writable(self) -> None:
        found = await self._sound_scan()
        if self.header.map_among_data:  # a crash came before the room was made, and the image is not written like that
            self._rearranged(*await room.finish(self.storage, self.header, self._sector))
            found = await self.scan()
        self._set_writable(self._space_of(found))
        # What is sent from the file while its blocks move would not be what it was.
        self._lacks_room = room.is_wanted(self.header, found)
        self.keeps_places = not self._lacks_room

    def _space_of(self, found: Scan) -> AppendSpace:
        """Where new blocks go; notes what the data area has before that."""
        self._allocated, self._end = found.allocated, found.end
        holes = found.holes()
        if found.end - found.allocated <= _MOST_UNMAPPED:
            self._unmapped = {at for first, count in holes for at in range(first, first + count)}
        else:
            self._unmapped = None
        block = self._block
        space = self._new_space()
        space.add_free((self._base + first * block, count * block) for first, count in holes)
        return space

    async def make_room(self) -> None:
        """For a second map, if there is none; the first blocks move. Without it, where it cannot be had, it goes on.

        An error half way, with the old blocks still where they were: nothing is written any more.
        """
        if not self._lacks_room:
            return
        self._check_whole()
        await self._commits.settle()
        try:
            header, sector = await room.make_room(self.storage, self.header, self._sector)
        except OSError as error:
            header, sector = await read_header(self.storage)
            if header.map_among_data:
                self._stop_writing(f"{self.path}: the room for a second map could not be made, open it anew: {error}")
                raise
            _log.warning("%s: there is no room for a second map: %s", self.path, error)
        self._rearranged(header, sector)
        self.space = self._space_of(await self.scan())
        self._lacks_room, self.keeps_places = False, True

    def _rearranged(self, header: Header, sector: bytes) -> None:
        """The header's sector on disk is this one, and the map and the data area are where it says."""
        if header != self.header:
            self._touched = True
            self._sector = sector
            self.adopt_header(header)

    def _new_space(self) -> AppendSpace:
        base, block = self._base, self._block
        return AppendSpace(self.storage, block, base + self._end * block, limit=base + ZEROED * block)

    def accept_backing(self, backing: FormatDriver) -> None:
        """Only a differencing image has a parent; if that is a VDI image, its UUIDs are those in the header."""
        header = self.header
        if not header.differencing:
            raise ImageError(
                self.path,
                f"a {layout.TYPE_NAMES[header.type]} image leaves nothing to a backing file",
                field="image type",
                value=header.type,
            )
        if isinstance(backing, VdiDriver):
            for field, wanted, found in (
                ("parent UUID", header.uuid_parent, backing.header.uuid),
                ("parent modification UUID", header.uuid_parent_modified, backing.header.uuid_modified),
            ):
                if wanted != found:
                    raise ImageError(
                        self.path,
                        f"{backing.path} has {found}: it is not the image this one was made on, or was changed since",
                        field=field,
                        value=str(wanted),
                    )

    # --- making ----------------------------------------------------------------------------------------------------

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """ConfigError for a bad option, or a size no VDI image can have."""
        cls.check_option_names(options)
        plan_header(size, options)

    @classmethod
    async def create(
        cls,
        storage: Storage,
        size: int,
        options: Mapping[str, str],
        *,
        companions: Sequence[Storage] = (),
        backing: FormatDriver | None = None,
        secret: bytes | None = None,
    ) -> None:
        """Make ``storage`` an image of ``size`` bytes with fresh UUIDs; a static one has all of its blocks in place.

        A differencing image remembers ``backing``, its parent, by its UUIDs.
        """
        cls.check_option_names(options)
        header = plan_header(size, options)
        if header.differencing:
            if not isinstance(backing, VdiDriver):
                raise ConfigError("backing_file: the parent has to be opened, a differencing image holds its UUIDs")
            of = backing.header
            header = replace(header, uuid_parent=of.uuid, uuid_parent_modified=of.uuid_modified)
        await create_vdi(storage, header)

    def info(self) -> ImageInfo:
        info = ImageInfo(self.name, self.size, self._block)
        if self.header.differencing:
            info.specific = {"uuid": str(self.header.uuid), "parent-uuid": str(self.header.uuid_parent)}
        return info

    # --- what the words of the map mean ----------------------------------------------------------------------------

    def _kind(self, word: int) -> int:
        if word == FREE and self.header.differencing:
            return UNALLOCATED
        return ZERO if word >= ZEROED else -1

    def _kinds(self, words: AnyWords) -> npt.NDArray[np.uint8]:
        kinds = np.where(words >= ZEROED, np.uint8(ZERO), np.uint8(DATA))
        if self.header.differencing:
            kinds[words == FREE] = UNALLOCATED
        return kinds

    async def iter_runs(self, start: int, end: int) -> RunStream:
        """As for other formats; of a static image the holes in its file are ZERO, which keep their places."""
        async for runs in super().iter_runs(start, end):
            yield await self._with_holes(runs) if self.header.type == layout.TYPE_STATIC else runs

    async def _with_holes(self, runs: RunArray) -> RunArray:
        parts: list[RunArray] = []
        rows = zip(
            runs.start.tolist(), runs.length.tolist(), runs.kind.tolist(), runs.host_offset.tolist(), strict=True
        )
        for start, length, kind, host_offset in rows:
            done = length if kind != DATA else 0
            if done:
                parts.append(RunArray.of(start, length, kind, host_offset))
            while done < length:
                found = await self.storage.host_map(host_offset + done, length - done)
                parts.append(RunArray(found.start - host_offset + start, found.length, found.kind, found.start))
                done += int(found.length.sum())
        return RunArray(
            np.concatenate([part.start for part in parts]),
            np.concatenate([part.length for part in parts]),
            np.concatenate([part.kind for part in parts]),
            np.concatenate([part.host_offset for part in parts]),
        )

    # --- changing the mapping --------------------------------------------------------------------------------------

    def publish(self, allocation: Allocation) -> None:
        """Point the map at the new blocks."""
        super().publish(allocation)
        count = allocation.token[2]
        first = (allocation.host_offset - self._base) // self._block
        if self._unmapped is not None:
            if first > self._end:
                self._unmapped.update(range(self._end, first))
            else:
                self._unmapped.difference_update(range(first, first + count))
        self._allocated += count
        self._end = max(self._end, first + count)
        self._touched = True

    async def prepare(self, offset: int, length: int) -> None:
        """As for all such images, with room for a second map. RoomNeededError."""
        if self._lacks_room:
            raise RoomNeededError
        await super().prepare(offset, length)

    def _is_marked(self) -> bool:
        return self._ready

    async def _mark(self) -> None:
        """Before the first allocation: the second map is a copy of the first."""
        async with self._readying:
            if self._ready:
                return
            self._maps = maps = TwoMaps.of(self.header)
            if maps is not None:
                await self._copy_map(maps.other)  # a commit meanwhile tells ``maps`` what it wrote
                maps.synced = True
            self._ready = True

    async def _copy_map(self, host_offset: int) -> None:
        async for first, words in self.map.words(0, self.map.count):
            await self.storage.write(host_offset + first * 4, words.astype("<u4").tobytes())

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Blocks that are not allocated: nothing to do, or ZEROED where a parent could show. 0 for allocated ones."""
        self._check_whole()
        page = self._writable_page(offset)
        if page is None:
            return None
        table, first = page
        end = min(len(table.words), first + div_ceil(length, self._block))
        words = table.words[first:end]
        free = words >= ZEROED
        count = len(words) if free.all() else int(free.argmin())
        if not count:
            return 0
        if self.header.differencing and (words[:count] != ZEROED).any():
            words[:count] = ZEROED
            table.touch(first, first + count)
            self._touched = True
        return min(length, count * self._block)

    async def resize(self, size: int) -> None:
        """Grow the disk, as far as there is room for its map: in images made here, to the next multiple of 256 GiB.

        ConfigError for more, and for less. The new entries are stable before the header counts them.
        """
        size = align_up(size, SECTOR_SIZE)
        if size < self.header.size:
            raise ConfigError(f"{self.path}: VDI images cannot shrink")
        if size > self.header.size:
            await self.make_room()
        header = self.header
        old, blocks = header.disk_blocks, div_ceil(size, self._block)
        movable = header.end + old * 4 <= header.map_offset
        entries = (header.data_offset - (header.end if movable else header.map_offset)) // 4
        if blocks > entries or size > layout.MAX_SIZE:
            most = min(entries * self._block, layout.MAX_SIZE)
            raise ConfigError(f"{self.path}: the map has room for {most} bytes: convert the image to a larger one")
        await self._commits.settle()
        self._maps, self._ready = None, False
        if header.map_offset + blocks * 4 > header.data_offset:
            await self._copy_map(header.end)
            await self.storage.flush()
            await self._barrier_header([self._header_piece(header.end, old, self._end)])
        map_offset, static = self.header.map_offset, header.type == layout.TYPE_STATIC
        for first in range(old, blocks, PAGE_WORDS):
            count = min(PAGE_WORDS, blocks - first)
            words = np.arange(count) + self._end if static else np.full(count, FREE)
            await self.storage.write(map_offset + first * 4, words.astype("<u4").tobytes())
            if static:
                self._end += count
                self._allocated += count
        if static:
            await self.storage.truncate(self._base + self._end * self._block)
            self.space = self._new_space()
        await self.storage.flush()
        low, high = divmod(size, 1 << 32)[::-1]
        sizes = {layout.SIZE_AT: low, layout.SIZE_AT + 4: high}
        await self._barrier_header([self._header_piece(map_offset, blocks, self._end, sizes)])
        self.adopt_header(replace(self.header, size=size))

    # --- stability -------------------------------------------------------------------------------------------------

    def _collect(self, batch: Batch) -> None:
        """What changed: the map to its other place if there is such, and the header's sector that names it."""
        maps = self._maps
        if not self.map.cache.changed and self._end == self.header.blocks_allocated:
            batch.free(self.space)
        elif maps is None or not maps.synced:
            self._collect_in_place(batch)
        else:
            self._collect_other(batch, maps)

    def _collect_in_place(self, batch: Batch) -> None:
        """The count of allocated blocks, then the map where it is.

        The count becomes stable before the entries: it is where QEMU puts its next block, so it may be too high, but
        never too low. Crash before the map is written: the count promises blocks that nothing refers to.
        """
        count, map_offset, blocks = self._end, self.header.map_offset, self.map.count
        batch.free(self.space)
        if count > self.header.blocks_allocated:
            piece = self._header_piece(map_offset, blocks, count)
            batch.hidden.add([piece], partial(self._header_written, self._sector))
            self._header_written(piece[1])
        pieces = self.map.collect(batch, batch.stage(self._barrier_map))
        if self._maps is not None:
            self._maps.note(pieces)
        if count < self.header.blocks_allocated:
            piece = self._header_piece(map_offset, blocks, count)
            batch.stage(self._barrier_header).add([piece], lambda: None)

    def _collect_other(self, batch: Batch, maps: TwoMaps) -> None:
        """The map, with placeholders for blocks that have no entry, becomes stable with the guest data."""
        batch.free(self.space)
        hidden = batch.hidden
        if maps.uncertain:
            batch.stage(self._barrier_header).add([(0, self._sector)], lambda: None)
            hidden = batch.stage(self._barrier_map)
        pieces = self.map.collect(batch, hidden, maps.other)
        more, blocks = maps.placeholders(self._unmapped or ())
        hidden.pieces += maps.missing(pieces) + more
        header = self._header_piece(maps.other, blocks, self._end)
        batch.stage(partial(self._barrier_switch, maps, pieces)).add([header], lambda: None)

    async def _barrier_switch(self, maps: TwoMaps, written: list[Piece], pieces: list[Piece]) -> None:
        """One sector names the other map, with the number of its entries and the count of blocks they refer to.

        Crash before the barrier: it names the old map or the new one, both stable. Without it, a flush would be
        answered while the disk has the old map, and the next commit would write over the one the disk has.
        """
        maps.uncertain = True
        await self._barrier_header(pieces)
        maps.switched(written)

    async def _barrier_header(self, pieces: list[Piece]) -> None:
        """The header's sector, which is old or new after a crash."""
        await self.storage.write_stable(pieces)
        self._header_written(bytes(pieces[-1][1]))

    def _header_piece(
        self, map_offset: int, blocks: int, count: int, more: Mapping[int, int] | None = None
    ) -> tuple[int, bytes]:
        fields = {layout.MAP_OFFSET_AT: map_offset, layout.BLOCKS_AT: blocks, layout.BLOCKS_ALLOCATED_AT: count}
        return 0, layout.patched(self._sector, fields | dict(more or {}))

    def _header_written(self, sector: bytes) -> None:
        """The header's sector on disk is this one now."""
        self._sector = sector
        map_offset, blocks, count = (
            int.from_bytes(sector[at : at + 4], "little")
            for at in (layout.MAP_OFFSET_AT, layout.BLOCKS_AT, layout.BLOCKS_ALLOCATED_AT)
        )
        self.header = replace(self.header, map_offset=map_offset, blocks=blocks, blocks_allocated=count)
        self.map.host_offset = map_offset

    async def _finish(self) -> None:
        """Leave a dense data area, the right count, and a file that ends where the data does."""
        if self._end != self._allocated:
            await self._mark()
            await self._fill_holes()
            self._touched = True
        if self._end != self.header.blocks_allocated:
            await self._mark()
            await self._commits.settle()
            self._touched = True
        end = self._base + self._end * self._block
        if self._touched and self.storage.size != end:
            await self.storage.truncate(end)
            await self.storage.flush()

    async def _fill_holes(self) -> None:
        """Move the last blocks of the data area into its holes.

        Each copy is stable before the map refers to it: a crash leaves the old place or the new one in the map.
        """
        found = await self.scan()
        holes = (at for first, count in found.holes() for at in range(first, first + count))
        async for first, words in self.map.words(0, self.map.count):
            for index in np.flatnonzero((words >= found.allocated) & (words < ZEROED)).tolist():
                source, target = (self._base + at * self._block for at in (int(words[index]), next(holes)))
                await copy_unit(self.storage, source, target, self._block)
                await self.map.set(first + index, (target - self._base) // self._block)
        self._end = self._allocated = found.allocated
        self._unmapped = set()
        await self._commits.commit()

    # --- checking --------------------------------------------------------------------------------------------------

    async def _check_file(self, *, repair_leaks: bool, repair_errors: bool) -> CheckResult:
        from nbdserve.formats.vdi.check import VdiCheck  # noqa: PLC0415  (check works on drivers)

        return await VdiCheck(self).run(repair_leaks=repair_leaks, repair_errors=repair_errors)
