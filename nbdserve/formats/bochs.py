"""Bochs "growing" disks (Bochs user manual, "Disk image modes", redolog version 1.0 and 2.0). Read-only.

A header of 512 bytes, little endian; the catalog, one u32 per extent, ffffffff for none; then the extents in the order
they were allocated, each behind a bitmap with one bit per sector, the lowest bit of a byte first.
"""

from __future__ import annotations

import asyncio
import errno
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self

import construct as c
import numpy as np
import numpy.typing as npt

from nbdserve.errors import CorruptImageError, ImageError, RequestError, UnsupportedImageError
from nbdserve.extents import DATA, UNALLOCATED, Run, RunArray, RunStream
from nbdserve.formats.base import FormatDriver, ImageInfo
from nbdserve.storage.base import Storage
from nbdserve.units import MIB, SECTOR_SIZE, align_up, div_ceil, is_power_of_two

HEADER_SIZE: Final = 512
MAGIC: Final = b"Bochs Virtual HD Image"
TYPE: Final = b"Redolog"
SUBTYPE: Final = b"Growing"
VERSION_1: Final = 0x10000
VERSION_2: Final = 0x20000
NONE: Final = 0xFFFFFFFF
"""A catalog entry: no extent."""

MAX_CATALOG: Final = 1 << 20
"""Entries, 4 MiB; as QEMU."""
MAX_EXTENT: Final = 8 * MIB
MAX_BITMAP: Final = 64 * 1024
"""Bytes of one bitmap; an extent of MAX_EXTENT needs 2048."""
_KEPT_BITMAPS: Final = 4096
_CATALOG_STEP: Final = 4096
"""Entries looked at for a run of extents that do not exist; it bounds what a catalog with every other one costs."""

HEADER: Final[Any] = c.Struct(
    "magic" / c.Bytes(32),
    "type" / c.Bytes(16),
    "subtype" / c.Bytes(16),
    "version" / c.Int32ul,
    "header_size" / c.Int32ul,
    "catalog" / c.Int32ul,
    "bitmap" / c.Int32ul,
    "extent" / c.Int32ul,
)
TAIL_1: Final[Any] = c.Struct("disk" / c.Int64ul)
TAIL_2: Final[Any] = c.Struct("timestamp" / c.Int32ul, "disk" / c.Int64ul)


class BochsDriver(FormatDriver):
    """One open growing disk."""

    name: ClassVar[str] = "bochs"

    def __init__(self, storage: Storage, fields: Any, size: int, catalog: npt.NDArray[np.uint32]) -> None:
        self.path, self.storage, self.data = storage.path, storage, storage
        self.read_only = True
        self.size = size
        self.cluster_size = self.granularity = 1
        self.extent_size: int = fields.extent
        self._catalog = catalog
        self._bitmap_bytes = fields.extent // SECTOR_SIZE // 8 or 1
        self._bitmap_room = align_up(fields.bitmap, SECTOR_SIZE)
        self._data_offset = fields.header_size + 4 * fields.catalog
        self._bitmaps: OrderedDict[int, bytes] = OrderedDict()

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image; it can only be read."""
        if not read_only:
            raise ImageError(
                storage.path, "such images can only be read", field="format", value="bochs", hint="--read-only"
            )
        if storage.size < HEADER_SIZE:
            raise CorruptImageError(
                storage.path, "the file is too short for a bochs header", field="file size", value=storage.size
            )
        data = bytes(await storage.read(0, HEADER_SIZE))
        fields = HEADER.parse(data)
        _check_names(fields, storage.path)
        tail_form = TAIL_1 if fields.version == VERSION_1 else TAIL_2
        tail = tail_form.parse(data[HEADER.sizeof() :])
        size = tail.disk // SECTOR_SIZE * SECTOR_SIZE
        _check_places(fields, size, storage, HEADER.sizeof() + tail_form.sizeof())
        catalog = np.frombuffer(await storage.read(fields.header_size, 4 * fields.catalog), "<u4").astype(np.uint32)
        return cls(storage, fields, size, catalog[: div_ceil(size, fields.extent)])

    def info(self) -> ImageInfo:
        """The facts of this layer."""
        return ImageInfo(self.name, self.size)

    def _extent_offset(self, index: int) -> int | None:
        """Host offset of the bitmap of extent ``index``, which the extent follows; None when there is none.

        RequestError(EIO) when it does not begin inside the file.
        """
        entry = int(self._catalog[index])
        if entry == NONE:
            return None
        host_offset: int = self._data_offset + entry * (self._bitmap_room + self.extent_size)
        if host_offset >= self.storage.size:
            raise RequestError(errno.EIO, f"{self.path}: catalog[{index}] = {entry:#x}: behind the end of the file")
        return host_offset

    def lookup(self, offset: int, length: int) -> Run | None:
        """DATA where the extent's bitmap has the sector."""
        index, inside = divmod(offset, self.extent_size)
        length = min(length, self.extent_size - inside)
        host_offset = self._extent_offset(index)
        if host_offset is None:
            return UNALLOCATED, length, -1
        bits = self._bitmaps.get(index)
        if bits is None:
            return None
        sector = inside // SECTOR_SIZE
        end = sector + 1
        value = bits[sector >> 3] >> (sector & 7) & 1
        last = (inside + length - 1) // SECTOR_SIZE
        while end <= last and bits[end >> 3] >> (end & 7) & 1 == value:
            end += 1
        length = min(length, end * SECTOR_SIZE - inside)
        return (DATA, length, host_offset + self._bitmap_room + inside) if value else (UNALLOCATED, length, -1)

    async def load(self, offset: int) -> None:
        """Read the bitmap of the extent."""
        index = offset // self.extent_size
        host_offset = self._extent_offset(index)
        if host_offset is None or index in self._bitmaps:
            return
        bits = bytes(await self.storage.read(host_offset, self._bitmap_bytes))
        self._bitmaps[index] = bits
        if len(self._bitmaps) > _KEPT_BITMAPS:
            self._bitmaps.popitem(last=False)

    async def iter_runs(self, start: int, end: int) -> RunStream:
        """One extent after the other; those that follow each other and do not exist are one run."""
        while start < end:
            index = start // self.extent_size
            host_offset = self._extent_offset(index)
            if host_offset is None:
                absent = self._catalog[index : index + _CATALOG_STEP] == NONE
                stop = index + (len(absent) if absent.all() else int(absent.argmin()))
                until = min(end, stop * self.extent_size)
                yield RunArray.of(start, until - start, UNALLOCATED)
            else:
                until = min(end, (index + 1) * self.extent_size)
                bits = self._bitmaps.get(index) or await self.storage.read(host_offset, self._bitmap_bytes)
                yield _runs(bits, index * self.extent_size, host_offset + self._bitmap_room, start, until)
            start = until
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Release the file."""
        await self.storage.close()


def _runs(bits: bytes | bytearray, base: int, host_offset: int, start: int, end: int) -> RunArray:
    """The runs of ``[start, end)`` of the extent that begins at the guest offset ``base``."""
    first, stop = (start - base) // SECTOR_SIZE, div_ceil(end - base, SECTOR_SIZE)
    present = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[first:stop]
    changes = np.flatnonzero(np.diff(present)) + 1
    starts = np.concatenate(([start], base + (first + changes) * SECTOR_SIZE)).astype(np.int64)
    has_data = present[np.concatenate(([0], changes))] != 0
    kind = np.where(has_data, np.uint8(DATA), np.uint8(UNALLOCATED))
    return RunArray(starts, np.diff(np.append(starts, end)), kind, np.where(has_data, host_offset + starts - base, -1))


def _check_names(fields: Any, path: str) -> None:
    for name, value, wanted in (
        ("magic", fields.magic, MAGIC),
        ("type", fields.type, TYPE),
        ("subtype", fields.subtype, SUBTYPE),
    ):
        if value.partition(b"\0")[0] != wanted:
            raise UnsupportedImageError(path, f"only {wanted.decode()!r} is known", field=name, value=value)
    if fields.version not in (VERSION_1, VERSION_2):
        raise UnsupportedImageError(path, "versions 1.0 and 2.0 are known", field="version", value=fields.version)


def _check_places(fields: Any, size: int, storage: Storage, header_bytes: int) -> None:
    if not is_power_of_two(fields.extent) or not SECTOR_SIZE <= fields.extent <= MAX_EXTENT:
        raise CorruptImageError(
            storage.path,
            f"must be a power of two between {SECTOR_SIZE} and {MAX_EXTENT}",
            field="extent",
            value=fields.extent,
        )
    if not div_ceil(fields.extent // SECTOR_SIZE, 8) <= fields.bitmap <= MAX_BITMAP:
        raise CorruptImageError(
            storage.path,
            f"must have a bit for each sector of an extent of {fields.extent} bytes, and at most {MAX_BITMAP} bytes",
            field="bitmap",
            value=fields.bitmap,
        )
    if fields.header_size < header_bytes:
        raise CorruptImageError(
            storage.path, "the catalog would be inside the header", field="header_size", value=fields.header_size
        )
    if fields.catalog > MAX_CATALOG or fields.header_size + 4 * fields.catalog > storage.size:
        raise CorruptImageError(
            storage.path,
            f"at most {MAX_CATALOG} entries, inside the file of {storage.size} bytes",
            field="catalog",
            value=fields.catalog,
        )
    if size >= 1 << 63 or div_ceil(size, fields.extent) > fields.catalog:
        raise CorruptImageError(
            storage.path,
            f"{fields.catalog} extents of {fields.extent} bytes are fewer than the disk needs",
            field="disk",
            value=size,
        )
