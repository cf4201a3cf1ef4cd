"""Compressed grains: a zlib stream each, behind a marker (VMware Virtual Disk Format 5.0, "Stream-Optimized")."""

from __future__ import annotations

import errno
import zlib
from functools import partial
from typing import Final

from isal import isal_zlib

from nbdserve.errors import RequestError
from nbdserve.extents import COMPRESSED
from nbdserve.formats.inflate import ZLIB_WINDOW
from nbdserve.formats.unit_cache import UnitCache
from nbdserve.formats.vmdk.extents import SECTOR_BITS, SparseExtent
from nbdserve.formats.vmdk.layout import GRAIN_MARKER, GRAIN_MARKER_BYTES
from nbdserve.storage.base import ReadBuffer
from nbdserve.storage.pool import worker_pool
from nbdserve.units import SECTOR_SIZE, align_up

_LEVEL: Final = 3
"""The best of isal's, 5 times as fast as zlib's usual one."""


def inflate_grain(stored: bytes | bytearray, grain_size: int, needed: int) -> bytes:
    """The grain: at least ``needed`` and at most ``grain_size`` bytes. RequestError(EIO) for anything else.

    The grain at the end of a disk may be stored as short as the disk leaves it.
    """
    inflater = zlib.decompressobj(ZLIB_WINDOW)
    try:
        data = inflater.decompress(stored, grain_size)
        rest = inflater.decompress(inflater.unconsumed_tail, 1)
    except zlib.error as error:
        raise RequestError(errno.EIO, f"compressed grain: {error}") from None
    if rest or len(data) < needed or not inflater.eof:
        found = f"more than {grain_size}" if rest else str(len(data))
        raise RequestError(errno.EIO, f"compressed grain: {found} bytes instead of {needed}, or cut off")
    return data


class CompressedGrains:
    """Reads the grains of one compressed extent, and adds new ones."""

    def __init__(self, extent: SparseExtent) -> None:
        self._extent = extent
        self._units = UnitCache(extent.file)

    async def read(self, offset: int) -> tuple[int, bytes]:
        """The grain with ``offset``, which counts from the extent's start: where it begins, and its bytes."""
        extent = self._extent
        grain = extent.header.grain_size
        while (run := extent.lookup(offset, 1)) is None:
            await extent.load_table(offset >> extent.table_shift)
        if run[0] != COMPRESSED:
            raise RequestError(errno.EIO, f"{extent.path}: the grain at {offset:#x} is not compressed")
        place = run[2] - extent.host_base
        start = offset & -grain
        needed = min(grain, extent.size - start)
        length = min(2 * grain, extent.file.size - place)
        key = place
        if extent.header.markers:
            marker = bytearray(GRAIN_MARKER_BYTES)
            if not extent.file.try_read_into(place, memoryview(marker)):
                await extent.file.read_into(place, memoryview(marker))
            length = int.from_bytes(marker[8:], "little")
            if not 0 < length <= 2 * grain:
                raise RequestError(
                    errno.EIO, f"{extent.path}: grain marker at {place:#x}: size {length} is not 1 to {2 * grain}"
                )
            place += GRAIN_MARKER_BYTES
        inflate = partial(inflate_grain, grain_size=grain, needed=needed)
        data = await self._units.read(key, place, length, inflate)
        return start, data[: extent.size - start]

    async def write(self, offset: int, data: ReadBuffer) -> None:
        """Add the grain at ``offset``, a multiple of the grain size, behind all others.

        ``data`` is a whole grain, or what the disk has of its last one. RequestError(EIO) if the grain is there
        already: the form is written once, from its beginning to its end.
        """
        extent = self._extent
        grain = extent.header.grain_size
        if offset % grain or len(data) != min(grain, extent.size - offset):
            raise RequestError(errno.EINVAL, f"{extent.path}: grains are written whole, one at a time")
        stored = await worker_pool().run(isal_zlib.compress, data, _LEVEL)
        sector = (extent.start + offset) // SECTOR_SIZE
        unit = GRAIN_MARKER.build({"sector": sector, "size": len(stored)}) + stored
        while (run := extent.lookup_writable(offset, 1)) is None:
            await extent.load_table(offset >> extent.table_shift)
        if run[0] == 0:
            raise RequestError(errno.EIO, f"{extent.path}: the compressed grain at {offset:#x} is there already")
        assert extent.space is not None
        table = extent.find_table(offset >> extent.table_shift)
        assert table is not None
        length = align_up(len(unit), SECTOR_SIZE)
        host_offset, _ = extent.space.take_whole(length // SECTOR_SIZE)
        table.pins += 1
        try:
            await extent.file.write(host_offset, unit + bytes(length - len(unit)))
        finally:
            table.pins -= 1
        index = (offset >> extent.grain_bits) & extent.header.table_entries - 1
        table.limit = max(table.limit, extent.end >> SECTOR_BITS)
        table.store(index, host_offset >> SECTOR_BITS)
