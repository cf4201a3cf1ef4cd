"""The VDI driver: dynamic, static and differencing images.

A block once allocated keeps its place: zeroing and discarding work on the file behind it (a hole is punched). So the
data area stays dense, as the allocator of QEMU and VirtualBox takes for granted; the one way to a hole, an allocation
whose write failed, is mended before the image is closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Final, Self
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ConfigError, CorruptImageError, ImageError
from nbdserve.extents import DATA, UNALLOCATED, ZERO, RunArray, RunStream
from nbdserve.formats.append_space import AppendSpace
from nbdserve.formats.base import Allocation, CheckResult, CreateOption, FormatDriver, ImageInfo
from nbdserve.formats.flat_image import FlatImage
from nbdserve.formats.flat_map import PAGE_WORDS, FlatMap
from nbdserve.formats.ordered_commit import Batch
from nbdserve.formats.tables import AnyWords
from nbdserve.formats.vdi import layout
from nbdserve.formats.vdi.layout import FREE, ZEROED, Header
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, SECTOR_SIZE, align_up, div_ceil

_SWITCH: Final = {
    "on": True,
    "yes": True,
    "true": True,
    "y": True,
    "off": False,
    "no": False,
    "false": False,
    "n": False,
}
_COPY: Final = MIB


async def read_header(storage: Storage) -> tuple[Header, bytes]:
    """The header of the image on ``storage``, and its sector as stored."""
    sector = bytes(await storage.read(0, SECTOR_SIZE))
    return Header.parse(sector, storage.path, storage.size), sector


class VdiDriver(FlatImage):
    """One open VDI image."""

    name: ClassVar[str] = "vdi"
    backing_formats: ClassVar[tuple[str, ...] | None] = ("vdi",)
    needs_open_backing = True
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption(
            "backing_file", "File name of the parent: make a differencing image, which does not store the name"
        ),
        CreateOption("backing_fmt", "Image format of the parent (vdi)"),
        CreateOption("size", "Virtual disk size"),
        CreateOption("static", "VDI static (pre-allocated) image", "off"),
    )

    def __init__(self, storage: Storage, header: Header, sector: bytes) -> None:
        super().__init__(storage, header.size, header.block_size)
        self.zeroes_fast = self.keeps_places = True
        self._sector = bytearray(sector)
        self._allocated = 0
        """Blocks of the data area that the map refers to."""
        self._end = 0
        """The block of the data area behind the last one of these."""
        self._touched = False
        """The file is not what it was when it was opened."""
        self._set_header(header)

    def _set_header(self, header: Header) -> None:
        self.header = header
        self.size = header.size
        self._set_map(
            FlatMap(self.storage, header.map_offset, header.blocks),
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
        if self.storage.read_only:
            raise ImageError(self.path, "the file is open read-only")
        found = await self.scan()
        for field, blocks, problem in (
            ("blocks with a place of their own", found.duplicates, "share their place with another block"),
            ("blocks inside the file", found.outside, "are outside the file"),
        ):
            if blocks:
                raise CorruptImageError(
                    self.path,
                    f"{len(blocks)} blocks {problem}, first that at guest offset {blocks[0] * self._block:#x}",
                    field=field,
                    value=found.allocated - len(blocks),
                    hint="it can be read; image check -r all",
                )
        self._allocated, self._end = found.allocated, found.end
        block = self._block
        space = self._new_space()
        space.add_free((self._base + first * block, count * block) for first, count in found.holes())
        self._set_writable(space)

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
        _plan(size, options)

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
        header = _plan(size, options)
        if header.differencing:
            if not isinstance(backing, VdiDriver):
                raise ConfigError("backing_file: the parent has to be opened, a differencing image holds its UUIDs")
            of = backing.header
            header = replace(header, uuid_parent=of.uuid, uuid_parent_modified=of.uuid_modified)
        await storage.truncate(0)
        await storage.truncate(header.data_offset + header.blocks_allocated * header.block_size)
        for first in range(0, header.blocks, PAGE_WORDS):
            count = min(PAGE_WORDS, header.blocks - first)
            words = np.arange(first, first + count) if header.blocks_allocated else np.full(count, FREE)
            await storage.write(header.map_offset + first * 4, words.astype("<u4").tobytes())
        await storage.flush()
        await storage.write_stable([(0, header.build())])

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
        self._allocated += count
        self._end = max(self._end, (allocation.host_offset - self._base) // self._block + count)
        self._touched = True

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Blocks that are not allocated: nothing to do, or ZEROED where a parent could show. 0 for allocated ones."""
        self._check_whole()
        page = self._writable_page(offset)
        if page is None or self.map.cache.crowded:
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

    async def load(self, offset: int) -> None:
        """The page of ``offset``; when too many pages differ from the disk, they are written back first."""
        if not self.read_only and self.map.cache.crowded:
            await self._commits.commit()
        await super().load(offset)

    async def resize(self, size: int) -> None:
        """Grow the disk, as far as there is room for its map: in images made here, to the next multiple of 256 GiB.

        ConfigError for more, and for less. The new entries are stable before the header counts them.
        """
        header, size = self.header, align_up(size, SECTOR_SIZE)
        blocks = max(header.blocks, div_ceil(size, self._block))
        if size < header.size:
            raise ConfigError(f"{self.path}: VDI images cannot shrink")
        if blocks > header.map_room or size > layout.MAX_SIZE:
            most = min(header.map_room * self._block, layout.MAX_SIZE)
            raise ConfigError(f"{self.path}: the map has room for {most} bytes: convert the image to a larger one")
        await self._commits.settle()
        static = header.type == layout.TYPE_STATIC
        for first in range(header.blocks, blocks, PAGE_WORDS):
            count = min(PAGE_WORDS, blocks - first)
            words = np.arange(count) + self._end if static else np.full(count, FREE)
            await self.storage.write(header.map_offset + first * 4, words.astype("<u4").tobytes())
            if static:
                self._end += count
                self._allocated += count
        if static:
            await self.storage.truncate(self._base + self._end * self._block)
            self._set_count(self._end)
            self.space = self._new_space()
        await self.storage.flush()
        self._sector[layout.SIZE_AT : layout.SIZE_AT + 8] = size.to_bytes(8, "little")
        self._sector[layout.BLOCKS_AT : layout.BLOCKS_AT + 4] = blocks.to_bytes(4, "little")
        await self.storage.write_stable([(0, bytes(self._sector))])
        self._set_header(replace(header, size=size, blocks=blocks))

    # --- stability -------------------------------------------------------------------------------------------------

    def _collect(self, batch: Batch) -> None:
        """The count of allocated blocks, then the map.

        The count becomes stable before the entries: it is where QEMU puts its next block, so it may be too high, but
        never too low. Crash before the map is written: the count promises blocks that nothing refers to.
        """
        if self._end > self._count or (self._end < self._count and not self.map.cache.changed):
            batch.hidden.add([self._header_piece(self._end)], partial(self._set_count, self._count))
            self._set_count(self._end)
        super()._collect(batch)

    @property
    def _count(self) -> int:
        """``blocks_allocated`` as written last."""
        at = layout.BLOCKS_ALLOCATED_AT
        return int.from_bytes(self._sector[at : at + 4], "little")

    def _set_count(self, count: int) -> None:
        at = layout.BLOCKS_ALLOCATED_AT
        self._sector[at : at + 4] = count.to_bytes(4, "little")

    def _header_piece(self, count: int) -> tuple[int, bytes]:
        sector = bytearray(self._sector)
        at = layout.BLOCKS_ALLOCATED_AT
        sector[at : at + 4] = count.to_bytes(4, "little")
        return 0, bytes(sector)

    async def _finish(self) -> None:
        """Leave a dense data area, the right count, and a file that ends where the data does."""
        if self._end != self._allocated:
            await self._fill_holes()
            self._touched = True
        if self._end != self._count:
            await self._commits.settle()
            self._touched = True
        end = self._base + self._end * self._block
        if self._touched and self.storage.size != end:
            await self.storage.truncate(end)
            await self.storage.flush()

    async def _fill_holes(self) -> None:
        """Move the last blocks of the data area into its holes.

        Each copy is stable before the map refers to it, and the count is lowered after that: a crash leaves the old
        place or the new one in the map, and a count that is too high.
        """
        found = await self.scan()
        holes = (at for first, count in found.holes() for at in range(first, first + count))
        async for first, words in self.map.words(0, self.map.count):
            for index in np.flatnonzero((words >= found.allocated) & (words < ZEROED)).tolist():
                target = next(holes)
                await self._copy_block(int(words[index]), target)
                await self.map.set(first + index, target)
        await self._commits.commit()
        self._end = self._allocated = found.allocated

    async def _copy_block(self, source: int, target: int) -> None:
        for at in range(0, self._block, _COPY):
            data = await self.storage.read(self._base + source * self._block + at, min(_COPY, self._block))
            await self.storage.write(self._base + target * self._block + at, data)

    # --- checking --------------------------------------------------------------------------------------------------

    async def check(self, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
        """Compare the map with itself, with the count of allocated blocks, and with the file.

        A repair works on the file; the image is to be opened anew.
        """
        from nbdserve.formats.vdi.check import check_vdi  # noqa: PLC0415  (check works on drivers)

        if not self.read_only:
            await self._commits.settle()
            if repair_leaks or repair_errors:
                self._stop_writing(f"{self.path}: repaired since it was opened, open it anew")
        return await check_vdi(self, repair_leaks=repair_leaks, repair_errors=repair_errors)


def _plan(size: int, options: Mapping[str, str]) -> Header:
    static = options.get("static", "off")
    if static not in _SWITCH:
        raise ConfigError(f"static={static}: must be on or off")
    parent = options.get("backing_file")
    if parent and _SWITCH[static]:
        raise ConfigError(f"static={static}: a differencing image is dynamic")
    if parent and options.get("backing_fmt") != "vdi":
        raise ConfigError(f"backing_fmt={options.get('backing_fmt')}: the parent of a VDI image is one too (vdi)")
    try:
        header = layout.plan(size, static=_SWITCH[static])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    kind = layout.TYPE_DIFFERENCING if parent else header.type
    return replace(header, type=kind, uuid=uuid4(), uuid_modified=uuid4())
