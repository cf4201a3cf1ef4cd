"""Finding out what a file is: descriptor, sparse extent with its descriptor, or both; and opening the extents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nbdserve.errors import CorruptImageError, ImageError, UnsupportedImageError
from nbdserve.formats.base import Companion
from nbdserve.formats.tables import AnyWords, L2Cache, decode_table
from nbdserve.formats.vmdk import layout
from nbdserve.formats.vmdk.descriptor import (
    FILE_TYPES,
    FLAT_TYPES,
    MAX_BYTES,
    SPARSE_TYPES,
    ZERO_TYPE,
    Descriptor,
    ExtentLine,
)
from nbdserve.formats.vmdk.extents import Extent, FlatExtent, SparseExtent, ZeroExtent
from nbdserve.formats.vmdk.layout import SparseHeader
from nbdserve.storage.base import Storage
from nbdserve.storage.joined import PART_BITS
from nbdserve.units import SECTOR_SIZE


@dataclass(frozen=True, slots=True)
class Source:
    """What the file the user named holds."""

    descriptor: Descriptor
    descriptor_offset: int
    """Where the descriptor's text begins in it, bytes."""
    descriptor_room: int
    """Bytes that there are for the text; 0: there is no descriptor."""
    header: SparseHeader | None
    """Of the one sparse extent that it is; None if the descriptor names the extents."""

    @property
    def companions(self) -> tuple[Companion, ...]:
        """The files of the extents, each once. Only a descriptor that is not inside its extent has such."""
        if self.header is not None:
            return ()
        chosen: dict[str, Companion] = {}
        for line in self.descriptor.extents:
            if line.type != ZERO_TYPE:
                # The older and the space-efficient forms of ESX are only read.
                read_only = line.access != "RW" or line.type in ("VMFSSPARSE", "SESPARSE")
                chosen.setdefault(line.name, Companion(line.name, "extent", read_only))
        return tuple(chosen.values())


async def read_source(storage: Storage) -> Source:
    """Descriptor and, of a sparse extent, header. ImageError naming field and value."""
    head = bytes(await storage.read(0, min(SECTOR_SIZE, storage.size)))
    if head[:4] in (layout.KDMV, layout.COWD):
        header = await read_header(storage)
        descriptor = Descriptor()
        if header.descriptor_offset and header.descriptor_size:
            length = header.descriptor_size
            if length > MAX_BYTES:
                raise CorruptImageError(
                    storage.path, f"at most {MAX_BYTES} bytes", field="descriptorSize", value=length // SECTOR_SIZE
                )
            text = await storage.read(header.descriptor_offset, length)
            descriptor = Descriptor.parse(text, storage.path)
        room = header.descriptor_size if header.descriptor_offset else 0
        source = Source(descriptor, header.descriptor_offset, room, header if header.capacity else None)
        if header.capacity:
            return source
    else:
        if storage.size > MAX_BYTES:
            raise CorruptImageError(
                storage.path, f"a descriptor has at most {MAX_BYTES} bytes", field="file size", value=storage.size
            )
        text = await storage.read(0, storage.size)
        source = Source(Descriptor.parse(text, storage.path), 0, MAX_BYTES, None)
    descriptor = source.descriptor
    if descriptor.create_type not in FILE_TYPES:
        raise UnsupportedImageError(
            storage.path, "not known for images of several files", field="createType", value=descriptor.create_type
        )
    if not descriptor.extents:
        raise CorruptImageError(storage.path, "the descriptor has no extents", field="extents", value=0)
    return source


async def read_header(file: Storage) -> SparseHeader:
    """The header of a sparse extent of any form. ImageError naming field and value."""
    sector = await file.read(0, min(SECTOR_SIZE, file.size))
    if sector[:4] == layout.COWD:
        return layout.parse_cowd(sector, file.path, file.size)
    if sector[:8] == layout.SESPARSE:
        place = layout.volatile_offset(sector, file.path, file.size)
        return layout.parse_sesparse(sector, await file.read(place, SECTOR_SIZE), file.path, file.size)
    if layout.wants_footer(sector, file.path):
        if file.size < 4 * SECTOR_SIZE:
            raise CorruptImageError(file.path, "too short for a footer", field="file size", value=file.size)
        sector = bytearray(
            layout.parse_footer(await file.read(file.size - 3 * SECTOR_SIZE, 3 * SECTOR_SIZE), file.path)
        )
    return layout.parse_hosted(sector, file.path, file.size)


async def open_extents(storage: Storage, source: Source, companions: Sequence[Storage]) -> tuple[list[Extent], L2Cache]:
    """The extents of the image on ``storage`` in guest order, and the cache of grain tables they share.

    ``companions`` are the files of ``source.companions``.
    """
    if source.header is not None:
        cache = _cache_for([source.header])
        return [await _open_sparse("", 0, storage, storage.path, source.header, cache, 0, 0)], cache
    if len(companions) != len(source.companions):
        raise ImageError(storage.path, "the extents are not given", field="extents", value=len(source.companions))
    lines = source.descriptor.extents
    numbers = {companion.name: number for number, companion in enumerate(source.companions)}
    headers = {
        line.name: await _read_extent_header(line, companions[numbers[line.name]])
        for line in lines
        if line.type in SPARSE_TYPES
    }
    if sum(header.directory_entries * header.entry_size for header in headers.values()) > layout.MAX_DIRECTORY_BYTES:
        raise UnsupportedImageError(
            storage.path,
            f"the grain directories have more than {layout.MAX_DIRECTORY_BYTES} bytes",
            field="extents",
            value=len(lines),
        )
    cache = _cache_for(list(headers.values()))
    extents: list[Extent] = []
    start = first_key = 0
    for line in lines:
        size = line.size_sectors * SECTOR_SIZE
        if line.type == ZERO_TYPE:
            extents.append(ZeroExtent(start, size))
        else:
            path = line.name if line.name.startswith("/") else storage.path[: storage.path.rfind("/") + 1] + line.name
            number = numbers[line.name]
            file, base = companions[number], number << PART_BITS if len(companions) > 1 else 0
            if line.type in FLAT_TYPES:
                place = base + line.offset_sectors * SECTOR_SIZE
                extents.append(FlatExtent(line.type, start, size, file, path, place))
            else:
                header = headers[line.name]
                extents.append(await _open_sparse(line.type, start, file, path, header, cache, first_key, base))
                first_key += header.directory_entries
        start += extents[-1].size
        if start > layout.MAX_SIZE:
            raise CorruptImageError(storage.path, f"more than {layout.MAX_SIZE} bytes", field="disk size", value=start)
    return extents, cache


def _cache_for(headers: Sequence[SparseHeader]) -> L2Cache:
    return L2Cache(max((header.table_bytes for header in headers), default=layout.TABLE_ENTRIES * 4))


async def _read_extent_header(line: ExtentLine, file: Storage) -> SparseHeader:
    header = await read_header(file)
    if (header.kind == layout.SESPARSE) != (line.type == "SESPARSE"):
        raise CorruptImageError(file.path, "the file is of another form", field="extent type", value=line.type)
    if not header.capacity:
        raise CorruptImageError(file.path, "an extent of nothing", field="capacity", value=0)
    return header


async def _open_sparse(
    kind: str,
    start: int,
    file: Storage,
    path: str,
    header: SparseHeader,
    cache: L2Cache,
    first_key: int,
    base: int,
) -> SparseExtent:
    stored = await file.read(header.directory_offset, header.directory_entries * header.entry_size)
    if header.kind == layout.SESPARSE:
        directory = _sesparse_directory(stored, header, path)
    else:
        directory = decode_table(stored, "<u4")
    return SparseExtent(kind, start, file, path, header, directory, cache, first_key, base)


def _sesparse_directory(stored: bytearray, header: SparseHeader, path: str) -> AnyWords:
    """Sectors of the tables: an entry is 0, or bit 60 and the number of a table in its area."""
    entries = decode_table(stored, "<u8").astype(np.uint64)
    used = entries != 0
    bad = used & (entries >> np.uint64(32) != 0x1000_0000)
    if bad.any():
        value = int(entries[int(bad.argmax())])
        raise CorruptImageError(path, "no place of a grain table", field="grain directory entry", value=value)
    sectors = np.uint64(layout.SESPARSE_TABLE // SECTOR_SIZE)
    places = (entries & np.uint64(0xFFFF_FFFF)) * sectors + np.uint64(header.tables_offset // SECTOR_SIZE)
    return np.where(used, places, np.uint64(0))


async def read_redundant(extent: SparseExtent) -> AnyWords | None:
    """The redundant grain directory; None when the extent has none. OSError."""
    if not extent.header.redundant_offset:
        return None
    stored = await extent.file.read(extent.header.redundant_offset, extent.header.directory_entries * 4)
    return decode_table(stored, "<u4")
