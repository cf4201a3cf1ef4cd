"""The Parallels driver: v1 and Ext images.

The header says that an image is in use from its first change until it is closed. Then the file ends behind its last
cluster: QEMU takes what lies there for zeroes when it allocates, so nothing stale may.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from nbdserve.errors import ConfigError, UnsupportedImageError
from nbdserve.extents import DATA, UNALLOCATED, Run
from nbdserve.formats.append_space import AppendSpace, HostRange
from nbdserve.formats.base import CheckResult, CreateOption, FormatDriver, ImageInfo
from nbdserve.formats.flat_image import FlatImage, copy_unit
from nbdserve.formats.flat_map import PAGE_BITS, FlatMap
from nbdserve.formats.parallels import extension, layout
from nbdserve.formats.parallels.extension import DirtyBitmap, Extension
from nbdserve.formats.parallels.layout import CLOSED, FLAG_EMPTY, IN_USE, Header
from nbdserve.formats.tables import AnyWords
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up, div_ceil, parse_size


async def read_header(storage: Storage) -> Header:
    """The header of the image on ``storage``."""
    return Header.parse(await storage.read(0, layout.HEADER_LENGTH), storage.path, storage.size)


class ParallelsDriver(FlatImage):
    """One open Parallels image."""

    name: ClassVar[str] = "parallels"
    unit_called: ClassVar[str] = "cluster"
    outside_means: ClassVar[str] = "outside the file, or not aligned"
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("size", "Virtual disk size"),
        CreateOption("cluster_size", "Parallels image cluster size", "1048576"),
    )

    def __init__(self, storage: Storage, header: Header, found: Extension, options: Mapping[str, Any]) -> None:
        super().__init__(storage, header.size, header.cluster_size)
        self.zeroes_fast = True
        self.extension = found
        """What the image's Format Extension holds. The first change of the image drops its dirty bitmaps."""
        self._has_backing = bool(options.get("has_backing"))
        self._punch = options.get("discard") == "unmap"
        self._guarded = True
        self._marked = False
        """The header says that the image is in use, and nothing that a change would make wrong."""
        self._set_header(header)

    def _set_header(self, header: Header) -> None:
        self.header = header
        self.size = header.size
        self._set_map(
            FlatMap(self.storage, layout.BAT_OFFSET, header.bat_entries),
            base=0,
            scale=header.entry_scale,
            low=header.data_offset // header.entry_scale,
            host_limit=max(self.storage.size, header.data_offset),
        )

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image.

        One that was not closed is opened too, writable if its table is sound: nothing that it refers to is lost.
        """
        header = await read_header(storage)
        found = Extension()
        if header.in_use == CLOSED:  # others do not keep the extension up to date
            found = await extension.read_extension(storage, header)
        driver = cls(storage, header, found, options)
        if not read_only:
            await driver._open_writable()
        return driver

    async def _open_writable(self) -> None:
        header = self.header
        necessary = self.extension.necessary
        if necessary is not None:
            raise UnsupportedImageError(
                self.path,
                f"the feature {necessary.magic:#x} of the extension is not known, and forbids changing the image",
                field="ext_off",
                value=header.extension_offset // SECTOR_SIZE,
                hint="open it read-only",
            )
        found = await self._sound_scan()
        block = self._block
        keeps_unknown = bool(self.extension.transit)
        # Where an unknown feature has its clusters nobody knows: then none in the file is free.
        end = div_ceil(max(0, self.storage.size - header.data_offset), block) if keeps_unknown else found.end
        space = self._new_space(header, header.data_offset + end * block)
        if not keeps_unknown:
            space.add_free((header.data_offset + first * block, count * block) for first, count in found.holes())
        self._set_writable(space)

    def _new_space(self, header: Header, end: int) -> AppendSpace:
        return AppendSpace(self.storage, self._block, end, limit=header.host_limit, punch=self._punch)

    # --- making ----------------------------------------------------------------------------------------------------

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """ConfigError for a bad cluster size, or one too small for the disk."""
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
        """Make ``storage`` an image (Ext) of ``size`` bytes; no cluster is allocated."""
        cls.check_option_names(options)
        header = _plan(size, options)
        await storage.truncate(0)
        await storage.truncate(header.data_offset)
        await storage.zero(0, header.data_offset, unmap=True)  # truncating does not zero a block device
        await storage.flush()
        await storage.write_stable([(0, header.build())])

    def info(self) -> ImageInfo:
        bitmaps = [{"name": str(bitmap.id), "granularity": bitmap.granularity} for bitmap in self.extension.bitmaps]
        dirty = True if self.header.in_use == IN_USE else None
        return ImageInfo(self.name, self.size, dirty=dirty, specific={"bitmaps": bitmaps} if bitmaps else {})

    def dirty_ranges(self, bitmap: DirtyBitmap) -> AsyncIterator[tuple[int, int]]:
        """``(offset, length)`` of what one of ``extension.bitmaps`` says has changed. CorruptImageError."""
        return extension.dirty_ranges(self.storage, self.header, bitmap)

    # --- what the words of the map mean ----------------------------------------------------------------------------

    def _kind(self, word: int) -> int:
        return -1 if word else UNALLOCATED

    def _kinds(self, words: AnyWords) -> npt.NDArray[np.uint8]:
        return np.where(words == 0, np.uint8(UNALLOCATED), np.uint8(DATA))

    # --- changing the mapping --------------------------------------------------------------------------------------

    def _is_admitted(self, run: Run | None) -> bool:
        """The first one to write is sent to ``load``, which marks the image as in use."""
        return super()._is_admitted(run) and (self._marked or run is None)

    async def load(self, offset: int) -> None:
        """The page of ``offset``. Who comes although it is in memory wants to change it: mark the image first."""
        if not self.read_only and not self._marked and self.map.find(offset // self._block >> PAGE_BITS) is not None:
            await self._mark()
        await super().load(offset)

    def _is_marked(self) -> bool:
        return self._marked

    async def _mark(self) -> None:
        """In use is stable before the first change, guest data included; bitmaps and the empty flag go with it.

        Crash before: nothing was changed. Crash after: the image is not closed, its table is as good as ever.
        """
        self._check_whole()
        if self._marked:
            return
        header = replace(self.header, in_use=IN_USE, flags=self.header.flags & ~FLAG_EMPTY)
        transit = self.extension.transit
        if header.extension_offset and not transit:
            header = replace(header, extension_offset=0)
        elif header.extension_offset and self.extension.bitmaps:
            offset, _ = self.space.take_whole(1)
            await self.storage.write_stable([(offset, extension.build(transit, header.cluster_size))])
            header = replace(header, extension_offset=offset)
        if header != self.header:
            await self.storage.write_stable([(0, header.build())])
        self.header = header
        self.extension = Extension((), self.extension.unknown if transit else ())
        self._marked = True
        self._guarded = bool(self._broken)

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Unmap clusters, or find them unallocated. 0: over a backing file, and for what is to keep its space."""
        self._check_whole()
        if self._has_backing:
            return 0
        page = self._writable_page(offset)
        if page is None or not self._marked:
            return None
        table, first = page
        end = min(len(table.words), first + div_ceil(length, self._block))
        words = table.words[first:end]
        used = words != 0
        if unmap and used.any():
            for host_offset, count in self._runs(words[used]):
                self.space.free(host_offset, count)
            words[:] = 0
            table.touch(first, end)
        elif used[0]:
            return 0
        elif used.any():
            end = first + int(used.argmax())
        return min(length, (end - first) * self._block)

    def _runs(self, words: AnyWords) -> list[HostRange]:
        """``(host_offset, clusters)`` of the runs that follow each other in the file."""
        values = words.astype(np.int64)
        bad = (values < self._low) | (values >= self._high)
        values = values[~bad]  # nothing is there to be released
        if not len(values):
            return []
        starts = np.concatenate(([0], np.flatnonzero(np.diff(values) != self._step) + 1))
        counts = np.diff(np.concatenate((starts, [len(values)])))
        return list(zip((values[starts] * self._scale).tolist(), counts.tolist(), strict=True))

    def discard(self, offset: int, length: int) -> int | None:
        """As ``zero``: what was discarded reads as zeroes."""
        return self.zero(offset, length, unmap=True)

    async def resize(self, size: int) -> None:
        """Grow the disk; where its table needs more room, clusters behind it move to the end of the file.

        ConfigError for less, and for more than the table can have.
        """
        size = align_up(size, SECTOR_SIZE)
        if size < self.header.size:
            raise ConfigError(f"{self.path}: Parallels images cannot shrink")
        entries = max(self.header.bat_entries, div_ceil(size, self._block))
        old = self.header.data_offset
        data_offset = old + align_up(max(0, layout.BAT_OFFSET + entries * 4 - old), self._block)
        if entries > layout.MAX_BAT_ENTRIES or (
            self.header.magic == layout.MAGIC_V1 and size // SECTOR_SIZE > 0xFFFF_FFFF
        ):
            raise ConfigError(f"{self.path}: a Parallels image with clusters of {self._block} cannot have {size} bytes")
        if self.extension.transit and data_offset > old:
            raise ConfigError(f"{self.path}: an unknown feature keeps clusters where the table would grow")
        await self._mark()
        await self._commits.settle()
        if data_offset > old:
            await self._move_clusters(data_offset)
        # The new part of the table is empty before the header counts it, and no entry refers to where it is.
        end = layout.BAT_OFFSET + self.header.bat_entries * 4
        await self.storage.zero(end, layout.BAT_OFFSET + entries * 4 - end, unmap=False)
        await self.storage.flush()
        header = replace(
            self.header,
            size=size,
            bat_entries=entries,
            data_offset=data_offset,
            cylinders=layout.cylinders_of(size) if self.header.cylinders else 0,
        )
        await self.storage.write_stable([(0, header.build())])
        self._set_header(header)
        self._set_host_limit(max(self.space.end, data_offset))

    async def _move_clusters(self, data_offset: int) -> None:
        """Put what is before ``data_offset`` at the end: the copy is stable before the table refers to it."""
        self.space = self._new_space(self.header, max(self.space.end, data_offset))
        limit = data_offset // self._scale
        async for first, words in self.map.words(0, self.map.count):
            for index in np.flatnonzero((words != 0) & (words < limit)).tolist():
                host_offset, _ = self.space.take_whole(1)
                await copy_unit(self.storage, int(words[index]) * self._scale, host_offset, self._block)
                await self.map.set(first + index, host_offset // self._scale)
        self._set_host_limit(self.space.end)
        await self._commits.settle()

    # --- closing ---------------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """The file ends behind the last cluster before the header says that the image is closed."""
        if not self._marked:
            return
        end = self.space.end
        if self._outstanding and not self.extension.transit:
            end = self.header.data_offset + (await self.scan()).end * self._block
        if self.storage.size != end:
            await self.storage.truncate(end)
        await self.storage.flush()
        self.header = replace(self.header, in_use=CLOSED)
        await self.storage.write_stable([(0, self.header.build())])

    # --- checking --------------------------------------------------------------------------------------------------

    async def _check_file(self, *, repair_leaks: bool, repair_errors: bool) -> CheckResult:
        from nbdserve.formats.parallels.check import ParallelsCheck  # noqa: PLC0415  (check works on drivers)

        return await ParallelsCheck(self).run(repair_leaks=repair_leaks, repair_errors=repair_errors)


def _plan(size: int, options: Mapping[str, str]) -> Header:
    text = options.get("cluster_size", str(layout.DEFAULT_CLUSTER_SIZE))
    try:
        return layout.plan(size, cluster_size=align_up(parse_size(text), SECTOR_SIZE))
    except ValueError as error:
        raise ConfigError(f"cluster_size={text}: {error}") from None
